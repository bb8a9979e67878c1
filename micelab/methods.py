"""The registry of conversion methods: how each sets theta and v0, which neuron it uses, what it must be given.

A new method joins with `register(Method(...))` and is then known to `convert`, to the command line and to every table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from micelab.activation import ActivationName, SpikeClip, TrainableClip, quantize
from micelab.exceptions import ConversionError, InputError


@dataclass(frozen=True)
class Observation:
    """What an activation of the ANN received on the calibration images.

    `samples` [C, M] of its input z (a fixed, even choice where there were more), `highest` [C] over all; `time_steps`,
    `percentile`, `v0`: what the user asked for.
    """

    layer: str
    activation: nn.Module
    samples: Tensor
    highest: Tensor
    time_steps: int
    percentile: float
    v0: float


@dataclass(frozen=True)
class Method:
    """One way to convert. `theta` maps an Observation to a threshold for each row of its samples, [C] > 0.

    `v0`: initial potential in units of theta, None for the trained one; `trained_with`: the activation that the network
    should have been trained with; `calibrates`: needs calibration images;
    `hidden_steps`: steps spent beyond T, counted in every table.
    """

    name: str
    title: str
    source: str
    theta: Callable[[Observation], Tensor]
    v0: float | None = 0.0
    signed: bool = False
    calibrates: bool = True
    trained_with: ActivationName = "relu"
    hidden_steps: int = 0


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Adds a method under its name; raises InputError where the name is taken."""
    if method.name in METHODS:
        raise InputError(f"a method named {method.name!r} is registered already: choose another name")
    METHODS[method.name] = method
    return method


def get(name: str) -> Method:
    """The method of that name; raises InputError that lists what there is."""
    if name not in METHODS:
        raise InputError(f"method {name!r} is unknown: choose one of {', '.join(METHODS)}")
    return METHODS[name]


def highest(seen: Observation) -> Tensor:
    """theta = the largest activation on the calibration images."""
    return seen.highest


def percentile(seen: Observation) -> Tensor:
    """theta = the p-th percentile of relu(z), 99.9 by default: single outliers no longer slow the layer down."""
    return torch.quantile(seen.samples.clamp(min=0), seen.percentile / 100, dim=1)


def mean_square_optimal(seen: Observation, candidates: int = 100) -> Tensor:
    """theta that minimizes mean (Q(z) - relu(z))^2 at T = `time_steps`, by search over 1..100 % of the largest activation."""
    z = seen.samples
    best, least = seen.highest.clone(), torch.full_like(seen.highest, torch.inf)
    for step in range(1, candidates + 1):
        theta = (seen.highest * step / candidates).clamp(min=1e-12)
        error = (quantize(z.T, theta, seen.time_steps, seen.v0).T - z.clamp(min=0)).square().mean(1)
        best, least = torch.where(error < least, theta, best), torch.minimum(error, least)
    return best


def trained_bound(seen: Observation) -> Tensor:
    """theta = the clipping bound that the network was trained with."""
    if not isinstance(seen.activation, TrainableClip):
        raise ConversionError(
            f"layer `{seen.layer}` is nn.{type(seen.activation).__name__} and has no trained bound: train with "
            'activation="clip" or "quant_clip", or convert with "max", "percentile" or "mse"'
        )
    return seen.activation.theta.detach()


def trained_start(layer: str, activation: nn.Module) -> Tensor:
    """v0 = the initial potential that the network was jointly trained with, in units of theta."""
    if not isinstance(activation, SpikeClip):
        raise ConversionError(
            f"layer `{layer}` is {type(activation).__name__} and has no trained initial potential: train the network jointly "
            'with micelab.joint (`micelab train --joint`), or convert it with "qcfs"'
        )
    return activation.v0.detach()


register(
    Method(
        name="max",
        title="largest activation",
        source="Diehl et al., IJCNN 2015: data-based threshold balancing by the maximum",
        theta=highest,
    )
)
register(
    Method(
        name="percentile",
        title="99.9th percentile",
        source="Rueckauer et al., Frontiers in Neuroscience 2017: robust normalization by a percentile",
        theta=percentile,
    )
)
register(
    Method(
        name="mse",
        title="least square error",
        source="Li et al., ICML 2021: grid search of the least mean square error to the clip-floor; start at half a threshold",
        theta=mean_square_optimal,
        v0=0.5,
    )
)
register(
    Method(
        name="tcl",
        title="trained clip",
        source="Ho & Chang, DAC 2021 (arXiv 2008.04509): the trained clipping bound is the threshold",
        theta=trained_bound,
        calibrates=False,
        trained_with="clip",
    )
)
register(
    Method(
        name="qcfs",
        title="quantized clip",
        source="Bu et al., ICLR 2022: trained with quantization and clipping, start at half a threshold",
        theta=trained_bound,
        v0=0.5,
        calibrates=False,
        trained_with="quant_clip",
    )
)
register(
    Method(
        name="mice",
        title="joint training",
        source="after Ho & Chang, JETCAS 2023 (a reconstruction): trained with the spikes in the loop, theta and v0 as trained",
        theta=trained_bound,
        v0=None,
        calibrates=False,
        trained_with="spike_clip",
    )
)
