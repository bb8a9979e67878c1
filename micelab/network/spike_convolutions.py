"""Convolutions of spikes on a CPU in fp32's numbers, each compiled, faster than a dense one: spike by spike, or by a matrix unit.

Their sums have another order, so currents differ from a dense convolution's by rounding, and on a grid (`micelab.snap_to_grid`)
not at all. Layers that do not suit a way convolve as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from micelab.neuron.compiled import convolve_spikes, convolved_shape, fire_convolved, shared_library
from micelab.neuron.firing import Firing, IntegrateFire


@dataclass(frozen=True)
class Convolution:
    """A convolution yet to be done: of `spikes` [N, C, H, W] by `weight` [rows, columns, C, out], theta multiplied in, to
    currents of `shape` [N, out, H, W]."""

    function: str
    spikes: Tensor
    weight: Tensor
    bias: Tensor
    stride: int
    padding: int
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        """Of the currents."""
        return torch.float32

    def currents(self) -> Tensor:
        """They themselves, channels_last."""
        return convolve_spikes(self.function, self.spikes, self.weight, self.bias, self.stride, self.padding)

    def fire(self, neurons: IntegrateFire, steps: int, count: bool, plus: Tensor | None = None) -> tuple[Tensor, Firing]:
        """Spikes of amplitude theta [steps*n, out, H, W] of the neurons that these currents, and those of `plus`, charge."""
        given = (self.spikes, self.weight, self.bias, self.stride, self.padding)
        out, fired, residual = fire_convolved(*given, steps, neurons.theta, neurons.v0, count, plus)
        return out, Firing(fired, residual, neurons.v0)


@dataclass(frozen=True)
class Way:
    """One way: `function` of the library takes the convolutions that it `serves`; `fires`: neurons can go along."""

    function: str
    serves: Callable[[nn.Conv2d], bool]
    works: Callable[[], bool]
    fires: bool = False

    def is_here(self, device: str) -> bool:
        """Whether it works on this device."""
        return device == "cpu" and self.works()

    def suits(self, convolution: Any, neuron: Any) -> bool:
        """Whether the convolution [N, C, H, W] of this layer's spikes is one for it."""
        if type(convolution) is not nn.Conv2d or not isinstance(neuron, IntegrateFire) or neuron.signed:
            return False
        square = all(isinstance(size, tuple) and size[0] == size[1] for size in (convolution.stride, convolution.padding))
        plain = square and convolution.dilation == (1, 1) and convolution.groups == 1 and convolution.padding_mode == "zeros"
        return plain and convolution.weight.dtype == torch.float32 and self.serves(convolution)

    def takes_along(self, neurons: Any) -> bool:
        """Whether these neurons, which read the currents of a convolution, can be done with it."""
        return self.fires and neurons.adds and not neurons.signed and neurons.theta.dtype == torch.float32

    def of(self, spikes: Tensor, convolution: Any, theta: Tensor) -> Convolution:
        """Of spikes [N, in, H, W] of amplitude theta (scalar or [in]), fp32. Raises RuntimeError where the kernel is larger than
        the padded map."""
        theta = theta.to(convolution.weight.dtype)
        weight = convolution.weight * (theta if theta.dim() == 0 else theta.view(1, -1, 1, 1))
        bias = weight.new_zeros(len(weight)) if convolution.bias is None else convolution.bias
        ordered = weight.permute(2, 3, 1, 0).contiguous()
        stride, padding = convolution.stride[0], convolution.padding[0]
        shape = torch.Size(convolved_shape(spikes, ordered, stride, padding))
        return Convolution(self.function, spikes, ordered, bias, stride, padding, shape)


def _has_compiler() -> bool:
    return shared_library() is not None


@cache
def _has_matrix_unit() -> bool:
    """Whether the matrix unit is here, and gives a dense convolution's numbers where they are exact: with weights of 19 bits,
    which take all three parts, whatever torch's defaults are at the time."""
    if not _has_compiler() or not shared_library().has_matrix_unit():
        return False
    with torch.device("cpu"), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        spikes = torch.randint(2, (2, 16, 20, 20), generator=generator).float()
        weight = torch.randint(-(2**18), 2**18, (16, 16, 3, 3), generator=generator).float()
        ordered, bias = weight.permute(2, 3, 1, 0).contiguous(), torch.zeros(16, dtype=torch.float32)
        for stride in (1, 2):
            expected = F.conv2d(spikes.double(), weight.double(), None, stride, 1).float()
            if not torch.equal(convolve_spikes("convolve_matrix", spikes, ordered, bias, stride, 1), expected):
                return False
    return True


def _by_events(convolution: nn.Conv2d) -> bool:
    """Below 32 channels, 3x3 weights alone are enough to pay for finding the spikes."""
    if convolution.in_channels <= 32 and convolution.kernel_size == (3, 3):
        return convolution.in_channels >= 16 and convolution.out_channels % 16 == 0
    return convolution.in_channels >= 32 and convolution.out_channels % 32 == 0


WAYS = {
    "events": Way("convolve_events", _by_events, _has_compiler, fires=True),
    "bf16x3": Way("convolve_matrix", lambda convolution: convolution.out_channels % 16 == 0, _has_matrix_unit),
}
"""events: spikes add their weights where they are seen, by eights whose sums are known or one by one, and silence costs next to
nothing. bf16x3: weights as sums of three bf16 numbers, which is exact, on processors with AMX."""
