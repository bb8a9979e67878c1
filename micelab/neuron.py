"""The integrate-and-fire neuron with soft reset: v += I(t); s = (v >= theta); v -= theta*s.

Charge is conserved: theta*sum(s) + v(T) = theta*v0 + sum(I). Signed: a neuron that has fired may take a spike back
(s = -1) when v < 0 (Wang et al., IJCAI 2022).
"""

from __future__ import annotations

import torch
from torch import Tensor

from micelab.activation import over_channels
from micelab.exceptions import InputError


def integrate_and_fire(
    current: Tensor, theta: Tensor | float, v0: Tensor | float = 0.5, signed: bool = False
) -> tuple[Tensor, Tensor]:
    """Spikes [T, N, ...] (0/1; signed: -1/0/1) and residual membrane potential v(T) [N, ...] in activation units.

    current: [T, N, ...] input of each step, activation units; theta: firing threshold > 0, scalar or [C] (channels are
    dimension 2 of `current`); v0: initial potential in units of theta, scalar or [C].

    >>> spikes, residual = integrate_and_fire(torch.full((4, 1), 0.3), theta=1.0, v0=0.5)
    >>> spikes.flatten().tolist(), round(residual.item(), 4)
    ([0.0, 1.0, 0.0, 0.0], 0.7)

    Raises InputError where T < 1 or theta is not positive. Source: Rueckauer et al. 2017, eq. 4 (reset by subtraction).
    """
    if current.dim() < 1 or current.shape[0] < 1:
        raise InputError("current has no time-step: its first dimension, T, must be at least 1")
    spikes = torch.empty_like(current)
    residual = step_through(current, theta, v0, signed, spikes)
    return spikes, residual


def step_through(
    current: Tensor, theta: Tensor | float, v0: Tensor | float, signed: bool, out: Tensor, amplitude: bool = False
) -> Tensor:
    """Writes the spikes into `out` [T, N, ...] step by step, in place, and gives back the residual [N, ...].

    The one time loop of micelab: every simulation runs through it. With `amplitude`, theta*s(t) is written instead
    of s(t): what the next layer receives.
    """
    theta = over_channels(theta, current, channel_dim=2)
    if not bool((theta > 0).all()):  # False for NaN too
        raise InputError(f"theta holds {float(theta.min()):.4g}: a firing threshold must be above 0")
    v = torch.empty_like(current[0]).copy_((over_channels(v0, current, channel_dim=2) * theta).expand_as(current[0]))
    fired = torch.zeros_like(v) if signed else None
    for t in range(current.shape[0]):
        v += current[t]
        spike = torch.ge(v, theta, out=out[t])
        if fired is not None:
            spike -= (v < 0) & (fired > 0)
            fired += spike
        if amplitude:
            v -= spike.mul_(theta)
        else:
            v -= spike * theta
    return v
