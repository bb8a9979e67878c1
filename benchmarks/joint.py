"""What a step of joint training costs, in steps of the plain ANN: a shipped network, alternating, medians of one run.

    python benchmarks/joint.py --out data/results/benchmark-joint.json
    python benchmarks/joint.py --kind C --batch-size 16  # the wide one, for the T that it is shipped for

Networks are the shipped ones, on images of CIFAR-10: training through time follows the spikes, and they are a trained network's.
Seconds are those of the process (CPU time where one thread is used), so that a busy machine disturbs the ratios less.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import micelab
from micelab.checkpoint import write_json
from micelab.exceptions import CheckpointError
from micelab.joint import SpikesInTheLoop, SpikesThroughTime, convolutions, prepare
from micelab.machine import keep_memory, machine


def steps(kind: str, batch_size: int, precision: str) -> dict[str, Callable[[], None]]:
    """A forward and backward pass of each kind, without the optimizer: ReLU, quantized clip, and both joint ones at several T."""
    layout: Any = {"memory_format": torch.channels_last}
    images, _ = next(micelab.load_data("cifar10").train.batches(batch_size))

    def step(model: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = forward().float().square().mean()
            loss.backward()

        return run

    found = {}
    for activation, name in (("relu", "relu"), ("quant_clip", "qcfs")):
        if (ann := shipped(kind, name)) is not None:
            ann = ann.to(**layout).train()
            found[activation] = step(ann, lambda ann=ann: ann(images))
    for gradient, name in ((SpikesInTheLoop, "joint"), (SpikesThroughTime, "through time")):
        for t in (1, 2, 4, 8):
            if (ann := shipped(kind, f"mice-t{t}")) is None:
                continue
            loop = gradient(prepare(ann, t).to(**layout)).train()
            found[f"{name} T={t}"] = step(loop, lambda loop=loop, t=t: loop(images, t).logits)
            if t == 8:
                found[f"{name} T={t}, dense"] = densely(found[f"{name} T={t}"])
    return found


def shipped(kind: str, name: str) -> Any:
    """The network of this kind for CIFAR-10, or None where it is not shipped."""
    try:
        return micelab.load(f"resnet20{kind.lower()}-cifar10-{name}")
    except CheckpointError:
        return None


def densely(step: Callable[[], None]) -> Callable[[], None]:
    """The same step without convolutions that follow the spikes."""

    def run() -> None:
        with patch.object(convolutions, "suits", lambda *_: False):
            step()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="A", choices=["A", "C"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_memory()  # as `micelab train` does
    clock = time.process_time if options.threads == 1 else time.perf_counter
    kinds = steps(options.kind, options.batch_size, options.precision)
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(options.repeat + 1):
        for name, run in kinds.items():
            begin = clock()
            run()
            if number:  # the first round warms up
                seconds[name].append(clock() - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {name: value / medians["quant_clip"] for name, value in medians.items()}
    for name, ratio in ratios.items():
        print(f"{name:24s} {medians[name]:.3f} s, {ratio:.2f} of the quantized ANN's step")
    if options.out:
        words = {"command": shlex.join(["python", "benchmarks/joint.py", *sys.argv[1:]]), "machine": machine()}
        words |= {
            "kind": options.kind,
            "batch_size": options.batch_size,
            "precision": options.precision,
            "repeat": options.repeat,
        }
        words |= {"seconds": medians, "ratio_to_quant_clip": ratios}
        write_json(options.out, words)


if __name__ == "__main__":
    main()
