"""The pass through time: true spikes forward, their gradient backward through all T steps of every neuron.

The gradient of the rates (micelab.joint.loop) knows how many spikes a neuron sends, not when. This one follows the membrane:
v(t) = v(t-1) - theta*s(t-1) + I(t) is differentiated as it stands, and only the spike s(t) = 1 where v(t) >= theta has a gradient
put in its place: ds/dv = 1/theta where |v - theta| < theta/2, else 0. So the charge of a current passes on from step to step
until it meets a membrane near its threshold, and counts there, once. For T = 1 and v0 = 1/2 that is the gradient of the rates.

Back-propagation through time with a rectangular surrogate: Wu et al., Frontiers in Neuroscience 12:331, 2018; the reset is not
detached. A step costs up to T times one of an ANN. Batch-norm takes its statistics over all T steps (Zheng et al., AAAI 2021);
on a CPU it and the neurons after it are one pass (micelab.neuron.normed), and its output is neither rounded nor stored.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from micelab.activation import over_channels
from micelab.graph.tracing import is_activation, module_of, read
from micelab.joint.plan import JointPass, Plan, scale_gradients
from micelab.network.folded import TimeFolded
from micelab.neuron import compiled
from micelab.neuron.firing import fire
from micelab.neuron.layout import steps_like
from micelab.neuron.normed import NormedNeurons


class SpikesThroughTime(nn.Module):
    """Runs `model` (of `micelab.joint.prepare`) with true spikes and the gradient of every step of them.

    >>> import micelab
    >>> net = micelab.joint.prepare(micelab.small_cnn(activation="quant_clip"), time_steps=4)
    >>> logits, _ = SpikesThroughTime(net)(torch.rand(2, 1, 8, 8), time_steps=4)
    >>> logits.sum().backward()
    >>> logits.shape, net.stem[2].v0_start.grad.shape
    (torch.Size([2, 10]), torch.Size([]))
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self._plan = Plan(read(model))

    def forward(self, images: Tensor, time_steps: int, penalize: bool = False) -> JointPass:
        """Images [N, C, H, W] in [0, 1] through T = `time_steps` steps; the penalty is 0: a configuration that asks for one
        together with this gradient is refused."""
        logits = _Steps(self._plan, time_steps, len(images)).run(images)
        return JointPass(logits, logits.new_zeros(()))


class _Steps(TimeFolded):
    """All T steps with gradient; the head runs on their mean."""

    def __init__(self, plan: Plan, time_steps: int, images: int):
        super().__init__(plan.traced, time_steps, images, record=False, spikes=False)
        self.plan = plan
        self.norms: dict[fx.Node, Any] = {}  # by activation, the batch-norm that it takes along
        self.plus: dict[fx.Node, Tensor] = {}  # and the current that is added after it

    def run_node(self, n: fx.Node) -> Any:
        if n in self.plan.before:
            return super().run_node(n)
        timed = {source: self.env[source] for source in n.all_input_nodes if source in self.over_time}
        self.env.update({source: value.unflatten(0, (self.steps, self.images)).mean(0) for source, value in timed.items()})
        self.over_time -= timed.keys()
        out = super().run_node(n)
        self.env.update(timed)  # others may still want every step of them
        self.over_time |= timed.keys()
        return out

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A batch-norm that the neurons after it take along hands its input on to them."""
        reader = self.plan.normed.get(self.node)
        if reader is not None:
            alone = is_activation(self.traced, reader)
            activation = reader if alone else next(iter(reader.users))
            norm, neurons = (cast(Any, module_of(self.traced, str(node.target))) for node in (self.node, activation))
            if (alone or self.node in self.over_time) and suits(norm, neurons, args[0], self.steps):
                self.norms[activation] = norm
                return args[0]
        return super().call_module(target, args, kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The sum of such a batch-norm and another current is left to the neurons too."""
        activation = next(iter(self.node.users), None)
        if activation not in self.norms:
            return super().call_function(target, args, kwargs)
        normed = next(i for i, source in enumerate(self.node.args) if self.plan.normed.get(cast(Any, source)) is self.node)
        self.plus[cast(fx.Node, activation)] = args[1 - normed]
        return args[normed]

    def activate(self, name: str, module: Any, z: Tensor) -> Tensor:
        log_theta, v0 = scale_gradients(module, z)
        norm = self.norms.pop(self.node, None)
        if norm is None:
            return spikes_through_time(self.current(z), log_theta, v0).flatten(0, 1)
        constant = self.node.all_input_nodes[0] not in self.over_time
        return normed_spikes(z, norm, log_theta, v0, self.steps, self.plus.pop(self.node, None), constant)

    def joins(self, module: Any) -> bool:
        return False


class _ThroughTime(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, current: Tensor, log_theta: Tensor, v0: Tensor) -> Tensor:
        ctx.save_for_backward(current, log_theta, v0)
        out = steps_like(current)
        fire(current, log_theta.exp(), v0, False, out, amplitude=True)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        current, log_theta, v0 = ctx.saved_tensors
        return time_gradient(grad, current, log_theta.exp(), v0)


