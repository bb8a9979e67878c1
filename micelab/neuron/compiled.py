"""The integrate-and-fire neuron on a CPU in one pass: `neuron.c`, compiled when it is first needed.

Same contract as `micelab.neuron.fire`, spike for spike: every sum and product is rounded as the loop rounds it. Each current is
read once and each spike written once, in memory order, so that channels_last and contiguous tensors are the same to it.

`micelab.neuron.building` compiles and loads it. Before it is used it must give the loop's numbers on a few thousand neurons.
Where any of this fails the loop runs instead, and the log says why, once. MICELAB_COMPILE=0 in the environment asks for the loop.
"""

from __future__ import annotations

import logging
import os
import subprocess
import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

from micelab.neuron.building import compiler, load
from micelab.neuron.layout import in_order_of, is_dense, over_channels, steps_like

log = logging.getLogger(__name__)

BLOCK = 4096
"""So many neurons share a sum of gradients, as in neuron.c."""

LONGEST = 256
"""More steps than that the kernel of `time_gradient` has no room for, as in lanes.h."""

ALONE = 2**15
"""Fewer values than that in a layer's T steps are done by one thread: to wake a second takes longer."""

_ONE_AT_A_TIME = threading.Lock()


def fire(
    current: Tensor,
    theta: Tensor,
    v0: Tensor | float,
    signed: bool,
    out: Tensor,
    amplitude: bool = False,
    count: bool = False,
    plus: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """What `micelab.neuron.fire` does, (count, residual), in one pass; None where it cannot run here.

    current [T, N, ...] fp32 or bf16 (other types are the loop's); out: like `current`, and it may be `current` or `plus`
    itself.
    """
    if type(current) is not Tensor:  # a stand-in without numbers
        return None
    same = current.dtype == out.dtype and (plus is None or plus.dtype == out.dtype)
    if out.dtype not in (torch.float32, torch.bfloat16) or not same or not is_dense(out[0]) or not current.numel():
        return None
    library = shared_library()
    return None if library is None else _call(library.fire, current, theta, v0, signed, out, amplitude, count, plus)


def as_bytes(values: Tensor) -> Tensor:
    """1 where `values` [N, ...], fp32 and dense, is not 0, as uint8 in the same memory order.

    >>> as_bytes(torch.tensor([0.0, 0.7, 0.0])).tolist()
    [0, 1, 0]
    """
    library = shared_library()
    if library is None or values.dtype != torch.float32 or not is_dense(values):
        return values.ne(0).view(torch.uint8)
    made = torch.empty_like(values, dtype=torch.uint8)
    library.ones(values.data_ptr(), made.data_ptr(), values.numel(), threads_for(values))
    return made


def staircase(z: Tensor, theta: Tensor, v0: Tensor | float, levels: int) -> Tensor | None:
    """Q(z) of `micelab.activation.quantize` in one pass over z, fp32 or bf16; None where it cannot run here.

    theta, v0: one number for all.
    """
    library = _for_training(z, theta, v0)
    if library is None:
        return None
    rate, bound = torch.empty_like(z), theta.detach()
    scales = (float(levels / bound), float(v0), float(levels), float(bound / levels))
    library.staircase(z.data_ptr(), rate.data_ptr(), *scales, z.numel(), z.dtype == torch.bfloat16, threads_for(z))
    return rate


def rate_gradient(grad: Tensor, z: Tensor, rate: Tensor, theta: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """(gradient of z, its sum for log(theta), its sum for v0 in spikes) of `micelab.activation.straight_through`, in one pass
    over the three; None where it cannot run here. theta: one number for all."""
    library = _for_training(z, theta)
    if library is None or not z.dtype == rate.dtype == grad.dtype:
        return None
    bound, grad_z = float(theta), torch.empty_like(z)
    sums = torch.empty(-(-z.numel() // BLOCK), 2, dtype=torch.float64)
    values = (in_order_of(z[None], grad[None]), z, in_order_of(z[None], rate[None]), grad_z, sums)
    pointers = [tensor.data_ptr() for tensor in values]
    library.rate_gradient(*pointers, bound, -bound / levels, z.numel(), z.dtype == torch.bfloat16, threads_for(z))
    of_theta, of_start = sums.sum(0).float()
    return grad_z, of_theta, of_start


def time_gradient(grad: Tensor, current: Tensor, theta: Tensor, v0: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """(gradient of the currents [T, N, ...], of log(theta), of v0) of `micelab.joint.through_time`, in one pass; None where it
    cannot run here. theta, v0: one number for all."""
    library = _for_training(current[0], theta, v0) if len(current) <= LONGEST else None
    if library is None or not current.is_cpu or current.dtype != grad.dtype:
        return None
    bound = float(theta)
    of_current = steps_like(current)
    grad, current = in_order_of(of_current, grad), in_order_of(of_current, current)
    sums = torch.empty(-(-current[0].numel() // BLOCK), 2, dtype=torch.float64)
    pointers = [tensor.data_ptr() for tensor in (grad, current, of_current, sums)]
    sizes = (current[0].numel(), grad.stride(0), current.stride(0), of_current.stride(0), len(current))
    half, threads = current.dtype == torch.bfloat16, threads_for(of_current)
    library.time_gradient(*pointers, bound, float(v0) * bound, *sizes, half, threads)
    of_theta, of_start = sums.sum(0).float()
    return of_current, of_theta.reshape(theta.shape), (of_start * bound).reshape(v0.shape)


def _for_training(z: Tensor, theta: Tensor, v0: Tensor | float = 0.0) -> Any:
    """The library where it can take values like z with one theta and v0 for all; else None."""
    if type(z) is not Tensor or z.dtype not in (torch.float32, torch.bfloat16) or not is_dense(z) or not z.numel():
        return None
    single = theta.numel() == 1 and (not isinstance(v0, Tensor) or v0.numel() == 1)
    return shared_library() if single else None


def threads_for(values: Tensor) -> int:
    """How many threads take these values."""
    return torch.get_num_threads() if values.numel() >= ALONE else 1


def _call(
    function: Any,
    current: Tensor,
    theta: Tensor,
    v0: Tensor | float,
    signed: bool,
    out: Tensor,
    amplitude: bool,
    count: bool,
    plus: Tensor | None,
) -> tuple[Tensor, Tensor]:
    step = torch.empty_like(out[0], dtype=torch.float32)
    bound = over_channels(theta, step)
    start = over_channels(v0, step) * bound
    current = in_order_of(out, current)
    plus = None if plus is None else in_order_of(out, plus)
    bound, start = _laid_out(bound, step), _laid_out(start, step)
    residual = step
    fired = torch.empty_like(step) if count else step.new_empty(0)
    function(
        *(current.data_ptr(), None if plus is None else plus.data_ptr(), bound.data_ptr(), start.data_ptr(), out.data_ptr()),
        *(fired.data_ptr() if count else None, residual.data_ptr(), step.numel()),
        *(current.stride(0), 0 if plus is None else plus.stride(0), out.stride(0), bound.numel(), start.numel()),
        *(len(out), int(signed), int(amplitude), int(out.dtype == torch.bfloat16), threads_for(out)),
    )
    return fired, residual


def _laid_out(value: Tensor, step: Tensor) -> Tensor:
    """`value` (a number, one a channel, or one a neuron) in the memory order of `step`: all the numbers, or one image's."""
    if value.numel() == 1:
        return value.contiguous()
    like = step[:1] if value.dim() < step.dim() and is_dense(step[:1]) else step
    return torch.empty_like(like).copy_(value.expand_as(like))


def shared_library() -> Any:
    """The compiled library, or None where there is none: the log says why, once, however many threads ask."""
    with _ONE_AT_A_TIME:
        return _shared_library()


@cache
def _shared_library() -> Any:
    if os.environ.get("MICELAB_COMPILE") == "0":
        return None
    try:
        library = load(compiler())
        if _equal(library.fire):
            return library
        why = "what the C compiler makes of the neuron gives other numbers than the loop"
    except (OSError, subprocess.SubprocessError) as error:
        why = str(error)
    log.warning("%s: neurons run step by step instead, the same spikes, more slowly (MICELAB_COMPILE=0 ends this message)", why)
    return None


def _equal(function: Any) -> bool:
    """Whether the function gives the loop's numbers on a few thousand neurons, plain and signed."""
    from micelab.neuron.firing import step_by_step

    current = torch.randn(5, 2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    theta, start = torch.tensor([0.3, 1.1, 0.7]), torch.tensor(0.5)
    for signed in (False, True):
        expected, found = torch.empty_like(current), torch.empty_like(current)
        numbers = step_by_step(current, theta, start, signed, expected, True, True, current)
        others = _call(function, current, theta, start, signed, found, True, True, current)
        pairs = [(expected, found), *zip(numbers, others, strict=True)]
        if not all(torch.equal(a, b) for a, b in pairs):
            return False
    return True
