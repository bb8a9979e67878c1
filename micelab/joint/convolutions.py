"""Convolutions of spikes in training, spike by spike on a CPU: forward, and in the gradient of the weights.

Most neurons are silent at a step, so both are sums over the few that are not (micelab.neuron.convolutions); the gradient of the
spikes themselves, which has no zeros, is a dense convolution as ever.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from micelab.graph.tracing import is_activation, module_of
from micelab.network.spike_convolutions import WAYS, ByEvents, Spikes, is_plain
from micelab.neuron.convolutions import packed, weight_gradient
from micelab.neuron.layout import over_channels


def suits(convolution: Any, spikes: Tensor | Spikes) -> bool:
    """Whether this layer's convolution of these spikes is done spike by spike here.

    With a matrix unit, dense convolutions of bf16 are faster.
    """
    plain = type(spikes) in (Tensor, Spikes) and len(spikes.shape) == 4
    if not plain or spikes.dtype not in (torch.float32, torch.bfloat16):
        return False
    device = spikes.device.type if isinstance(spikes, Tensor) else "cpu"
    if not (is_plain(convolution) and ByEvents.serves(convolution) and WAYS["events"].is_here(device)):
        return False
    half = spikes.dtype == torch.bfloat16 or torch.is_autocast_enabled(device)
    return not (half and WAYS["bf16x3"].is_here(device))


def convolve(convolution: Any, spikes: Tensor, theta: Tensor) -> Tensor:
    """What `convolution`, of those that suit, gives for spikes [N, C, H, W] of amplitude theta, scalar or [C], with gradient: of
    the spikes, weight and bias. In the type of the spikes, fp32 or bf16.

    >>> layer = torch.nn.Conv2d(16, 16, 3, padding=1)
    >>> spikes = 0.5 * torch.randint(2, (2, 16, 8, 8)).float()
    >>> suits(layer, spikes) and not torch.allclose(convolve(layer, spikes, torch.tensor(0.5)), layer(spikes), atol=1e-5)
    False
    """
    return cast(Tensor, _Convolution.apply(spikes, convolution.weight, convolution.bias, theta.detach(), convolution))


def following(traced: fx.GraphModule, node: fx.Node, spikes: Any) -> Tensor | None:
    """What the layer `node` gives, spike by spike, if it is a convolution that suits, of an activation; else None."""
    source, layer = node.all_input_nodes[0], module_of(traced, str(node.target))
    if not is_activation(traced, source) or not suits(layer, spikes):
        return None
    return convolve(layer, spikes, module_of(traced, str(source.target)).log_theta.exp())


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spikes: Tensor, weight: Tensor, bias: Tensor | None, theta: Tensor, convolution: Any) -> Tensor:
        bits = packed(spikes)
        ctx.convolution = convolution
        ctx.sparse = convolution.stride == (1, 1) and convolution.kernel_size in ((1, 1), (3, 3))
        ctx.sparse = ctx.sparse and convolution.padding[0] < convolution.kernel_size[0]
        ctx.save_for_backward(bits if ctx.sparse else spikes, weight, bias, theta)
        return ByEvents(convolution, theta).layer.currents(bits, spikes.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        spikes, weight, bias, theta = ctx.saved_tensors
        padding, weights = ctx.convolution.padding, weight.to(grad.dtype)
        of_bias = None if bias is None else grad.sum((0, 2, 3), dtype=bias.dtype)
        if not ctx.sparse:
            sizes = (None, ctx.convolution.stride, padding, (1, 1), False, (0, 0), 1, (True, True, False))
            of_spikes, of_weight, _ = torch.ops.aten.convolution_backward(grad, spikes, weights, *sizes)
            return of_spikes, of_weight.to(weight.dtype), of_bias, None, None
        channels, side = weight.shape[1:3]
        of_weight = weight_gradient(spikes, grad, channels, side, padding[0]).permute(3, 2, 0, 1)
        of_weight = of_weight * over_channels(theta, of_weight)
        turned = weights.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
        return F.conv2d(grad, turned, padding=side - 1 - padding[0]), of_weight, of_bias, None, None
