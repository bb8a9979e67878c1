"""The neurons of rival methods: kinds of `IntegrateFire` that all run through the same loop, `micelab.neuron.fire`.

What each takes from its authors and what is ours stands in its docstring, as documented (paper, or the authors' public code),
inferred, or our choice. `micelab.methods` registers the methods that use them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from micelab.neuron.firing import Firing, IntegrateFire, fire, over_time
from micelab.neuron.layout import over_channels

MARGIN = 1e-3
"""In units of theta: how far from 0 or theta a potential must lie to count as beyond it (the value in the authors' code)."""


def never_fires_again(residual: Tensor, theta: Tensor | float) -> Tensor:
    """Which neurons SRP silences, [N, ...] bool: those whose potential v(tau) [N, ...] is at most 0 (plus a margin).

    theta: > 0, scalar or [C]. Source: Hao et al., AAAI 2023, and their code (v <= 0.001 theta).

    >>> never_fires_again(torch.tensor([[-0.3, 0.0, 0.2]]), 1.0).tolist()
    [[True, True, False]]
    """
    return residual <= MARGIN * over_channels(theta, residual)


def shifted_start(current: Tensor, sent: Tensor, residual: Tensor, theta: Tensor | float, v0: Tensor | float) -> Tensor:
    """The start v0 [N, ...] (units of theta) from which a neuron sends one spike less, one more, or as many as before.

    current, sent: I(t) and theta*s(t) of rho steps, [rho, N, ...]; residual: v(rho) [N, ...]; theta, v0: as they were in
    these steps, scalar or [C]. v(rho) < 0 after a spike: the start falls by theta, or by what the weakest spike had to spare
    if that is more. v(rho) >= theta: it rises by theta, or by what was missing at the strongest step without spike if that
    is more. Source: Hao et al., ICLR 2023, and their code. Our choice: a neuron that fired at every step stays as it is (in
    their code it would fire for ever after).

    >>> current = torch.tensor([[[0.9]], [[-1.3]]])  # one early spike, then a debt: v(2) = 0.5 + 0.9 - 1 - 1.3 = -0.9
    >>> shifted_start(current, torch.tensor([[[1.0]], [[0.0]]]), torch.tensor([[-0.9]]), 1.0, 0.5).tolist()
    [[-0.5]]
    """
    theta, v0 = over_channels(theta, residual), over_channels(v0, residual)
    left = (current - sent).cumsum(0).add_(v0 * theta)  # v(t) after every step
    fired = sent > 0
    spare = left.masked_fill(~fired, torch.inf).amin(0) + MARGIN * theta
    missing = (1 + MARGIN) * theta - left.masked_fill(fired, -torch.inf).amax(0)
    down, up = (residual < 0) & fired.any(0), (residual >= theta) & ~fired.all(0)
    change = torch.where(down, -torch.maximum(spare, theta), torch.where(up, torch.maximum(missing, theta), 0.0))
    return v0 + change / theta


class Muting(IntegrateFire):
    """SRP (Hao et al., AAAI 2023): tau = 4 hidden steps, after which a neuron with v(tau) <= 0 is silent for all T steps.

    Documented (their code): the whole network runs the tau steps with plain neurons; then every potential goes back to
    theta/2, and nothing of the tau steps reaches the answer. A muted neuron goes on to integrate; here it also keeps its
    charge, so that charge balance holds (our choice, without effect on what it sends).
    """

    before = 4

    def respond(self, current: Tensor, out: Tensor, time_steps: int, count: bool = True) -> Firing:
        tau = self.before
        hidden, left = fire(current[:tau], self.theta, self.v0, self.signed, out[:tau], amplitude=True, count=count)
        mute = never_fires_again(left, self.theta)
        charge = current[tau:].sum(0)  # `out` may take the currents' place
        sent, residual = fire(current[tau:], self.theta, self.v0, self.signed, out[tau:], amplitude=True, count=count)
        out[tau:].masked_fill_(mute, 0.0)
        if count:
            theta, v0 = over_channels(self.theta, residual), over_channels(self.v0, residual)
            sent.masked_fill_(mute, 0.0)
            residual = torch.where(mute, v0 * theta + charge, residual)
        return Firing(sent, residual, self.v0, hidden)


class Shifting(IntegrateFire):
    """COS (Hao et al., ICLR 2023): rho = 4 hidden steps, after which the start of each neuron is shifted by a spike's worth.

    Documented (their code): layer by layer, a layer's hidden steps see the first rho steps that the layer before sends
    from its own shifted start; the shifts of `shifted_start`; one round of them. Their tables count T, ours T + rho; on
    hardware that runs all layers at once every layer would wait rho steps for the one before, which neither counts. With
    T < rho, the first T of rho steps are reported, as theirs are the first T of a longer run.
    """

    ahead = 4

    def respond(self, current: Tensor, out: Tensor, time_steps: int, count: bool = True) -> Firing:
        first = current[: self.ahead]
        sent = torch.empty_like(first)
        hidden, left = fire(first, self.theta, self.v0, self.signed, sent, amplitude=True, count=count)
        v0 = shifted_start(first, sent, left, self.theta, self.v0)
        reported = None
        if time_steps < len(current):  # before `out` takes the currents' place
            reported = fire(current[:time_steps], self.theta, v0, self.signed, sent[:time_steps], amplitude=True, count=count)
        last = fire(current, self.theta, v0, self.signed, out, amplitude=True, count=count)
        return Firing(*(reported or last), v0, hidden)


class Accumulating(IntegrateFire):
    """Accumulate, then fire: a layer waits for all T steps of its input and then sends the staircase count Q(zbar), evenly.

    An upper bound, not a rival: no order of spikes can disturb it, so its timing error is zero, but every layer starts T
    steps after the one before (compare Datta et al., TMLR 2025; PASCAL, 2025). Its true steps are T times the number of
    layers in a row. Our choice: the waiting charge drives the T steps in equal parts, which makes Q exact.
    """

    waits = True

    def drive(self, current: Tensor) -> Tensor:
        return over_time(current).expand_as(current)


class ChannelBias(IntegrateFire):
    """A plain neuron with a constant `bias` in its current (activation units; scalar or [C]): what `calibrated` sets."""

    bias: Tensor

    def __init__(self, theta: Tensor | float, v0: Tensor | float = 0.5, signed: bool = False, layer: str = ""):
        super().__init__(theta, v0, signed, layer)
        self.register_buffer("bias", torch.zeros_like(self.v0))

    def drive(self, current: Tensor) -> Tensor:
        bias = over_channels(self.bias, current, channel_dim=2)
        return (current[0] + bias).expand_as(current) if current.stride(0) == 0 else current + bias


class StepBias(IntegrateFire):
    """A plain neuron with a `bias` for each step and channel in its current ([S, C], activation units): what `step_bias` sets.

    It is made for S steps, shorter runs included; the steps after S have no bias.
    """

    bias: Tensor

    def __init__(self, theta: Tensor | float, v0: Tensor | float = 0.5, signed: bool = False, layer: str = ""):
        super().__init__(theta, v0, signed, layer)
        self.register_buffer("bias", torch.zeros(0, 1, device=self.theta.device))

    def drive(self, current: Tensor) -> Tensor:
        bias = current.new_zeros(len(current), self.bias.shape[1])
        bias[: len(self.bias)] = self.bias[: len(current)]
        return current + bias.reshape(len(current), 1, -1, *[1] * (current.dim() - 3))
