"""The integrate-and-fire neuron on CUDA: all T steps in one Triton kernel, with the membrane in registers.

Same contract as `micelab.neuron.fire`, spike for spike: every sum and product is rounded as the loop rounds it, and none are
contracted (no fused multiply-add). Each current is read once and each spike written once, in memory order, so that
channels_last and contiguous tensors are the same to it. docs/gpu.md says what of this has been checked, and how.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from micelab.exceptions import InputError
from micelab.neuron.layout import in_order_of, is_dense, over_channels

try:
    import triton
    from triton import language as tl
except ImportError:  # Windows, macOS: `why_not` says so, and the neurons take the loop
    triton = tl = None

log = logging.getLogger(__name__)

BLOCK, WARPS, UNROLLED = 1024, 4, 16
"""Neurons and warps of one program; up to so many steps are unrolled, more are a loop (else the code grows with T)."""

CAPABILITY = (8, 0)
"""The oldest GPU that Triton supports and that has bf16: Ampere."""

jit: Callable[[Any], Any] = triton.jit if triton else lambda function: function


@jit
def _one_step(  # type: ignore[no-untyped-def]
    v, fired, bound, here, current, plus, out, inside, SIGNED: tl.constexpr, AMPLITUDE: tl.constexpr
):
    """(v, fired) after one step; `here` is where the step's neurons lie in memory, `v` and `fired` are held in fp32 or fp64."""
    drive = tl.load(current + here, mask=inside, other=0.0).to(v.dtype)
    if plus is not None:
        drive += tl.load(plus + here, mask=inside, other=0.0).to(v.dtype)
    v += drive
    spike = tl.where(v >= bound, 1.0, 0.0).to(v.dtype)
    if SIGNED:
        spike -= tl.where((v < 0) & (fired > 0), 1.0, 0.0).to(v.dtype)
    fired += spike
    spent = spike * bound  # exact, also where the type of `out` rounds what is sent
    tl.store(out + here, (spent if AMPLITUDE else spike).to(out.dtype.element_ty), mask=inside)
    v -= spent
    return v, fired


