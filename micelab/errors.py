"""The three errors of conversion as one exact sum, neuron by neuron (docs/errors.md):

    phi - relu(z_ann) = [phi - Q(zbar)]                      timing
                      + [Q(zbar) - clip(zbar, 0, theta)]     quantization
                      + [clip(zbar, 0, theta) - relu(zbar)]  clipping
                      + [relu(zbar) - relu(z_ann)]           inherited from the layers before

phi is the rate theta*n/T of the spiking neuron, zbar its mean input current, z_ann the same neuron's input in the ANN and
Q(z) = theta*clip(floor(T*z/theta + v0), 0, T)/T the rate of a neuron whose current is constant.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from micelab.activation import clip, clipping_bound
from micelab.exceptions import InputError
from micelab.graph.runner import InputCollector, check_time_steps, image_batches, in_own_type
from micelab.graph.tracing import activations, trace
from micelab.network.records import LayerRun
from micelab.network.spiking import SpikingNetwork
from micelab.neuron.firing import IntegrateFire, check_theta, fire
from micelab.neuron.layout import over_channels

KINDS = ("timing", "quantization", "clipping", "inherited")
"""The four terms, in the order in which every table and figure shows them."""


def split_error(
    rate: Tensor, mean_current: Tensor, z_ann: Tensor, theta: Tensor | float, v0: Tensor | float, time_steps: int
) -> dict[str, Tensor]:
    """The four terms and their "total", each [N, ...] in activation units, of one layer.

    rate, mean_current: phi and zbar of the spiking layer (a bias that a method gives its neurons is part of the current);
    z_ann: the ANN's input of the same neurons; theta: scalar or [C]; v0: as the neurons finally started, also [N, ...]. Q is
    the rate of this very neuron under the constant current zbar, run step by step: in real numbers that is the formula
    above, and where rounding decides on which side of a step zbar lies, it decides alike in phi and in Q.

    >>> terms = split_error(torch.tensor([[0.5]]), torch.tensor([[0.8]]), torch.tensor([[0.9]]), 1.0, 0.5, time_steps=4)
    >>> {kind: round(term.item(), 3) for kind, term in terms.items()}
    {'timing': -0.25, 'quantization': -0.05, 'clipping': 0.0, 'inherited': -0.1, 'total': -0.4}
    """
    theta = check_theta(torch.as_tensor(theta, dtype=rate.dtype, device=rate.device))
    if not rate.shape == mean_current.shape == z_ann.shape:
        raise InputError(
            f"rate {tuple(rate.shape)}, mean_current {tuple(mean_current.shape)} and z_ann {tuple(z_ann.shape)} "
            "must be of one shape: one number for each neuron"
        )
    current = mean_current.expand(time_steps, *mean_current.shape)
    spent = torch.empty_like(mean_current).expand_as(current)
    count, _ = fire(current, theta, v0, signed=False, out=spent, count=True)
    staircase = count * over_channels(theta, count) / time_steps
    clipped = clip(mean_current, theta)
    positive, ann = mean_current.clamp(min=0), z_ann.clamp(min=0)
    return {
        "timing": rate - staircase,
        "quantization": staircase - clipped,
        "clipping": clipped - positive,
        "inherited": positive - ann,
        "total": rate - ann,
    }


@dataclass(frozen=True)
class Term:
    """One error term over all neurons and images of a layer, in activation units."""

    mean: float
    mean_abs: float
    rms: float


@dataclass(frozen=True)
class LayerErrors:
    """The terms of one layer; `signal` is the root-mean-square of relu(z_ann), the yardstick; shares are in [0, 1].

    over_firing: neurons that fired more often than their mean current asks for (v(T) < 0 after a spike); under_firing:
    less often (v(T) >= theta, not saturated); saturated: fired at every step. trained_clip: the ANN clips at this very
    theta itself, so its accuracy already includes the clipping error.
    """

    timing: Term
    quantization: Term
    clipping: Term
    inherited: Term
    total: Term
    signal: float
    over_firing: float
    under_firing: float
    saturated: float
    theta: float
    v0: float
    trained_clip: bool = False

    @property
    def relative(self) -> float:
        """rms of the total over the signal: 0 is perfect, 1 as wrong as silence."""
        return self.share("total")

    def share(self, kind: str) -> float:
        """rms of one term, or of the "total", over the signal; 0 where there is none."""
        return float(getattr(self, kind).rms) / self.signal if self.signal else 0.0

    def own(self) -> dict[str, float]:
        """Mean square of the errors that arise in this layer and that the ANN was not trained with."""
        kinds = KINDS[:2] if self.trained_clip else KINDS[:3]
        return {kind: getattr(self, kind).rms ** 2 for kind in kinds}


@dataclass(frozen=True)
class ErrorTable:
    """The errors of every spiking layer, input to output, over `images` images at `time_steps` steps."""

    layers: dict[str, LayerErrors]
    time_steps: int
    images: int
    method: str

    def words(self) -> str:
        """What the table says, in plain words: which layer loses most, to which error, and what helps."""
        return _words(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and names."""
        return asdict(self)

    @classmethod
    def from_dict(cls, words: dict[str, Any]) -> ErrorTable:
        """The table that `to_dict` gave."""
        terms: dict[str, Any] = dict.fromkeys((*KINDS, "total"), Term)
        layers: dict[str, Any] = {}
        for name, layer in words["layers"].items():
            fields: dict[str, Any] = {key: terms[key](**value) if key in terms else value for key, value in layer.items()}
            layers[name] = LayerErrors(**fields)
        return cls(**words | {"layers": layers})


