"""Convolutions of spikes in compiled C: spike by spike (`events.c`), with their neurons or the gradient of their weights
(`gradients.c`), or by the matrix unit (`matrix.c`).

They need the library of `micelab.neuron.compiled`; `micelab.network.spike_convolutions` says which layers they are for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from micelab.neuron import compiled

NO_MEMORY = "can't allocate memory for a convolution of spikes"


def convolve_by_matrix(spikes: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """The convolution of spikes [N, C, H, W] (not 0 where there is one) by weight [rows, columns, C, out], theta multiplied in,
    with bias [out], fp32: [N, out, H, W], channels_last, by the processor's matrix unit. out: a multiple of 16.

    Raises RuntimeError where the kernel is larger than the padded map, and where the memory does not suffice.
    """
    out = _channels_last(convolved_shape(spikes.shape, weight, stride, padding))
    spikes = spikes.contiguous(memory_format=torch.channels_last)
    places = (tensor.data_ptr() for tensor in (spikes, weight, bias, out))
    sizes = (*_sizes(spikes), weight.shape[3], *weight.shape[:2], stride, padding)
    if compiled.shared_library().convolve_matrix(*places, *sizes, compiled.threads_for(spikes)):
        raise RuntimeError(NO_MEMORY)
    return out


def packed(spikes: Tensor) -> Tensor:
    """Spikes [N, C, H, W], fp32 or bf16 and not 0 where there is one, as bits [N, H, W, ceil(C/8)], uint8: of a byte's eight
    channels the first is the lowest bit.

    >>> packed(torch.tensor([0.0, 0.7, 0.7]).view(1, 3, 1, 1)).item()  # 2 + 4
    6
    """
    spikes = spikes.contiguous(memory_format=torch.channels_last)
    images, height, width, channels = _sizes(spikes)
    bits = torch.empty(images, height, width, -(-channels // 8), dtype=torch.uint8, device="cpu")
    places = images * height * width
    half, threads = spikes.dtype == torch.bfloat16, compiled.threads_for(spikes)
    compiled.shared_library().pack_spikes(spikes.data_ptr(), bits.data_ptr(), places, channels, half, threads)
    return bits


def unpacked(bits: Tensor, theta: Tensor, channels: int) -> Tensor:
    """The reverse of `packed`: [N, C, H, W], channels_last, of amplitude theta, scalar or [C], fp32."""
    images, height, width, _ = bits.shape
    spikes, heights = _channels_last((images, channels, height, width)), theta.expand(channels).contiguous()
    pointers = (tensor.data_ptr() for tensor in (bits, heights, spikes))
    compiled.shared_library().unpack_spikes(*pointers, images * height * width, channels, compiled.threads_for(spikes))
    return spikes


def fire_as_bits(current: Tensor, theta: Tensor, v0: Tensor, count: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(bits [T*N, H, W, C/8], counts (empty unless asked for) and residual [N, C, H, W]) of plain neurons, theta and v0 scalar or
    [C], for currents [T, N, C, H, W], fp32, or one expanded over T; C: a multiple of 16.

    The spikes that `micelab.neuron.fire` writes as numbers.

    >>> current = torch.tensor([0.6, -1.0, 0.3, 0.5]).repeat(4).view(1, 16, 1, 1).expand(2, 1, 16, 1, 1)
    >>> bits, counts, _ = fire_as_bits(current, torch.tensor(1.0), torch.tensor(0.5), count=True)
    >>> bits.flatten().tolist(), counts.flatten()[:4].tolist()  # 1 + 8 + 16 + 128 in the first step
    ([153, 153, 68, 68], [1.0, 0.0, 1.0, 1.0])
    """
    steps, shape = len(current), current.shape[1:]
    constant = current.stride(0) == 0
    values = (current[0] if constant else current.flatten(0, 1)).contiguous(memory_format=torch.channels_last)
    neurons = _Neurons.room(torch.Size(shape), steps, theta, v0, count)
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in (values, *neurons))
    ahead, places = 0 if constant else shape.numel(), shape.numel() // shape[1]
    compiled.shared_library().fire_bits(*pointers, steps, ahead, places, shape[1], compiled.threads_for(current))
    return neurons.said()


