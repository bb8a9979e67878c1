"""What a conversion is worth: accuracy over time, points lost to each error, spikes, synaptic operations and energy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from micelab.activation import clip, quantize
from micelab.exceptions import InputError
from micelab.graph.affine import CONVOLUTIONS, TRANSPOSED, WEIGHTED, is_size
from micelab.graph.runner import LayerRunner
from micelab.graph.tracing import is_activation, trace
from micelab.network.spiking import Precision, SpikingNetwork
from micelab.neuron.firing import over_time

PICOJOULE_PER_MAC = 4.6
PICOJOULE_PER_AC = 0.9
ENERGY_ASSUMPTIONS = (
    "Energy: 4.6 pJ a 32-bit multiply-accumulate, 0.9 pJ an accumulate (45 nm CMOS; M. Horowitz, ISSCC 2014). Counted are the "
    "arithmetic operations of convolutions, linear layers and shortcuts alone: no memory traffic, no neuron updates, no leakage. "
    "The first layer sees real-valued images, constant over time, and counts as multiply-accumulates once. A spike costs one "
    "accumulate for each weight it meets, image borders included."
)


@dataclass(frozen=True)
class AccuracyCurve:
    """Accuracy in [0, 1] after each of `time_steps`; `true_steps` counts what a method spends beyond them.

    That is `hidden_steps` more, and `turns` times as many where so many layers in a row wait for one another.
    """

    time_steps: tuple[int, ...]
    accuracy: tuple[float, ...]
    images: int
    method: str
    hidden_steps: int = 0
    turns: int = 1

    @property
    def true_steps(self) -> tuple[int, ...]:
        """T x turns + hidden steps, for each T."""
        return tuple(self.true(steps) for steps in self.time_steps)

    @property
    def true_words(self) -> str:
        """The same as a formula: "T", "T + 4", "19 T"."""
        steps = "T" if self.turns == 1 else f"{self.turns} T"
        return f"{steps} + {self.hidden_steps}" if self.hidden_steps else steps

    def true(self, time_steps: int) -> int:
        """The steps that a run of T = `time_steps` takes in truth."""
        return time_steps * self.turns + self.hidden_steps

    def within(self, true_steps: int) -> float | None:
        """Accuracy at the largest T that takes at most so many true steps; None where not even the smallest does."""
        fitting = [a for steps, a in zip(self.time_steps, self.accuracy, strict=True) if self.true(steps) <= true_steps]
        return fitting[-1] if fitting else None

    def at(self, time_steps: int) -> float:
        """Accuracy after so many steps."""
        return self.accuracy[self.time_steps.index(time_steps)]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and names."""
        return asdict(self) | {"true_steps": self.true_steps}


def accuracy_curve(
    snn: SpikingNetwork,
    loader: Iterable[tuple[Tensor, Tensor]],
    time_steps: Sequence[int] = (1, 2, 4, 8, 16, 32),
    precision: Precision = "fp32",
) -> AccuracyCurve:
    """Accuracy of `snn` after each number of steps, over batches of (images in [0, 1], labels).

    One simulation at the largest T gives every T, since the logits after t steps do not depend on what comes later; only
    a network whose layers wait for one another is simulated for each T by itself. `precision`: "int8" and "bf16" are the
    fast modes of `SpikingNetwork.simulate`.
    """
    wanted = tuple(sorted(set(time_steps)))
    if not wanted or wanted[0] < 1:
        raise InputError(f"time_steps is {tuple(time_steps)}: give numbers of at least 1")
    right, seen = torch.zeros(len(wanted), dtype=torch.long), 0
    for images, labels in loader:
        if snn.turns == 1:
            predictions = snn.simulate(images, wanted[-1], record=False, precision=precision).predictions[[t - 1 for t in wanted]]
        else:
            predictions = torch.stack([snn(images, t, precision).argmax(-1) for t in wanted])
        right += (predictions == labels.to(predictions.device)).sum(1).cpu()
        seen += len(labels)
    if not seen:
        raise InputError("the loader gave no images: give batches of (images, labels)")
    return AccuracyCurve(wanted, tuple((right / seen).tolist()), seen, snn.method, snn.hidden_steps, snn.turns)


@dataclass(frozen=True)
class LostPoints:
    """Accuracy in [0, 1] of the ANN, of the network with clipping alone, with clipping and quantization, and of the SNN.

    The differences are the points lost to each error; they sum to the whole loss. Negative: the error happens to help.
    """

    ann: float
    clipped: float
    quantized: float
    snn: float
    time_steps: int
    images: int

    @property
    def clipping(self) -> float:
        """Lost to activations above theta."""
        return self.ann - self.clipped

    @property
    def quantization(self) -> float:
        """Lost to the staircase of T steps."""
        return self.clipped - self.quantized

    @property
    def timing(self) -> float:
        """Lost to the order in which spikes arrive."""
        return self.quantized - self.snn

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers."""
        return asdict(self) | {kind: getattr(self, kind) for kind in ("clipping", "quantization", "timing")}


def lost_points(
    ann: nn.Module,
    snn: SpikingNetwork,
    loader: Iterable[tuple[Tensor, Tensor]],
    time_steps: int = 8,
    snn_accuracy: float | None = None,
) -> LostPoints:
    """Why the accuracy falls from ANN to SNN: three networks in between, each with one error more than the last.

    The clipped network limits every activation to [0, theta]; the quantized one puts it on Q, the staircase of `time_steps`
    steps, with the start and the bias that the method gives its neurons; the SNN adds the order of spikes, and what the
    method does about it image by image. `snn_accuracy`: the SNN's over the same images where it is known already.
    """
    runners = [LayerRunner(trace(ann)), _Substitute(snn, None), _Substitute(snn, time_steps)]
    right, seen = [0] * (4 if snn_accuracy is None else 3), 0
    for images, labels in loader:
        with torch.inference_mode():
            predictions = [runner.run(images).argmax(1) for runner in runners]
        if snn_accuracy is None:
            predictions.append(snn.simulate(images, time_steps, record=False).predictions[-1])
        right = [r + int((p == labels.to(p.device)).sum()) for r, p in zip(right, predictions, strict=True)]
        seen += len(labels)
    if not seen:
        raise InputError("the loader gave no images: give batches of (images, labels)")
    ann_right, clipped, quantized, *simulated = (r / seen for r in right)
    return LostPoints(ann_right, clipped, quantized, simulated[0] if simulated else snn_accuracy or 0.0, time_steps, seen)


class _Substitute(LayerRunner):
    """The spiking network with every neuron replaced by its clip (levels None) or its staircase."""

    def __init__(self, snn: SpikingNetwork, levels: int | None):
        super().__init__(snn.layers)
        self.levels = levels

    def activate(self, name: str, module: Any, z: Tensor) -> Tensor:
        if self.levels is None:
            return clip(z, module.theta)
        mean = over_time(module.drive(z.expand(self.levels, *z.shape)))
        return quantize(mean, module.theta, self.levels, module.v0)


@dataclass(frozen=True)
class Size:
    """Parameters of a network and multiply-accumulates for one image."""

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
    """Operations and energy of one image, ANN and SNN side by side; `synaptic_operations` counts accumulates by spikes."""

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


def energy(snn: SpikingNetwork, images: Tensor, time_steps: int = 8) -> Energy:
    """Spikes, synaptic operations and energy for one image, mean over `images` [N, C, H, W], and the ANN's beside them.

    Every spike is counted: those of hidden steps, and those that signed neurons take back, too.
    """
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
