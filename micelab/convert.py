"""From a trained network to a spiking one: trace, fold batch-norm, set thresholds, replace every activation by neurons."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from micelab import methods, models
from micelab.exceptions import ConversionError, InputError
from micelab.graph import LayerRunner, activations, check_images, replace_activations, trace
from micelab.network import SpikingNetwork
from micelab.neuron import IntegrateFire

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
    (a loader; labels are ignored), for the methods that need some; time_steps: the T that "mse" searches for; per_channel:
    a threshold for each channel (a trained bound keeps its shape); v0 (in [0, 1]) and signed override the method's; fold:
    batch-norm into the weights.

    >>> import micelab
    >>> snn = micelab.convert(micelab.small_cnn(activation="quant_clip"), method="qcfs")
    >>> snn.simulate(torch.rand(2, 1, 8, 8), time_steps=4).logits.shape
    torch.Size([4, 2, 10])

    Raises ConversionError naming the layer that cannot be converted, InputError for options out of range.
    """
    chosen = methods.get(method)
    if not isinstance(time_steps, int) or time_steps < 1:
        raise InputError(f"time_steps is {time_steps!r}: give an integer of at least 1")
    if v0 is not None and not 0 <= v0 <= 1:
        raise InputError(f"v0 is {v0}: the initial potential, in units of theta, lies between 0 and 1")
    if not 0 < percentile <= 100:
        raise InputError(f"percentile is {percentile}: it lies above 0 and at most at 100")
    traced = trace(ann, fold)
    start = chosen.v0 if v0 is None else v0
    if chosen.calibrates:
        if calibration is None:
            raise InputError(f"method {method!r} sets thresholds from data: give calibration=images (some training images)")
        seen = _observe(traced, calibration)
    else:
        nothing = (torch.zeros(1, 0), torch.ones(1))
        seen = dict.fromkeys(activations(traced), nothing)

    def neuron(name: str, activation: nn.Module) -> IntegrateFire:
        samples, highest = seen[name]
        if chosen.calibrates and not bool((highest > 0).any()):
            raise ConversionError(
                f"layer `{name}` is never above 0 on the calibration images: give others, or check its training"
            )
        if not per_channel:
            samples, highest = samples.reshape(1, -1), highest.max().reshape(1)
        begin = methods.trained_start(name, activation) if start is None else float(start)
        theta = chosen.theta(
            methods.Observation(
                name,
                activation,
                samples,
                highest,
                time_steps,
                percentile,
                float(begin.mean()) if isinstance(begin, Tensor) else begin,
            )
        )
        if chosen.calibrates:
            theta = torch.where((theta > 0) & (highest > 0), theta, highest.max())  # a silent channel gets the layer's largest
        theta = theta.reshape(()) if theta.numel() == 1 else theta
        return IntegrateFire(theta, begin, chosen.signed if signed is None else signed, layer=name)

    spiking = replace_activations(traced, neuron).requires_grad_(False).to(_home(traced).device)
    snn = SpikingNetwork(spiking, method, time_steps, chosen.hidden_steps)
    snn.spec = {"ann": dict(getattr(ann, "spec", {})), "method": method, "time_steps": time_steps, "fold": fold}
    snn.spec["signed"] = chosen.signed if signed is None else signed
    return snn


def restore(spec: dict[str, Any], tensors: dict[str, Tensor]) -> SpikingNetwork:
    """The spiking network of a `spec` that `convert` made, with the thresholds' shapes of `tensors`; weights are not loaded."""

    def neuron(name: str, _: nn.Module) -> IntegrateFire:
        shape = [tensors.get(f"layers.{name}.{kind}", torch.ones(())).shape for kind in ("theta", "v0")]
        return IntegrateFire(torch.ones(shape[0]), torch.zeros(shape[1]), spec["signed"], layer=name)

    layers = replace_activations(trace(models.build(spec["ann"]), spec["fold"]), neuron).requires_grad_(False)
    snn = SpikingNetwork(layers, spec["method"], spec["time_steps"], methods.get(spec["method"]).hidden_steps)
    snn.spec = spec
    return snn


def _observe(traced: fx.GraphModule, calibration: Tensor | Iterable[Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """(samples [C, M], highest [C]) of the input of every activation over the calibration images."""
    home = _home(traced)
    if not isinstance(calibration, Iterable):
        raise InputError(f"calibration is a {type(calibration).__name__}: give training images [N, C, H, W] or batches of them")
    given = check_images(calibration).split(64) if isinstance(calibration, Tensor) else calibration
    batches = [check_images(_images_of(batch)) for batch in given]
    if not batches:
        raise InputError("calibration holds no images: give some training images [N, C, H, W]")
    observer = _Observer(traced, sum(len(batch) for batch in batches))
    with torch.inference_mode():
        for batch in batches:
            observer.run(batch.to(home))
        return {name: (torch.cat(parts, 1), observer.highest[name]) for name, parts in observer.samples.items()}


def _home(traced: fx.GraphModule) -> Tensor:
    """A tensor on the network's device, of its type."""
    return next(chain(traced.parameters(), traced.buffers(), [torch.zeros(())]))


def _images_of(batch: Any) -> Any:
    return batch[0] if isinstance(batch, (tuple, list)) and batch else batch


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
