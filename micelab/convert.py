"""From a trained network to a spiking one: trace, fold batch-norm, set thresholds, replace every activation by neurons."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor, fx, nn

from micelab import methods, models
from micelab.activation import clipping_bound
from micelab.exceptions import ConversionError, InputError
from micelab.graph.runner import LayerRunner, check_images, check_time_steps, image_batches
from micelab.graph.tracing import activations, replace_activations, trace
from micelab.methods.calibration import IMAGES as CALIBRATION_IMAGES
from micelab.methods.calibration import ann_means
from micelab.network.grid import round_images
from micelab.network.spiking import SpikingNetwork
from micelab.neuron.firing import IntegrateFire
from micelab.neuron.layout import over_channels

SAMPLES = 2**20
"""So many inputs of a layer, at most twice as many, are kept for percentiles and searches; the maximum is taken over all."""


def convert(
    ann: nn.Module,
    method: str,
    calibration: Tensor | Iterable[Any] | None = None,
    *,
    time_steps: int = 8,
    per_channel: bool = False,
    v0: float | None = None,
    signed: bool | None = None,
    percentile: float = 99.9,
    fold: bool = True,
) -> SpikingNetwork:
    """A spiking copy of `ann`, which is not changed.

    method: a name of `micelab.methods.METHODS`; calibration: training images [N, C, H, W] in [0, 1], or batches of them
    (a loader; labels are ignored), for the methods that need some; time_steps: the T that "mse" and "calibrated" are made
    for, and up to which "step_bias" has biases; per_channel: a threshold for each channel (a trained bound keeps its shape);
    v0 (in [0, 1]) and signed override the method's; fold: batch-norm into the weights.

    A loader is read once, a batch at a time, and may be of any length. Kept are, for thresholds, at most 2**21 inputs of each
    layer (evenly chosen) and the maximum of all; for biases, the first 256 images, after which "step_bias" reads no more.

    >>> import micelab
    >>> snn = micelab.convert(micelab.small_cnn(activation="quant_clip"), method="qcfs")
    >>> snn.simulate(torch.rand(2, 1, 8, 8), time_steps=4).logits.shape
    torch.Size([4, 2, 10])

    Raises ConversionError naming the layer that cannot be converted, InputError for options out of range.
    """
    chosen = methods.get(method)
    time_steps = check_time_steps(time_steps)
    if v0 is not None and not (isinstance(v0, Real) and 0 <= v0 <= 1):
        raise InputError(f"v0 is {v0!r}: the initial potential, in units of theta, is one number between 0 and 1")
    if not (isinstance(percentile, Real) and 0 < percentile <= 100):
        raise InputError(f"percentile is {percentile!r}: it is a number above 0 and at most 100")
    traced = trace(ann, fold)
    start = chosen.v0 if v0 is None else v0
    seen = dict.fromkeys(activations(traced), (torch.zeros(1, 0), torch.ones(1)))
    first: list[Tensor] = []

    def neuron(name: str, activation: nn.Module) -> IntegrateFire:
        samples, highest = seen[name]
        if chosen.calibrates and not bool((highest > 0).any()):
            raise ConversionError(
                f"layer `{name}` is never above 0 on the calibration images: give others, or check its training"
            )
        if not per_channel:
            samples, highest = samples.reshape(1, -1), highest.max().reshape(1)
        begin = methods.trained_start(name, activation) if start is None else float(start)
        theta = chosen.theta(methods.Observation(name, activation, samples, highest, time_steps, percentile, begin))
        if chosen.calibrates:
            theta = torch.where((theta > 0) & (highest > 0), theta, highest.max())  # a silent channel gets the layer's largest
            if (bound := clipping_bound(activation)) is not None:  # and none more than its own clip
                theta = torch.minimum(theta, bound.to(theta))
        theta = theta.reshape(()) if theta.numel() == 1 else theta
        return chosen.neuron(theta, begin, chosen.signed if signed is None else signed, layer=name)

    if not chosen.calibrates:  # an activation that does not suit is said before images are asked for
        for name, activation in activations(traced).items():
            neuron(name, activation)
    if chosen.needs_images:
        if calibration is None:
            what = "thresholds" if chosen.calibrates else "biases"
            raise InputError(f"method {method!r} sets {what} from data: give calibration=images (some training images)")
        observer = _Observer(traced, _known(calibration)) if chosen.calibrates else None
        first = _look(calibration, observer, 0 if chosen.calibrate is None else CALIBRATION_IMAGES, _home(traced))
        seen = seen if observer is None else observer.seen()
    if chosen.calibrate is not None:
        images = torch.cat(first).to(_home(traced))
        means = ann_means(traced, images)

    spiking = replace_activations(traced, neuron).requires_grad_(False).to(_home(traced).device)
    snn = SpikingNetwork(spiking, method, time_steps, chosen.hidden_steps)
    snn.spec = {"ann": dict(getattr(ann, "spec", {})), "method": method, "time_steps": time_steps, "fold": fold}
    snn.spec["signed"] = chosen.signed if signed is None else signed
    if chosen.calibrate is not None:
        chosen.calibrate(snn, images, means, time_steps)
    return snn


def restore(spec: dict[str, Any], tensors: dict[str, Tensor]) -> SpikingNetwork:
    """The spiking network of a `spec` that `convert` made, its neurons shaped as in `tensors`; numbers are not loaded."""
    chosen = methods.get(spec["method"])

    def neuron(name: str, _: nn.Module) -> IntegrateFire:
        made = chosen.neuron(1.0, 0.0, spec["signed"], layer=name)
        for kind, buffer in list(made.named_buffers()):
            shape = tensors.get(f"layers.{name}.{kind}", buffer).shape
            setattr(made, kind, torch.ones(shape))
        return made

    layers = replace_activations(trace(models.build(spec["ann"]), spec["fold"]), neuron).requires_grad_(False)
    snn = SpikingNetwork(layers, spec["method"], spec["time_steps"], chosen.hidden_steps)
    snn.spec = spec
    if "grid" in spec:
        round_images(layers, spec["grid"]["value_bits"])
        snn.most_steps = spec["grid"]["time_steps"]
    return snn


def _batches(calibration: Tensor | Iterable[Any]) -> Iterator[Tensor]:
    """The calibration images, checked, in batches."""
    if not isinstance(calibration, Iterable):
        raise InputError(f"calibration is a {type(calibration).__name__}: give training images [N, C, H, W] or batches of them")
    yield from image_batches(check_images(calibration).split(64) if isinstance(calibration, Tensor) else calibration)


def _known(calibration: Tensor | Iterable[Any]) -> int | None:
    """How many images there are, where they are at hand; a loader does not tell before it has been read."""
    return sum(map(len, _batches(calibration))) if isinstance(calibration, (Tensor, list, tuple)) else None


def _look(calibration: Tensor | Iterable[Any], observer: _Observer | None, count: int, home: Tensor) -> list[Tensor]:
    """Shows the images to the observer, batch by batch, and gives back the first `count`; with neither more to do it stops."""
    first: list[Tensor] = []
    seen = 0
    for batch in _batches(calibration):
        if seen < count:
            first.append(batch[: count - seen])
        seen += len(batch)
        if observer is not None:
            with torch.inference_mode():
                observer.run(batch.to(home))
        elif seen >= count:
            break
    if not seen:
        raise InputError("calibration holds no images: give some training images [N, C, H, W]")
    return first


def _home(traced: fx.GraphModule) -> Tensor:
    """A tensor on the network's device, of its type."""
    return next(chain(traced.parameters(), traced.buffers(), [torch.zeros(())]))


