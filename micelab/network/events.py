"""Convolutions that follow spikes on a CPU: each spike adds its weights where it is seen, and silence costs next to nothing.

The numbers are fp32's, the sums have another order: currents differ from a dense convolution's by rounding, and on a grid
(`micelab.snap_to_grid`) not at all. It pays from 32 channels on (docs/performance.md); other layers convolve as ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from micelab.neuron.compiled import convolve_events, shared_library
from micelab.neuron.firing import IntegrateFire

CHANNELS = 32
"""A layer with fewer channels, in or out, is convolved: its sums are too short for the spikes to be found first."""


def has_events(device: str) -> bool:
    """Whether the compiled convolution of spikes is here."""
    return device == "cpu" and shared_library() is not None


def suits(convolution: Any, neuron: Any) -> bool:
    """Whether the convolution [N, C, H, W] of this layer's spikes is one to be done spike by spike."""
    if type(convolution) is not nn.Conv2d or not isinstance(neuron, IntegrateFire) or neuron.signed:
        return False
    square = all(isinstance(size, tuple) and size[0] == size[1] for size in (convolution.stride, convolution.padding))
    plain = square and convolution.dilation == (1, 1) and convolution.groups == 1 and convolution.padding_mode == "zeros"
    wide = convolution.in_channels >= CHANNELS and convolution.out_channels % CHANNELS == 0
    return plain and wide and convolution.weight.dtype == torch.float32


def convolve(spikes: Tensor, convolution: Any, theta: Tensor) -> Tensor:
    """Currents [N, out, H, W] of spikes [N, in, H, W] of amplitude theta (scalar or [in]), both fp32, channels_last."""
    weight = convolution.weight * (theta if theta.dim() == 0 else theta.view(1, -1, 1, 1))
    bias = weight.new_zeros(len(weight)) if convolution.bias is None else convolution.bias
    return convolve_events(spikes, weight.permute(2, 3, 1, 0).contiguous(), bias, convolution.stride[0], convolution.padding[0])
