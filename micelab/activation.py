"""Activations of the network to be converted: ReLU, trainable clip (TCL), quantized clip (QCFS), the same with noise (NQ).

Pure functions hold the mathematics; the modules store `theta` and call one. `theta` is kept positive by storing its
logarithm, and its gradient comes free: the activation is homogeneous of degree one in (z, theta).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from micelab.exceptions import InputError

ActivationName = Literal["relu", "clip", "quant_clip", "noisy_quant_clip"]


def over_channels(value: Tensor | float, like: Tensor, channel_dim: int = 1) -> Tensor:
    """`value` shaped to broadcast over `like`: a scalar stays a scalar, [C] lies along `channel_dim`.

    A value for each neuron of each image, [N, C, ...] as in `like`, stays as it is.

    >>> over_channels(torch.tensor([1.0, 2.0]), torch.zeros(5, 2, 4, 4)).shape
    torch.Size([2, 1, 1])

    Raises InputError where a vector's length is not the number of channels.
    """
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if value.dim() == 0 or (value.dim() > 1 and value.shape == like.shape[channel_dim - 1 :]):
        return value
    if value.dim() != 1 or like.dim() <= channel_dim or value.shape[0] != like.shape[channel_dim]:
        raise InputError(
            f"a per-channel value of shape {tuple(value.shape)} does not fit a tensor of shape {tuple(like.shape)} "
            f"with channels in dimension {channel_dim}: give a scalar or one value per channel"
        )
    return value.reshape(-1, *[1] * (like.dim() - channel_dim - 1))


def clip(z: Tensor, theta: Tensor | float) -> Tensor:
    """z limited to [0, theta]: [N, C, ...] in activation units, same shape out (TCL, Ho & Chang, DAC 2021, eq. 3).

    >>> clip(torch.tensor([-1.0, 0.5, 3.0]), 2.0)
    tensor([0.0000, 0.5000, 2.0000])
    """
    theta = over_channels(theta, z) if isinstance(theta, Tensor) else theta
    return torch.minimum(z.clamp(min=0), theta) if isinstance(theta, Tensor) else z.clamp(0, theta)


def quantize(z: Tensor, theta: Tensor | float, levels: int, v0: Tensor | float = 0.5) -> Tensor:
    """Q(z) = theta * clip(floor(levels*z/theta + v0), 0, levels) / levels: the staircase of DESIGN section 3.

    z: [N, C, ...]; theta > 0 and v0 (in units of theta): scalar or [C]; levels: integer >= 1. With `levels` the number of
    time-steps it is the rate of a neuron whose current is constant. Source: QCFS, Bu et al., ICLR 2022, eq. 8.

    >>> quantize(torch.tensor([-1.0, 0.3, 0.9, 5.0]), theta=2.0, levels=4)
    tensor([0.0000, 0.5000, 1.0000, 2.0000])
    """
    theta, v0 = over_channels(theta, z), over_channels(v0, z)
    return theta * torch.floor(levels * z / theta + v0).clamp(0, levels) / levels


class _QuantizeStraightThrough(torch.autograd.Function):
    """Forward: quantize. Backward: floor passes its gradient; theta's follows from homogeneity (Euler)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, log_theta: Tensor, levels: int) -> Tensor:
        theta = over_channels(log_theta.exp(), z)
        y = torch.floor((z * (levels / theta)).add_(0.5)).clamp_(0, levels).mul_(theta / levels)
        ctx.save_for_backward(z, y, theta)
        ctx.per_channel, ctx.dtype = log_theta.dim() == 1, log_theta.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        z, y, theta = ctx.saved_tensors
        grad_z = grad * ((z > 0) & (z < theta))
        # d y/d theta = (y - gate*z)/theta, and d theta/d log_theta = theta
        dims = [d for d in range(z.dim()) if d != 1] if ctx.per_channel else list(range(z.dim()))
        grad_log_theta = ((grad * y) - (grad_z * z)).sum(dims, dtype=ctx.dtype)
        return grad_z, grad_log_theta, None


class TrainableClip(nn.Module):
    """y = clip(z, 0, theta) with theta trained (TCL, Ho & Chang, DAC 2021).

    theta: start of the bound, > 0; channels: one theta for each of so many channels, None for one per layer.
    """

    levels: int | None = None

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
        self.levels = levels

    def forward(self, z: Tensor) -> Tensor:
        return _QuantizeStraightThrough.apply(z, self.log_theta, self.levels)


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


def make_activation(name: ActivationName, levels: int | None = 8, theta: float = 4.0) -> nn.Module:
    """A new activation module by name; `levels=None` turns "quant_clip" into the plain trainable clip."""
    if name == "noisy_quant_clip":
        if levels is None:
            raise InputError("activation 'noisy_quant_clip' quantizes: give it levels of at least 1")
        return NoisyQuantClip(levels, theta)
    if name == "relu":
        return nn.ReLU()
    if name == "clip" or (name == "quant_clip" and levels is None):
        return TrainableClip(theta)
    if name == "quant_clip":
        return QuantClip(levels, theta)
    raise InputError(f"activation {name!r} is unknown: choose 'relu', 'clip', 'quant_clip' or 'noisy_quant_clip'")
