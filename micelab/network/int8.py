"""Convolutions of spikes by 8-bit weights: oneDNN's quantized convolution on a CPU, a fast mode of other numbers.

theta is multiplied into the weights, and these are rounded to 255 levels for each output channel. What a convolution adds up are
integers, so the sums are exact and the same in any order; one product and one sum with the bias make fp32 currents of them.
Layers that suit add the same integers spike by spike instead, which is faster (`micelab.network.spike_convolutions.ByIntegers`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from micelab.neuron.firing import IntegrateFire


def has_int8(device: str) -> bool:
    """Whether oneDNN's quantized convolution is here: on CPUs of the x86-64 kind that have AVX2."""
    wanted = ("qconv_prepack", "qconv2d_pointwise")
    capable = torch.backends.cpu.get_cpu_capability().startswith(("AVX2", "AVX512"))
    return device == "cpu" and capable and all(hasattr(torch.ops.onednn, name) for name in wanted)


def suits(convolution: Any, neuron: Any) -> bool:
    """Whether a convolution [N, C, H, W] can take this layer's spikes as bytes: they must be 0 or 1, the padding zeros."""
    plain = type(convolution) is nn.Conv2d and convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)
    return plain and convolution.weight.dtype == torch.float32 and isinstance(neuron, IntegrateFire) and not neuron.signed


def rounded(weight: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """(integers [out, in, h, w] in -127..127, scale [out]): their product is weight*theta, to half a scale.

    weight: [out, in, h, w]; theta: scalar or [in], > 0, in activation units.

    >>> integers, scale = rounded(torch.tensor([1.27, -0.5]).view(1, 2, 1, 1), torch.tensor(2.0))
    >>> integers.flatten().tolist(), round(scale.item(), 4)
    ([127, -50], 0.02)
    """
    folded = weight * (theta if theta.dim() == 0 else theta.view(1, -1, 1, 1))
    scale = folded.abs().amax((1, 2, 3)).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (folded / scale.view(-1, 1, 1, 1)).round().clamp(-127, 127).to(torch.int8), scale


def packed(convolution: Any, theta: Tensor, shape: list[int]) -> Any:
    """What `convolve` needs of a convolution that takes spikes of amplitude theta, [N, C, H, W] of this shape."""
    if theta.dim() and convolution.groups > 1:
        theta = theta.view(convolution.groups, -1).repeat_interleave(convolution.out_channels // convolution.groups, 0)
        theta = theta.view(convolution.out_channels, -1, 1, 1)
        integers, scale = rounded(convolution.weight * theta, torch.ones(()))
    else:
        integers, scale = rounded(convolution.weight, theta)
    settings = (list(convolution.stride), list(convolution.padding), list(convolution.dilation), convolution.groups)
    weights = torch.ops.onednn.qconv_prepack(integers, torch.ones_like(scale), 1.0, 0, *settings, shape)
    return weights, scale, torch.zeros_like(scale, dtype=torch.int8), convolution.bias, settings


def convolve(spikes: Tensor, given: Any) -> Tensor:
    """Currents fp32 [N, out, H, W] of spikes uint8 [N, in, H, W], 0 or 1."""
    weights, scale, zeros, bias, settings = given
    how: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
    return torch.ops.onednn.qconv2d_pointwise(spikes, 1.0, 0, weights, scale, zeros, bias, *settings, *how)
