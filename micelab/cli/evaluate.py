"""`micelab evaluate` and `micelab explain`: what is reached, and which layer loses the rest to what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from micelab.cli.app import (
    CalibrationOption,
    FolderOption,
    JsonOption,
    LimitOption,
    MethodsOption,
    ReportOption,
    StepsOption,
    command,
    parsed_steps,
    to_write,
    typed,
)
from micelab.cli.networks import dataset_of, show, trained
from micelab.exceptions import InputError


@command(epilog="Example: `micelab evaluate resnet20a-cifar10-relu resnet20a-cifar10-qcfs --out data/results/cifar10.json`")
def evaluate(
    checkpoints: Annotated[
        list[str], typer.Argument(help="Names or paths of trained networks; each method takes the one it fits.")
    ],
    method: MethodsOption = None,
    time_steps: StepsOption = "1,2,4,8,16,32",
    explain_at: Annotated[int, typer.Option(min=1, help="T of the error table.")] = 8,
    dataset: Annotated[str | None, typer.Option(help="Data set [the checkpoint's].")] = None,
    split: Annotated[str, typer.Option(help="test, or validation to make choices on.")] = "test",
    limit: LimitOption = None,
    calibration_images: CalibrationOption = 256,
    precision: Annotated[
        str, typer.Option(help="Of the simulations: events or fp32, whichever is faster (auto), bf16x3, bf16 or int8.")
    ] = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Write everything as JSON here; rows that are there already are kept.", callback=to_write)
    ] = None,
    report: ReportOption = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Also write a PNG: accuracy over time of all rows, errors of the best.", callback=to_write),
    ] = None,
    data: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Accuracy over time of every method, with the ANN's, the points lost to each error, and the energy."""
    from micelab.checkpoint import write_json, write_whole
    from micelab.data import load_data
    from micelab.network.spiking import PRECISIONS
    from micelab.report.compare import ERROR_IMAGES, check_alike, compare, drawable, merged

    if split not in ("train", "validation", "test"):
        raise InputError(f"--split {split!r} is unknown: choose validation or test")
    if precision not in PRECISIONS:
        raise InputError(f"--precision {precision!r} is unknown: choose {', '.join(PRECISIONS)}")
    networks, loaded = _loaded(checkpoints, method)
    earlier = _stored(out) if out is not None and out.exists() else None
    found = load_data(dataset_of(loaded, dataset), data)
    images = len(found.split(split).head(limit))  # type: ignore[arg-type]
    errors_over = min(ERROR_IMAGES, images)
    if earlier is not None:  # before hours of measuring
        measured = {"dataset": found.name, "split": split, "images": images, "error_images": errors_over}
        check_alike(earlier, measured | {"errors_at_time_steps": explain_at})
    result = compare(
        networks,
        found,
        split,  # type: ignore[arg-type]
        parsed_steps(time_steps),
        explain_at,
        limit,
        errors_over,
        calibration_images=calibration_images,
        progress=True,
        command=typed(),
        precision=precision,  # type: ignore[arg-type]
    )
    whole = result.to_dict() if earlier is None else merged(earlier, result.to_dict())
    if out is not None:
        write_json(out, whole)
    if picture is not None:
        from micelab.pictures import curve_and_errors

        write_whole(picture, curve_and_errors(*drawable(whole)))
    show(result, report, as_json)


@command(
    epilog="Examples: `micelab explain resnet20a-cifar10-qcfs --time-steps 4 --report why.html` · "
    "`micelab explain resnet20a-cifar10-mice-t4 --before resnet20a-cifar10-qcfs --time-steps 4`"
)
def explain(
    checkpoint: Annotated[str, typer.Argument(help="Name or path of a trained network.")],
    method: Annotated[str | None, typer.Option(help="Conversion method [the one that the network was trained for].")] = None,
    before: Annotated[str | None, typer.Option(help="Another network, such as its stage 1: layers side by side.")] = None,
    time_steps: Annotated[int, typer.Option(min=1)] = 8,
    images: Annotated[int, typer.Option(min=1, help="Validation images that the errors are averaged over.")] = 256,
    dataset: Annotated[str | None, typer.Option(help="Data set [the checkpoint's].")] = None,
    calibration_images: CalibrationOption = 256,
    report: ReportOption = None,
    data: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Which layer loses accuracy, to which of the errors, and what helps (on validation images)."""
    from micelab.data import load_data
    from micelab.report.compare import compare, natural

    networks, loaded = _loaded([checkpoint], [method or natural(trained(checkpoint))])
    first = None
    if before is not None:
        earlier, more = _loaded([before], [natural(trained(before))])
        loaded = loaded | more
        (first, old), (name, new) = *earlier.items(), *networks.items()
        if first == name:
            first, name = f"{first} before", f"{name} after"
        networks = {first: old, name: new}
    found = load_data(dataset_of(loaded, dataset), data)
    steps = tuple(t for t in (1, 2, 4, 8, 16, 32) if t < time_steps) + (time_steps,)
    result = compare(
        networks,
        found,
        "validation",
        steps,
        time_steps,
        images,
        images,
        calibration_images,
        progress=True,
        command=typed(),
        before=first,
    )
    show(result, report, as_json)


def _stored(out: Path) -> dict[str, Any]:
    """The results of an earlier run in that file."""
    try:
        found = json.loads(out.read_text())
    except (ValueError, OSError) as error:
        raise InputError(f"{out} cannot be read as results ({error}): choose another --out") from error
    rows = found.get("results") if isinstance(found, dict) else None
    if not isinstance(rows, dict) or not all(
        isinstance(row, dict) and {"curve", "errors"} <= row.keys() for row in rows.values()
    ):
        raise InputError(f"{out} does not hold results of `micelab evaluate`: choose another --out")
    return found


def _loaded(checkpoints: list[str], chosen: list[str] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(network of every row, networks by checkpoint): methods by the activation that each network was trained with."""
    import micelab
    from micelab.models import describe
    from micelab.report.compare import rows

    loaded = {name: trained(name) for name in checkpoints}
    networks = rows(list(loaded.values()))
    if not chosen:
        return networks, loaded
    wanted = {name: [row for row in networks if row.split(" ")[0] == micelab.methods.get(name).name] for name in chosen}
    for name, found in wanted.items():
        if not found:
            if not micelab.methods.get(name).calibrates:
                micelab.convert(next(iter(loaded.values())), name)  # says which layer is not what it takes
            given = "; ".join(describe(network.spec) for network in loaded.values())
            fits = micelab.methods.get(name).trained_with
            raise InputError(f"method {name!r} takes none of these networks ({given}): give one trained with {fits}")
    return {row: networks[row] for found in wanted.values() for row in found}, loaded
