"""Activations of the network to be converted: ReLU, trainable clip (TCL), quantized clip (QCFS) and its kin: with noise
(NQ), and jointly trained.

Pure functions hold the mathematics; the modules store `theta` and call one. `theta` is kept positive by storing its
logarithm, and its gradient comes free: the activation is homogeneous of degree one in (z, theta).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from micelab.exceptions import InputError
from micelab.neuron.compiled import rate_gradient, staircase
from micelab.neuron.layout import over_channels

ActivationName = Literal["relu", "clip", "quant_clip", "noisy_quant_clip", "spike_clip"]


def clip(z: Tensor, theta: Tensor | float) -> Tensor:
    """z limited to [0, theta]: [N, C, ...] in activation units, same shape out (TCL, Ho & Chang, DAC 2021, eq. 3).

    >>> clip(torch.tensor([-1.0, 0.5, 3.0]), 2.0)
    tensor([0.0000, 0.5000, 2.0000])
    """
    theta = over_channels(theta, z) if isinstance(theta, Tensor) else theta
    return torch.minimum(z.clamp(min=0), theta) if isinstance(theta, Tensor) else z.clamp(0, theta)


def quantize(z: Tensor, theta: Tensor | float, levels: int, v0: Tensor | float = 0.5) -> Tensor:
    """Q(z) = theta * clip(floor(levels*z/theta + v0), 0, levels) / levels: the staircase.

    z: [N, C, ...]; theta > 0 and v0 (in units of theta): scalar or [C]; levels: integer >= 1. With `levels` the number of
    time-steps it is the rate of a neuron whose current is constant. Raises InputError for levels below 1. Source: QCFS, Bu et
    al., ICLR 2022, eq. 8.

    >>> quantize(torch.tensor([-1.0, 0.3, 0.9, 5.0]), theta=2.0, levels=4)
    tensor([0.0000, 0.5000, 1.0000, 2.0000])
    """
    if levels < 1:
        raise InputError(f"levels is {levels!r}: a staircase has at least one")
    theta, v0 = over_channels(theta, z), over_channels(v0, z)
    return theta * torch.floor(levels * z / theta + v0).clamp(0, levels) / levels


class _StraightThrough(torch.autograd.Function):
    """Forward: `rate` as it is given. Backward: that of Q at z, with floor passing its gradient.

    The rate is homogeneous of degree one in (z, theta), so theta's gradient is (rate - gate*z)/theta (Euler); one unit of
    v0 is one spike more, theta/levels. Both hold for the staircase and for a true spike count alike.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, log_theta: Tensor, v0: Tensor | None, rate: Tensor, levels: int) -> Tensor:
        ctx.save_for_backward(z, rate, log_theta)
        ctx.levels = levels
        return rate.view_as(rate)  # an input given back as it is would be taken for a view

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, rate, log_theta = ctx.saved_tensors
        fused = _in_one_pass(rate_gradient, grad, z, rate, log_theta.exp(), ctx.levels)
        if fused is not None:
            grad_z, of_theta, spikes = fused
            return grad_z, of_theta, spikes * log_theta.exp() / ctx.levels if ctx.needs_input_grad[2] else None, None, None
        theta = over_channels(log_theta.exp(), z)
        grad_z = grad * ((z > 0) & (z < theta))
        dims = [d for d in range(z.dim()) if log_theta.dim() == 0 or d != 1]
        # d rate/d theta = (rate - gate*z)/theta, and d theta/d log_theta = theta
        grad_log_theta = ((grad * rate) - (grad_z * z)).sum(dims, dtype=log_theta.dtype)
        grad_v0 = None
        if ctx.needs_input_grad[2]:
            gated = grad * ((z > -theta / ctx.levels) & (z < theta))  # from where v0 <= 1 can make a spike
            grad_v0 = gated.sum(dims, dtype=log_theta.dtype) * log_theta.exp() / ctx.levels
        return grad_z, grad_log_theta, grad_v0, None, None


