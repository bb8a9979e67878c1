"""The spiking network as a torch.nn.Module: what may be asked of it, and how many images go through at a time.

`micelab.network.folded` is the walk over the layers, `micelab.network.records` what is kept of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn

from micelab.exceptions import InputError
from micelab.graph.runner import check_batch, check_images, check_time_steps
from micelab.graph.tracing import activations, depth
from micelab.machine import has_bf16, say_lacking, sums_of_products
from micelab.network import int8
from micelab.network.folded import TimeFolded, largest_layer, steps_to_run
from micelab.network.memory import Pace, device_budget, in_chunks
from micelab.network.records import Record, SimulationRun
from micelab.network.replay import Replay
from micelab.network.spike_convolutions import WAYS, SpikeConvolution
from micelab.neuron.firing import IntegrateFire

CACHE_BUDGET = 8 * 2**20
"""Bytes that the largest layer's activations of one chunk take on a CPU, to begin with: a chunk that spills the cache loses a
third, one that is too small leaves every call of a layer little to do. How much is best depends on the processor, the network
and T (4 MB on one machine, 16 on another), so that a long simulation tries the half and the double of it too."""

LEAST_SHARE = 3
"""A thread of its own pays for no less than this part of a chunk, a third: going from layer to layer takes Python some
milliseconds, in which the other threads wait."""

DEVICE_BUDGET = 512 * 2**20
"""The same on an accelerator, at most: large chunks keep it busy. It is less where less memory is free."""


Precision = Literal["auto", "fp32", "events", "bf16x3", "bf16", "int8"]
"""auto: events where that was seen to be faster (x86 with AVX2 and a C compiler), else fp32.

Three have fp32's products, and differ in the order of their sums, on a grid in nothing: fp32, dense convolutions by torch; events
(CPU only), spike by spike; bf16x3 (CPU only), each as three bf16 numbers by a matrix unit (AMX). Two are fast modes of other
numbers, with membranes in fp32: bf16, convolutions and linear layers multiply bf16 numbers; int8 (CPU only), convolutions add
weights of 8 bits where spikes are."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

_LACKING = {
    "events": "compiled convolution of spikes (no C compiler works here)",
    "bf16x3": "matrix unit (AMX) that a C compiler here knows",
    "bf16": "bf16 arithmetic (it would be emulated, and slower than fp32)",
    "int8": "quantized convolution here",
}


def is_here(precision: Precision, device: torch.device | str) -> bool:
    """Whether a simulation on this device can run in that precision."""
    has = {name: way.is_here for name, way in WAYS.items()} | {"bf16": has_bf16, "int8": int8.has_int8}
    return precision in ("auto", "fp32") or has[precision](str(device))


