"""The order in which a tensor lies in memory, which the fused neurons keep."""

from __future__ import annotations

import torch
from torch import Tensor


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