def check_spiking(snn: Any) -> None:
    """Raises InputError where `snn` is no spiking network."""
    if not isinstance(snn, SpikingNetwork):
        raise InputError(f"snn is a {type(snn).__name__}: give the SpikingNetwork that micelab.convert gave")


def steps_of(snn: SpikingNetwork, time_steps: Any) -> int:
    """The T to measure `snn` at: `time_steps`, or, where that is None, what it was converted for; both are checked."""
    check_spiking(snn)
    return snn.time_steps if time_steps is None else check_time_steps(time_steps)


def trace_of(ann: nn.Module, snn: SpikingNetwork) -> fx.GraphModule:
    """The graph of `ann`; raises InputError where its activations are not the layers of `snn`."""
    traced = trace(ann)
    if list(activations(traced)) != list(snn.neurons):
        raise InputError(
            f"the networks do not match: the ANN's activations are {', '.join(activations(traced))}, the spiking layers "
            f"{', '.join(snn.neurons)}; convert this very ANN"
        )
    return traced


def error_breakdown(
    ann: nn.Module, snn: SpikingNetwork, images: Tensor | Iterable[Any], time_steps: int | None = None
) -> ErrorTable:
    """The four error terms of every layer of `snn` against `ann`, for images [N, C, H, W] in [0, 1] or batches of them,
    at T = `time_steps` (default: those `snn` was converted for).

    Images go through in chunks, sums are kept in float64. Raises InputError where the networks' layers do not match, or `snn`
    is no spiking network.

    >>> import micelab
    >>> ann = micelab.small_cnn(activation="quant_clip")
    >>> table = micelab.error_breakdown(ann, micelab.convert(ann, "qcfs"), torch.rand(4, 1, 8, 8), time_steps=1)
    >>> table.layers["stem.2"].timing.rms  # one step has no order
    0.0
    """
    time_steps = steps_of(snn, time_steps)
    collector = InputCollector(trace_of(ann, snn))
    sums: dict[str, _Sums] = {name: _Sums() for name in snn.neurons}
    seen = 0
    for batch in image_batches(images):
        for part, run in snn.stream(batch, time_steps):
            with torch.inference_mode():
                collector.run(in_own_type(collector.traced, part))
                for name, layer in run.layers.items():
                    if layer.residual.shape != collector.inputs[name].shape:
                        raise InputError(
                            f"the networks do not match: layer `{name}` has neurons {tuple(layer.residual.shape)}, the ANN's "
                            f"activation {tuple(collector.inputs[name].shape)}; convert this very ANN"
                        )
                    sums[name].add(layer, collector.inputs[name])
            seen += len(part)
    if not seen:
        raise InputError("there are no images: give a tensor [N, C, H, W] or batches of them")
    layers = {name: total.errors(snn.neurons[name], collector.activations[name]) for name, total in sums.items()}
    return ErrorTable(layers, time_steps, seen, snn.method)


