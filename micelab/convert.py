"""From a trained network to a spiking one: trace, fold batch-norm, set thresholds, replace every activation by neurons."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor, fx, nn

from micelab import methods, models
from micelab.exceptions import ConversionError, InputError
from micelab.graph.runner import LayerRunner, check_images, check_time_steps, image_batches
from micelab.graph.tracing import activations, replace_activations, trace
from micelab.methods.calibration import IMAGES as CALIBRATION_IMAGES
from micelab.methods.calibration import ann_means
from micelab.network.grid import round_images
from micelab.network.spiking import SpikingNetwork
from micelab.neuron.firing import IntegrateFire

SAMPLES = 2**20
"""At most so many inputs of a layer are kept for percentiles and searches; the maximum is taken over all."""


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
    (a loader; labels are ignored), for the methods that need some; all are kept until the thresholds are set, and a few hundred
    do; time_steps: the T that "mse" and "calibrated" are made for, and up to which "step_bias" has biases; per_channel: a
    threshold for each channel (a trained bound keeps its shape);
    v0 (in [0, 1]) and signed override the method's; fold: batch-norm into the weights.

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
    batches: list[Tensor] = []
    seen = dict.fromkeys(activations(traced), (torch.zeros(1, 0), torch.ones(1)))
    if chosen.needs_images:
        if calibration is None:
            what = "thresholds" if chosen.calibrates else "biases"
            raise InputError(f"method {method!r} sets {what} from data: give calibration=images (some training images)")
        batches = _batches(calibration)
    if chosen.calibrates:
        seen = _observe(traced, batches)
    if chosen.calibrate is not None:
        images = torch.cat(batches)[:CALIBRATION_IMAGES].to(_home(traced))
        means = ann_means(traced, images)

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
        theta = theta.reshape(()) if theta.numel() == 1 else theta
        return chosen.neuron(theta, begin, chosen.signed if signed is None else signed, layer=name)

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


def _batches(calibration: Tensor | Iterable[Any]) -> list[Tensor]:
    """The calibration images, checked, in batches."""
    if not isinstance(calibration, Iterable):
        raise InputError(f"calibration is a {type(calibration).__name__}: give training images [N, C, H, W] or batches of them")
    batches = list(image_batches(check_images(calibration).split(64) if isinstance(calibration, Tensor) else calibration))
    if not batches:
        raise InputError("calibration holds no images: give some training images [N, C, H, W]")
    return batches


def _observe(traced: fx.GraphModule, batches: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(samples [C, M], highest [C]) of the input of every activation over the calibration images."""
    home = _home(traced)
    observer = _Observer(traced, sum(len(batch) for batch in batches))
    with torch.inference_mode():
        for batch in batches:
            observer.run(batch.to(home))
        return {name: (torch.cat(parts, 1), observer.highest[name]) for name, parts in observer.samples.items()}


def _home(traced: fx.GraphModule) -> Tensor:
    """A tensor on the network's device, of its type."""
    return next(chain(traced.parameters(), traced.buffers(), [torch.zeros(())]))


class _Observer(LayerRunner):
    """Keeps an even choice of each activation's inputs and their maximum per channel."""

    def __init__(self, traced: fx.GraphModule, images: int):
        super().__init__(traced)
        self.images = images
        self.samples: dict[str, list[Tensor]] = {}
        self.highest: dict[str, Tensor] = {}

    def activate(self, name: str, module: nn.Module, z: Tensor) -> Tensor:
        rows = z.transpose(0, 1).flatten(1)
        total = rows.numel() // len(z) * self.images
        stride = max(1, total // SAMPLES)
        stride += stride % 2 == 0 and stride > 1  # odd, so that it does not fall in step with the image's rows
        self.samples.setdefault(name, []).append(rows[:, ::stride].clone())
        highest = rows.amax(1)
        self.highest[name] = torch.maximum(self.highest[name], highest) if name in self.highest else highest
        return module(z)
