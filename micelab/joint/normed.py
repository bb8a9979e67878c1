"""Batch-norm that the activation after it takes along: both in one pass over memory, forward and backward, on a CPU.

A walk hands batch-norm's input on (`TakesAlong`), through a sum where there is one, and the activation computes its currents,
(z - mean)*slope*weight + bias (+ plus), as it reads them: what batch-norm says is neither rounded nor stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from micelab.graph.runner import LayerRunner
from micelab.graph.tracing import is_activation, is_hooked, module_of
from micelab.joint.plan import Plan
from micelab.neuron.normed import Gradient, NormedNeurons


class Norm(NamedTuple):
    """A batch-norm in training: its weight and bias, and of this batch the mean and the slope 1/sqrt(variance + eps), [C]."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    slope: Tensor


def statistics(norm: Any, z: Tensor) -> tuple[Norm, Tensor]:
    """What `norm` does to z in training, and z's variance [C]; its running statistics go on."""
    with torch.no_grad():
        mean, variance = NormedNeurons(z, None, 1.0, 0.0, 1, False).moments(norm.running_mean)
        norm.num_batches_tracked += 1
        momentum = 1 / int(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        count = z.numel() // len(mean)
        norm.running_mean.lerp_(mean, momentum)
        norm.running_var.lerp_(variance * (count / max(1, count - 1)), momentum)
        return Norm(norm.weight, norm.bias, mean, (variance + norm.eps).rsqrt()), variance


def suits(norm: Any, neurons: Any, z: Tensor, steps: int) -> bool:
    """Whether these neurons can take this batch-norm along, by T = `steps` steps, for its input z."""
    plain = norm.training and norm.affine and norm.running_mean is not None and not isinstance(norm, nn.SyncBatchNorm)
    return plain and not is_hooked(norm) and neurons.log_theta.numel() == 1 and NormedNeurons.suits(z, steps)


class TakesAlong(LayerRunner):
    """A walk whose activations take batch-norms along: `taken` says of each, by node, what it does and what is added to it."""

    plan: Plan
    node: fx.Node

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.taken: dict[fx.Node, tuple[Norm, Tensor | None]] = {}

    def takes(self, norm: Any, z: Tensor, steps: int) -> tuple[Norm, Tensor] | None:
        """What the batch-norm at hand does, and z's variance, if the activation after it takes it along and z is to be handed on;
        else None."""
        reader = self.plan.normed.get(self.node)
        if reader is None:
            return None
        activation = reader if is_activation(self.traced, reader) else next(iter(reader.users))
        if not suits(norm, module_of(self.traced, str(activation.target)), z, steps):
            return None
        found, variance = statistics(norm, z)
        self.taken[activation] = found, None
        return found, variance

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The sum of such a batch-norm and another current is left to the activation too, if they have one shape."""
        activation = next(iter(self.node.users), None)
        found = [isinstance(source, fx.Node) and self.plan.normed.get(source) is self.node for source in self.node.args]
        if activation not in self.taken or True not in found:
            return super().call_function(target, args, kwargs)
        normed = found.index(True)
        z, plus = args[normed], args[1 - normed]
        if isinstance(plus, Tensor) and plus.shape == z.shape:
            self.taken[activation] = self.taken[activation][0], plus
            return z
        norm, _ = self.taken.pop(activation)  # one of them is spread over the other: batch-norm is done after all
        eps = module_of(self.traced, str(cast(fx.Node, self.node.args[normed]).target)).eps
        said = F.batch_norm(z, None, None, norm.weight, norm.bias, True, eps=eps)
        return super().call_function(target, (said, plus) if normed == 0 else (plus, said), kwargs)


class ThroughTime(torch.autograd.Function):
    """theta*s(t) with the gradient of every spike, as `micelab.joint.through_time.spikes_through_time`, [T*N, C, ...]."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, plus: Tensor | None, log_theta: Tensor, v0: Tensor, steps: int, constant: bool, *norm: Tensor
    ) -> Tensor:
        ctx.save_for_backward(z, plus, log_theta, v0, *norm)
        ctx.steps, ctx.constant = steps, constant
        return NormedNeurons(z, plus, float(log_theta.exp()), float(v0), steps, constant).fire(*_affine(Norm(*norm)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, plus, log_theta, v0, *rest = ctx.saved_tensors
        norm = Norm(*rest)
        fused = NormedNeurons(z, plus, float(log_theta.exp()), float(v0), ctx.steps, ctx.constant)
        found = fused.gradient(grad, *_affine(norm), norm.mean)
        return _gradients(fused, found, norm, plus, log_theta, v0)


class StraightThrough(torch.autograd.Function):
    """`rate` with the gradient of the staircase, as `micelab.activation.straight_through`, [N, C, ...]."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, plus: Tensor | None, log_theta: Tensor, v0: Tensor, rate: Tensor, levels: int, *norm: Tensor
    ) -> Tensor:
        ctx.save_for_backward(z, plus, log_theta, v0, rate, *norm)
        ctx.levels = levels
        return rate.view_as(rate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, plus, log_theta, v0, rate, *rest = ctx.saved_tensors
        norm = Norm(*rest)
        fused = NormedNeurons(z, plus, float(log_theta.exp()), float(v0), 1, False)
        found = fused.rate_gradient(grad, rate, ctx.levels, *_affine(norm), norm.mean)
        return _gradients(fused, found, norm, plus, log_theta, v0)


def _gradients(
    fused: NormedNeurons, found: Gradient, norm: Norm, plus: Tensor | None, log_theta: Tensor, v0: Tensor
) -> tuple[Tensor | None, ...]:
    """Of z, plus, log_theta, v0, two plain values, and of the weight and bias of the norm, whose mean and slope are z's."""
    of_z, of_weight, of_bias = fused.of_norm(found, norm.weight, norm.slope, norm.mean)
    of_neurons = found.of_theta.reshape(log_theta.shape), found.of_start.reshape(v0.shape)
    return of_z, None if plus is None else found.of_current, *of_neurons, None, None, of_weight, of_bias, None, None


def fire_once(z: Tensor, norm: Norm, theta: Tensor, v0: Tensor, plus: Tensor | None) -> Tensor:
    """theta*s of one step, [N, C, ...], without gradient."""
    with torch.no_grad():
        return NormedNeurons(z, plus, float(theta), float(v0), 1, False).fire(*_affine(norm))


def _affine(norm: Norm) -> tuple[Tensor, Tensor]:
    """scale and shift [C] of what batch-norm does."""
    scale = norm.weight * norm.slope
    return scale, norm.bias - norm.mean * scale