def spikes_through_time(current: Tensor, log_theta: Tensor, v0: Tensor) -> Tensor:
    """theta*s(t) of neurons with soft reset, [T, N, ...], for currents [T, N, ...] in activation units, with gradient.

    log_theta, v0 (in units of theta): scalar or [C].

    >>> current = torch.tensor([[[0.3]], [[0.4]]], requires_grad=True)  # the second step fires, and both have charged it
    >>> spikes = spikes_through_time(current, torch.tensor(0.0), torch.tensor(0.5))
    >>> spikes.sum().backward()
    >>> spikes.flatten().tolist(), current.grad.flatten().tolist()
    ([0.0, 1.0], [1.0, 1.0])
    """
    return _ThroughTime.apply(current, log_theta, v0)


class _NormedThroughTime(torch.autograd.Function):
    """The same with batch-norm before it, [T*N, C, ...]: `NormedNeurons` runs both in one pass, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        plus: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        log_theta: Tensor,
        v0: Tensor,
        mean: Tensor,
        slope: Tensor,
        steps: int,
        constant: bool,
    ) -> Tensor:
        ctx.save_for_backward(z, plus, weight, bias, log_theta, v0, mean, slope)
        ctx.steps, ctx.constant = steps, constant
        scale = weight * slope
        fused = NormedNeurons(z, plus, float(log_theta.exp()), float(v0), steps, constant)
        return fused.fire(scale, bias - mean * scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, plus, weight, bias, log_theta, v0, mean, slope = ctx.saved_tensors
        fused = NormedNeurons(z, plus, float(log_theta.exp()), float(v0), ctx.steps, ctx.constant)
        scale = weight * slope
        of_current, of_theta, of_start, sums = fused.gradient(grad, scale, bias - mean * scale, mean)
        of_bias, of_weight = sums[0], sums[1] * slope
        count = z.numel() // len(weight)
        second = -scale * slope * of_weight / count
        of_z = fused.combine(of_current, scale, second, -scale * of_bias / count - mean * second)
        of_plus = None if plus is None else of_current
        return (of_z, of_plus, of_weight, of_bias, of_theta.reshape(log_theta.shape), of_start.reshape(v0.shape), *[None] * 4)


def suits(norm: Any, neurons: Any, z: Tensor, steps: int) -> bool:
    """Whether `normed_spikes` can run this batch-norm and these neurons for batch-norm's input z."""
    plain = norm.training and norm.affine and norm.running_mean is not None and not isinstance(norm, nn.SyncBatchNorm)
    return plain and neurons.log_theta.numel() == 1 and NormedNeurons.suits(z, steps)


def normed_spikes(
    z: Tensor, norm: Any, log_theta: Tensor, v0: Tensor, steps: int, plus: Tensor | None = None, constant: bool = False
) -> Tensor:
    """theta*s(t), [T*N, C, ...], of neurons with the current norm(z) + plus, with gradient; norm is in training mode.

    z: [T*N, C, ...], or [N, C, ...] where it is the same at every step (`constant`); plus: like z.
    """
    with torch.no_grad():
        mean, variance = NormedNeurons(z, plus, 1.0, 0.0, steps, constant).moments(norm.running_mean)
        norm.num_batches_tracked += 1
        momentum = 1 / int(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        count = z.numel() // len(mean)
        norm.running_mean.lerp_(mean, momentum)
        norm.running_var.lerp_(variance * (count / max(1, count - 1)), momentum)
        slope = (variance + norm.eps).rsqrt()
    return _NormedThroughTime.apply(z, plus, norm.weight, norm.bias, log_theta, v0, mean, slope, steps, constant)


def time_gradient(grad: Tensor, current: Tensor, theta: Tensor, v0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the currents [T, N, ...], of log(theta) and of v0 (scalar or [C]) for that of theta*s(t), [T, N, ...].

    The spikes are homogeneous of degree one in (current, theta), so theta's follows from the currents' (Euler).
    """
    fused = compiled.time_gradient(grad, current, theta, v0)
    if fused is not None:
        return fused
    with torch.no_grad():
        wide = current.float()
        v = torch.empty_like(wide[0])
        bound = over_channels(theta, v)
        v.copy_((over_channels(v0, v) * bound).expand_as(v))
        near, sent = [], torch.zeros_like(v)
        for step, g in zip(wide, grad, strict=True):
            v = v + step
            near.append((v - bound).abs() < bound / 2)
            spike = (v >= bound) * bound
            sent += g * spike
            v = v - spike
        of_current = steps_like(current)
        passed, charge = torch.zeros_like(v), torch.zeros_like(v)
        for t in reversed(range(len(wide))):
            passed = torch.where(near[t], grad[t].float(), passed)
            of_current[t] = passed
            charge += passed * wide[t]
        dims = [d for d in range(v.dim()) if theta.dim() == 0 or d != 1]
        of_theta = (sent - charge).sum(dims, dtype=theta.dtype)
        of_v0 = (passed * bound).sum([d for d in range(v.dim()) if v0.dim() == 0 or d != 1], dtype=v0.dtype)
        return of_current, of_theta, of_v0
