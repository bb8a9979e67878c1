"""What each part of the method gives: one network, one start; accuracy and the four errors. Up to "+ joint" a row has one part
more than the one before it; those after it are each the joint one with one thing changed.

Every row is trained for the same few epochs and measured on validation images only. The first row is the network that the
others start from. Run:

    python benchmarks/ablation.py --dataset cifar10 --start resnet20a-cifar10-qcfs --time-steps 4 --epochs 1 \
        --train-images 15360 --penalty 3 --out data/results/ablation-cifar10-t4.json
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import micelab
from micelab import joint
from micelab.checkpoint import write_json
from micelab.data import to_float
from micelab.errors import KINDS
from micelab.machine import machine
from micelab.train.recipe import JointConfig, Recipe, TrainConfig


def rows(
    start: str, dataset: str, time_steps: int, penalty: float, common: dict[str, Any]
) -> dict[str, tuple[Recipe | None, str, bool]]:
    """name -> (what is trained, conversion method, signed neuron)."""
    shape = {key: value for key, value in micelab.load(start).spec.items() if key in ("kind", "width") and value}
    network = micelab.load(start).spec["name"]
    shared = {"dataset": dataset, "start": start} | common
    stage1 = {"network": network, "levels": time_steps, "lr": 0.01, "warmup_epochs": 0.1} | shape
    steps = {"time_steps": (time_steps,)}
    return {
        "qcfs": (None, "qcfs", False),
        "qcfs, trained on": (TrainConfig(activation="quant_clip", **stage1, **shared), "qcfs", False),
        "+ trainable v0": (TrainConfig(activation="spike_clip", **stage1, **shared), "mice", False),
        "+ joint": (JointConfig(**steps, **shared), "mice", False),
        "+ penalty": (JointConfig(**steps, penalty=penalty, **shared), "mice", False),
        "+ distillation": (JointConfig(**steps, distill=1.0, **shared), "mice", False),
        "+ signed spikes": (JointConfig(**steps, **shared), "mice", True),
    }


def measure(ann: Any, method: str, signed: bool, data: Any, time_steps: int, images: int) -> dict[str, Any]:
    """Validation accuracy at T, and each error's rms in % of the signal, mean over the layers."""
    snn = micelab.convert(ann, method, signed=signed)
    curve = micelab.accuracy_curve(snn, data.validation.batches(), (1, 2, 4, 8, 16))
    table = micelab.error_breakdown(ann, snn, to_float(data.validation.images[:images]), time_steps)
    points = micelab.lost_points(ann, snn, data.validation.batches(), time_steps, curve.at(time_steps))
    layers = list(table.layers.values())
    shares = {kind: sum(getattr(row, kind).rms / row.signal for row in layers) / len(layers) for kind in (*KINDS, "total")}
    shares |= {name: sum(getattr(row, name) for row in layers) / len(layers) for name in ("over_firing", "under_firing")}
    return {
        "accuracy": curve.at(time_steps),
        "accuracy_by_time_steps": dict(zip(map(str, curve.time_steps), curve.accuracy, strict=True)),
        "ann_accuracy": micelab.train.accuracy(ann, data.validation),
        "errors": shares,
        "points_lost": {kind: getattr(points, kind) for kind in ("clipping", "quantization", "timing")},
        "last_layer": asdict(layers[-1]),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--start", required=True, help="checkpoint of stage 1 (quant_clip)")
    parser.add_argument("--time-steps", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--augment", default="standard")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--images", type=int, default=256, help="validation images for the errors")
    parser.add_argument("--train-images", type=int, help="only the first so many [all]")
    parser.add_argument("--penalty", type=float, default=0.1, help="its weight in its row")
    parser.add_argument("--runs", type=Path, default=Path("data/runs/ablation"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    data = micelab.load_data(options.dataset)
    test = data.test.head(256)  # nothing here is measured on it
    data = replace(data, train=data.train.head(options.train_images), test=test)
    common = {"epochs": options.epochs, "batch_size": options.batch_size}
    common |= {"augment": options.augment, "precision": options.precision}
    chosen = rows(options.start, options.dataset, options.time_steps, options.penalty, common)
    found: dict[str, Any] = {}
    for name, (recipe, method, signed) in chosen.items():
        ann: Any = micelab.load(options.start)
        if recipe is not None:
            folder = options.runs / "".join(c if c.isalnum() else "-" for c in name.replace("signed spikes", "joint"))
            carry = joint.train if isinstance(recipe, JointConfig) else micelab.train.train
            ann = carry(recipe, folder, data, resume=(folder / "state.safetensors").exists())  # type: ignore[operator]
        found[name] = measure(ann, method, signed, data, options.time_steps, options.images)
        print(f"{name:20s} {100 * found[name]['accuracy']:.2f} %", flush=True)
        if options.out:
            words = {"command": shlex.join(["python", "benchmarks/ablation.py", *(arguments or sys.argv[1:])])}
            words |= {"dataset": data.name, "images": len(data.validation), "time_steps": options.time_steps}
            words |= {"train_images": len(data.train), "penalty": options.penalty}
            words |= {"epochs": options.epochs, "machine": machine(), "rows": found}
            write_json(options.out, words)
    return found


if __name__ == "__main__":
    main()
