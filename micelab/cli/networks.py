"""The trained networks that commands are given, and how the comparison of them is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from micelab.cli.app import typed
from micelab.exceptions import InputError


def trained(name: str) -> Any:
    """The trained network of a checkpoint."""
    import micelab

    model: Any = micelab.load(name)
    if "activation" not in model.spec:
        raise InputError(f"{name} is a spiking network already: give the trained network it was made from")
    return model


def dataset_of(model: Any, given: str | None) -> str:
    """The data set that was named, or else the one that the network was trained on."""
    name = given or getattr(model, "card", {}).get("dataset")
    if not name:
        raise InputError("the checkpoint does not say which data it was trained on: name it with --dataset")
    return str(name)


def show(result: Any, report: Path | None, as_json: bool) -> None:
    """Prints a comparison as tables or as JSON, and writes its page where one is wanted."""
    from micelab.report import tables

    page = None
    if report is not None:
        from micelab.report.page import write_report

        page = write_report(report, result, typed())
    if as_json:
        typer.echo(json.dumps({"command": typed()} | result.to_dict(), indent=1))
    else:
        tables.show(result)
        if page is not None:
            tables.say(f"The whole story, with interactive figures: {page}")
