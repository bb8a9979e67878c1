"""The walk that simulates: T steps layer by layer, with time folded into the batch.

Layer by layer is exact, since no information flows from a later layer to an earlier one: a layer's spikes of all T steps
are made at once, [T*N, C, H, W] for its convolution, [T, N, C, H, W] for its neurons. What the images alone decide (the
first convolution) is computed once, not T times.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from micelab.graph.affine import WEIGHTED, is_fresh, is_size
from micelab.graph.runner import LayerRunner
from micelab.graph.tracing import activations, is_activation, module_of
from micelab.network import int8
from micelab.network.records import LayerRun, Record
from micelab.network.spike_convolutions import INTEGERS, WAYS, ByEvents, Due, SpikeConvolution, Spikes, send_bits
from micelab.neuron.compiled import as_bytes
from micelab.neuron.firing import Firing, IntegrateFire, over_time


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

    Constant values are [n, ...] until the first neurons, all others [steps*n, ...]. `records` holds what each layer did;
    `prepared` what is made of its weights for all images, by node, which others who run the same layers may share.
    """

    def __init__(
        self,
        layers: fx.GraphModule,
        time_steps: int,
        images: int,
        record: Record,
        spikes: bool,
        precision: str = "fp32",
        prepared: dict[str, SpikeConvolution | None] | None = None,
    ):
        super().__init__(layers)
        self.prepared = {} if prepared is None else prepared
        self.time_steps, self.images, self.record, self.spikes = time_steps, images, record, spikes
        self.keeps_membranes = bool(record) and record != "counts"
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
        if len(timed) == 2 and self._is_joined(n):
            return tuple(self.env[source] for source in timed)
        if tensors and isinstance(self.env[tensors[0]], tuple):
            return self._join(module_of(self.traced, str(n.target)), self.env[tensors[0]], tensors[0].all_input_nodes)
        for source in tensors:
            if isinstance(due := self.env[source], Due):
                if is_activation(self.traced, n) and self.joins(neurons := module_of(self.traced, str(n.target))):
                    return self._fire_with(due, neurons)
                self.env[source] = due.currents()
        packed = {source: value for source in tensors if isinstance(value := self.env[source], Spikes)}
        if self._own_convolution(n):
            packed = packed or {tensors[0]: Spikes(self.env[tensors[0]])}
            self.env |= packed
        elif not isinstance(self.submodules.get(str(n.target)), nn.Identity):
            self.env |= {source: spikes.numbers for source, spikes in packed.items()}
        out = super().run_node(n)
        self.env |= packed  # for those who take them as bits
        return out

    def _own_convolution(self, n: fx.Node) -> SpikeConvolution | None:
        """What convolves spikes at the node `n` in a way of its own, or None where torch does, or `n` does something else."""
        way = INTEGERS if self.precision == "int8" else WAYS.get(self.precision)
        if not way or not way.is_here("cpu") or n.op != "call_module":
            return None
        if n.name not in self.prepared:
            module, sender = module_of(self.traced, str(n.target)), self._sender(n)
            self.prepared[n.name] = way.kind(module, sender.theta) if way.suits(module, sender) else None
        return self.prepared[n.name]

    def _sender(self, n: fx.Node) -> Any:
        """The neurons whose spikes the layer `n` reads, or None where it reads something else."""
        source = n.all_input_nodes[0]
        return module_of(self.traced, str(source.target)) if is_activation(self.traced, source) else None

    def _is_joined(self, n: fx.Node) -> bool:
        """Whether the sum `n` of two currents is left to the neurons, which alone read it."""
        reader = next(iter(n.users)) if len(n.users) == 1 else n
        if n.target not in (operator.add, torch.add) or len(n.args) != 2 or n.kwargs or not is_activation(self.traced, reader):
            return False
        first, second = (self.env[source] for source in n.all_input_nodes)
        return (
            first.shape == second.shape and first.dtype == second.dtype and self.joins(module_of(self.traced, str(reader.target)))
        )

    def joins(self, module: Any) -> bool:
        """Whether such neurons may take part in what makes their currents: a sum of two, or a convolution."""
        same_steps = not self.record or self.steps == self.time_steps
        return type(self).activate is TimeFolded.activate and module.adds and same_steps

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In a fast mode layers with weights that act at every step have their own arithmetic; a head's is fp32 in any case."""
        module = module_of(self.traced, target)
        if self.precision == "fp32" or self.node not in self.over_time or not isinstance(module, WEIGHTED):
            return super().call_module(target, args, kwargs)
        if self.precision == "bf16":
            if isinstance(module, nn.Linear):
                return super().call_module(target, (args[0].float(), *args[1:]), kwargs)
            with torch.autocast(args[0].device.type, torch.bfloat16):
                return super().call_module(target, args, kwargs)
        if convolution := self._own_convolution(self.node):
            return convolution.due(args[0]) if self._is_taken_along(convolution) else convolution.currents(args[0])
        neuron = self._sender(self.node)
        if self.precision != "int8" or not int8.suits(module, neuron):
            return super().call_module(target, args, kwargs)
        source = self.node.all_input_nodes[0]
        if source not in self.bytes:  # for all who read these spikes; older ones are done with
            self.bytes = {source: as_bytes(args[0])}
        return int8.convolve(self.bytes[source], int8.packed(module, neuron.theta, list(args[0].shape)))

    def _is_taken_along(self, convolution: SpikeConvolution) -> bool:
        """Whether the convolution at hand waits for the neurons that read it, or its sum with something else of its shape."""
        readers = list(self.node.users)
        if len(readers) == 1 and readers[0].target in (operator.add, torch.add):
            readers = list(readers[0].users)
        taken = len(readers) == 1 and is_activation(self.traced, readers[0])
        return taken and convolution.takes_along(module_of(self.traced, str(readers[0].target)))

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A size is what it is for one step's images; a reshape to so many images is one to all steps' images."""
        if target == "size" and self.node.all_input_nodes[0] in self.over_time:
            size = self._one_step(args[0].shape)
            return size[args[1]] if len(args) > 1 else size[kwargs["dim"]] if kwargs else size
        if target == "numel" and self.node.all_input_nodes[0] in self.over_time:
            return self._one_step(args[0].shape).numel()
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
            return z.unflatten(0, (self.steps, self.images)) if self.steps > 1 else z[None]  # of one image it keeps its strides
        return z.expand(self.steps, *z.shape)

    def is_room(self, source: fx.Node) -> bool:
        """Whether spikes may go into the currents of the node `source`, since nobody else reads them."""
        return source in self.over_time and len(source.users) == 1 and is_fresh(self.traced, source)

    def room(self, z: Tensor) -> Tensor:
        """Where the spikes of the activation at hand go, [steps*n, ...]: into its currents z where they are room.

        In bf16 on CUDA they are written as the next layer takes them, also where the currents are fp32 (the first layer's).
        """
        dtype = torch.bfloat16 if self.precision == "bf16" and z.is_cuda else z.dtype
        if dtype == z.dtype and self.is_room(self.node.all_input_nodes[0]):
            return z
        shape = (self.steps * self.images, *z.shape[1:])
        layout = torch.channels_last if z.dim() == 4 else torch.contiguous_format
        return torch.empty(shape, dtype=dtype, device=z.device, memory_format=layout)

    def activate(self, name: str, module: Any, z: Tensor) -> Any:
        if self._is_asked_for_bits(module, z):
            current = self.current(z)
            mean = self._mean(module, current)
            return self._record_bits(module, *Spikes.fired(module, current, bool(self.record)), mean)
        current, out = module.drive(self.current(z)), self.room(z)
        steps = out.unflatten(0, (self.steps, self.images))
        mean = self._mean(module, current)
        did = module.respond(current, steps, self.time_steps, count=bool(self.record))
        if self.record:
            self.records[name] = self._layer_run(did, mean, module, steps)
        return out.to(torch.bfloat16) if self.precision == "bf16" else out

    def _is_asked_for_bits(self, module: Any, z: Tensor) -> bool:
        """Whether a layer that takes the spikes of the activation at hand as bits follows, and they can be sent so."""
        if z.dim() != 4 or z.dtype != torch.float32 or z.shape[1] % 16 or not (self.joins(module) and send_bits(module)):
            return False
        return any(isinstance(self._own_convolution(reader), ByEvents) for reader in self.node.users)

    def _mean(self, module: Any, current: Tensor) -> Tensor | None:
        """The mean current, [n, ...], where it is to be kept: where it is the same at every step, or charge balance does not tell
        it."""
        told = current.stride(0) != 0 and module.adds and self.steps == self.time_steps
        return None if told or not self.keeps_membranes else over_time(self.counted(current))

    def _join(self, module: Any, summands: tuple[Any, Any], sources: list[fx.Node]) -> Tensor | Spikes:
        """theta*s(t) of neurons that add the two currents [steps*n, ...] themselves."""
        due = [summand for summand in summands if isinstance(summand, Due)]
        if due:
            other = summands[0] if due[0] is summands[1] else summands[1]
            return self._fire_with(due[0], module, other.currents() if isinstance(other, Due) else other)
        currents = [summand.numbers if isinstance(summand, Spikes) else summand for summand in summands]
        rooms = zip(currents, sources, strict=True)
        out = next((z for z, source in rooms if self.is_room(source)), None)
        out = torch.empty_like(currents[0]) if out is None else out
        first, second, steps = (z.unflatten(0, (self.steps, self.images)) for z in (*currents, out))
        self.fire_sum(module, first, second, steps)
        return out

    def _fire_with(self, due: Due, module: Any, plus: Tensor | Spikes | None = None) -> Spikes:
        """theta*s(t) of neurons that are done with the convolution that makes their currents, or the sum with `plus`."""
        assert isinstance(due.convolution, ByEvents)
        return self._record_bits(module, *due.convolution.fire(due.spikes, module, self.steps, bool(self.record), plus))

    def _record_bits(self, module: Any, out: Spikes, did: Firing, mean: Tensor | None = None) -> Spikes:
        """`out`, with what the activation at hand did written down."""
        if self.record:
            steps = out.numbers.unflatten(0, (self.steps, self.images)) if self.spikes else None
            self.records[str(self.node.target)] = self._layer_run(did, mean, module, steps)
        return out

    def fire_sum(self, module: Any, first: Tensor, second: Tensor, out: Tensor) -> None:
        """Writes theta*s(t) for the sum of two currents [steps, n, ...] into `out`, which may be one of them."""
        did = module.respond_to_sum(first, second, out, count=bool(self.record))
        if self.record:
            self.records[str(self.node.target)] = self._layer_run(did, None, module, out)

    def _layer_run(self, did: Firing, mean: Tensor | None, module: Any, steps: Tensor | None) -> LayerRun:
        kind = torch.int8 if self.steps < 2**7 else torch.int16 if self.steps < 2**15 else torch.int32
        spikes = self.counted(steps).sign().to(torch.int8) if self.spikes and steps is not None else None
        hidden = None if did.hidden is None else did.hidden.to(kind)
        constant = mean is not None and send_bits(module) and self.steps == self.time_steps  # then the current tells the residual
        membrane = did.residual if self.keeps_membranes and not constant else None
        theta = module.theta.to(did.residual.dtype)
        return LayerRun(did.count.to(kind), membrane, theta, did.v0, self.time_steps, mean, spikes, hidden)
