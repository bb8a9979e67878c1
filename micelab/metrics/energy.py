"""Size of a network, its spikes, and the energy of its operations by the usual count."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from micelab.errors import steps_of
from micelab.graph.affine import CONVOLUTIONS, TRANSPOSED, WEIGHTED, is_size
from micelab.graph.runner import LayerRunner
from micelab.graph.tracing import is_activation, trace
from micelab.network.spiking import SpikingNetwork

PICOJOULE_PER_MAC = 4.6
PICOJOULE_PER_AC = 0.9
ENERGY_ASSUMPTIONS = (
    "Energy: 4.6 pJ a 32-bit multiply-accumulate, 0.9 pJ an accumulate (45 nm CMOS; M. Horowitz, ISSCC 2014). Counted are the "
    "arithmetic operations of convolutions, linear layers and shortcuts alone: no memory traffic, no neuron updates, no leakage. "
    "The first layer sees real-valued images, constant over time, and counts as multiply-accumulates once. A spike costs one "
    "accumulate for each weight it meets, image borders included."
)


@dataclass(frozen=True)
class Size:
    """Parameters of a network and multiply-accumulates for one image.

    >>> str(Size(parameters=1_000, macs=2_500_000))
    '1,000 parameters, 2.5 M multiply-accumulates an image'
    """

    parameters: int
    macs: int

    def __str__(self) -> str:
        return f"{self.parameters:,} parameters, {self.macs / 1e6:.1f} M multiply-accumulates an image"


def size(model: nn.Module, shape: Sequence[int]) -> Size:
    """Parameters and multiply-accumulates of `model` for one image of `shape` (C, H, W).

    >>> import micelab
    >>> str(size(micelab.resnet20(), (3, 32, 32)))
    '272,474 parameters, 40.8 M multiply-accumulates an image'
    """
    meter = _Meter(trace(model))
    first = next(model.parameters())
    with torch.inference_mode():
        meter.run(torch.zeros(1, *shape, dtype=first.dtype, device=first.device))
    return Size(sum(p.numel() for p in model.parameters()), sum(meter.macs.values()))


@dataclass(frozen=True)
class Energy:
    """Operations and energy of one image, ANN and SNN side by side; `synaptic_operations` counts accumulates by spikes.

    >>> spent = Energy(4, ann_macs=1e6, snn_macs=1e5, synaptic_operations=5e5, spikes=200.0, spike_rates={"relu": 0.1})
    >>> round(spent.ann_microjoule, 2), round(spent.snn_microjoule, 2)
    (4.6, 0.91)
    """

    time_steps: int
    ann_macs: float
    snn_macs: float
    synaptic_operations: float
    spikes: float
    spike_rates: dict[str, float]

    @property
    def ann_microjoule(self) -> float:
        """Energy of one image through the ANN."""
        return self.ann_macs * PICOJOULE_PER_MAC * 1e-6

    @property
    def snn_microjoule(self) -> float:
        """Energy of one image through the SNN in T steps."""
        return (self.snn_macs * PICOJOULE_PER_MAC + self.synaptic_operations * PICOJOULE_PER_AC) * 1e-6

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, with the assumptions."""
        return asdict(self) | {
            "ann_microjoule": self.ann_microjoule,
            "snn_microjoule": self.snn_microjoule,
            "assumptions": ENERGY_ASSUMPTIONS,
        }


def energy(snn: SpikingNetwork, images: Tensor, time_steps: int | None = None) -> Energy:
    """Spikes, synaptic operations and energy for one image, mean over `images` [N, C, H, W], and the ANN's beside them, at T =
    `time_steps` (default: those `snn` was converted for).

    Every spike is counted: those of hidden steps, and those that signed neurons take back, too. What it costs depends on where
    it arrives: one that a slice leaves out costs nothing there, one that a concatenation uses twice costs twice. Raises
    InputError where `snn` is no spiking network.

    >>> import micelab
    >>> snn = micelab.convert(micelab.small_cnn(activation="quant_clip"), "qcfs")
    >>> spent = energy(snn, torch.rand(2, 1, 8, 8), time_steps=4)  # images are multiplied once, spikes added after that
    >>> spent.snn_macs < spent.ann_macs, list(spent.spike_rates)[0]
    (True, 'stem.2')
    """
    time_steps = steps_of(snn, time_steps)
    signed = any(neuron.signed for neuron in snn.neurons.values())
    steps = time_steps + snn.hidden_steps
    sent: dict[str, Tensor] = {}
    for _, run in snn.stream(images, time_steps, spikes=signed):
        for name, layer in run.layers.items():
            spent = layer.count if layer.spikes is None else layer.spikes.abs().sum(0)
            spent = spent.sum(0) if layer.hidden is None else spent.sum(0) + layer.hidden.sum(0)
            sent[name] = sent.get(name, 0) + spent.cpu().double()
    spikes = {name: float(all_images.sum()) / len(images) for name, all_images in sent.items()}
    with torch.inference_mode(False):
        meter = _Arrivals(snn.layers, sent)
        meter.run(torch.zeros(1, *images.shape[1:], dtype=torch.float64))
    macs, operations = 0.0, 0.0
    for node, cost in meter.macs.items():
        sources = spike_sources(meter.traced, node.all_input_nodes[0])
        if sources == {IMAGES}:  # the image is the same at every step: once
            macs += cost
        elif sources & {IMAGES, REAL}:
            macs += cost * steps
        else:
            operations += meter.arrived[node] * cost / meter.inputs[node] / len(images)
    shortcuts = (count for node, count in meter.arrived.items() if node not in meter.macs)  # without weights: into the membrane
    operations += sum(shortcuts) / len(images)
    rates = {name: spikes[name] / (meter.neurons[name] * steps) for name in spikes}
    return Energy(time_steps, float(sum(meter.macs.values())), macs, operations, sum(spikes.values()), rates)


