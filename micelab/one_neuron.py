"""One neuron looked at closely: all that happens in it step by step, and what its staircase costs.

The numbers come from `neuron` and `activation`; here they are put side by side, as a lesson needs them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from micelab.activation import clip, quantize
from micelab.exceptions import InputError
from micelab.neuron.firing import check_theta, integrate_and_fire

DUST = 1e-9
"""Head start of a neuron that is looked at, in units of theta: what reaches the threshold on paper reaches it here."""


@dataclass(frozen=True)
class NeuronTrace:
    """What one neuron did: tensors [T] in activation units; `before` and `after` are v at each step, before and after reset."""

    current: Tensor
    before: Tensor
    after: Tensor
    spikes: Tensor
    theta: float
    v0: float

    @property
    def time_steps(self) -> int:
        """T."""
        return len(self.current)

    @property
    def count(self) -> int:
        """n, the spikes sent."""
        return int(self.spikes.sum())

    @property
    def mean_current(self) -> float:
        """zbar."""
        return float(self.current.double().mean())

    @property
    def rate(self) -> float:
        """phi = theta*n/T, what the neuron says."""
        return self.theta * self.count / self.time_steps

    @property
    def residual(self) -> float:
        """v(T), what is left in the membrane."""
        return float(self.after[-1])

    @property
    def asked(self) -> int:
        """The count of the same neuron if its current were zbar at every step: T*Q(zbar)/theta."""
        steady = torch.full((self.time_steps, 1), self.mean_current, dtype=torch.float64)
        return int(integrate_and_fire(steady, self.theta, self.v0 + DUST)[0].sum())

    @property
    def timing_error(self) -> float:
        """phi - Q(zbar): what the order of the input alone has changed."""
        return self.theta * (self.count - self.asked) / self.time_steps

    @property
    def running_rate(self) -> Tensor:
        """phi after 1, 2, ..., T steps, [T]."""
        return self.theta * self.spikes.cumsum(0) / torch.arange(1, self.time_steps + 1)

    def verdict(self) -> str:
        """Over-firing, under-firing or neither, in words."""
        extra = self.count - self.asked
        if not extra:
            return "fires as often as its mean current asks for"
        return f"{'over' if extra > 0 else 'under'}-fires by {abs(extra)}"


def trace_neuron(current: Tensor, theta: float = 1.0, v0: float = 0.5) -> NeuronTrace:
    """The whole story of one neuron under `current` [T] (activation units); theta > 0, v0 in units of theta.

    >>> trace = trace_neuron(torch.tensor([1.5, 1.5, -1.0, -1.0]), theta=1.0, v0=0.5)
    >>> trace.spikes.tolist(), trace.residual, trace.asked, trace.verdict()
    ([1.0, 1.0, 0.0, 0.0], -0.5, 1, 'over-fires by 1')
    """
    if current.dim() != 1:
        raise InputError(f"current has shape {tuple(current.shape)}: one neuron takes one number a step, [T]")
    current = current.double()
    spikes, _ = integrate_and_fire(current[:, None], theta, v0 + DUST)
    spikes = spikes[:, 0]
    after = v0 * theta + (current - theta * spikes).cumsum(0)
    return NeuronTrace(current, after + theta * spikes, after, spikes, theta, v0)


@dataclass(frozen=True)
class StaircaseError:
    """Error Q(z) - z over an even spread of z in [0, theta], in activation units."""

    mean: float
    rms: float
    largest: float


def staircase_error(time_steps: int, v0: float = 0.5, theta: float = 1.0) -> StaircaseError:
    """Mean, root-mean-square and largest size of the quantization error, exact.

    A step is theta/T wide and its error runs evenly from (v0 - 1)*theta/T to v0*theta/T.

    >>> staircase_error(time_steps=4, v0=0.0, theta=1.0)
    StaircaseError(mean=-0.125, rms=0.14433756729740643, largest=0.25)
    """
    if time_steps < 1 or not 0 <= v0 <= 1:
        raise InputError(f"time_steps is {time_steps} and v0 {v0}: they must be at least 1 and between 0 and 1")
    step = theta / time_steps
    return StaircaseError((v0 - 0.5) * step, step * ((v0 - 0.5) ** 2 + 1 / 12) ** 0.5, max(v0, 1 - v0) * step)


@dataclass(frozen=True)
class ThresholdErrors:
    """Root-mean-square errors in activation units for every candidate theta, [K] each."""

    thetas: Tensor
    clipping: Tensor
    quantization: Tensor

    @property
    def total(self) -> Tensor:
        """Both together: no input suffers from both, so their squares add up."""
        return (self.clipping.square() + self.quantization.square()).sqrt()

    @property
    def best(self) -> int:
        """The place of the theta with the smallest total."""
        return int(self.total.argmin())


def threshold_errors(z: Tensor, thetas: Tensor, time_steps: int, v0: float = 0.5) -> ThresholdErrors:
    """What each candidate in `thetas` [K] > 0 would cost a layer whose inputs are `z` (any shape), at T = `time_steps`.

    >>> errors = threshold_errors(torch.tensor([0.5, 3.0]), torch.tensor([1.0, 2.0, 3.0]), time_steps=2)
    >>> errors.thetas[errors.best].item(), [round(e, 3) for e in errors.clipping.tolist()]
    (3.0, [1.414, 0.707, 0.0])
    """
    z, thetas = z.flatten().double(), check_theta(thetas).double()
    if not len(z):
        raise InputError("z is empty: give the inputs of a layer")
    clipped = [clip(z, float(theta)) for theta in thetas]
    lost = [(c - z.clamp(min=0)).square().mean().sqrt() for c in clipped]
    stepped = [
        (quantize(z, float(theta), time_steps, v0) - c).square().mean().sqrt() for theta, c in zip(thetas, clipped, strict=True)
    ]
    return ThresholdErrors(thetas, torch.stack(lost), torch.stack(stepped))