class _Sums:
    """Running sums of one layer, chunk by chunk."""

    def __init__(self) -> None:
        self.terms = {kind: [0.0, 0.0, 0.0] for kind in (*KINDS, "total")}
        self.signal, self.shares, self.neurons = 0.0, [0, 0, 0], 0

    def add(self, run: LayerRun, z_ann: Tensor) -> None:
        terms = split_error(run.rate, run.mean_current, z_ann, run.theta, run.v0, run.time_steps)
        for kind, term in terms.items():
            term = term.double()
            sums = (term.sum(), term.abs().sum(), term.square().sum())
            self.terms[kind] = [a + float(b) for a, b in zip(self.terms[kind], sums, strict=True)]
        theta = over_channels(run.theta, run.residual)
        saturated = run.count >= run.time_steps
        flags = ((run.residual < 0) & (run.count > 0), (run.residual >= theta) & ~saturated, saturated)
        self.shares = [a + int(flag.sum()) for a, flag in zip(self.shares, flags, strict=True)]
        self.signal += float(z_ann.clamp(min=0).double().square().sum())
        self.neurons += z_ann.numel()

    def errors(self, neuron: IntegrateFire, activation: nn.Module) -> LayerErrors:
        n = max(1, self.neurons)
        terms = {kind: Term(s[0] / n, s[1] / n, (s[2] / n) ** 0.5) for kind, s in self.terms.items()}
        over, under, saturated = (share / n for share in self.shares)
        signal = (self.signal / n) ** 0.5
        return LayerErrors(
            **terms,
            signal=signal,
            over_firing=over,
            under_firing=under,
            saturated=saturated,
            theta=float(neuron.theta.mean()),
            v0=float(neuron.v0.mean()),
            trained_clip=_clips_alike(activation, neuron),
        )


def _clips_alike(activation: nn.Module, neuron: IntegrateFire) -> bool:
    bound = clipping_bound(activation)
    return bound is not None and torch.allclose(bound.to(neuron.theta), neuron.theta)


_HELP = {
    "timing": "more time-steps, signed spikes, or training with the spikes in the loop",
    "quantization": "more time-steps, a smaller threshold, or training with quantized activations (QCFS)",
    "clipping": "a larger threshold (a higher percentile), or training with a clip (TCL, QCFS)",
}


def _words(table: ErrorTable) -> str:
    own = {name: sum(layer.own().values()) / layer.signal**2 for name, layer in table.layers.items() if layer.signal}
    if not own or max(own.values()) == 0:
        return f"At T = {table.time_steps} the spiking network says exactly what the ANN says, in every layer."
    worst = max(own, key=lambda name: own[name])
    layer = table.layers[worst]
    kind = max(layer.own(), key=lambda k: layer.own()[k])
    share = layer.own()[kind] / sum(layer.own().values())
    last, end = list(table.layers.items())[-1]
    remedy = ("a start at v0 = 1/2, " if kind != "clipping" and layer.v0 < 0.5 else "") + _HELP[kind]
    lines = [
        f"At T = {table.time_steps}, layer `{worst}` adds the most error of its own: {100 * own[worst] ** 0.5:.0f} % of its "
        f"signal, {100 * share:.0f} % of that (in squares) by {kind}.",
        f"There {100 * layer.over_firing:.1f} % of the neurons over-fire, {100 * layer.under_firing:.1f} % under-fire and "
        f"{100 * layer.saturated:.1f} % are saturated."
        + (" Clipping is left out: the ANN was trained with the same bound." if layer.trained_clip else ""),
        f"What helps against {kind}: {remedy}.",
        f"At the last spiking layer, `{last}`, the error has grown to {100 * end.relative:.0f} % of the signal"
        + (f", {100 * min(1.0, end.inherited.rms / end.total.rms):.0f} % as large inherited." if end.total.rms else "."),
    ]
    return "\n".join(lines)
