"""Size of a network, its spikes, and the energy of its operations by the usual count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

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

    Every spike is counted: those of hidden steps, and those that signed neurons take back, too.

    >>> import micelab
    >>> snn = micelab.convert(micelab.small_cnn(activation="quant_clip"), "qcfs")
    >>> spent = energy(snn, torch.rand(2, 1, 8, 8), time_steps=4)  # images are multiplied once, spikes added after that
    >>> spent.snn_macs < spent.ann_macs, list(spent.spike_rates)[0]
    (True, 'stem.2')
    """
    time_steps = snn.time_steps if time_steps is None else time_steps
    signed = any(neuron.signed for neuron in snn.neurons.values())
    steps = time_steps + snn.hidden_steps
    meter = _Meter(snn.layers)
    sent: dict[str, float] = dict.fromkeys(snn.neurons, 0.0)
    for part, run in snn.stream(images, time_steps, spikes=signed):
        if not meter.macs:
            with torch.inference_mode():
                meter.run(part[:1])
        for name, layer in run.layers.items():
            spent = layer.count if layer.spikes is None else layer.spikes.abs().sum(0)
            sent[name] += float(spent.double().sum()) + (0.0 if layer.hidden is None else float(layer.hidden.double().sum()))
    spikes = {name: total / len(images) for name, total in sent.items()}
    macs, operations = 0.0, 0.0
    for node, cost in meter.macs.items():
        sources = spike_sources(snn.layers, node.all_input_nodes[0])
        if sources == {IMAGES}:  # the image is the same at every step: once
            macs += cost
        elif sources & {IMAGES, REAL}:
            macs += cost * steps
        else:
            operations += sum(spikes[source] for source in sources) * cost / meter.inputs[node]
    for node in snn.layers.graph.nodes:  # a shortcut without weights adds its spikes to the membrane
        if is_activation(snn.layers, node):
            operations += sum(spikes.get(source, 0.0) for source in spike_sources(snn.layers, node.all_input_nodes[0]))
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