class _Neurons(NamedTuple):
    """What C asks for of a layer's neurons, and has room for what they do: theta and start [C], in memory order; bits, counts or
    None, residual."""

    theta: Tensor
    start: Tensor
    fired: Tensor
    sent: Tensor | None
    residual: Tensor

    @classmethod
    def room(cls, shape: torch.Size, steps: int, theta: Tensor, v0: Tensor, count: bool) -> _Neurons:
        """For T steps of neurons [N, C, H, W]."""
        images, channels, height, width = shape
        fired = torch.empty(steps * images, height, width, channels // 8, dtype=torch.uint8, device="cpu")
        bound, start = (value.expand(channels).contiguous() for value in (theta, v0 * theta))
        return cls(bound, start, fired, _channels_last(shape) if count else None, _channels_last(shape))

    def said(self) -> tuple[Tensor, Tensor, Tensor]:
        """(bits, counts or nothing, residual)."""
        return self.fired, self.residual.new_empty(0) if self.sent is None else self.sent, self.residual


def sums_of_sets(weight: Tensor) -> Tensor:
    """For each set of spikes among eight channels the sum of their weights, as `EventLayer` takes them: of a square weight
    [k, k, C, out], fp32 or int16, out a multiple of 16, some 32*k*k*C*out numbers of its type."""
    rows, columns, channels, outputs = weight.shape
    sums = torch.empty(-(-channels // 8) * 2**8 * rows * columns * outputs, dtype=weight.dtype, device="cpu")
    sizes = (rows * columns, channels, outputs)
    compiled.shared_library().sum_sets(weight.data_ptr(), sums.data_ptr(), *sizes, weight.dtype == torch.int16)
    return sums


def weight_gradient(bits: Tensor, grad: Tensor, channels: int, side: int, padding: int) -> Tensor:
    """Gradient [side, side, C, out] of the weights of a convolution of spikes, bits as of `packed`, of stride 1 and a kernel of
    `side` 1 or 3, for that of its currents [N, out, H, W], fp32 or bf16; in fp32. out: a multiple of 16.

    Raises RuntimeError where the memory does not suffice.
    """
    grad = grad.contiguous(memory_format=torch.channels_last)
    images, height, width, _ = bits.shape
    threads = compiled.threads_for(grad)
    parts = torch.zeros(threads, side, side, channels, grad.shape[1], dtype=torch.float32, device="cpu")
    places = (tensor.data_ptr() for tensor in (bits, grad, parts))
    sizes = (images, height, width, channels, grad.shape[1], side, padding)
    if compiled.shared_library().weight_gradient(*places, *sizes, grad.dtype == torch.bfloat16, threads):
        raise RuntimeError(NO_MEMORY)
    return parts.sum(0)


@dataclass(frozen=True)
class EventLayer:
    """A convolution of spikes, bits as of `packed`: weight [rows, columns, C, out] with theta multiplied in, and bias [out].

    sums: `sums_of_sets` of the weight, for C from 16 to 32 and a kernel of 1x1 or 3x3; or None, for out a multiple of 32.
    scale: None, or, [out], of a weight in int16, what its sums are multiplied by; none may pass 16 bits, whatever fires.
    """

    weight: Tensor
    sums: Tensor | None
    bias: Tensor
    stride: int
    padding: int
    scale: Tensor | None = None

    def currents(self, bits: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, out, H, W], channels_last, fp32, or bf16 where `dtype` is. Raises as `convolve_by_matrix` does."""
        out = _channels_last(self._shape(bits), dtype)
        self._run(bits, 1, out=out)
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
        neurons = _Neurons.room(torch.Size((total // steps, *one)), steps, theta, v0, count)
        others, amplitude = more or (None, None)
        amplitude = None if amplitude is None else amplitude.expand(one[0]).contiguous()
        self._run(bits, steps, plus, others, amplitude, neurons)
        return neurons.said()

    def _shape(self, bits: Tensor) -> tuple[int, int, int, int]:
        images, height, width, _ = bits.shape
        return convolved_shape(torch.Size((images, self.weight.shape[2], height, width)), self.weight, self.stride, self.padding)

    def _run(
        self,
        bits: Tensor,
        steps: int,
        plus: Tensor | None = None,
        more: Tensor | None = None,
        amplitude: Tensor | None = None,
        neurons: _Neurons | None = None,
        out: Tensor | None = None,
    ) -> None:
        """`fire_events` of events.c, in its order."""
        theta, start, *said = neurons or (None,) * 5
        own = (self.weight, self.sums, self.bias, self.scale)
        given = (bits, *own, plus, more, amplitude, theta, start, out, *said)
        places = (None if tensor is None else tensor.data_ptr() for tensor in given)
        images, height, width, _ = bits.shape
        rows, columns, channels, outputs = self.weight.shape
        sizes = (steps, images // steps, height, width, channels, outputs, rows, columns, self.stride, self.padding)
        threads = torch.get_num_threads() if images * height * width * outputs >= compiled.ALONE else 1
        half = out is not None and out.dtype == torch.bfloat16
        if compiled.shared_library().fire_events(*places, *sizes, half, threads):
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


def _channels_last(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Room for numbers in main memory, whatever torch's defaults are."""
    return torch.empty(shape, dtype=dtype, device="cpu", memory_format=torch.channels_last)


def _sizes(images: Tensor) -> tuple[int, int, int, int]:
    """Images, height, width, channels, as the library asks for them."""
    count, channels, height, width = images.shape
    return count, height, width, channels
