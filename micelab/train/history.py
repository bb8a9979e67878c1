"""A run's `metrics.jsonl`: one line for each epoch that is over. Its curve is drawn and its card made from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from micelab import checkpoint
from micelab.exceptions import CheckpointError

_AGAIN = "put it back, or begin again in another --out"


def read(file: Path, epochs: int) -> list[dict[str, Any]]:
    """The lines of the first `epochs` epochs. Raises CheckpointError where the file does not have them."""
    if not epochs:
        return []
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}), and the card is made from it: {_AGAIN}") from error
    if len(lines) < epochs:
        raise CheckpointError(f"{file} tells of {len(lines)} epochs, and {epochs} are over: {_AGAIN}")
    return lines[:epochs]


def add(file: Path, line: dict[str, Any]) -> None:
    """Puts the line of an epoch behind those of the epochs before it, in place of any that stand there."""
    lines = [*read(file, line["epoch"] - 1), line]
    checkpoint.write_whole(file, "".join(json.dumps(entry) + "\n" for entry in lines).encode())
