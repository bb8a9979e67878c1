"""`micelab demo`: the whole story on one data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from micelab.cli.app import (
    DatasetOption,
    FolderOption,
    JsonOption,
    LimitOption,
    StepsOption,
    command,
    parsed_steps,
    to_write,
    typed,
)
from micelab.cli.networks import show
from micelab.exceptions import InputError


@command(epilog="Examples: `micelab demo` · `micelab demo --dataset cifar10`")
def demo(
    dataset: DatasetOption = "digits",
    time_steps: StepsOption = "1,2,4,8,16,32",
    report: Annotated[Path, typer.Option(help="Where the HTML page goes.", callback=to_write)] = Path("report.html"),
    limit: LimitOption = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    data: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train (digits) or load (CIFAR) networks, convert them by every method, and explain every lost point."""
    from micelab.data import load_data
    from micelab.report import tables
    from micelab.report.compare import compare, rows

    steps = parsed_steps(time_steps)
    found = load_data(dataset, data)
    networks = _train_digits(found, seed, quiet=as_json) if dataset == "digits" else _shipped(dataset)
    if dataset != "digits" and limit is None:
        limit = 1000
        if not as_json:
            tables.say(f"The first {limit:,} test images; `--limit {len(found.test)}` takes all.")
    result = compare(rows(networks), found, time_steps=steps, limit=limit, progress=True, command=typed())
    show(result, report, as_json)


def _train_digits(data: Any, seed: int, quiet: bool) -> list[Any]:
    """One small network for each activation, trained on the digits in seconds, and the last of them jointly too."""
    import tempfile

    from micelab import joint
    from micelab.report import tables
    from micelab.train.recipe import JointConfig, TrainConfig
    from micelab.train.run import train as run

    networks = {}
    with tempfile.TemporaryDirectory() as folder:
        for activation in ("relu", "clip", "quant_clip"):
            if not quiet:
                tables.say(f"Training a small network with activation {activation} on {len(data.train):,} digits ...")
            config = TrainConfig(activation=activation, epochs=30, lr=0.05, theta=2.0, seed=seed)
            networks[activation] = run(config, Path(folder) / activation, data, progress=not quiet)
        if not quiet:
            tables.say("Training the last one jointly, with its spikes in the loop, for every T from 1 to 8 ...")
        second = JointConfig(time_steps=(1, 2, 4, 8), batch_size=64, seed=seed)
        start = networks["quant_clip"]
        networks["spike_clip"] = joint.train(second, Path(folder) / "joint", data, model=start, progress=not quiet)
    return list(networks.values())


def _shipped(dataset: str) -> list[Any]:
    """The small ResNet-20 that the repository ships for a data set."""
    import micelab
    from micelab.checkpoint import shipped

    names = [name for name in shipped() if name.startswith(f"resnet20a-{dataset}-")]
    if not names:
        raise InputError(f"no trained network is shipped for {dataset!r}: train one with `micelab train --dataset {dataset}`")
    return [micelab.load(name) for name in names]
