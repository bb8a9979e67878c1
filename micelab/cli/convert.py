"""`micelab convert`: a spiking network in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from micelab.cli.app import (
    CalibrationOption,
    FolderOption,
    command,
    to_write,
    typed,
)
from micelab.cli.networks import dataset_of, trained


@command(epilog="Example: `micelab convert resnet20a-cifar10-qcfs --method qcfs --out spiking.safetensors`")
def convert(
    checkpoint: Annotated[str, typer.Argument(help="Name or path of a trained network.")],
    out: Annotated[Path, typer.Option(help="Where the spiking network goes.", callback=to_write)],
    method: Annotated[
        str | None, typer.Option(help="max, qcfs, cos ...: see docs/conversion.md [the one the network was trained for].")
    ] = None,
    time_steps: Annotated[int, typer.Option(min=1, help="Time-steps it is made for.")] = 8,
    per_channel: Annotated[bool, typer.Option("--per-channel", help="A threshold for each channel.")] = False,
    v0: Annotated[float | None, typer.Option(help="Initial potential in thetas [the method's].")] = None,
    signed: Annotated[bool | None, typer.Option(help="Neurons that may take a spike back [the method's].")] = None,
    dataset: Annotated[str | None, typer.Option(help="Data set for calibration [the checkpoint's].")] = None,
    calibration_images: CalibrationOption = 256,
    data: FolderOption = None,
) -> None:
    """Convert a trained network and save the spiking one (`micelab.load` reads it back)."""
    import micelab
    from micelab.data import load_data, to_float
    from micelab.report.compare import natural

    ann = trained(checkpoint)
    method = method or natural(ann)
    images = None
    if micelab.methods.get(method).needs_images:
        images = to_float(load_data(dataset_of({checkpoint: ann}, dataset), data).train.images[:calibration_images])
    snn = micelab.convert(ann, method, images, time_steps=time_steps, per_channel=per_channel, v0=v0, signed=signed)
    path = micelab.save(snn, out, {"from": checkpoint, "method": method, "command": typed()})
    typer.echo(f"{path}: {len(snn.neurons)} spiking layers, method {method}, made for T = {time_steps}")
