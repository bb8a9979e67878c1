"""`micelab data`: a data set fetched, checked, described."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from micelab.cli.app import (
    FolderOption,
    JsonOption,
    command,
)


@command(epilog="Examples: `micelab data cifar10` · `micelab data path/to/folder`")
def data(
    dataset: Annotated[str, typer.Argument(help="digits, cifar10, cifar100, or the path of a folder of images.")] = "digits",
    folder: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Download a data set if it is absent, check it, and say what is in it."""
    from micelab.data import load_data
    from micelab.report import tables

    found = load_data(dataset, folder)
    counts = {name: len(found.split(name)) for name in ("train", "validation", "test")}
    words = {"dataset": found.name, "shape": found.shape, "classes": found.classes, "images": counts}
    words |= {"mean": found.mean, "std": found.std}
    typer.echo(json.dumps(words, indent=1) if as_json else tables.data_words(found))
