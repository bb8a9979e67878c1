"""Convolutions of spikes on a CPU, each compiled, faster than a dense one: spike by spike, in fp32's numbers or with weights of 8
bits, or by a matrix unit.

Sums of fp32's numbers have another order, so currents differ from a dense convolution's by rounding, and on a grid
(`micelab.snap_to_grid`) not at all. Layers that do not suit a way convolve as ever.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from micelab.graph.tracing import is_hooked
from micelab.network.int8 import rounded
from micelab.neuron import compiled
from micelab.neuron.convolutions import (
    EventLayer,
    convolve_by_matrix,
    convolved_shape,
    fire_as_bits,
    packed,
    sums_of_sets,
    unpacked,
)
from micelab.neuron.firing import Firing, IntegrateFire
from micelab.neuron.layout import over_channels


class Spikes:
    """Spikes of a layer at all steps, `shape` [N, C, H, W]: as numbers, theta (scalar or [C]) where there is one and else 0,
    channels_last; or as bits, of which a byte holds eight channels. One of them is given, the other made when it is asked for.

    >>> Spikes(torch.tensor([0.0, 0.7, 0.7]).view(1, 3, 1, 1)).bits.item()  # 2 + 4
    6
    """

    dtype = torch.float32
    theta: Tensor | None = None

    def __init__(self, numbers: Tensor):
        self.shape, self.numbers = numbers.shape, numbers

    @classmethod
    def of_bits(cls, bits: Tensor, theta: Tensor, channels: int) -> Spikes:
        """Those of bits [N, H, W, ceil(C/8)], as `micelab.neuron.convolutions.packed` gives them."""
        made = cls.__new__(cls)
        images, height, width, _ = bits.shape
        made.shape, made.theta, made.bits = torch.Size((images, channels, height, width)), theta, bits
        return made

    @classmethod
    def fired(cls, neurons: IntegrateFire, current: Tensor, count: bool) -> tuple[Spikes, Firing]:
        """Those of plain neurons for currents [T, n, C, H, W] that `send_bits`, C a multiple of 16."""
        bits, sent, residual = fire_as_bits(current, neurons.theta, neurons.v0, count)
        return cls.of_bits(bits, neurons.theta, current.shape[2]), Firing(sent, residual, neurons.v0)

    @cached_property
    def numbers(self) -> Tensor:
        assert self.theta is not None
        return unpacked(self.bits, self.theta, self.shape[1])

    @cached_property
    def bits(self) -> Tensor:
        return packed(self.numbers)


def send_bits(neurons: Any) -> bool:
    """Whether the spikes of these neurons are bits: they are plain, in fp32."""
    return neurons.adds and not neurons.signed and neurons.theta.dtype == torch.float32


class SpikeConvolution(ABC):
    """A convolution of spikes of amplitude theta (scalar or [C]), as one way does it; made once for all images.

    `weight` [rows, columns, C, out] holds theta; which layers it may be is told by `Way.suits`. `folded`: weight and bias in
    place of the layer's own, with batch-norm in them.
    """

    fires = False
    """Whether the neurons that read the currents can be done with them."""

    def __init__(self, convolution: Any, theta: Tensor, folded: tuple[Tensor, Tensor] | None = None):
        own, bias = folded or (convolution.weight, convolution.bias)
        self.weight = self.numbers_of(own, theta).permute(2, 3, 1, 0).contiguous()
        self.bias = own.new_zeros(len(own)) if bias is None else bias
        self.stride, self.padding = convolution.stride[0], convolution.padding[0]

    def numbers_of(self, weight: Tensor, theta: Tensor) -> Tensor:
        """What is added up for weight [out, C, rows, columns], theta in it."""
        return weight * over_channels(theta, weight)

    @staticmethod
    @abstractmethod
    def serves(convolution: nn.Conv2d) -> bool:
        """Whether it takes a layer of so many channels with such a kernel."""

    @staticmethod
    def has_room(convolution: nn.Conv2d, theta: Tensor) -> bool:
        """Whether its numbers hold every sum of these weights."""
        return True

    @abstractmethod
    def currents(self, spikes: Spikes) -> Tensor:
        """[N, out, H, W], channels_last, of spikes [N, C, H, W], fp32."""

    def due(self, spikes: Spikes) -> Due:
        """The same, to be done later. Raises RuntimeError where the kernel is larger than the padded map."""
        return Due(self, spikes, torch.Size(convolved_shape(spikes.shape, self.weight, self.stride, self.padding)))

    def takes_along(self, neurons: Any) -> bool:
        """Whether these neurons, which read the currents, can be done with them."""
        return self.fires and send_bits(neurons)


class ByEvents(SpikeConvolution):
    """Spikes add their weights where they are seen, by eights whose sums are known or one by one; silence is nearly free."""

    fires = True
    scale: Tensor | None = None

    def __init__(self, convolution: Any, theta: Tensor, folded: tuple[Tensor, Tensor] | None = None):
        super().__init__(convolution, theta, folded)
        sums = sums_of_sets(self.weight) if self.by_sets(convolution) else None
        self.layer = EventLayer(self.weight, sums, self.bias, self.stride, self.padding, self.scale)

    @staticmethod
    def by_sets(convolution: nn.Conv2d) -> bool:
        """In wide layers most sets are so rare, and large kernels have so many places, that their sums are not at hand."""
        return convolution.in_channels <= 32 and convolution.kernel_size in ((1, 1), (3, 3))

    @staticmethod
    def serves(convolution: nn.Conv2d) -> bool:
        """Else the search for spikes costs more than the weights of the silent."""
        if ByEvents.by_sets(convolution):
            return convolution.in_channels >= 16 and convolution.out_channels % 16 == 0
        return convolution.in_channels >= 32 and convolution.out_channels % 32 == 0

    def currents(self, spikes: Spikes) -> Tensor:
        return self.layer.currents(spikes.bits)

    def fire(
        self, spikes: Spikes, neurons: IntegrateFire, steps: int, count: bool, plus: Tensor | Spikes | None
    ) -> tuple[Spikes, Firing]:
        """Spikes [steps*n, out, H, W] of the neurons that these currents, and `plus` like them, charge."""
        more = None
        if isinstance(plus, Spikes):
            plus, more = (plus.numbers, None) if plus.theta is None else (None, (plus.bits, plus.theta))
        bits, fired, residual = self.layer.fire(spikes.bits, steps, neurons.theta, neurons.v0, count, plus, more)
        return Spikes.of_bits(bits, neurons.theta, len(self.bias)), Firing(fired, residual, neurons.v0)


class ByIntegers(ByEvents):
    """The same with weights of 8 bits (`micelab.network.int8.rounded`), added exactly in integers of 16."""

    def numbers_of(self, weight: Tensor, theta: Tensor) -> Tensor:
        integers, self.scale = rounded(weight, theta.to(weight.dtype))
        return integers.to(torch.int16)

    @staticmethod
    def has_room(convolution: nn.Conv2d, theta: Tensor) -> bool:
        """Whether no sum can pass 16 bits, whatever fires."""
        integers = rounded(convolution.weight, theta.to(convolution.weight.dtype))[0].int()
        of_one_sign = torch.stack((integers.clamp(min=0), -integers.clamp(max=0)))
        return int(of_one_sign.sum((2, 3, 4)).amax()) < 2**15


class ByMatrixUnit(SpikeConvolution):
    """Weights as sums of three bf16 numbers, which is exact, on processors with AMX."""

    @staticmethod
    def serves(convolution: nn.Conv2d) -> bool:
        return convolution.out_channels % 16 == 0

    def currents(self, spikes: Spikes) -> Tensor:
        return convolve_by_matrix(spikes.numbers, self.weight, self.bias, self.stride, self.padding)


@dataclass(frozen=True)
class Due:
    """Currents of `shape` [N, out, H, W] that are yet to be made of spikes [N, C, H, W]."""

    convolution: SpikeConvolution
    spikes: Spikes
    shape: torch.Size
    dtype = torch.float32

    def currents(self) -> Tensor:
        """They themselves."""
        return self.convolution.currents(self.spikes)


@dataclass(frozen=True)
class Way:
    """One way: `kind` does the convolutions that it serves, where it `works`."""

    kind: type[SpikeConvolution]
    works: Callable[[], bool]

    def is_here(self, device: str) -> bool:
        """Whether it works on this device."""
        return device == "cpu" and self.works()

    def suits(self, convolution: Any, neuron: Any) -> bool:
        """Whether the convolution [N, C, H, W] of this layer's spikes is one for it."""
        if not isinstance(neuron, IntegrateFire) or neuron.signed or not is_plain(convolution):
            return False
        return self.kind.serves(convolution) and self.kind.has_room(convolution, neuron.theta)


