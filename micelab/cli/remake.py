"""`micelab remake`: a shipped network trained again."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from micelab.cli.app import FolderOption, command


@command(epilog="Examples: `micelab remake resnet20a-cifar10-mice-t2 --list` · `micelab remake resnet20a-cifar10-qcfs`")
def remake(
    checkpoint: Annotated[str, typer.Argument(help="Name of a shipped network, or path of a checkpoint.")],
    out: Annotated[Path | None, typer.Option(help="Folder of its runs, 1, 2, ... [data/runs/remade-NAME].")] = None,
    only_list: Annotated[bool, typer.Option("--list", help="Show the runs and what they reached, and stop.")] = False,
    data: FolderOption = None,
) -> None:
    """Train a network again: every run that its card names, one after the other.

    Call it again after a stop: it goes on where it was.
    """
    from micelab.machine import keep_memory
    from micelab.train.remake import remake as again
    from micelab.train.remake import runs

    cards = runs(checkpoint)
    for number, run in enumerate(cards, 1):
        epochs = run["recipe"]["epochs"]
        length = f"{epochs} epoch{'s' * (epochs > 1)}, {run['hours']:.1f} h"
        reached = f"{length}, validation {100 * run['validation_accuracy']:.2f} %"
        typer.echo(f"{number}/{len(cards)}  {reached}  {run['command']}")
    if only_list:
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    keep_memory()
    out = out or Path("data/runs") / f"remade-{Path(checkpoint).stem}"
    made = again(checkpoint, out, data).card
    for split in ("validation", "test"):
        was, now = (card[f"{split}_accuracy"] for card in (cards[-1], made))
        typer.echo(f"{split}: {100 * now:.2f} %, {100 * was:.2f} % on the card")
    typer.echo(f"in {out / str(len(cards)) / 'model.safetensors'}")