class SpikingNetwork(nn.Module):
    """A converted network: `simulate` runs T steps and keeps what every layer did, calling it gives the last mean logits.

    An ordinary module: `.to(device)`, `copy.deepcopy`, and `state_dict` (weights, thresholds and initial potentials).
    `method` and `hidden_steps` say how it was made and how many steps it spends beyond T; `turns` is 1, or the number of
    layers in a row where each waits for all T steps of the one before; `most_steps`: the longest T it may be simulated for, on a
    grid (`micelab.snap_to_grid`), or None.

    >>> import micelab
    >>> snn = micelab.convert(micelab.small_cnn(activation="quant_clip"), "qcfs", time_steps=4)
    >>> run = snn.simulate(torch.rand(2, 1, 8, 8), 4)
    >>> run.logits.shape, list(run.layers)[0], snn(torch.rand(2, 1, 8, 8)).shape
    (torch.Size([4, 2, 10]), 'stem.2', torch.Size([2, 10]))
    """

    def __init__(self, layers: fx.GraphModule, method: str = "", time_steps: int = 8, hidden_steps: int = 0):
        super().__init__()
        for value in chain(layers.parameters(), layers.buffers()):
            if value.dim() == 4:  # laid out as the images: else each call copies the weights
                value.data = value.data.contiguous(memory_format=torch.channels_last)
        self.layers = layers.eval()
        self.method, self.time_steps, self.hidden_steps = method, time_steps, hidden_steps
        waits = any(neuron.waits for neuron in self.neurons.values())
        self.turns = depth(layers) if waits else 1
        self.spec: dict[str, Any] = {}
        self.most_steps: int | None = None
        self._largest: dict[tuple[int, ...], int] = {}
        self._paces: dict[tuple[Any, ...], Pace] = {}
        self._shrink = 1

    @property
    def neurons(self) -> dict[str, IntegrateFire]:
        """The spiking layers by name, from input to output."""
        return activations(self.layers)  # type: ignore[return-value]

    def train(self, mode: bool = True) -> SpikingNetwork:
        """A converted network has nothing to train: a batch-norm that was not folded keeps to its statistics in either mode."""
        super().train(mode)
        self.layers.eval()
        return self

    def true_steps(self, time_steps: int) -> int:
        """How many steps a run of T = `time_steps` takes in truth, until the last layer has ended."""
        return time_steps * self.turns + self.hidden_steps

    def forward(self, images: Tensor, time_steps: int | None = None, precision: Precision = "auto") -> Tensor:
        """Mean logits after `time_steps` (default: those it was converted for), [N, classes]."""
        return self.simulate(images, time_steps, record=False, precision=precision).logits[-1]

    def simulate(
        self,
        images: Tensor,
        time_steps: int | None = None,
        record: Record = True,
        spikes: bool = False,
        chunk: int | None = None,
        precision: Precision = "auto",
    ) -> SimulationRun:
        """Runs `time_steps` steps (default: those it was converted for) on images [N, C, H, W]: logits after every step and what
        each layer did.

        `record="counts"` keeps of every layer its spike counts alone, a fifth of the memory, and False the logits only; `spikes`
        keeps every spike too ([T, N, ...] int8 a layer); `chunk` images go through at a time, which does not change the result:
        by default as many as fit the device budget, or, on a CPU, as many as were fastest in the first chunks. Where the device
        runs out of memory the chunk is halved, and stays so.
        `precision`: "fp32", "events" and "bf16x3" are of the same products, "auto" is the faster of the first two, "bf16" and
        "int8" are fast modes of other numbers (`Precision`): where the device lacks one the log says so once, and "auto" is used.
        """
        time_steps = self._steps(time_steps)
        images, used = self._check(images, time_steps), self.precision_here(precision, images.device)
        if chunk is not None and not (isinstance(chunk, int) and chunk >= 1):
            raise InputError(f"chunk is {chunk!r}: an integer, at least one image at a time")
        if record not in (True, False, "counts"):
            raise InputError(f'record is {record!r}: choose True, "counts" or False')
        whole: SimulationRun | None = None
        for start, part, run in self._parts(images, time_steps, record or spikes, spikes, chunk, precision=used):
            if len(part) == len(images):
                return run
            whole = whole or run.room_for(len(images))
            whole.put(run, start)
        assert whole is not None
        return whole

    def stream(self, images: Tensor, time_steps: int, spikes: bool = False) -> Iterator[tuple[Tensor, SimulationRun]]:
        """(images, run) chunk by chunk, so that what is kept stays small for any number of images."""
        time_steps = self._steps(time_steps)
        images = self._check(images, time_steps)
        for _, part, run in self._parts(images, time_steps, True, spikes, precision=self.precision_here("auto", images.device)):
            yield part, run

    def recorded(self, images: Tensor, time_steps: int | None = None, precision: Precision = "auto") -> Replay:
        """What calling the network does, for images of this shape and device only, all in one chunk: on CUDA it is recorded
        as a graph and replayed by one launch, which pays for few images; elsewhere it is the plain call.

        >>> import micelab
        >>> snn = micelab.convert(micelab.small_cnn(activation="quant_clip"), "qcfs", time_steps=4)
        >>> images = torch.rand(1, 1, 8, 8)
        >>> answer = snn.recorded(images)
        >>> torch.equal(answer(images), snn(images))
        True

        Its images are not checked for NaN, since that waits for the device. Raises InputError where the network was moved since.
        """
        steps = self._steps(time_steps)
        images, used = self._check(images, steps), self.precision_here(precision, images.device)
        return Replay(self, images, lambda part: self._simulate(part, steps, False, False, used).logits)

    def _parts(
        self, images: Tensor, time_steps: int, record: Record, spikes: bool, chunk: int | None = None, *, precision: str
    ) -> Iterator[tuple[int, Tensor, SimulationRun]]:
        def halved() -> None:
            self._shrink *= 1 if chunk else 2

        prepared: dict[str, SpikeConvolution | None] = {}

        def work(part: Tensor) -> SimulationRun:
            return self._simulate(part, time_steps, record, spikes, precision, prepared)

        size = chunk or (self.chunk(images, time_steps, precision) if len(images) > 1 else 1)
        lanes = self._lanes(images, least=1 if chunk else size // LEAST_SHARE)
        pace = None if chunk else self._pace(images, time_steps, record, size, precision)
        return in_chunks(images, size if chunk else min(size, -(-len(images) // lanes)), work, halved, pace, lanes)

    def _lanes(self, images: Tensor, least: int = 1) -> int:
        """How many chunks go through side by side: on a CPU as many as there are threads, each with one of its own, if each has
        `least` images.

        Two threads in one layer wait for each other and for the operations between layers that only one does. On a grid, where
        the kind of convolution is set for the whole process, chunks go one after another.
        """
        if images.device.type != "cpu" or self.most_steps is not None:
            return 1
        return max(1, min(torch.get_num_threads(), len(images) // max(1, least)))

    def _pace(self, images: Tensor, time_steps: int, record: Record, guess: int, precision: str) -> Pace | None:
        """What is known of the best chunk for such images; None where they are too few to try, or nothing is to be tried."""
        sizes = sorted({max(1, guess // 2), guess, 2 * guess})
        if images.device.type != "cpu" or self._shrink > 1 or len(images) < 2 * self._lanes(images) * sizes[-1]:
            return None
        key = (tuple(images.shape[1:]), images.dtype, time_steps, record, torch.get_num_threads(), guess, precision)
        return self._paces.setdefault(key, Pace(sizes, guess))

    def chunk(self, images: Tensor, time_steps: int, precision: str = "fp32") -> int:
        """How many images go through at a time to begin with: the largest layer's T steps of them fill the budget, one at the
        least."""
        shape = tuple(images.shape[1:])
        if shape not in self._largest:
            self._largest[shape] = largest_layer(self.layers, images[:1])
        budget = CACHE_BUDGET if images.device.type == "cpu" else device_budget(images.device, DEVICE_BUDGET)
        budget //= self._shrink
        size = 2 if precision == "bf16" else images.element_size()
        return max(1, budget // (self._largest[shape] * size * steps_to_run(self.layers, time_steps)[0]))

    def _steps(self, time_steps: int | None) -> int:
        return self.time_steps if time_steps is None else check_time_steps(time_steps)

    def _check(self, images: Tensor, time_steps: int) -> Tensor:
        if self.most_steps is not None and time_steps > self.most_steps:
            raise InputError(
                f"time_steps is {time_steps}, but this network was put on a grid for at most {self.most_steps}: beyond, sums may "
                f"round; use micelab.snap_to_grid(..., time_steps={time_steps})"
            )
        own = next(chain(self.layers.parameters(), self.layers.buffers()))
        if isinstance(images, Tensor) and images.device != own.device:
            raise InputError(f"images are on {images.device}, the network on {own.device}: move one with .to(...)")
        images = check_images(images).to(own.dtype)
        check_batch(self.layers, images)
        return images

    def precision_here(self, precision: Precision, device: torch.device | str) -> Precision:
        """What a simulation that is asked for `precision` runs in: itself; what "auto" is, "events" or "fp32", where it is
        "auto" or where the device lacks it, which the log says once."""
        if precision not in PRECISIONS:
            raise InputError(f"precision is {precision!r}: choose {', '.join(map(repr, PRECISIONS[:-1]))} or {PRECISIONS[-1]!r}")
        own = next((value.dtype for value in self.layers.parameters()), torch.float32)
        if precision == "auto":
            vectors = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
            return "events" if own == torch.float32 and vectors and is_here("events", device) else "fp32"
        if precision != "fp32" and own != torch.float32:
            raise InputError(f"precision {precision!r} is one of fp32 networks, this one is {own}: use .float(), or leave it out")
        if precision in ("bf16", "int8") and self.most_steps is not None:
            raise InputError(f"precision is {precision!r}, and this network is on a grid to be exact: simulate it in fp32")
        if is_here(precision, device):
            return precision
        say_lacking(str(device), _LACKING[precision])
        return self.precision_here("auto", device)

    def _simulate(
        self,
        images: Tensor,
        time_steps: int,
        record: Record,
        spikes: bool,
        precision: str = "fp32",
        prepared: dict[str, SpikeConvolution | None] | None = None,
    ) -> SimulationRun:
        images = images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images
        own_arithmetic = torch.autocast(images.device.type, enabled=False)  # whatever the caller has around it
        with torch.no_grad(), sums_of_products(self.most_steps is not None), own_arithmetic:
            runner = TimeFolded(self.layers, time_steps, len(images), record, spikes, precision, prepared)
            outputs = runner.counted(runner.run(images).unflatten(0, (runner.steps, len(images))))
            steps = torch.arange(1, time_steps + 1, device=outputs.device, dtype=outputs.dtype)
            mean = outputs.cumsum(0) / steps.view(-1, *[1] * (outputs.dim() - 1))
        return SimulationRun(mean, runner.records)
