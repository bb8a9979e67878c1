"""How tensors lie: the order in memory, which the fused neurons keep, and values for each channel beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from micelab.exceptions import InputError


def is_dense(step: Tensor) -> bool:
    """Whether the values of one step fill their memory without holes, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(step.shape, step.stride(), strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def steps_like(current: Tensor) -> Tensor:
    """A new tensor of the shape of `current` [T, N, ...], each step in the memory order of the first, one after the other.

    >>> steps_like(torch.zeros(1, 2).expand(4, 1, 2)).stride()
    (2, 2, 1)
    """
    step = torch.empty_like(current[0])
    return torch.empty_strided(current.shape, (step.numel(), *step.stride()), dtype=current.dtype, device=current.device)


def in_order_of(like: Tensor, values: Tensor) -> Tensor:
    """`values` [T, N, ...] with every step in the memory order of `like`'s: itself where it is already."""
    pairs = zip(like.shape[1:], like.stride()[1:], values.stride()[1:], strict=True)
    if all(a == b for size, a, b in pairs if size > 1):
        return values
    if values.stride(0) == 0 and len(values) > 1:  # the same at every step: one copy
        return torch.empty_like(like[0], dtype=values.dtype).copy_(values[0]).expand_as(values)
    return torch.empty_like(like, dtype=values.dtype).copy_(values)


def over_channels(value: Tensor | float, like: Tensor, channel_dim: int = 1) -> Tensor:
    """`value` shaped to broadcast over `like`: a scalar stays a scalar, [C] lies along `channel_dim`.

    A value for each neuron of each image, [N, C, ...] as in `like`, stays as it is.

    >>> over_channels(torch.tensor([1.0, 2.0]), torch.zeros(5, 2, 4, 4)).shape
    torch.Size([2, 1, 1])

    Raises InputError where a vector's length is not the number of channels.
    """
    if not isinstance(value, Tensor):
        return like.new_full((), value)  # made where it is needed, not copied there
    value = value.to(like)
    if value.dim() == 0 or (value.dim() > 1 and value.shape == like.shape[channel_dim - 1 :]):
        return value
    if value.dim() != 1 or like.dim() <= channel_dim or value.shape[0] != like.shape[channel_dim]:
        raise InputError(
            f"a per-channel value of shape {tuple(value.shape)} does not fit a tensor of shape {tuple(like.shape)} "
            f"with channels in dimension {channel_dim}: give a scalar or one value per channel"
        )
    return value.reshape(-1, *[1] * (like.dim() - channel_dim - 1))