@jit
def fire_kernel(  # type: ignore[no-untyped-def]
    current,
    plus,
    theta,
    start,
    out,
    count,
    residual,
    neurons,
    step_current,
    step_plus,
    step_out,
    channel_stride,
    channels,
    T: tl.constexpr,
    SIGNED: tl.constexpr,
    AMPLITUDE: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    PER_NEURON: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`neurons` neurons, BLOCK for each program, one step's values `step_...` elements after those of the step before.

    theta, start: one number, or one for each channel (neuron i of the memory order is of channel i // channel_stride %
    channels); start with PER_NEURON: one for each neuron. plus: a second current to be added, or None. count: where the sum
    of spikes goes, or None. The membrane is held in the type of `residual`, fp32 or fp64.
    """
    wide: tl.constexpr = residual.dtype.element_ty
    here = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = here < neurons
    channel = (here // channel_stride) % channels if PER_CHANNEL else here * 0
    bound = tl.load(theta + channel).to(wide)
    own = here if PER_NEURON else channel
    v = tl.load(start + own, mask=inside, other=0.0).to(wide)
    fired = tl.zeros([BLOCK], wide)
    if UNROLL:
        for t in tl.static_range(T):
            at = current + tl.cast(step_current, tl.int64) * t
            more = None if plus is None else plus + tl.cast(step_plus, tl.int64) * t
            to = out + tl.cast(step_out, tl.int64) * t
            v, fired = _one_step(v, fired, bound, here, at, more, to, inside, SIGNED, AMPLITUDE)
    else:
        for t in range(T):
            at = current + tl.cast(step_current, tl.int64) * t
            more = None if plus is None else plus + tl.cast(step_plus, tl.int64) * t
            to = out + tl.cast(step_out, tl.int64) * t
            v, fired = _one_step(v, fired, bound, here, at, more, to, inside, SIGNED, AMPLITUDE)
    if count is not None:
        tl.store(count + here, fired.to(count.dtype.element_ty), mask=inside)
    tl.store(residual + here, v, mask=inside)


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
    """What `micelab.neuron.fire` does, (count, residual), by the kernel; None where it cannot run here (said once, in the log).

    current [T, N, ...] fp32, bf16, fp16 or fp64; v0: scalar, [C], or [N, ...], one for each neuron of each image; plus: a
    second current, summed in (a residual connection); out: like `current`, or uint8/int8 for spikes that are not multiplied
    by theta. Tensors in one memory order are read and written without copies; where `out` lies in another order than
    `current`, the currents are copied into its order first.
    """
    if (why := why_not(current.device)) is not None:
        _say_once(why)
        return None
    if not out.is_floating_point() and (amplitude or (signed and out.dtype == torch.uint8)):
        what = "theta*s is a real number" if amplitude else "a signed neuron also sends -1"
        raise InputError(f"spikes are to be written as {out.dtype}, but {what}: use {'a floating type' if amplitude else 'int8'}")
    room = out if is_dense(out[0]) else torch.empty_like(out, memory_format=torch.contiguous_format)
    if room[0].numel() >= 2**31:
        raise InputError(f"one step has {room[0].numel():,} neurons, and the kernel counts to 2^31: give a smaller chunk")
    membrane = torch.empty_like(room[0], dtype=_wide(current))
    theta = over_channels(theta, membrane)
    if isinstance(v0, Tensor) and v0.dim() > 1:
        start = membrane.copy_(v0 * theta)
        theta = theta.flatten()
    else:
        start = over_channels(v0, membrane) * theta
        theta, start = (value.flatten().expand(max(theta.numel(), start.numel())).contiguous() for value in (theta, start))
    current = in_order_of(room, current)
    plus = None if plus is None else in_order_of(room, plus)
    fired, residual = _fire_op(current, plus, theta, start, room, signed, amplitude, count)
    if room is not out:
        out.copy_(room)
    return fired, residual


def _wide(current: Tensor) -> torch.dtype:
    """The type of membranes: fp32, or fp64 for such currents."""
    return torch.promote_types(current.dtype, torch.float32)


def why_not(device: torch.device) -> str | None:
    """Why the kernel cannot run on `device` (its driver included), or None where it can."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.cuda.is_available() else CAPABILITY
    return _reason(triton is not None, capability)


def _reason(has_triton: bool, capability: tuple[int, int]) -> str | None:
    slower = "neurons run step by step instead: the same spikes, more slowly"
    if not has_triton:
        return f"triton is not installed (it comes with torch for CUDA on Linux; `pip install triton`): {slower}"
    if capability < CAPABILITY:
        found, needed = (".".join(map(str, version)) for version in (capability, CAPABILITY))
        return f"this GPU has compute capability {found} and the fused neuron needs {needed}: {slower}"
    return None


@cache
def _say_once(why: str) -> None:
    log.warning("%s", why)


def run_kernel(
    current: Tensor, plus: Tensor | None, theta: Tensor, start: Tensor, out: Tensor, signed: bool, amplitude: bool, count: bool
) -> tuple[Tensor, Tensor]:
    """Launches the kernel: all tensors on one device, every step dense and in one memory order."""
    fired, residual = _results(current, plus, theta, start, out, signed, amplitude, count)
    step = out[0]
    with torch.cuda.device_of(current):
        fire_kernel[(triton.cdiv(step.numel(), BLOCK),)](
            *(current, plus, theta, start, out, fired if count else None, residual, step.numel()),
            *(current.stride(0), 0 if plus is None else plus.stride(0), out.stride(0)),
            *((step.stride(1), step.shape[1]) if step.dim() > 1 else (1, 1)),
            T=current.shape[0],
            SIGNED=signed,
            AMPLITUDE=amplitude,
            PER_CHANNEL=theta.numel() > 1,
            PER_NEURON=start.dim() > 1,
            UNROLL=current.shape[0] <= UNROLLED,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return fired, residual


def _results(
    current: Tensor, plus: Tensor | None, theta: Tensor, start: Tensor, out: Tensor, signed: bool, amplitude: bool, count: bool
) -> tuple[Tensor, Tensor]:
    """Room for (count, residual), in `out`'s memory order; this is also what the operator is to a FakeTensor."""
    residual = torch.empty_like(out[0], dtype=_wide(current))
    return (torch.empty_like(residual) if count else residual.new_empty(0)), residual


_fire_op = torch.library.custom_op(
    "micelab::fire",
    run_kernel,
    mutates_args=("out",),
    device_types="cuda",
    schema="(Tensor current, Tensor? plus, Tensor theta, Tensor start, Tensor(a!) out, bool signed, bool amplitude, bool count)"
    " -> (Tensor, Tensor)",
)
_fire_op.register_fake(_results)
