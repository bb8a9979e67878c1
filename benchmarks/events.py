"""Is a simulation that follows single spikes faster on a CPU than one that convolves everything? One layer of each stage, and
layers of several widths at several firing rates.

    python benchmarks/events.py --out data/results/benchmark-events.json

The spikes are those of a real network for real test images, the convolution is the layer that reads them; milliseconds of the
process, one thread, the lowest of `--rounds`. "followed" is micelab's own (`precision="events"`): for each place of the output
the weights of the spikes that it sees, added in registers, in narrow layers by eights whose sums were made before; its spikes are
bits, as they come from the layer before. "matrix unit": all of them, by AMX, where the processor has it (`precision="bf16x3"`).
"scattered": each spike adds its weights to nine places, by torch.
"columns": the places that a kernel sees as rows of a sparse matrix (CSR), times the weights; "product alone" leaves out how the
rows come about. "packed": all steps of a neuron as the bits of one byte, which a convolution with real weights must unpack first:
what packing and unpacking cost alone.

"rates": random spikes at T = 8, a 3x3 convolution of C channels and the neurons that read it: how many times as long both take
by dense convolutions as by events.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import micelab
from micelab.checkpoint import write_json
from micelab.machine import machine
from micelab.network.spike_convolutions import WAYS, ByEvents, Spikes
from micelab.neuron.firing import IntegrateFire

LAYERS = {"blocks.1.act1": "blocks.1.conv2", "blocks.4.act1": "blocks.4.conv2", "blocks.7.act1": "blocks.7.conv2"}
"""A layer of neurons in each of the three stages, and the convolution that reads its spikes."""

RATES = (0.05, 0.1, 0.2, 0.3, 0.5)
SHAPES = {16: 32, 32: 16, 64: 8, 128: 16, 256: 8, 512: 4}
"""Channels of a layer, and the side of its map."""


def scattered(spikes: Tensor, weight: Tensor) -> Tensor:
    """The convolution (3x3, padding 1) of spikes [B, C, H, W], spike by spike."""
    images, _, height, width = spikes.shape
    image, channel, y, x = spikes.nonzero(as_tuple=True)
    out = spikes.new_zeros(images * (height + 2) * (width + 2), len(weight))
    for down in range(3):
        for right in range(3):
            place = (image * (height + 2) + y + 2 - down) * (width + 2) + x + 2 - right
            out.index_add_(0, place, weight[:, :, down, right].t()[channel])
    return out.view(images, height + 2, width + 2, -1)[:, 1:-1, 1:-1].permute(0, 3, 1, 2)


def rows(spikes: Tensor) -> Tensor:
    """What each place of the output sees, [B*H*W, 9*C], as a sparse matrix."""
    return F.unfold(spikes, 3, padding=1).transpose(1, 2).flatten(0, 1).to_sparse_csr()


def product(seen: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
    return (seen @ weight.flatten(1).t()).view(shape[0], *shape[2:], -1).permute(0, 3, 1, 2)


def packed(spikes: Tensor) -> Tensor:
    """Spikes [T, ...] of at most eight steps as the bits of bytes, and out of them again."""
    places = (2 ** torch.arange(len(spikes))).to(torch.uint8).view(-1, *[1] * (spikes.dim() - 1))
    byte = (spikes.to(torch.uint8) * places).sum(0, dtype=torch.uint8)
    return (byte.bitwise_and(places) != 0).to(spikes.dtype)


def milliseconds(work: Callable[[], Any], rounds: int) -> float:
    work()
    times = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return round(1000 * min(times), 3)


def measured(spikes: Tensor, conv: nn.Conv2d, rounds: int) -> dict[str, Any]:
    """Firing rate, milliseconds of each way, and its largest difference from the dense convolution."""
    flat, weight = spikes.flatten(0, 1).contiguous(memory_format=torch.channels_last), conv.weight
    seen, bits = rows(flat), Spikes.of_bits(Spikes(flat).bits, torch.ones(()), flat.shape[1])
    silent = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=False).requires_grad_(False)
    silent.weight.copy_(weight)
    compiled = {name: way.kind(silent, torch.ones(())) for name, way in WAYS.items() if way.is_here("cpu")}
    ways = {
        "dense": lambda: F.conv2d(flat, weight, padding=1),
        "followed": lambda: compiled["events"].currents(bits),
        "matrix unit": lambda: compiled["bf16x3"].currents(Spikes(flat)),
        "scattered": lambda: scattered(flat, weight),
        "columns": lambda: product(rows(flat), weight, flat.shape),
        "columns, product alone": lambda: product(seen, weight, flat.shape),
    }
    expected = ways["dense"]()
    found: dict[str, Any] = {"rate": round(float(spikes.mean()), 3), "shape": list(flat.shape)}
    for name, work in ways.items():
        if name == "matrix unit" and "bf16x3" not in compiled:
            continue
        found[name] = {"ms": round(milliseconds(work, rounds), 1), "difference": float((work() - expected).abs().max())}
    return found | {"packed": {"ms": round(milliseconds(lambda: packed(spikes), rounds), 1)}}


def times_as_long(channels: int, side: int, rate: float, rounds: int, images: int = 8) -> float:
    """How many times as long a layer and its neurons take by a dense convolution as by events, of random spikes at T = 8."""
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, 3, padding=1).requires_grad_(False).to(memory_format=torch.channels_last)
    neurons, followed = IntegrateFire(theta=0.7), ByEvents(conv, torch.ones(()))
    spikes = (torch.rand(8 * images, channels, side, side) < rate).float().contiguous(memory_format=torch.channels_last)
    bits = Spikes.of_bits(Spikes(spikes).bits, torch.ones(()), channels)

    def dense() -> None:
        current = conv(spikes).unflatten(0, (8, images))
        neurons.respond(current, current, 8, count=False)

    events = milliseconds(lambda: followed.fire(bits, neurons, 8, False, None), rounds)
    return round(milliseconds(dense, rounds) / events, 2)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="resnet20a-cifar10-mice-t8")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    ann: Any = micelab.load(options.checkpoint)
    snn = micelab.convert(ann, "mice").requires_grad_(False)
    images = next(micelab.load_data(ann.card["dataset"]).test.batches(options.images))[0]
    results: dict[str, Any] = {"machine": machine(), "network": options.checkpoint, "images": options.images, "layers": {}}
    results["command"] = shlex.join(["python", "benchmarks/events.py", *(sys.argv[1:] if arguments is None else arguments)])
    with torch.inference_mode():
        run = snn.simulate(images, 8, record="counts", spikes=True)
        for layer, reader in LAYERS.items():
            found = measured(run.layers[layer].spikes.float(), snn.layers.get_submodule(reader), options.rounds)
            results["layers"][reader] = found
            print(reader, found, flush=True)
        results["rates"] = {}
        for channels, side in SHAPES.items():
            found = {rate: times_as_long(channels, side, rate, options.rounds) for rate in RATES}
            results["rates"][channels] = found
            print(channels, "channels:", found, flush=True)
    if options.out:
        write_json(options.out, results)


if __name__ == "__main__":
    main()
