"""The integrate-and-fire neuron with soft reset: v += I(t); s = (v >= theta); v -= theta*s.

Charge is conserved: theta*sum(s) + v(T) = theta*v0 + sum(I). Signed: a neuron that has fired may take a spike back
(s = -1) when v < 0 (Wang et al., IJCAI 2022).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar

import torch
from torch import Tensor, nn

from micelab.exceptions import InputError
from micelab.neuron.layout import over_channels

FUSED = {"cuda": "micelab.neuron.triton_kernel", "cpu": "micelab.neuron.compiled"}
"""By type of device, the module whose `fire` does all steps in one pass where it can, and gives None where it cannot."""


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
    if not current.is_floating_point():
        raise InputError(f"current is {current.dtype}: the membrane integrates floating-point numbers, so use current.float()")
    if current.dim() < 2 or current.shape[0] < 1:
        raise InputError(f"current has shape {tuple(current.shape)}: it must be [T, N, ...] with at least one time-step")
    spikes = torch.empty_like(current)
    _, residual = fire(current, check_theta(theta), v0, signed, out=spikes)
    return spikes, residual


def check_theta(theta: Tensor | float, layer: str = "") -> Tensor:
    """`theta` as a tensor if it is finite and above 0; raises InputError naming the layer otherwise.

    >>> check_theta(0.5)
    tensor(0.5000)
    """
    theta = torch.as_tensor(theta, dtype=torch.get_default_dtype()) if not isinstance(theta, Tensor) else theta
    good = (theta > 0) & torch.isfinite(theta)
    if not bool(good.all()):
        where = f"layer `{layer}`: " if layer else ""
        raise InputError(
            f"{where}theta holds {float(theta[~good].flatten()[0]):.4g}: a firing threshold must be finite and above 0"
        )
    return theta


@torch.no_grad()
def fire(
    current: Tensor,
    theta: Tensor,
    v0: Tensor | float,
    signed: bool,
    out: Tensor,
    amplitude: bool = False,
    count: bool = False,
    plus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Writes the spikes of every step into `out` [T, N, ...]; gives back (count, residual), both [N, ...].

    Every simulation runs through it. current [T, N, ...] and theta in activation units, v0 in units of theta. `out` may be
    `current` itself. With `amplitude`, theta*s(t) is written, what the next layer receives; only with `count` are the spikes
    summed over time. `plus`: a second current [T, N, ...] that is added to the first, as at the end of a residual block; `out`
    may be it, too.

    >>> current = torch.full((4, 1), 0.3)
    >>> count, residual = fire(current, torch.tensor(1.0), 0.5, False, current, count=True, plus=current.clone())
    >>> count.tolist(), current.flatten().tolist()
    ([2.0], [1.0, 0.0, 1.0, 0.0])

    All steps are done in one pass where that can be: by a Triton kernel on CUDA, by compiled C on a CPU. Elsewhere
    `step_by_step` does it. All give the same numbers.
    """
    if current.device.type in FUSED:
        module = import_module(FUSED[current.device.type])
        fused = module.fire(current, theta, v0, signed, out, amplitude, count, plus)
        if fused is not None:
            return fused
    return step_by_step(current, theta, v0, signed, out, amplitude, count, plus)


