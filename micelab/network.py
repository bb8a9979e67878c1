"""The spiking network: T steps are simulated layer by layer, with time folded into the batch.

Layer by layer is exact, since no information flows from a later layer to an earlier one: a layer's spikes of all T steps
are made at once, [T*N, C, H, W] for its convolution, [T, N, C, H, W] for its neurons. What the images alone decide (the
first convolution) is computed once, not T times.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from micelab import int8
from micelab.activation import over_channels
from micelab.compiled_neuron import as_bytes
from micelab.exceptions import InputError
from micelab.graph import WEIGHTED, LayerRunner, activations, check_images, depth, is_activation, is_fresh, is_size, module_of
from micelab.machine import has_bf16, say_lacking, sums_of_products
from micelab.memory import Pace, device_budget, in_chunks
from micelab.neuron import Firing, IntegrateFire, over_time

CACHE_BUDGET = 8 * 2**20
"""Bytes that the largest layer's activations of one chunk take on a CPU, to begin with: a chunk that spills the cache loses a
third, one that is too small leaves every call of a layer little to do. How much is best depends on the processor, the network
and T (4 MB on one machine, 16 on another), so that a long simulation tries the half and the double of it too."""

DEVICE_BUDGET = 512 * 2**20
"""The same on an accelerator, at most: large chunks keep it busy. It is less where less memory is free."""


Precision = Literal["fp32", "bf16", "int8"]
"""fp32 is exact. Two fast modes of other numbers, with membranes in fp32: bf16, convolutions and linear layers multiply bf16
numbers; int8 (CPU only), convolutions add weights of 8 bits where spikes are."""

_LACKING = {"bf16": "bf16 arithmetic (it would be emulated, and slower than fp32)", "int8": "quantized convolution here"}


@dataclass
class LayerRun:
    """What one spiking layer did in the T = `time_steps` steps that count: tensors [N, ...].

    theta: as in the layer; v0: the start it took in the end, scalar, [C] or [N, ...]; `hidden`: spikes of hidden steps.
    """

    count: Tensor
    residual: Tensor
    mean_current: Tensor
    theta: Tensor
    v0: Tensor
    time_steps: int
    spikes: Tensor | None = None
    hidden: Tensor | None = None

    @property
    def rate(self) -> Tensor:
        """theta*n/T in activation units, [N, ...]: what the layer says."""
        return self.count.to(self.residual.dtype) * over_channels(self.theta, self.residual) / self.time_steps

    @property
    def spike_rate(self) -> float:
        """Spikes per neuron and step, mean over neurons and images (a taken-back spike counts as one less)."""
        return float(self.count.double().mean()) / self.time_steps

    def tensors(self) -> dict[str, tuple[Tensor, int]]:
        """Each tensor of the run, with the dimension along which its images lie."""
        found = {"count": (self.count, 0), "residual": (self.residual, 0), "mean_current": (self.mean_current, 0)}
        found |= {"v0": (self.v0, 0)} if self.v0.dim() > 1 else {}
        found |= {} if self.hidden is None else {"hidden": (self.hidden, 0)}
        return found if self.spikes is None else found | {"spikes": (self.spikes, 1)}

    def room_for(self, images: int) -> LayerRun:
        """An empty run of the same layer for so many images."""
        rooms: dict[str, Any] = {name: _room(tensor, dim, images) for name, (tensor, dim) in self.tensors().items()}
        return replace(self, **rooms)

    def to_dict(self) -> dict[str, Any]:
        """Summary in plain numbers."""
        return {
            "theta": self.theta.tolist(),
            "v0": self.v0.tolist() if self.v0.dim() < 2 else float(self.v0.mean()),
            "spike_rate": self.spike_rate,
            "mean_residual": float(self.residual.mean()),
            "mean_current": float(self.mean_current.mean()),
        }


@dataclass
class SimulationRun:
    """`logits` [T, N, classes], the running mean over time; `layers` from input to output, named as in the ANN."""

    logits: Tensor
    layers: dict[str, LayerRun]

    def room_for(self, images: int) -> SimulationRun:
        """An empty run for so many images.

        Chunks are copied into one such run: kept piece by piece they would lie between the large tensors of the simulation
        and cut the memory into holes too small for the next ones (13 GB instead of 3 for 1,000 images at T = 64).
        """
        layers = {name: layer.room_for(images) for name, layer in self.layers.items()}
        return SimulationRun(_room(self.logits, 1, images), layers)

    def put(self, part: SimulationRun, start: int) -> None:
        """Copies the run of a chunk to its place, from image `start` on."""
        pairs = [(self.logits, part.logits, 1)]
        for name, layer in self.layers.items():
            new = part.layers[name].tensors()
            pairs += [(tensor, new[key][0], dim) for key, (tensor, dim) in layer.tensors().items()]
        for whole, piece, dim in pairs:
            whole.narrow(dim, start, piece.shape[dim]).copy_(piece)

    @property
    def predictions(self) -> Tensor:
        """Class after every step, [T, N]."""
        return self.logits.argmax(-1)

    def to_dict(self) -> dict[str, Any]:
        """Summary in plain numbers."""
        return {"logits": self.logits.tolist(), "layers": {name: run.to_dict() for name, run in self.layers.items()}}


class SpikingNetwork(nn.Module):
    """A converted network: `simulate` runs T steps and keeps what every layer did, calling it gives the last mean logits.

    An ordinary module: `.to(device)`, `copy.deepcopy`, and `state_dict` (weights, thresholds and initial potentials).
    `method` and `hidden_steps` say how it was made and how many steps it spends beyond T; `turns` is 1, or the number of
    layers in a row where each waits for all T steps of the one before; `most_steps`: the longest T it may be simulated for, on a
    grid (`micelab.snap_to_grid`), or None.
    """

    def __init__(self, layers: fx.GraphModule, method: str = "", time_steps: int = 8, hidden_steps: int = 0):
        super().__init__()
        self.layers = layers.to(memory_format=torch.channels_last)  # as the images: else each call copies its weights
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

    def true_steps(self, time_steps: int) -> int:
        """How many steps a run of T = `time_steps` takes in truth, until the last layer has ended."""
        return time_steps * self.turns + self.hidden_steps

    def forward(self, images: Tensor, time_steps: int | None = None, precision: Precision = "fp32") -> Tensor:
        """Mean logits after `time_steps` (default: those it was converted for), [N, classes]."""
        steps = self.time_steps if time_steps is None else time_steps
        return self.simulate(images, steps, record=False, precision=precision).logits[-1]

    def simulate(
        self,
        images: Tensor,
        time_steps: int = 8,
        record: bool = True,
        spikes: bool = False,
        chunk: int | None = None,
        precision: Precision = "fp32",
    ) -> SimulationRun:
        """Runs `time_steps` steps on images [N, C, H, W]: logits after every step and what each layer did.

        `record=False` keeps the logits only; `spikes` keeps every spike too ([T, N, ...] int8 a layer); `chunk` images go
        through at a time, which does not change the result: by default as many as fit the device budget, or, on a CPU, as
        many as were fastest in the first chunks. Where the device runs out of memory the chunk is halved, and stays so.
        `precision` "bf16" and "int8" are fast modes of other numbers (docs/performance.md): where the device lacks one the log
        says so once, and fp32 is used.
        """
        images, used = self._check(images, time_steps), self._possible(precision, images)
        if chunk is not None and chunk < 1:
            raise InputError(f"chunk is {chunk}: at least one image must go through at a time")
        whole: SimulationRun | None = None
        for start, part, run in self._parts(images, time_steps, record or spikes, spikes, chunk, used):
            if len(part) == len(images):
                return run
            whole = whole or _whole(run, len(images), images.device)
            whole.put(run, start)
        assert whole is not None
        return whole

    def stream(self, images: Tensor, time_steps: int, spikes: bool = False) -> Iterator[tuple[Tensor, SimulationRun]]:
        """(images, run) chunk by chunk, so that what is kept stays small for any number of images."""
        images = self._check(images, time_steps)
        for _, part, run in self._parts(images, time_steps, True, spikes):
            yield part, run

    def _parts(
        self, images: Tensor, time_steps: int, record: bool, spikes: bool, chunk: int | None = None, precision: str = "fp32"
    ) -> Iterator[tuple[int, Tensor, SimulationRun]]:
        def halved() -> None:
            self._shrink *= 1 if chunk else 2

        size = chunk or (self.chunk(images, time_steps) if len(images) > 1 else 1)
        pace = None if chunk else self._pace(images, time_steps, record, size, precision)
        return in_chunks(images, size, lambda part: self._simulate(part, time_steps, record, spikes, precision), halved, pace)

    def _pace(self, images: Tensor, time_steps: int, record: bool, guess: int, precision: str) -> Pace | None:
        """What is known of the best chunk for such images; None where they are too few to try, or nothing is to be tried."""
        sizes = sorted({max(1, guess // 2), guess, 2 * guess})
        if images.device.type != "cpu" or self._shrink > 1 or len(images) < 2 * sizes[-1]:
            return None
        key = (tuple(images.shape[1:]), images.dtype, time_steps, record, torch.get_num_threads(), guess, precision)
        return self._paces.setdefault(key, Pace(sizes, guess))

    def chunk(self, images: Tensor, time_steps: int) -> int:
        """How many images go through at a time to begin with: the largest layer's T steps of them fill the budget, one at the
        least."""
        shape = tuple(images.shape[1:])
        if shape not in self._largest:
            self._largest[shape] = largest_layer(self.layers, images[:1])
        budget = CACHE_BUDGET if images.device.type == "cpu" else device_budget(images.device, DEVICE_BUDGET)
        budget //= self._shrink
        return max(1, budget // (self._largest[shape] * images.element_size() * steps_to_run(self.layers, time_steps)[0]))

    def _check(self, images: Tensor, time_steps: int) -> Tensor:
        if not isinstance(time_steps, int) or time_steps < 1:
            raise InputError(f"time_steps is {time_steps!r}: a simulation needs an integer of at least 1")
        if self.most_steps is not None and time_steps > self.most_steps:
            raise InputError(
                f"time_steps is {time_steps}, but this network was put on a grid for at most {self.most_steps}: beyond, sums may "
                f"round; use micelab.snap_to_grid(..., time_steps={time_steps})"
            )
        own = next(chain(self.layers.parameters(), self.layers.buffers()))
        if isinstance(images, Tensor) and images.device != own.device:
            raise InputError(f"images are on {images.device}, the network on {own.device}: move one with .to(...)")
        images = check_images(images).to(own.dtype)
        return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images

    def _possible(self, precision: str, images: Tensor) -> str:
        """`precision`, or fp32 where the device lacks it, which the log says once."""
        if precision not in ("fp32", "bf16", "int8"):
            raise InputError(f"precision is {precision!r}: choose 'fp32' (exact), 'bf16' or 'int8' (fast modes)")
        if precision != "fp32" and self.most_steps is not None:
            raise InputError(f"precision is {precision!r}, and this network is on a grid to be exact: simulate it in fp32")
        device = str(images.device)
        if precision == "fp32" or (has_bf16 if precision == "bf16" else int8.has_int8)(device):
            return precision
        say_lacking(device, _LACKING[precision])
        return "fp32"

    def _simulate(self, images: Tensor, time_steps: int, record: bool, spikes: bool, precision: str = "fp32") -> SimulationRun:
        with torch.inference_mode(), sums_of_products(self.most_steps is not None):
            runner = TimeFolded(self.layers, time_steps, len(images), record, spikes, precision)
            outputs = runner.counted(runner.run(images).unflatten(0, (runner.steps, len(images))))
            steps = torch.arange(1, time_steps + 1, device=outputs.device, dtype=outputs.dtype)
            mean = outputs.cumsum(0) / steps.view(-1, *[1] * (outputs.dim() - 1))
        return SimulationRun(mean, runner.records)


def steps_to_run(layers: fx.GraphModule, time_steps: int) -> tuple[int, int]:
    """(steps that are simulated so that T = `time_steps` count, how many of them run before those)."""
    neurons = [neuron for neuron in activations(layers).values() if isinstance(neuron, IntegrateFire)]  # not those in training
    before = max((neuron.before for neuron in neurons), default=0)
    return max(before + time_steps, max((neuron.ahead for neuron in neurons), default=0)), before


def largest_layer(layers: fx.GraphModule, image: Tensor) -> int:
    """Neurons of the largest layer for such an image [1, C, H, W]."""
    probe = _Probe(layers)
    with torch.no_grad():
        probe.run(image)
    return probe.largest


class _Probe(LayerRunner):
    """Runs one image without neurons, to see how large the layers are."""

    largest = 1

    def activate(self, name: str, module: Any, z: Tensor) -> Tensor:
        self.largest = max(self.largest, z.numel())
        return z


class TimeFolded(LayerRunner):
    """Runs `steps` steps of n images, of which T = `time_steps` count (all, unless the neurons ask for more).

    Constant values are [n, ...] until the first neurons, all others [steps*n, ...]. `records` holds what each layer did.
    """

    def __init__(self, layers: fx.GraphModule, time_steps: int, images: int, record: bool, spikes: bool, precision: str = "fp32"):
        super().__init__(layers)
        self.time_steps, self.images, self.record, self.spikes = time_steps, images, record, spikes
        self.precision = precision
        self.bytes: dict[fx.Node, Tensor] = {}
        self.steps, self.before = steps_to_run(layers, time_steps)
        self.records: dict[str, LayerRun] = {}
        self.over_time: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        tensors = [source for source in n.all_input_nodes if not is_size(source)]
        timed = [source for source in tensors if source in self.over_time]
        if (timed and not is_size(n)) or is_activation(self.traced, n):
            self.over_time.add(n)
        if timed and len(timed) < len(tensors):  # a constant meets spikes: it is the same at every step
            for source in tensors:
                if source not in self.over_time:
                    self.env[source] = self.env[source].expand(self.steps, *self.env[source].shape).flatten(0, 1)
                    self.over_time.add(source)
        self.node = n
        if len(timed) == 2 and not self.record and self._is_joined(n):
            return tuple(self.env[source] for source in timed)
        if tensors and isinstance(self.env[tensors[0]], tuple):
            return self._join(module_of(self.traced, str(n.target)), self.env[tensors[0]], tensors[0].all_input_nodes)
        return super().run_node(n)

    def _is_joined(self, n: fx.Node) -> bool:
        """Whether the sum `n` of two currents is left to the neurons, which alone read it."""
        reader = next(iter(n.users)) if len(n.users) == 1 else n
        if n.target not in (operator.add, torch.add) or len(n.args) != 2 or n.kwargs or not is_activation(self.traced, reader):
            return False
        module = module_of(self.traced, str(reader.target))
        first, second = (self.env[source] for source in n.all_input_nodes)
        return self.joins(module) and first.shape == second.shape and first.dtype == second.dtype

    def joins(self, module: Any) -> bool:
        """Whether such neurons may add two currents themselves."""
        return type(self).activate is TimeFolded.activate and module.adds

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In a fast mode layers with weights that act at every step have their own arithmetic; what they give is fp32."""
        module = module_of(self.traced, target)
        if self.precision == "fp32" or self.node not in self.over_time or not isinstance(module, WEIGHTED):
            return super().call_module(target, args, kwargs)
        if self.precision == "bf16":
            with torch.autocast(args[0].device.type, torch.bfloat16):
                return super().call_module(target, args, kwargs).to(args[0].dtype)
        source = self.node.all_input_nodes[0]
        neuron: Any = module_of(self.traced, str(source.target)) if is_activation(self.traced, source) else None
        if not int8.suits(module, neuron):
            return super().call_module(target, args, kwargs)
        if source not in self.bytes:  # for all who read these spikes; older ones are done with
            self.bytes = {source: as_bytes(args[0])}
        return int8.convolve(self.bytes[source], int8.packed(module, neuron.theta, list(args[0].shape)))

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A size is what it is for one step's images; a reshape to so many images is one to all steps' images."""
        if target == "size" and self.node.all_input_nodes[0] in self.over_time:
            size = self._one_step(args[0].shape)
            return size[args[1]] if len(args) > 1 else size[kwargs["dim"]] if kwargs else size
        if target == "reshape" and self.node in self.over_time:
            first, *rest = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
            args = (args[0], (len(args[0]) if first == self.images else first, *rest))
        return super().call_method(target, args, kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is getattr and args[1] == "shape" and self.node.all_input_nodes[0] in self.over_time:
            return self._one_step(args[0].shape)
        if target is torch.reshape and self.node in self.over_time:
            return self.call_method("reshape", (args[0], *args[1:], *kwargs.values()), {})
        return super().call_function(target, args, kwargs)

    def _one_step(self, shape: torch.Size) -> torch.Size:
        return torch.Size((self.images, *shape[1:]))

    def counted(self, values: Tensor) -> Tensor:
        """The T steps that count of all that were run, [T, n, ...]."""
        return values[self.before : self.before + self.time_steps]

    def current(self, z: Tensor) -> Tensor:
        """The input z of the activation at hand as currents [steps, n, ...]; where they are constant, without copies."""
        if self.node.all_input_nodes[0] in self.over_time:
            return z.unflatten(0, (self.steps, self.images))
        return z.expand(self.steps, *z.shape)

    def is_room(self, source: fx.Node) -> bool:
        """Whether spikes may go into the currents of the node `source`, since nobody else reads them."""
        return source in self.over_time and len(source.users) == 1 and is_fresh(self.traced, source)

    def room(self, z: Tensor) -> Tensor:
        """Where the spikes of the activation at hand go, [steps*n, ...]: into its currents z where they are room."""
        if self.is_room(self.node.all_input_nodes[0]):
            return z
        shape = (self.steps * self.images, *z.shape[1:])
        layout = torch.channels_last if z.dim() == 4 else torch.contiguous_format
        return torch.empty(shape, dtype=z.dtype, device=z.device, memory_format=layout)

    def activate(self, name: str, module: Any, z: Tensor) -> Tensor:
        current, out = module.drive(self.current(z)), self.room(z)
        steps = out.unflatten(0, (self.steps, self.images))
        mean = over_time(self.counted(current)) if self.record else None
        did = module.respond(current, steps, self.time_steps, count=self.record)
        if mean is not None:
            self.records[name] = self._layer_run(did, mean, module.theta, steps)
        return out

    def _join(self, module: Any, summands: tuple[Tensor, Tensor], sources: list[fx.Node]) -> Tensor:
        """theta*s(t) of neurons that add the two currents [steps*n, ...] themselves."""
        rooms = zip(summands, sources, strict=True)
        out = next((z for z, source in rooms if self.is_room(source)), None)
        out = torch.empty_like(summands[0]) if out is None else out
        first, second, steps = (z.unflatten(0, (self.steps, self.images)) for z in (*summands, out))
        self.fire_sum(module, first, second, steps)
        return out

    def fire_sum(self, module: Any, first: Tensor, second: Tensor, out: Tensor) -> None:
        """Writes theta*s(t) for the sum of two currents [steps, n, ...] into `out`, which may be one of them."""
        module.respond_to_sum(first, second, out)

    def _layer_run(self, did: Firing, mean: Tensor, theta: Tensor, steps: Tensor) -> LayerRun:
        kind = torch.int16 if self.steps < 2**15 else torch.int32
        spikes = self.counted(steps).sign().to(torch.int8) if self.spikes else None
        hidden = None if did.hidden is None else did.hidden.to(kind)
        return LayerRun(did.count.to(kind), did.residual, mean, theta, did.v0, self.time_steps, spikes, hidden)


def _whole(part: SimulationRun, images: int, device: torch.device) -> SimulationRun:
    try:
        return part.room_for(images)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"the memory of {device} does not suffice to keep what every layer did for {images} images: use record=False, or "
            "`stream`, which gives it chunk by chunk"
        ) from error


def _room(tensor: Tensor, dim: int, images: int) -> Tensor:
    return tensor.new_empty((*tensor.shape[:dim], images, *tensor.shape[dim + 1 :]))
