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


def dataset_of(networks: dict[str, Any], given: str | None) -> str:
    """The data set that was named, or else the one that all these networks, by checkpoint, were trained on."""
    if given:
        return given
    cards = {name: getattr(network, "card", {}) for name, network in networks.items()}
    known = {name: card.get("recipe", {}).get("dataset") or card.get("dataset") for name, card in cards.items()}
    for name, dataset in known.items():
        if not dataset:
            raise InputError(f"{name} does not say which data it was trained on: name it with --dataset")
    if len(set(known.values())) > 1:
        said = ", ".join(f"{name} on {dataset}" for name, dataset in known.items())
        raise InputError(
            f"these networks were trained on different data ({said}): measure them apart, or name one with --dataset"
        )
    return str(next(iter(known.values())))


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