@torch.no_grad()
def step_by_step(
    current: Tensor,
    theta: Tensor,
    v0: Tensor | float,
    signed: bool,
    out: Tensor,
    amplitude: bool = False,
    count: bool = False,
    plus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `fire` does, by a plain loop over the steps on any device: what the fused neurons must equal spike for spike.

    >>> out = torch.empty(4, 1)
    >>> count, residual = step_by_step(torch.full((4, 1), 0.3), torch.tensor(1.0), 0.5, False, out, count=True)
    >>> count.tolist(), out.flatten().tolist()
    ([1.0], [0.0, 1.0, 0.0, 0.0])
    """
    v = torch.empty_like(current[0], dtype=torch.promote_types(current.dtype, torch.float32))
    theta = over_channels(theta, v)
    v.copy_((over_channels(v0, v) * theta).expand_as(v))
    fired = torch.zeros_like(v) if signed or count else v.new_empty(0)
    for t in range(current.shape[0]):
        v += current[t] if plus is None else current[t].to(v.dtype) + plus[t]
        spike = torch.ge(v, theta, out=out[t])
        if signed:
            spike -= ((v < 0) & (fired > 0)).to(spike.dtype)
        if signed or count:
            fired += spike
        sent = spike.to(v.dtype) * theta
        v -= sent
        if amplitude:
            spike.copy_(sent)
    return fired, v


@torch.no_grad()
def left(current: Tensor, theta: Tensor, v0: Tensor, time_steps: int) -> Tensor:
    """The residual that `fire` gives back for plain neurons charged by `current` [N, ...] at each of T = `time_steps` steps.

    >>> left(torch.tensor([0.3]), torch.tensor(1.0), torch.tensor(0.5), time_steps=2)  # 0.5 + 0.3 + 0.3 - 1
    tensor([0.1000])
    """
    v = torch.empty_like(current, dtype=torch.promote_types(current.dtype, torch.float32))
    theta = over_channels(theta, v)
    v.copy_((over_channels(v0, v) * theta).expand_as(v))
    for _ in range(time_steps):
        v += current
        v -= torch.ge(v, theta).to(v.dtype) * theta
    return v


def over_time(current: Tensor) -> Tensor:
    """Mean of [T, N, ...] over T, [N, ...]; where every step is one and the same number (an expanded tensor), that number.

    >>> over_time(torch.tensor([0.1]).expand(3, 1)).item() == torch.tensor(0.1).item()  # a mean of three might round
    True
    """
    return current[0] if current.stride(0) == 0 else current.mean(0)


@dataclass(frozen=True)
class Firing:
    """What a layer did in the T steps that count: `count` and `residual` [N, ...], the start `v0` it finally took (in units
    of theta: scalar, [C] or [N, ...]) and, where steps before T are spent, the spikes `hidden` sent in them [N, ...].

    >>> neurons = IntegrateFire(theta=1.0, v0=0.5)
    >>> done = neurons.respond(torch.full((4, 1), 0.3), out=torch.empty(4, 1), time_steps=4)
    >>> done.count, done.residual
    (tensor([1.]), tensor([0.7000]))
    """

    count: Tensor
    residual: Tensor
    v0: Tensor
    hidden: Tensor | None = None


class IntegrateFire(nn.Module):
    """A layer of integrate-and-fire neurons: holds `theta` and `v0` (scalar or [C]) as buffers, so they are in `state_dict`.

    Other kinds of neuron are subclasses that override `drive` or `respond` and say what they ask of the simulation: `before`:
    steps that the whole network runs before the T that count; `ahead`: steps of its input that a layer sees before its first
    step; `waits`: whether a layer starts only when the layer before has ended.

    >>> neurons = IntegrateFire(theta=2.0, v0=0.5)
    >>> neurons, neurons(torch.full((4, 1), 0.6)).flatten().tolist()
    (IntegrateFire(theta=2, v0=0.5), [0.0, 2.0, 0.0, 0.0])
    """

    before: ClassVar[int] = 0
    ahead: ClassVar[int] = 0
    waits: ClassVar[bool] = False

    theta: Tensor
    v0: Tensor

    def __init__(self, theta: Tensor | float, v0: Tensor | float = 0.5, signed: bool = False, layer: str = ""):
        super().__init__()
        self.register_buffer("theta", check_theta(theta, layer).detach().clone().float())
        self.register_buffer("v0", torch.as_tensor(v0, dtype=torch.float32).detach().clone().to(self.theta.device))
        self.signed = signed

    @property
    def adds(self) -> bool:
        """Whether `respond_to_sum` may be used: not where a kind of neuron has its own `drive` or `respond`."""
        kind = type(self)
        return kind.drive is IntegrateFire.drive and kind.respond is IntegrateFire.respond

    def drive(self, current: Tensor) -> Tensor:
        """The current that charges the membrane, [T, N, ...], for the one that arrives, [T, N, ...]; here the same."""
        return current

    def respond(self, current: Tensor, out: Tensor, time_steps: int, count: bool = True) -> Firing:
        """Writes theta*s(t) of every step into `out` (it may be `current` itself), for currents as `drive` gives them.

        The first `time_steps` steps after those `before` count; with `count` off, the counts given back mean nothing.
        """
        sent, residual = fire(current, self.theta, self.v0, self.signed, out, amplitude=True, count=count)
        return Firing(sent, residual, self.v0)

    def respond_to_sum(self, first: Tensor, second: Tensor, out: Tensor, count: bool = True) -> Firing:
        """Writes theta*s(t) for the sum of two currents [T, N, ...] into `out`, which may be one of them; only if `adds`."""
        sent, residual = fire(first, self.theta, self.v0, self.signed, out, amplitude=True, count=count, plus=second)
        return Firing(sent, residual, self.v0)

    def forward(self, current: Tensor) -> Tensor:
        """theta*s(t), [T, N, ...], for currents [T, N, ...]."""
        out = torch.empty_like(current)
        self.respond(self.drive(current), out, len(current) - self.before)
        return out

    def extra_repr(self) -> str:
        theta = f"theta={self.theta.item():.3g}" if self.theta.dim() == 0 else f"channels={len(self.theta)}"
        v0 = f"v0={self.v0.item():.3g}" if self.v0.dim() == 0 else "v0 per channel"
        return f"{theta}, {v0}" + (", signed" if self.signed else "")
