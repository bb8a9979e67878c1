"""How a method sets the threshold of a layer, and the start of a trained one, from what its activation received."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from micelab.activation import NoisyQuantClip, SpikeClip, clipping_bound, quantize
from micelab.exceptions import ConversionError


@dataclass(frozen=True)
class Observation:
    """What an activation of the ANN received on the calibration images.

    `samples` [C, M] of its input z (a fixed, even choice where there were more), `highest` [C] over all, neither above the
    bound of an activation that clips; `time_steps`, `percentile`, `v0`: what the user asked for.

    >>> seen = Observation("relu", nn.ReLU(), torch.tensor([[-1.0, 0.5, 2.0]]), torch.tensor([2.0]), 4, 99.9, 0.5)
    >>> highest(seen)
    tensor([2.])
    """

    layer: str
    activation: nn.Module
    samples: Tensor
    highest: Tensor
    time_steps: int
    percentile: float
    v0: Tensor | float


def highest(seen: Observation) -> Tensor:
    """theta = the largest activation on the calibration images.

    >>> highest(Observation("relu", nn.ReLU(), torch.tensor([[-1.0, 0.5, 2.0]]), torch.tensor([2.0]), 4, 99.9, 0.5))
    tensor([2.])
    """
    return seen.highest


def percentile(seen: Observation) -> Tensor:
    """theta = the p-th percentile of relu(z), 99.9 by default: single outliers no longer slow the layer down.

    >>> percentile(Observation("relu", nn.ReLU(), torch.arange(101.0)[None], torch.tensor([100.0]), 4, 90.0, 0.5))
    tensor([90.])
    """
    wide = seen.samples.to(torch.promote_types(seen.samples.dtype, torch.float32))  # quantile knows no half precision
    return torch.quantile(wide.clamp(min=0), seen.percentile / 100, dim=1).to(seen.samples.dtype)


def mean_square_optimal(seen: Observation, candidates: int = 100) -> Tensor:
    """theta that minimizes mean (Q(z) - relu(z))^2 at T = `time_steps`, by search over 1..100 % of the largest activation.

    >>> z = torch.tensor([[0.5] * 999 + [10.0]])  # one outlier
    >>> mean_square_optimal(Observation("relu", nn.ReLU(), z, torch.tensor([10.0]), 4, 99.9, 0.5)) < 10
    tensor([True])
    """
    z = seen.samples
    best, least = seen.highest.clone(), torch.full_like(seen.highest, torch.inf)
    for step in range(1, candidates + 1):
        theta = (seen.highest * step / candidates).clamp(min=1e-12)
        error = (quantize(z.T, theta, seen.time_steps, seen.v0).T - z.clamp(min=0)).square().mean(1)
        best, least = torch.where(error < least, theta, best), torch.minimum(error, least)
    return best


def trained_bound(seen: Observation) -> Tensor:
    """theta = the clipping bound that the network was trained with: a trained one, or the 6 of nn.ReLU6.

    >>> from micelab import QuantClip
    >>> z = torch.rand(1, 9)
    >>> trained_bound(Observation("act", QuantClip(levels=4, theta=2.0), z, z.amax(1), 4, 99.9, 0.5)).detach()
    tensor(2.)
    """
    bound = clipping_bound(seen.activation)
    if bound is None:
        raise ConversionError(
            f"layer `{seen.layer}` is nn.{type(seen.activation).__name__} and has no trained bound: train with "
            'activation="clip" or "quant_clip", or convert with "max", "percentile" or "mse"'
        )
    return bound


def trained_start(layer: str, activation: nn.Module) -> Tensor:
    """v0 = the initial potential that the network was jointly trained with, in units of theta.

    >>> from micelab import SpikeClip
    >>> trained_start("act", SpikeClip(levels=4, theta=2.0))
    tensor(0.5000)
    """
    if not isinstance(activation, SpikeClip):
        raise ConversionError(
            f"layer `{layer}` is {type(activation).__name__} and has no trained initial potential: train the network jointly "
            'with micelab.joint (`micelab train --joint`), or convert it with "qcfs"'
        )
    return activation.v0.detach()


def noisy_bound(seen: Observation) -> Tensor:
    """theta = the clipping bound of a network trained with conversion noise."""
    if not isinstance(seen.activation, NoisyQuantClip):
        raise ConversionError(
            f"layer `{seen.layer}` is {type(seen.activation).__name__}, which knows no conversion noise: train with "
            'activation="noisy_quant_clip", or convert with "qcfs"'
        )
    return trained_bound(seen)
