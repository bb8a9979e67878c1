"""How many points of accuracy each of the three errors costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from micelab.activation import clip, quantize
from micelab.errors import steps_of, trace_of
from micelab.graph.runner import LayerRunner, in_own_type, labelled_batches
from micelab.metrics.accuracy import classes
from micelab.network.spiking import SpikingNetwork
from micelab.neuron.firing import over_time


@dataclass(frozen=True)
class LostPoints:
    """Accuracy in [0, 1] of the ANN, of the network with clipping alone, with clipping and quantization, and of the SNN.

    The differences are the points lost to each error; they sum to the whole loss. Negative: the error happens to help.

    >>> lost = LostPoints(ann=0.9, clipped=0.875, quantized=0.75, snn=0.5, time_steps=2, images=1000)
    >>> round(lost.clipping, 3), round(lost.quantization, 3), round(lost.timing, 3)
    (0.025, 0.125, 0.25)
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
    time_steps: int | None = None,
    snn_accuracy: float | None = None,
) -> LostPoints:
    """Why the accuracy falls from ANN to SNN: three networks in between, each with one error more than the last.

    The clipped network limits every activation to [0, theta]; the quantized one puts it on Q, the staircase of `time_steps`
    steps (default: those `snn` was converted for), with the start and the bias that the method gives its neurons; the SNN adds
    the order of spikes, and what the method does about it image by image. `snn_accuracy`: the SNN's over the same images where
    it is known already. Raises InputError where the networks do not match or their answers are no logits [N, classes].

    >>> import micelab
    >>> ann = micelab.small_cnn(activation="quant_clip")
    >>> loader = micelab.load_data("digits").validation.batches()
    >>> lost = lost_points(ann, micelab.convert(ann, "qcfs"), loader, time_steps=4)
    >>> abs(lost.clipping + lost.quantization + lost.timing - (lost.ann - lost.snn)) < 1e-9
    True
    """
    steps = steps_of(snn, time_steps)
    runners = [LayerRunner(trace_of(ann, snn)), _Substitute(snn, None), _Substitute(snn, steps)]
    right, seen = [0] * (4 if snn_accuracy is None else 3), 0
    for images, labels in labelled_batches(loader):
        with torch.inference_mode():
            predictions = [classes(runner.run(in_own_type(runner.traced, images))) for runner in runners]
        if snn_accuracy is None:
            predictions.append(classes(snn(images, steps)))
        right = [r + int((p == labels.to(p.device)).sum()) for r, p in zip(right, predictions, strict=True)]
        seen += len(labels)
    ann_share, clipped, quantized, snn_share = [r / seen for r in right] + ([] if snn_accuracy is None else [snn_accuracy])
    return LostPoints(ann_share, clipped, quantized, snn_share, steps, seen)


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