IMAGES, REAL = "the images", "real numbers"


def spike_sources(layers: fx.GraphModule, node: fx.Node) -> set[str]:
    """What `node` carries: the spikes of these layers, IMAGES (constant), or REAL numbers (behind weights, at every step)."""
    if is_activation(layers, node):
        return {str(node.target)}
    if node.op == "placeholder":
        return {IMAGES}
    found = {name for source in node.all_input_nodes if not is_size(source) for name in spike_sources(layers, source)}
    weighted = node.op == "call_module" and isinstance(layers.get_submodule(str(node.target)), WEIGHTED)
    return {REAL} if weighted and found != {IMAGES} else found


class _Meter(LayerRunner):
    """Runs one image and counts multiply-accumulates and inputs of every weighted layer, and every layer's neurons."""

    def __init__(self, traced: fx.GraphModule):
        super().__init__(traced)
        self.macs: dict[fx.Node, int] = {}
        self.inputs: dict[fx.Node, int] = {}
        self.neurons: dict[str, int] = {}

    def activate(self, name: str, module: Any, z: Tensor) -> Tensor:
        self.neurons[name] = z.numel()
        return z.clamp(min=0)

    def run_node(self, n: fx.Node) -> Any:
        before = self.env.get(n.all_input_nodes[0]) if n.all_input_nodes else None
        out = super().run_node(n)
        module: Any = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if isinstance(module, WEIGHTED) and isinstance(before, Tensor):
            self.inputs[n] = before.numel()
            if isinstance(module, TRANSPOSED):
                self.macs[n] = before.numel() * module.weight[0].numel()
            elif isinstance(module, CONVOLUTIONS):
                self.macs[n] = out.numel() * module.weight[0].numel()
            else:
                self.macs[n] = out.numel() * module.in_features
        return out


class _Arrivals(_Meter):
    """Runs the spikes of all images, `sent` [...] by layer, in the place of values, and counts those that arrive: at each
    weighted layer, and at each activation those that no weight stands before.
    """

    def __init__(self, layers: fx.GraphModule, sent: Mapping[str, Tensor]):
        super().__init__(copy.deepcopy(layers).cpu().double())
        self.sent = sent
        self.arrived: dict[fx.Node, float] = {}

    def activate(self, name: str, module: Any, z: Tensor) -> Tensor:
        super().activate(name, module, z)
        return self.sent[name][None]

    def run_node(self, n: fx.Node) -> Any:
        weighted = n.op == "call_module" and isinstance(self.fetch_attr(str(n.target)), WEIGHTED)
        if weighted or is_activation(self.traced, n):
            self.arrived[n] = float(self.env[n.all_input_nodes[0]].sum())
            out = super().run_node(n)
            return torch.zeros_like(out) if weighted else out  # behind weights are no spikes
        if n.op in ("placeholder", "output") or is_size(n):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return _passed_on(lambda *a, **k: getattr(self, n.op)(n.target, a, k), args, kwargs)


def _passed_on(operation: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Where the spikes among the arguments are after an affine operation: each goes on as one, whatever it is multiplied by,
    and ends where it is not used."""
    spikes: list[Tensor] = []
    map_aggregate((args, kwargs), lambda value: spikes.append(value) if isinstance(value, Tensor) else None)

    def call(*tensors: Tensor) -> Tensor:
        left = iter(tensors)
        put = lambda value: next(left) if isinstance(value, Tensor) else value
        return operation(*map_aggregate(args, put), **map_aggregate(kwargs, put))

    linear: Any = torch.func.vjp(call, *map(torch.zeros_like, spikes))
    silent, shares_of = linear
    shares = shares_of(torch.ones_like(silent))
    return call(*(torch.where(share != 0, each / share, 0) for each, share in zip(spikes, shares, strict=True))) - silent
