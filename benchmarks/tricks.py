"""What each trick of the simulation gives: its speed without it, one at a time. Network A, T = 8, on a CPU.

    python benchmarks/tricks.py --out data/results/benchmark-tricks.json

Images a second, medians of `--rounds` alternating runs, so that a change of the machine meets all rows alike. What is left out
is left out of the simulation by dense convolutions (fp32), in one row all at once; "events" is the default. Batch-norm folded
into the weights and time folded into the batch cannot be left out here: the peers of `benchmarks/simulation.py` do without.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx

import micelab
from micelab.checkpoint import write_json
from micelab.machine import machine
from micelab.network.folded import TimeFolded
from micelab.network.spike_convolutions import WAYS
from micelab.network.spiking import SpikingNetwork
from micelab.neuron import compiled
from micelab.report.compare import natural

Change = Callable[[SpikingNetwork], Any]


@contextmanager
def contiguous(snn: SpikingNetwork) -> Iterator[None]:
    """Weights in torch's usual order, so that each call brings them into that of the images."""
    snn.layers.to(memory_format=torch.contiguous_format)
    try:
        yield
    finally:
        snn.layers.to(memory_format=torch.channels_last)


def constant_at_every_step(snn: SpikingNetwork) -> Any:
    """What the images alone decide, the first convolution, T times."""
    once = TimeFolded.run_node

    def run_node(self: TimeFolded, n: fx.Node) -> Any:
        out = once(self, n)
        if n.op != "placeholder":
            return out
        self.over_time.add(n)
        return out.expand(self.steps, *out.shape).flatten(0, 1).contiguous(memory_format=torch.channels_last)

    return patch.object(TimeFolded, "run_node", run_node)


LEFT_OUT: dict[str, Change] = {
    "neurons in compiled C": lambda snn: patch.object(compiled, "fire", lambda *_: None),
    "first convolution once": constant_at_every_step,
    "residual sum left to the neurons": lambda snn: patch.object(TimeFolded, "_is_joined", lambda *_: False),
    "weights laid out as the images": contiguous,
    "chunks that stay in the cache": lambda snn: patch.object(snn, "chunk", lambda *_: 10**6),
    "chunks side by side": lambda snn: patch.object(snn, "_lanes", lambda *_, **__: 1),
}


def everything(snn: SpikingNetwork) -> ExitStack:
    """All of them at once."""
    stack = ExitStack()
    for change in LEFT_OUT.values():
        stack.enter_context(change(snn))
    return stack


def measured(snn: SpikingNetwork, images: Tensor, time_steps: int, rounds: int) -> dict[str, Any]:
    """Images a second of every row, and the largest difference of its logits from those of fp32."""
    rows: dict[str, tuple[Change, str]] = {"dense": (lambda _: ExitStack(), "fp32")}
    rows |= {f"dense, without: {name}": (change, "fp32") for name, change in LEFT_OUT.items()}
    rows["dense, without: all of these"] = (everything, "fp32")
    rows |= {name: (lambda _: ExitStack(), name) for name, way in WAYS.items() if way.is_here("cpu")}
    expected = snn.simulate(images, time_steps, record=False, precision="fp32").logits[-1]
    speeds: dict[str, list[float]] = {name: [] for name in rows}
    differences = {}
    for number in range(rounds + 2):  # chunks are tried in the first two
        for name, (change, precision) in rows.items():
            with change(snn):
                started = time.perf_counter()
                found = snn.simulate(images, time_steps, record=False, precision=precision).logits[-1]  # type: ignore[arg-type]
                if number > 1:
                    speeds[name].append(len(images) / (time.perf_counter() - started))
            differences[name] = float((found - expected).abs().max())
    table = {}
    for name, values in speeds.items():
        median = statistics.median(values)
        table[name] = {"images_per_second": round(median, 1), "lowest": round(min(values), 1), "highest": round(max(values), 1)}
        table[name] |= {"share": round(median / statistics.median(speeds["dense"]), 3), "difference": differences[name]}
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="resnet20a-cifar10-qcfs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--time-steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if compiled.shared_library() is None:
        parser.error("no C compiler works here, so that most of what is left out here is not there")
    ann: Any = micelab.load(options.checkpoint)
    snn = micelab.convert(ann, natural(ann)).requires_grad_(False)
    images = next(micelab.load_data(ann.card["dataset"]).test.batches(options.batch))[0]
    results: dict[str, Any] = {"machine": machine(), "network": options.checkpoint, "threads": options.threads}
    results["command"] = shlex.join(["python", "benchmarks/tricks.py", *(sys.argv[1:] if arguments is None else arguments)])
    results["rows"] = measured(snn, images, options.time_steps, options.rounds)
    for name, row in results["rows"].items():
        print(
            f"{name:46s} {row['images_per_second']:8.1f} images/s, {row['share']:.2f}, logits differ by {row['difference']:.1e}"
        )
    if options.out:
        write_json(options.out, results)


if __name__ == "__main__":
    main()