def is_plain(convolution: Any) -> bool:
    """Whether it is one of two dimensions in fp32 without groups, dilation, or other edges than zeros, and as wide as high, and
    has no hooks, which only a layer's own call runs."""
    if type(convolution) is not nn.Conv2d or is_hooked(convolution):
        return False
    square = all(isinstance(size, tuple) and size[0] == size[1] for size in (convolution.stride, convolution.padding))
    whole = convolution.dilation == (1, 1) and convolution.groups == 1 and convolution.padding_mode == "zeros"
    return square and whole and convolution.weight.dtype == torch.float32


def _has_compiler() -> bool:
    return compiled.shared_library() is not None


@cache
def _has_matrix_unit() -> bool:
    """Whether the matrix unit is here, and gives a dense convolution's numbers where they are exact: with weights of 19 bits,
    which take all three parts, whatever torch's defaults are at the time."""
    if not _has_compiler() or not compiled.shared_library().has_matrix_unit():
        return False
    with torch.device("cpu"), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        spikes = torch.randint(2, (2, 16, 20, 20), generator=generator).float()
        weight = torch.randint(-(2**18), 2**18, (16, 16, 3, 3), generator=generator).float()
        ordered, bias = weight.permute(2, 3, 1, 0).contiguous(), torch.zeros(16, dtype=torch.float32)
        for stride in (1, 2):
            expected = F.conv2d(spikes.double(), weight.double(), None, stride, 1).float()
            if not torch.equal(convolve_by_matrix(spikes, ordered, bias, stride, 1), expected):
                return False
    return True


WAYS = {"events": Way(ByEvents, _has_compiler), "bf16x3": Way(ByMatrixUnit, _has_matrix_unit)}
"""By the precision that asks for it, those of fp32's products."""

INTEGERS = Way(ByIntegers, _has_compiler)
"""That of 8-bit weights: the sums of oneDNN's quantized convolution (`micelab.network.int8`), faster."""
