"""Batch-norm and the integrate-and-fire neurons after it on a CPU in one pass, forward and backward: what training runs.

Batch-norm's output is never written: a neuron's current is an affine function of batch-norm's input. The functions are those
of `normed.c` (micelab.neuron.compiled); they know channels that come last in memory, in multiples of 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from micelab.neuron.compiled import LONGEST, shared_library, threads_for
from micelab.neuron.layout import is_dense

PLACES, ROOM = 1024, 2**16
"""Neurons that are taken through all steps together, and how many values their steps may be at most."""


class Gradient(NamedTuple):
    """of_current: that of the currents, like z (summed over the steps where z is constant); of_theta: of log(theta); of_start:
    of v0; sums [2, C]: of the first over all but the channels, and of its product with z - mean."""

    of_current: Tensor
    of_theta: Tensor
    of_start: Tensor
    sums: Tensor


@dataclass(frozen=True)
class NormedNeurons:
    """Neurons whose current is affine in z, by channel, as batch-norm makes it: z*scale + shift (+ plus).

    z: [T*N, C, ...] fp32 or bf16 with the channels last in memory, or, `constant`, [N, C, ...], the same at every step; plus: a
    second current [T*N, C, ...], only where z is not constant; theta, v0 (in units of theta): one number for all; steps: T.
    """

    z: Tensor
    plus: Tensor | None
    theta: float
    v0: float
    steps: int
    constant: bool

    @staticmethod
    def suits(z: Tensor, steps: int) -> bool:
        """Whether such a z can be taken here, by T = `steps` steps."""
        if type(z) is not Tensor or not z.is_cpu or z.dtype not in (torch.float32, torch.bfloat16) or z.dim() < 3:
            return False
        channels_last = z.stride(1) == 1 and z.stride(0) == z[0].numel() and is_dense(z) and z.numel() > 0
        fits = z.shape[1] % 16 == 0 and z.shape[1] * steps <= ROOM and steps <= LONGEST
        return channels_last and fits and shared_library() is not None

    @property
    def _block(self) -> int:
        channels = self.z.shape[1]
        return channels * max(1, min(PLACES, ROOM // self.steps) // channels)

    def _places(self, values: Tensor) -> Tensor:
        """[..., C] values of the channels as values for each neuron of a block."""
        return values.float().repeat(*[1] * (values.dim() - 1), self._block // values.shape[-1]).contiguous()

    def _sizes(self) -> tuple[int, int]:
        return self.z.dtype == torch.bfloat16, threads_for(self.z)

    def in_order(self, values: Tensor) -> Tensor:
        """`values` in the memory order and type of z: themselves where they are already."""
        same = values.dtype == self.z.dtype and values.stride() == self.z.stride()
        return values if same else self._like_z(values.shape).copy_(values)

    def moments(self, pivot: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and (biased) variance [C] of z; precise where `pivot` [C] is near the mean."""
        library, z, block, channels = shared_library(), self.z, self._block, self.z.shape[1]
        pivots, chunk = self._places(pivot), 32 * block
        sums = torch.empty(-(-z.numel() // chunk), 2, channels)
        library.batch_moments(*_places_of(z, pivots, sums), z.numel(), chunk, block, channels, *self._sizes())
        far, square = sums.sum(0, dtype=torch.float64) / (z.numel() // channels)
        return (pivot + far).float(), (square - far * far).clamp(min=0).float()

    def fire(self, scale: Tensor, shift: Tensor) -> Tensor:
        """theta*s(t), [T*N, C, ...], for the currents z*scale + shift (+ plus); scale, shift: [C]."""
        shape = (len(self.z) * (self.steps if self.constant else 1), *self.z.shape[1:])
        out = self._like_z(shape)
        patterns = self._places(torch.stack((scale, shift)))
        neurons = out.numel() // self.steps
        plus = None if self.plus is None else self.in_order(self.plus)
        places = _places_of(self.z, plus, out, *patterns)
        sizes = (neurons, self._block, self.steps, self.constant, *self._sizes())
        shared_library().normed_fire(*places, self.theta, self.v0 * self.theta, *sizes)
        return out

    def gradient(self, grad: Tensor, scale: Tensor, shift: Tensor, mean: Tensor) -> Gradient:
        """What follows from the gradient of theta*s(t), [T*N, C, ...]; scale, shift, mean: [C]."""
        kernel, neurons = shared_library().normed_gradient, grad.numel() // self.steps
        more = (self.theta, self.v0 * self.theta), (self.steps, self.constant)
        out, of_channels, (of_theta, of_start) = self._gradient(kernel, neurons, [grad], (scale, shift, mean), *more)
        charge = (of_channels[0] * (scale * mean + shift) + of_channels[1] * scale).sum()  # and that of plus, in of_theta
        return Gradient(out, (of_theta - charge).float(), of_start.float() * self.theta, of_channels.float())

    def rate_gradient(self, grad: Tensor, rate: Tensor, levels: int, scale: Tensor, shift: Tensor, mean: Tensor) -> Gradient:
        """The same for that of given rates, with the gradient of the staircase of `levels` steps at the currents
        (`micelab.activation.straight_through`)."""
        kernel, spike = shared_library().normed_rate_gradient, self.theta / levels
        more = (self.theta, -spike), ()
        out, of_channels, (of_theta, spikes) = self._gradient(kernel, grad.numel(), [grad, rate], (scale, shift, mean), *more)
        return Gradient(out, of_theta.float(), spikes.float() * spike, of_channels.float())

    def _gradient(
        self,
        kernel: Any,
        neurons: int,
        values: list[Tensor],
        by_channel: tuple[Tensor, ...],
        numbers: tuple[float, float],
        more: tuple[int, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs such a kernel: (gradient of the currents, its sums by channel, two sums over all), the sums in fp64."""
        channels, block, out = self.z.shape[1], self._block, torch.empty_like(self.z)
        blocks = -(-neurons // block)
        sums, two = torch.empty(blocks, 2, channels), torch.empty(blocks, 2, dtype=torch.float64)
        patterns = self._places(torch.stack(by_channel))
        grad, *rates = [self.in_order(tensor) for tensor in values]
        plus = None if self.plus is None else self.in_order(self.plus)
        places = _places_of(grad, self.z, plus, *rates, out, *patterns, sums, two)
        kernel(*places, *numbers, neurons, block, channels, *more, *self._sizes())
        return out, sums.sum(0, dtype=torch.float64), two.sum(0)

    def of_norm(self, found: Gradient, weight: Tensor, slope: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of z, and of batch-norm's weight and bias: the currents are (z - mean)*slope*weight + bias (+ plus), with
        mean and slope = 1/sqrt(variance + eps) of z itself."""
        of_bias, of_weight = found.sums[0], found.sums[1] * slope
        first, count = weight * slope, self.z.numel() // len(weight)
        second = -first * slope * of_weight / count
        out = found.of_current if self.plus is None else torch.empty_like(self.z)
        patterns = self._places(torch.stack((first, second, -first * of_bias / count - mean * second)))
        places = _places_of(found.of_current, self.z, out, *patterns)
        shared_library().of_channels(*places, self.z.numel(), self._block, *self._sizes())
        return out, of_weight, of_bias

    def _like_z(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty_strided(shape, self.z.stride(), dtype=self.z.dtype)


def _places_of(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]