def _in_one_pass(function: Callable[..., Any], *args: Any) -> Any:
    """What the compiled `function` gives; None where the operations of torch must do."""
    return None if torch.compiler.is_compiling() or args[0].device.type != "cpu" else function(*args)


def straight_through(z: Tensor, rate: Tensor, log_theta: Tensor, v0: Tensor | None, levels: int) -> Tensor:
    """`rate` with the gradient of Q at z: [N, C, ...] in activation units, same shape out.

    rate: what the neurons said, the staircase Q(z) or theta*n/T of true spikes (it carries no gradient itself);
    log_theta, v0: scalar or [C], v0 None where it is fixed; levels: T. Source: QCFS (Bu et al., ICLR 2022) for the gate
    0 < z < theta; the rest follows from charge balance.

    >>> z = torch.tensor([0.3, 0.9, 5.0], requires_grad=True)
    >>> straight_through(z, torch.tensor([0.5, 1.0, 2.0]), torch.tensor(2.0).log(), None, levels=4).sum().backward()
    >>> z.grad.tolist()
    [1.0, 1.0, 0.0]
    """
    return _StraightThrough.apply(z, log_theta, v0, rate, levels)


class TrainableClip(nn.Module):
    """y = clip(z, 0, theta) with theta trained (TCL, Ho & Chang, DAC 2021).

    theta: start of the bound, > 0; channels: one theta for each of so many channels, None for one per layer.

    >>> TrainableClip(theta=2.0)(torch.tensor([-1.0, 0.5, 3.0])).tolist()
    [0.0, 0.5, 2.0]
    """

    levels: Any = None

    def __init__(self, theta: float = 4.0, channels: int | None = None):
        super().__init__()
        if not (theta > 0 and math.isfinite(theta)):
            raise InputError(f"theta is {theta}: the clipping bound must be a finite number above 0")
        shape = () if channels is None else (channels,)
        self.log_theta = nn.Parameter(torch.full(shape, math.log(theta)))

    @property
    def theta(self) -> Tensor:
        """The clipping bound, > 0, scalar or [C]."""
        return self.log_theta.exp()

    def forward(self, z: Tensor) -> Tensor:
        return clip(z, self.theta)

    def extra_repr(self) -> str:
        theta = self.theta.detach()
        levels = "" if self.levels is None else f", levels={self.levels}"
        return (f"theta={theta.item():.3g}" if theta.dim() == 0 else f"channels={len(theta)}") + levels


class QuantClip(TrainableClip):
    """y = theta*clip(floor(levels*z/theta + 1/2), 0, levels)/levels, straight-through for floor (QCFS, ICLR 2022).

    >>> QuantClip(levels=4, theta=2.0)(torch.tensor([0.3, 0.9, 5.0])).tolist()
    [0.5, 1.0, 2.0]
    """

    def __init__(self, levels: int = 8, theta: float = 4.0, channels: int | None = None):
        super().__init__(theta, channels)
        if not isinstance(levels, int) or levels < 1:
            raise InputError(f"levels is {levels!r}: the quantized clip needs an integer of at least 1")
        self.levels: int = levels

    @property
    def v0(self) -> Tensor | float:
        """The start of the staircase in units of theta: 1/2, so that it rounds."""
        return 0.5

    def forward(self, z: Tensor) -> Tensor:
        return straight_through(z, self.staircase(z), self.log_theta, None, self.levels)

    @torch.no_grad()
    def staircase(self, z: Tensor) -> Tensor:
        """Q(z), without gradient."""
        fused = _in_one_pass(staircase, z, self.theta, self.v0, self.levels)
        if fused is not None:
            return fused
        theta = over_channels(self.theta, z)
        return (
            torch.floor((z * (self.levels / theta)).add_(over_channels(self.v0, z)))
            .clamp_(0, self.levels)
            .mul_(theta / self.levels)
        )


