"""The command line: `micelab demo | train | convert | evaluate | explain | data`."""

from __future__ import annotations

import functools
import json
import logging
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from micelab.exceptions import InputError, MicelabError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")

DatasetOption = Annotated[str, typer.Option(help="digits (embedded), cifar10, cifar100, or the path of a folder of images.")]
FolderOption = Annotated[Path | None, typer.Option("--data", help="Folder of CIFAR and runs [$MICELAB_DATA, else data/].")]
StepsOption = Annotated[str, typer.Option("--time-steps", help="Numbers of time-steps, such as 1,2,4,8.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Only the first so many images.")]
CalibrationOption = Annotated[int, typer.Option(min=1, help="Training images that thresholds are set from.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
ReportOption = Annotated[Path | None, typer.Option(help="Also write an HTML page with interactive figures.")]
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


@command(epilog="Examples: `micelab demo` · `micelab demo --dataset cifar10`")
def demo(
    dataset: DatasetOption = "digits",
    time_steps: StepsOption = "1,2,4,8,16,32",
    report: Annotated[Path, typer.Option(help="Where the HTML page goes.")] = Path("report.html"),
    limit: LimitOption = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    data: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train (digits) or load (CIFAR) networks, convert them by every method, and explain every lost point."""
    from micelab import tables
    from micelab.compare import compare, rows
    from micelab.data import load_data

    steps = _steps(time_steps)
    found = load_data(dataset, data)
    networks = _train_digits(found, seed, quiet=as_json) if dataset == "digits" else _shipped(dataset)
    if dataset != "digits" and limit is None:
        limit = 1000
        tables.say(f"The first {limit:,} test images; `--limit {len(found.test)}` takes all.")
    result = compare(rows(networks), found, time_steps=steps, limit=limit, progress=True, command=_command())
    _show(result, report, as_json)


@command(
    epilog="Examples: `micelab train` · `micelab train --recipe cifar10-a` · "
    "`micelab train --dataset cifar10 --activation relu --epochs 60 --out data/runs/relu` · "
    "`micelab train --joint --time-steps 4 --dataset cifar10 --start resnet20a-cifar10-qcfs --out data/runs/t4`"
)
def train(
    recipe: Annotated[
        str | None, typer.Option(help="Choices by name, such as cifar10-a; options given beside it go before.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run: state, metrics, final network [data/runs/, by the recipe].")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="digits [that], cifar10, cifar100, or a folder of images.")] = None,
    network: Annotated[str | None, typer.Option(help="small_cnn or resnet20 [by the data set].")] = None,
    kind: Annotated[str | None, typer.Option(help="ResNet-20 of kind A, B or C.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Channels of the first stage.")] = None,
    activation: Annotated[
        str | None, typer.Option(help="relu, clip (TCL), quant_clip (QCFS) or noisy_quant_clip (NQ) [quant_clip].")
    ] = None,
    levels: Annotated[int | None, typer.Option(min=1, help="Levels of quant_clip [8].")] = None,
    theta: Annotated[float | None, typer.Option(help="Start of the clipping bounds [4].")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="[60; joint: 10]")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="[128]")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate [0.1 (SGD); joint: 0.001 (Adam)].")] = None,
    weight_decay: Annotated[float | None, typer.Option(min=0, help="[0.0005; joint: 0]")] = None,
    theta_lr: Annotated[float | None, typer.Option(min=0, help="Rate of bounds, as a share of --lr [0.1; joint: 1].")] = None,
    warmup_epochs: Annotated[float | None, typer.Option(min=0, help="[1; joint: 0.1]")] = None,
    label_smoothing: Annotated[float | None, typer.Option(min=0, help="[0]")] = None,
    augment: Annotated[
        str | None, typer.Option(help="none, standard (crop, flip) [that], cutout, or auto (AutoAugment too).")
    ] = None,
    start: Annotated[str | None, typer.Option(help="Checkpoint whose weights training starts from.")] = None,
    joint: Annotated[bool, typer.Option("--joint", help="Stage 2: train --start with the spikes in the loop.")] = False,
    time_steps: Annotated[
        str | None, typer.Option("--time-steps", help="Joint: the T to train for; several, as in 1,2,4,8: one network for all.")
    ] = None,
    distill: Annotated[float | None, typer.Option(min=0, help="Joint: weight of the divergence to --teacher [0].")] = None,
    teacher: Annotated[str | None, typer.Option(help="Joint: checkpoint to distil from [--start].")] = None,
    penalty: Annotated[float | None, typer.Option(min=0, help="Joint: weight of the residual potential penalty [0].")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="[0]")] = None,
    precision: Annotated[str, typer.Option(help="auto, bf16 or fp32; auto is bf16 where the machine has it.")] = "auto",
    storage: Annotated[
        str | None, typer.Option(help="Numbers of the final file: fp32, or fp16 (half the size) [fp32; recipes B, C: fp16].")
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Use torch.compile (needs a C++ compiler; a minute to start).")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, bit for bit.")] = False,
    save: Annotated[Path | None, typer.Option(help="Also copy the final network and its card here.")] = None,
    data: FolderOption = None,
) -> None:
    """Train a network to be converted: stage 1, or with --joint stage 2.

    Ctrl-C and SIGTERM save the state. Several GPUs or machines: `accelerate launch --multi_gpu -m micelab train ...`.
    """
    from accelerate import PartialState

    from micelab import checkpoint
    from micelab import joint as stage2
    from micelab import train as stage1
    from micelab.machine import default_precision
    from micelab.recipe import choose

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    common = {"precision": default_precision() if precision == "auto" else precision}
    common |= _given(dataset=dataset, epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, seed=seed)
    common |= _given(theta_lr=theta_lr, warmup_epochs=warmup_epochs, label_smoothing=label_smoothing)
    common |= _given(augment=augment, start=start, storage=storage)
    first = _given(network=network, kind=kind, width=width, activation=activation, levels=levels, theta=theta)
    first |= {"compile": True} if compile else {}
    second = _given(time_steps=_steps(time_steps) if time_steps else None, distill=distill, teacher=teacher, penalty=penalty)
    if astray := first if joint else second:
        name = next(iter(astray)).replace("_", "-")
        raise InputError(f"--{name} " + ("is for stage 1: leave out --joint" if joint else "is for joint training: add --joint"))
    carry: Callable[..., Any] = stage2.train if joint else stage1.train
    config = choose(recipe, joint, common | (second if joint else first))
    out = out or Path("data/runs") / ((recipe or "latest") + ("-joint" if joint else ""))
    try:
        model = carry(config, out, resume=resume, folder=data, command=_command())
    except KeyboardInterrupt:
        logging.getLogger(__name__).info("stopped; the state is in %s: go on with --resume", out)
        raise
    if not PartialState().is_main_process:
        return
    card = json.loads((out / "model.json").read_text())
    if save is not None:
        checkpoint.save(model, save, card, stage1.STORAGE[config.storage])
    typer.echo(
        f"{card['network']}, {card['dataset']}: validation {100 * card['validation_accuracy']:.2f} %, "
        f"test {100 * card['test_accuracy']:.2f} %, in {save or out / 'model.safetensors'}"
    )


@command(epilog="Example: `micelab convert resnet20a-cifar10-qcfs --method qcfs --out spiking.safetensors`")
def convert(
    checkpoint: Annotated[str, typer.Argument(help="Name or path of a trained network.")],
    out: Annotated[Path, typer.Option(help="Where the spiking network goes.")],
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
    from micelab.compare import natural
    from micelab.data import load_data, to_float

    ann = _trained(checkpoint)
    method = method or natural(ann)
    images = None
    if micelab.methods.get(method).needs_images:
        images = to_float(load_data(_dataset_of(ann, dataset), data).train.images[:calibration_images])
    snn = micelab.convert(ann, method, images, time_steps=time_steps, per_channel=per_channel, v0=v0, signed=signed)
    path = micelab.save(snn, out, {"from": checkpoint, "method": method, "command": _command()})
    typer.echo(f"{path}: {len(snn.neurons)} spiking layers, method {method}, made for T = {time_steps}")


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
    out: Annotated[Path | None, typer.Option(help="Write everything as JSON here; rows that are there already are kept.")] = None,
    report: ReportOption = None,
    picture: Annotated[
        Path | None, typer.Option(help="Also write a PNG: accuracy over time of all rows, errors of the best.")
    ] = None,
    data: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Accuracy over time of every method, with the ANN's, the points lost to each error, and the energy."""
    from micelab.checkpoint import write_whole
    from micelab.compare import compare, drawable, merged
    from micelab.data import load_data

    if split not in ("train", "validation", "test"):
        raise InputError(f"--split {split!r} is unknown: choose validation or test")
    networks, first = _loaded(checkpoints, method)
    earlier = json.loads(out.read_text()) if out is not None and out.exists() else None
    found = load_data(_dataset_of(first, dataset), data)
    result = compare(
        networks,
        found,
        split,  # type: ignore[arg-type]
        _steps(time_steps),
        explain_at,
        limit,
        calibration_images=calibration_images,
        progress=True,
        command=_command(),
    )
    whole = result.to_dict() if earlier is None else merged(earlier, result.to_dict())
    if out is not None:
        write_whole(out, (json.dumps(whole, indent=1) + "\n").encode())
    if picture is not None:
        from micelab.pictures import curve_and_errors

        write_whole(picture, curve_and_errors(*drawable(whole)))
    _show(result, report, as_json)


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
    from micelab.compare import compare, natural
    from micelab.data import load_data

    networks, ann = _loaded([checkpoint], [method or natural(_trained(checkpoint))])
    first = None
    if before is not None:
        earlier, _ = _loaded([before], [natural(_trained(before))])
        (first, old), (name, new) = *earlier.items(), *networks.items()
        if first == name:
            first, name = f"{first} before", f"{name} after"
        networks = {first: old, name: new}
    found = load_data(_dataset_of(ann, dataset), data)
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
        command=_command(),
        before=first,
    )
    _show(result, report, as_json)


@command(epilog="Examples: `micelab data cifar10` · `micelab data path/to/folder`")
def data(
    dataset: Annotated[str, typer.Argument(help="digits, cifar10, cifar100, or the path of a folder of images.")] = "digits",
    folder: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Download a data set if it is absent, check it, and say what is in it."""
    from micelab import tables
    from micelab.data import load_data

    found = load_data(dataset, folder)
    counts = {name: len(found.split(name)) for name in ("train", "validation", "test")}
    words = {"dataset": found.name, "shape": found.shape, "classes": found.classes, "images": counts}
    words |= {"mean": found.mean, "std": found.std}
    typer.echo(json.dumps(words, indent=1) if as_json else tables.data_words(found))


def _show(result: Any, report: Path | None, as_json: bool) -> None:
    from micelab import tables

    page = None
    if report is not None:
        from micelab.report import write_report

        page = write_report(report, result, _command())
    if as_json:
        typer.echo(json.dumps({"command": _command()} | result.to_dict(), indent=1))
    else:
        tables.show(result)
        if page is not None:
            tables.say(f"The whole story, with interactive figures: {page}")


def _train_digits(data: Any, seed: int, quiet: bool) -> list[Any]:
    """One small network for each activation, trained on the digits in seconds, and the last of them jointly too."""
    import tempfile

    from micelab import joint, tables
    from micelab.recipe import JointConfig, TrainConfig
    from micelab.train import train as run

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


def _loaded(checkpoints: list[str], chosen: list[str] | None) -> tuple[dict[str, Any], Any]:
    """(network of every row, first network): methods by the activation that each network was trained with."""
    import micelab
    from micelab.compare import rows

    loaded = [_trained(name) for name in checkpoints]
    networks = rows(loaded)
    wanted = {name: [row for row in networks if row.split(" ")[0] == micelab.methods.get(name).name] for name in chosen or []}
    for name, found in wanted.items():
        if not found:
            micelab.convert(loaded[0], name)  # says why this method cannot take this network
    return ({row: networks[row] for found in wanted.values() for row in found} if chosen else networks), loaded[0]


def _trained(name: str) -> Any:
    """The trained network of a checkpoint."""
    import micelab

    model: Any = micelab.load(name)
    if "activation" not in model.spec:
        raise InputError(f"{name} is a spiking network already: give the trained network it was made from")
    return model


def _dataset_of(model: Any, given: str | None) -> str:
    name = given or getattr(model, "card", {}).get("dataset")
    if not name:
        raise InputError("the checkpoint does not say which data it was trained on: name it with --dataset")
    return str(name)


def _steps(text: str) -> tuple[int, ...]:
    try:
        steps = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        steps = ()
    if not steps or steps[0] < 1:
        raise InputError(f"--time-steps {text!r} is not a list of numbers from 1 on: write for example 1,2,4,8")
    return steps


def _given(**options: Any) -> dict[str, Any]:
    """The options that were typed."""
    return {name: value for name, value in options.items() if value is not None}


def _command() -> str:
    return shlex.join(["micelab", *sys.argv[1:]])


def main() -> None:
    """Runs the command line: status 0, 2 for an error that is explained, 130 for Ctrl-C, 143 for SIGTERM."""
    app()


def _fail(message: str, status: int) -> None:
    if "--debug" in sys.argv and sys.exc_info()[0] is not None:
        import traceback

        traceback.print_exc()
    typer.echo(f"micelab: {message}", err=True)
    sys.exit(status)