class _Observer(LayerRunner):
    """Keeps an even choice of each activation's inputs, of `images` images or (None) of any number, and their maxima [C]."""

    def __init__(self, traced: fx.GraphModule, images: int | None):
        super().__init__(traced)
        self.images = images
        self.samples: dict[str, _Samples] = {}
        self.highest: dict[str, Tensor] = {}

    def seen(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(samples [C, M], highest [C]) of the input of every activation."""
        return {name: (torch.cat(kept.parts, 1), self.highest[name]) for name, kept in self.samples.items()}

    def activate(self, name: str, module: nn.Module, z: Tensor) -> Tensor:
        bound = clipping_bound(module)
        felt = z if bound is None else torch.minimum(z, over_channels(bound.to(z), z))  # the network says nothing above it
        rows, kept = felt.transpose(0, 1).flatten(1), self.samples.setdefault(name, _Samples())
        if self.images is None:
            kept.add(rows)
        else:
            total = rows.numel() // len(z) * self.images
            stride = max(1, total // SAMPLES)
            stride += stride % 2 == 0 and stride > 1  # odd, so that it does not fall in step with the image's rows
            kept.parts.append(rows[:, ::stride].clone())
        highest = rows.amax(1)
        self.highest[name] = torch.maximum(self.highest[name], highest) if name in self.highest else highest
        return module(z)


class _Samples:
    """`parts` [C, m]: every `stride`-th of the inputs of a layer, of however many there will be and in whatever batches."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.stride, self.columns = 1, 0
        self.thinning = (3, 5)  # in turn: a power of one of them could fall in step with the image's places

    def add(self, rows: Tensor) -> None:
        """Takes its share of some more, [C, M]; where that makes too many, every third (then every fifth) stays."""
        self.parts.append(rows[:, -self.columns % self.stride :: self.stride].clone())
        self.columns += rows.shape[1]
        while len(rows) * -(-self.columns // self.stride) > 2 * SAMPLES and self.columns > self.stride:
            factor, after = self.thinning
            self.parts = [torch.cat(self.parts, 1)[:, ::factor].clone()]
            self.stride, self.thinning = self.stride * factor, (after, factor)