class SpikeClip(QuantClip):
    """The staircase of `levels` = T steps with a trained start v0: what a spiking neuron says to a constant current.

    Joint training (micelab.joint) replaces its value by that of true spikes; on its own it is the quantized clip.

    >>> SpikeClip(levels=4, theta=2.0)(torch.tensor([0.3, 0.9, 5.0])).tolist()
    [0.5, 1.0, 2.0]
    """

    def __init__(self, levels: int = 8, theta: float = 4.0, channels: int | None = None):
        super().__init__(levels, theta, channels)
        self.v0_start = nn.Parameter(torch.full_like(self.log_theta, 0.5))

    @classmethod
    def like(cls, activation: TrainableClip, levels: int) -> SpikeClip:
        """One with the bound (and start) of another activation."""
        own = cls(levels)
        own.log_theta = nn.Parameter(activation.log_theta.detach().clone(), activation.log_theta.requires_grad)
        start = activation.v0_start.detach() if isinstance(activation, SpikeClip) else torch.full_like(own.log_theta, 0.5)
        trained = activation.v0_start if isinstance(activation, SpikeClip) else activation.log_theta
        own.v0_start = nn.Parameter(start.clone(), trained.requires_grad)
        return own

    @property
    def v0(self) -> Tensor:
        """The initial potential in units of theta, in [0, 1], scalar or [C]."""
        return self.v0_start.clamp(0, 1)

    def forward(self, z: Tensor) -> Tensor:
        return straight_through(z, self.staircase(z), self.log_theta, self.v0, self.levels)


class NoisyQuantClip(QuantClip):
    """The quantized clip; in training mode a normal noise of spread `sigma` (activation units) is added to its output.

    `sigma` >= 0 is not trained but measured: the spread of the error that conversion makes at this layer, which
    `micelab.measure_noise` takes on validation images after every epoch. It starts at 0 and is part of `state_dict`. Source:
    NQ, Huang et al., IEEE TNNLS 2025.

    >>> act = NoisyQuantClip(levels=4, theta=2.0)
    >>> act.sigma.fill_(0.1).item() > 0, act.eval()(torch.tensor([0.3, 0.9, 5.0])).tolist()
    (True, [0.5, 1.0, 2.0])
    """

    sigma: Tensor

    def __init__(self, levels: int = 8, theta: float = 4.0, channels: int | None = None):
        super().__init__(levels, theta, channels)
        self.register_buffer("sigma", torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        y = super().forward(z)
        return y + self.sigma.to(y.dtype) * torch.randn_like(y) if self.training else y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sigma={self.sigma.item():.3g}"


def clipping_bound(activation: nn.Module) -> Tensor | None:
    """theta of an activation that clips at a bound, trained or fixed (nn.ReLU6, nn.Hardtanh), scalar or [C]; None of others.

    A bound of infinity is none.

    >>> clipping_bound(nn.ReLU6()), clipping_bound(nn.ReLU())
    (tensor(6.), None)
    """
    if isinstance(activation, nn.Hardtanh):
        return torch.tensor(float(activation.max_val)) if activation.max_val < torch.inf else None
    return activation.theta.detach() if isinstance(activation, TrainableClip) else None


def make_activation(name: ActivationName, levels: int | None = 8, theta: float = 4.0) -> nn.Module:
    """A new activation module by name; `levels=None` turns "quant_clip" into the plain trainable clip."""
    if name == "relu":
        return nn.ReLU()
    if name == "clip" or (name == "quant_clip" and levels is None):
        return TrainableClip(theta)
    kinds = {"quant_clip": QuantClip, "noisy_quant_clip": NoisyQuantClip, "spike_clip": SpikeClip}
    if name not in kinds:
        raise InputError(f"activation {name!r} is unknown: choose 'relu', 'clip', {', '.join(map(repr, kinds))}")
    if levels is None:
        raise InputError(f"activation {name!r} quantizes: give it levels of at least 1")
    return kinds[name](levels, theta)
