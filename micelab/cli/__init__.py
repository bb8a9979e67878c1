"""The command line: `micelab demo | train | remake | convert | evaluate | explain | data`."""

from micelab.cli import demo, train, remake, convert, evaluate, data  # isort: skip  # the order of the help
from micelab.cli.app import app, main

__all__ = ["app", "convert", "data", "demo", "evaluate", "main", "remake", "train"]
