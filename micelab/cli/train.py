"""`micelab train`: both stages of training."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from micelab.cli.app import (
    FolderOption,
    command,
    parsed_steps,
    to_write,
    typed,
)
from micelab.exceptions import InputError


@command(
    epilog="Examples: `micelab train` · `micelab train --recipe cifar10-a` · "
    "`micelab train --dataset cifar10 --activation relu --epochs 60 --out data/runs/relu` · "
    "`micelab train --joint --gradient time --time-steps 4 --dataset cifar10 --start resnet20a-cifar10-qcfs --out data/runs/t4`"
)
def train(
    recipe: Annotated[str | None, typer.Option(help="Choices by name, such as cifar10-a; options given beside it win.")] = None,
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
    fit_theta: Annotated[
        bool,
        typer.Option("--fit-theta", help="Start the bounds where they suit the activations of --start, a ReLU network."),
    ] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="[60; joint: 10]")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="[128]")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate [0.1; joint: 0.001; through time: 0.05].")] = None,
    weight_decay: Annotated[float | None, typer.Option(min=0, help="[0.0005; joint: 0; through time: 0.0001]")] = None,
    theta_lr: Annotated[
        float | None, typer.Option(min=0, help="Rate of bounds, as a share of --lr [0.1; joint: 1; through time: 0.1].")
    ] = None,
    warmup_epochs: Annotated[float | None, typer.Option(min=0, help="[1; joint: 0.1; through time: 1]")] = None,
    label_smoothing: Annotated[float | None, typer.Option(min=0, help="[0]")] = None,
    augment: Annotated[
        str | None, typer.Option(help="none, standard (crop, flip) [that], cutout, or auto (AutoAugment too).")
    ] = None,
    small_crops: Annotated[
        float | None,
        typer.Option(help="Share of the epochs, from the first, that see crops of 3/4 of the side, at half the cost [0]."),
    ] = None,
    views: Annotated[
        int | None,
        typer.Option(min=0, help="Random views of each image, which come again: a teacher answers each once [0: always new]."),
    ] = None,
    start: Annotated[str | None, typer.Option(help="Checkpoint whose weights training starts from.")] = None,
    distill: Annotated[float | None, typer.Option(min=0, help="Weight of the divergence to --teacher [0].")] = None,
    teacher: Annotated[str | None, typer.Option(help="Checkpoint to distil from [--start].")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="What both networks' logits are divided by before that divergence [1].")
    ] = None,
    joint: Annotated[bool, typer.Option("--joint", help="Stage 2: train --start with the spikes in the loop.")] = False,
    time_steps: Annotated[
        str | None, typer.Option("--time-steps", help="Joint: the T to train for; several, as in 1,2,4,8: one network for all.")
    ] = None,
    gradient: Annotated[
        str | None,
        typer.Option(help="Joint: rates, of spike counts [that], or time, through time (up to T times an ANN's cost)."),
    ] = None,
    penalty: Annotated[float | None, typer.Option(min=0, help="Joint: weight of the residual potential penalty [0].")] = None,
    average: Annotated[
        bool, typer.Option("--average", help="Joint: the mean of the final weights and those of --start, itself trained jointly.")
    ] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="[0]")] = None,
    precision: Annotated[str, typer.Option(help="auto, bf16 or fp32; auto is bf16 where the machine has it.")] = "auto",
    storage: Annotated[
        str | None, typer.Option(help="Numbers of the final file: fp32, or fp16 (half the size) [fp32; recipes B, C: fp16].")
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Use torch.compile (needs a C++ compiler; a minute to start).")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, bit for bit.")] = False,
    save: Annotated[Path | None, typer.Option(help="Also copy the final network and its card here.", callback=to_write)] = None,
    data: FolderOption = None,
) -> None:
    """Train a network to be converted: stage 1, or with --joint stage 2.

    Ctrl-C and SIGTERM save the state. Several GPUs or machines: `accelerate launch --multi_gpu -m micelab train ...`.
    """
    from accelerate import PartialState

    from micelab import checkpoint
    from micelab import joint as stage2
    from micelab import train as stage1
    from micelab.machine import default_precision, keep_memory
    from micelab.train.recipe import choose

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    common = {"precision": default_precision() if precision == "auto" else precision}
    common |= _given(dataset=dataset, epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, seed=seed)
    common |= _given(theta_lr=theta_lr, warmup_epochs=warmup_epochs, label_smoothing=label_smoothing)
    common |= _given(augment=augment, small_crops=small_crops, views=views, start=start, storage=storage)
    common |= _given(distill=distill, teacher=teacher, temperature=temperature)
    first = _given(network=network, kind=kind, width=width, activation=activation, levels=levels, theta=theta)
    first |= _given(compile=compile or None, fit_theta=fit_theta or None)
    second = _given(
        time_steps=parsed_steps(time_steps) if time_steps else None,
        gradient=gradient,
        penalty=penalty,
        average=average or None,
    )
    if astray := first if joint else second:
        name = next(iter(astray)).replace("_", "-")
        raise InputError(f"--{name} " + ("is for stage 1: leave out --joint" if joint else "is for joint training: add --joint"))
    carry: Callable[..., Any] = stage2.train if joint else stage1.train
    config = choose(recipe, joint, common | (second if joint else first))
    keep_memory()
    out = out or Path("data/runs") / ((recipe or "latest") + ("-joint" if joint else ""))
    try:
        model = carry(config, out, resume=resume, folder=data, command=typed(without="--resume"))
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


def _given(**options: Any) -> dict[str, Any]:
    """The options that were typed."""
    return {name: value for name, value in options.items() if value is not None}
