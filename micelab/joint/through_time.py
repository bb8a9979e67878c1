"""The pass through time: true spikes forward, their gradient backward through all T steps of every neuron.

The gradient of the rates (micelab.joint.loop) knows how many spikes a neuron sends, not when. This one follows the membrane:
v(t) = v(t-1) - theta*s(t-1) + I(t) is differentiated as it stands, and only the spike s(t) = 1 where v(t) >= theta has a gradient
put in its place: ds/dv = 1/theta where |v - theta| < theta/2, else 0. So the charge of a current passes on from step to step
until it meets a membrane near its threshold, and counts there, once. For T = 1 and v0 = 1/2 that is the gradient of the rates.

Back-propagation through time with a rectangular surrogate: Wu et al., Frontiers in Neuroscience 12:331, 2018; the reset is not
detached. A step costs up to T times one of an ANN. Batch-norm takes its statistics over all T steps (Zheng et al., AAAI 2021);
on a CPU it and the neurons after it are one pass (micelab.joint.normed).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from micelab.graph.affine import BATCH_NORMS
from micelab.graph.tracing import is_activation, module_of, read
from micelab.joint import convolutions
from micelab.joint.normed import TakesAlong, ThroughTime
from micelab.joint.plan import JointPass, Plan, scale_gradients
from micelab.network.folded import TimeFolded
from micelab.neuron import compiled
from micelab.neuron.firing import fire
from micelab.neuron.layout import over_channels, steps_like


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

    def __reduce__(self) -> Any:
        """A copy reads its own model: the plan knows the layers of this one."""
        return type(self), (self.model,), {"training": self.training}

    def forward(self, images: Tensor, time_steps: int, penalize: bool = False) -> JointPass:
        """Images [N, C, H, W] in [0, 1] through T = `time_steps` steps; the penalty is 0: a configuration that asks for one
        together with this gradient is refused."""
        logits = _Steps(self._plan, time_steps, len(images)).run(images)
        return JointPass(logits, logits.new_zeros(()))


class _Steps(TakesAlong, TimeFolded):
    """All T steps with gradient; the head runs on their mean."""

    def __init__(self, plan: Plan, time_steps: int, images: int):
        super().__init__(plan.traced, time_steps, images, record=False, spikes=False)
        self.plan = plan

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
        """A batch-norm that the neurons after it take along hands its input on to them; convolutions follow the spikes."""
        if self.node.args[0] in self.over_time and (out := convolutions.following(self.traced, self.node, args[0])) is not None:
            return out
        timed = self.node in self.over_time or is_activation(self.traced, next(iter(self.node.users), self.node))
        norm = module_of(self.traced, target)
        if timed and isinstance(norm, BATCH_NORMS) and self.takes(norm, args[0], self.steps) is not None:
            return args[0]
        return super().call_module(target, args, kwargs)

    def activate(self, name: str, module: Any, z: Tensor) -> Tensor:
        log_theta, v0 = scale_gradients(module, z)
        if self.node not in self.taken:
            spikes = spikes_through_time(self.current(z), log_theta, v0)
            return spikes.flatten(0, 1) if self.steps > 1 else spikes[0]
        norm, plus = self.taken.pop(self.node)
        constant = self.node.all_input_nodes[0] not in self.over_time
        return cast(Tensor, ThroughTime.apply(z, plus, log_theta, v0, self.steps, constant, *norm))

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
