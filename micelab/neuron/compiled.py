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
from dataclasses import dataclass
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

NO_MEMORY = "can't allocate memory for a convolution of spikes"

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


def convolve_by_matrix(spikes: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """The convolution of spikes [N, C, H, W] (not 0 where there is one) by weight [rows, columns, C, out], theta multiplied in,
    with bias [out], fp32: [N, out, H, W], channels_last, by the processor's matrix unit. out: a multiple of 16.

    Raises RuntimeError where the kernel is larger than the padded map, and where the memory does not suffice.
    """
    out = _channels_last(convolved_shape(spikes.shape, weight, stride, padding))
    spikes = spikes.contiguous(memory_format=torch.channels_last)
    places = (tensor.data_ptr() for tensor in (spikes, weight, bias, out))
    sizes = (*_sizes(spikes), weight.shape[3], *weight.shape[:2], stride, padding)
    if shared_library().convolve_matrix(*places, *sizes, threads_for(spikes)):
        raise RuntimeError(NO_MEMORY)
    return out


def packed(spikes: Tensor) -> Tensor:
    """Spikes [N, C, H, W], fp32 and not 0 where there is one, as bits [N, H, W, ceil(C/8)], uint8: of a byte's eight channels the
    first is the lowest bit.

    >>> packed(torch.tensor([0.0, 0.7, 0.7]).view(1, 3, 1, 1)).item()  # 2 + 4
    6
    """
    spikes = spikes.contiguous(memory_format=torch.channels_last)
    images, height, width, channels = _sizes(spikes)
    bits = torch.empty(images, height, width, -(-channels // 8), dtype=torch.uint8, device="cpu")
    places = images * height * width
    shared_library().pack_spikes(spikes.data_ptr(), bits.data_ptr(), places, channels, threads_for(spikes))
    return bits


def unpacked(bits: Tensor, theta: Tensor, channels: int) -> Tensor:
    """The reverse of `packed`: [N, C, H, W], channels_last, of amplitude theta, scalar or [C], fp32."""
    images, height, width, _ = bits.shape
    spikes, heights = _channels_last((images, channels, height, width)), theta.expand(channels).contiguous()
    pointers = (tensor.data_ptr() for tensor in (bits, heights, spikes))
    shared_library().unpack_spikes(*pointers, images * height * width, channels, threads_for(spikes))
    return spikes


def sums_of_sets(weight: Tensor) -> Tensor:
    """For each set of spikes among eight channels the sum of their weights, as `fire_convolved` takes them: of a square weight
    [k, k, C, out], out a multiple of 16, some 32*k*k*C*out numbers."""
    rows, columns, channels, outputs = weight.shape
    sums = torch.empty(-(-channels // 8) * 2**8 * rows * columns * outputs, dtype=torch.float32, device="cpu")
    shared_library().sum_sets(weight.data_ptr(), sums.data_ptr(), rows * columns, channels, outputs)
    return sums


@dataclass(frozen=True)
class EventLayer:
    """A convolution of spikes, bits as of `packed`: weight [rows, columns, C, out] with theta multiplied in, and bias [out].

    sums: `sums_of_sets` of the weight, for C from 16 to 32 and a kernel of 1x1 or 3x3; or None, for out a multiple of 32.
    """

    weight: Tensor
    sums: Tensor | None
    bias: Tensor
    stride: int
    padding: int

    def currents(self, bits: Tensor) -> Tensor:
        """[N, out, H, W], channels_last. Raises as `convolve_by_matrix` does."""
        out = _channels_last(self._shape(bits))
        self._run(bits, 1, (None,) * 5, out, (None,) * 3)
        return out

    def fire(
        self,
        bits: Tensor,
        steps: int,
        theta: Tensor,
        v0: Tensor,
        count: bool,
        plus: Tensor | None,
        more: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(bits [T*N, H, W, out/8], counts (empty unless asked for) and residual [N, out, H, W]) of plain neurons, theta and v0
        scalar or [out], charged by the convolution, by `plus` [T*N, out, H, W] and by spikes `more` (bits, amplitude
        scalar or [out]).

        What the convolution and `micelab.neuron.fire` do one after the other, bit for bit, without the currents in between.
        """
        total, *one = self._shape(bits)
        plus = None if plus is None else plus.contiguous(memory_format=torch.channels_last)
        fired = torch.empty(total, *one[1:], one[0] // 8, dtype=torch.uint8, device="cpu")
        residual = _channels_last((total // steps, *one))
        counts = torch.empty_like(residual) if count else residual.new_empty(0)
        bound, start = (value.expand(one[0]).contiguous() for value in (theta, v0 * theta))
        others, amplitude = (None, None) if more is None else (more[0], more[1].expand(one[0]).contiguous())
        self._run(bits, steps, (plus, others, amplitude, bound, start), None, (fired, counts if count else None, residual))
        return fired, counts, residual

    def _shape(self, bits: Tensor) -> tuple[int, int, int, int]:
        images, height, width, _ = bits.shape
        return convolved_shape(torch.Size((images, self.weight.shape[2], height, width)), self.weight, self.stride, self.padding)

    def _run(self, bits: Tensor, steps: int, with_them: Any, out: Tensor | None, fired: Any) -> None:
        given = (bits, self.weight, self.sums, self.bias, *with_them, out, *fired)
        places = (None if tensor is None else tensor.data_ptr() for tensor in given)
        images, height, width, _ = bits.shape
        rows, columns, channels, outputs = self.weight.shape
        sizes = (steps, images // steps, height, width, channels, outputs, rows, columns, self.stride, self.padding)
        threads = torch.get_num_threads() if images * height * width * outputs >= ALONE else 1
        if shared_library().fire_events(*places, *sizes, threads):
            raise RuntimeError(NO_MEMORY)


def convolved_shape(shape: torch.Size, weight: Tensor, stride: int, padding: int) -> tuple[int, int, int, int]:
    """[N, out, H, W] of the convolution of spikes of `shape` [N, C, H, W] by weight [rows, columns, C, out]. Raises RuntimeError
    where the kernel is larger than the padded map.

    >>> convolved_shape(torch.Size((2, 4, 9, 9)), torch.empty(3, 3, 4, 8), stride=2, padding=1)
    (2, 8, 5, 5)
    """
    images, _, height, width = shape
    rows, columns, _, outputs = weight.shape
    high, wide = ((size + 2 * padding - kernel) // stride + 1 for size, kernel in ((height, rows), (width, columns)))
    if min(high, wide) < 1:
        raise RuntimeError(
            f"a kernel of {rows} x {columns} is larger than its padded input, [{height}, {width}] and {padding} around"
        )
    return images, outputs, high, wide


def _channels_last(shape: tuple[int, ...]) -> Tensor:
    """Room for fp32 numbers in main memory, whatever torch's defaults are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)


def _sizes(images: Tensor) -> tuple[int, int, int, int]:
    """Images, height, width, channels, as the library asks for them."""
    count, channels, height, width = images.shape
    return count, height, width, channels


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
