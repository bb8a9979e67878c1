"""What all commands share: the application, how an error ends, options that several have, and what was typed."""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from micelab.exceptions import InputError, MicelabError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def to_write(path: Path | None) -> Path | None:
    """A file that an option names, where it can be written: said before the work, not after it."""
    if path is None:
        return None
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder: give the name of a file in it")
    from micelab.checkpoint import make_folder

    try:
        make_folder(path.parent)
    except MicelabError as error:
        raise typer.BadParameter(f"{path} cannot be written: {error}") from error
    return path


DatasetOption = Annotated[str, typer.Option(help="digits (embedded), cifar10, cifar100, or the path of a folder of images.")]
FolderOption = Annotated[Path | None, typer.Option("--data", help="Folder of CIFAR [$MICELAB_DATA, else data/].")]
StepsOption = Annotated[str, typer.Option("--time-steps", help="Numbers of time-steps, such as 1,2,4,8.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Only the first so many images.")]
CalibrationOption = Annotated[int, typer.Option(min=1, help="Training images that thresholds are set from.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
ReportOption = Annotated[Path | None, typer.Option(help="Also write an HTML page with interactive figures.", callback=to_write)]
MethodsOption = Annotated[
    list[str] | None, typer.Option("--method", help="Conversion method; repeat for several [all that fit].")
]


def command(epilog: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose errors end in one sentence and a status, with a traceback for --debug only."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @app.command(epilog=epilog)
        @functools.wraps(function)
        def guarded(*args: Any, **options: Any) -> None:
            try:
                function(*args, **options)
            except MicelabError as error:
                _fail(str(error), 2)
            except KeyboardInterrupt as stop:  # train says which signal it was
                _fail("stopped", 128 + (stop.args[0] if stop.args else 2))
            except Exception as error:
                _fail(f"{type(error).__name__}: {error} (unexpected: `micelab --debug ...` shows where)", 1)

        return guarded

    return decorate


@app.callback()
def root(debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False) -> None:
    """See, learn and use the conversion of a trained neural network into a spiking one."""


def main() -> None:
    """Runs the command line: status 0, 2 for an error that is explained, 130 for Ctrl-C, 143 for SIGTERM."""
    app()


def _fail(message: str, status: int) -> None:
    if "--debug" in sys.argv and sys.exc_info()[0] is not None:
        import traceback

        traceback.print_exc()
    typer.echo(f"micelab: {message}", err=True)
    sys.exit(status)


def parsed_steps(text: str) -> tuple[int, ...]:
    """The numbers of a list such as 1,2,4,8, in order, each once."""
    try:
        steps = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        steps = ()
    if not steps or steps[0] < 1:
        raise InputError(f"--time-steps {text!r} is not a list of numbers from 1 on: write for example 1,2,4,8")
    return steps


def typed(without: str | None = None) -> str:
    """The command line as it was typed, but for one option."""
    return shlex.join(["micelab", *(word for word in sys.argv[1:] if word != without)])
