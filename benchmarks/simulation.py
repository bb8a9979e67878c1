"""Images per second of the simulation, beside the convolutions alone and spikingjelly's single-step loop, in one run.

    pip install -e .[bench]
    python benchmarks/simulation.py --out data/results/benchmark-simulation.json
    python benchmarks/simulation.py --memory --out data/results/benchmark-memory.json

Same weights, thresholds and images for all; the ways alternate, `--rounds` times; medians and spread are printed, with the
share of predictions that equal micelab's. A timing is a ratio within one run: compare no two machines by it. `--memory`
measures the peak memory of one simulation of 1,000 images at T = 64 instead, everything that each layer did kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import time
from pathlib import Path

import torch
from torch import nn

import micelab
from micelab.graph import replace_activations
from micelab.machine import machine


class SpikingJellyNeuron(nn.Module):
    """spikingjelly's IFNode with soft reset, sending theta at every spike."""

    def __init__(self, theta: float, v0: float):
        super().__init__()
        from spikingjelly.activation_based import neuron

        self.node, self.theta, self.start = neuron.IFNode(v_threshold=theta, v_reset=None), theta, v0 * theta
        self.count = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spike = self.node(x)
        return spike * self.theta


def spikingjelly_loop(snn: micelab.SpikingNetwork, time_steps: int):
    from spikingjelly.activation_based import functional

    net = replace_activations(copy.deepcopy(snn.layers), lambda _, n: SpikingJellyNeuron(float(n.theta), float(n.v0))).eval()
    neurons = [module for module in net.modules() if isinstance(module, SpikingJellyNeuron)]

    def run(images: torch.Tensor) -> torch.Tensor:
        functional.reset_net(net)
        for neuron in neurons:
            neuron.node.v = neuron.start
        return sum(net(images) for _ in range(time_steps)) / time_steps

    return run


def convolutions_alone(snn: micelab.SpikingNetwork, time_steps: int, batch: int):
    """The floor: the network's own convolutions on T images for each one, at their best batch, with no neuron work at all."""
    net = replace_activations(copy.deepcopy(snn.layers), lambda *_: nn.Identity()).to(memory_format=torch.channels_last)

    def run(images: torch.Tensor) -> torch.Tensor:
        for _ in range(time_steps):
            for part in images.split(batch):
                out = net(part)
        return out

    return run


def peak_memory(snn: micelab.SpikingNetwork) -> dict[str, int]:
    """Largest resident memory of this process, in MB, before and after T = 64 steps of 1,000 images."""

    def resident() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    before = resident()
    run = snn.simulate(torch.rand(1000, 3, 32, 32), time_steps=64)
    assert len(run.layers) == len(snn.neurons)
    return {"time_steps": 64, "images": 1000, "before_mb": before, "peak_mb": resident()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time-steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkpoint", default="resnet20a-cifar10-qcfs")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    ann = micelab.load(options.checkpoint)
    snn = micelab.convert(ann, "qcfs")
    if options.memory:
        save(options.out, peak_memory(snn) | {"network": options.checkpoint, "machine": machine()})
        return
    try:
        data = micelab.load_data(ann.card["dataset"], download=False)
        images = next(data.test.batches(options.batch))[0]
    except micelab.MicelabError:
        images = torch.rand(options.batch, 3, 32, 32)
    steps = options.time_steps
    ways = {
        "micelab": lambda x: snn.simulate(x, steps, record=False).logits[-1],
        "convolutions alone": convolutions_alone(snn, steps, options.batch),
    }
    try:
        ways["spikingjelly single-step"] = spikingjelly_loop(snn, steps)
    except ImportError:
        print("spikingjelly is not installed (pip install -e .[bench]): its row is left out")
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    outputs = {}
    with torch.inference_mode():
        for name, run in ways.items():
            outputs[name] = run(images)
        for _ in range(options.rounds):
            for name, run in ways.items():
                started = time.perf_counter()
                run(images)
                speeds[name].append(options.batch / (time.perf_counter() - started))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    rows = {}
    for name, values in speeds.items():
        rows[name] = {"images_per_second": round(medians[name], 1)}
        rows[name] |= {"lowest": round(min(values), 1), "highest": round(max(values), 1)}
        rows[name]["ratio_to_micelab"] = round(medians[name] / medians["micelab"], 3)
        if name.startswith("spikingjelly"):
            same = (outputs[name].argmax(1) == outputs["micelab"].argmax(1)).float().mean()
            rows[name]["same_predictions"] = float(same)
            rows[name]["largest_logit_difference"] = float((outputs[name] - outputs["micelab"]).abs().max())
        print(f"{name:26s} {medians[name]:8.1f} images/s  ({min(values):.1f} .. {max(values):.1f})")
    words = {"time_steps": steps, "batch": options.batch, "network": options.checkpoint, "machine": machine(), "rows": rows}
    save(options.out, words)


def save(path: Path | None, words: dict) -> None:
    print(words)
    if path:
        path.write_text(json.dumps(words, indent=1) + "\n")


if __name__ == "__main__":
    main()
