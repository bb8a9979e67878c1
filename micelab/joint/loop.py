"""The joint pass: true spikes forward, the gradient of their rates backward.

One walk over the layers carries two values side by side: the currents and spikes of all T steps, without gradient, by the
code that simulates (micelab.network), and their mean over time, with gradient, as in an ordinary ANN. A layer's mean
output is the true rate phi = theta*n/T of its neurons; its gradient is that of Q at the mean current (`straight_through`).
No back-propagation through time: a step costs less than (T + 3)/3 of an ANN's. Batch-norm takes its statistics from the mean
current and is the same affine map at every step.

Rates in the forward pass and an ANN's gradient in the backward pass: tandem learning (Wu et al., arXiv 1907.01167).
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from micelab.activation import straight_through
from micelab.exceptions import ConversionError, InputError
from micelab.graph.affine import BATCH_NORMS, is_size
from micelab.graph.tracing import is_activation, module_of, read
from micelab.joint import convolutions
from micelab.joint.normed import StraightThrough, TakesAlong, fire_once
from micelab.joint.plan import JointPass, Plan, scale_gradients
from micelab.network.folded import TimeFolded, largest_layer
from micelab.network.spike_convolutions import ByEvents, Due, Spikes
from micelab.network.spiking import CACHE_BUDGET
from micelab.neuron.firing import fire
from micelab.neuron.layout import over_channels

STEPS_BUDGET = 4 * CACHE_BUDGET
"""Bytes that the T steps of the largest layer may take at a time. Smaller chunks save memory, but no time in training."""


class SpikesInTheLoop(nn.Module):
    """Runs `model` (of `micelab.joint.prepare`) with true spikes forward and the gradient of its rates backward.

    >>> import micelab
    >>> net = micelab.joint.prepare(micelab.small_cnn(activation="quant_clip"), time_steps=4)
    >>> logits, penalty = SpikesInTheLoop(net)(torch.rand(2, 1, 8, 8), time_steps=4)
    >>> logits.sum().backward()
    >>> logits.shape, net.stem[2].v0_start.grad.shape
    (torch.Size([2, 10]), torch.Size([]))
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self._plan = Plan(read(model))
        self._largest: dict[tuple[int, ...], int] = {}

    def __reduce__(self) -> Any:
        """A copy reads its own model: the plan knows the layers of this one."""
        return type(self), (self.model,), {"training": self.training}

    def forward(self, images: Tensor, time_steps: int, penalize: bool = False) -> JointPass:
        """Images [N, C, H, W] in [0, 1] through T = `time_steps` steps; the penalty is 0 unless asked for."""
        mean = _Mean(self._plan, time_steps, self._chunk(images, time_steps), penalize)
        logits = mean.walk(images)
        return JointPass(logits, torch.stack(mean.penalties).mean() if penalize else logits.new_zeros(()))

    def _chunk(self, images: Tensor, time_steps: int) -> int:
        """How many images' T steps go from one activation to the next together: as many as the largest layer has room for."""
        if images.device.type != "cpu":
            return len(images)
        shape = tuple(images.shape[1:])
        if shape not in self._largest:  # of a copy, which may change its batch statistics
            self._largest[shape] = largest_layer(copy.deepcopy(self._plan.traced).eval(), images[:1])
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else images.dtype
        return max(1, STEPS_BUDGET // (self._largest[shape] * time_steps * dtype.itemsize))


class _Steps(TimeFolded):
    """The T steps of a chunk of the images, without gradient: the simulator, with batch-norm as the mean's walk found it.

    affine: of every batch-norm, (weight, bias) of itself and the layer before it in one, or, where that cannot be folded
    into, (scale, shift) for each channel. `counts`: the spikes of the last activation, [n, ...].
    """

    def __init__(self, plan: Plan, time_steps: int, images: slice, affine: dict[fx.Node, tuple[Tensor, Tensor]]):
        super().__init__(plan.traced, time_steps, images.stop - images.start, record=False, spikes=False)
        self.plan, self.part, self.affine = plan, images, affine
        self.counts = torch.empty(0)

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.affine and n not in self.plan.folded:
            return super().run_node(n)
        source = n.all_input_nodes[0]
        if source in self.over_time:
            self.over_time.add(n)
        x = self.env[source]
        if isinstance(x, Due):
            x = self.env[source] = x.currents()
        if n in self.plan.folded:  # its batch-norm comes next and takes it along
            return x
        before, (weight, bias) = self.plan.weighted.get(n), self.affine[n]
        sender = source.all_input_nodes[0] if before is not None else source
        if sender in self.over_time and is_activation(self.traced, sender) and convolutions.suits(before, x):
            theta = module_of(self.traced, str(sender.target)).theta
            return ByEvents(before, theta, (weight, bias)).due(x if isinstance(x, Spikes) else Spikes(x))
        x = x.numbers if isinstance(x, Spikes) else x
        if before is None:
            return x * over_channels(weight, x) + over_channels(bias, x)
        return F.linear(x, weight, bias) if isinstance(before, nn.Linear) else before._conv_forward(x, weight, bias)

    def activate(self, name: str, module: Any, z: Tensor) -> Tensor:
        out = self.room(z)
        self._fire(module, self.current(z), out.unflatten(0, (self.steps, self.images)))
        return out

    def joins(self, module: Any) -> bool:
        return True

    def _fire_with(self, due: Due, module: Any, plus: Tensor | Spikes | None = None) -> Spikes:
        assert isinstance(due.convolution, ByEvents)
        out, did = due.convolution.fire(due.spikes, module, self.steps, True, plus)
        self.counts = did.count
        return out

    def fire_sum(self, module: Any, first: Tensor, second: Tensor, out: Tensor) -> None:
        self._fire(module, first, out, second)

    def _fire(self, module: Any, current: Tensor, out: Tensor, plus: Tensor | None = None) -> None:
        self.counts, _ = fire(current, module.theta, module.v0, False, out, amplitude=True, count=True, plus=plus)


class _Mean(TakesAlong):
    """The mean over the steps, with gradient; it leads the walk and hands every layer to the steps too."""

    def __init__(self, plan: Plan, time_steps: int, chunk: int, penalize: bool):
        super().__init__(plan.traced)
        self.plan, self.time_steps, self.chunk, self.penalize = plan, time_steps, chunk, penalize
        self.penalties: list[Tensor] = []
        self.affine: dict[fx.Node, tuple[Tensor, Tensor]] = {}
        self.steps: list[_Steps] = []
        self.later: set[fx.Node] = set()  # what the images alone do not decide: it differs from step to step, or in size
        self.waiting: list[fx.Node] = []

    def walk(self, images: Tensor) -> Tensor:
        bounds = [*range(0, len(images), self.chunk), len(images)]
        parts = [slice(a, b) for a, b in pairwise(bounds)] if self.time_steps > 1 else []  # one step is its own mean
        self.steps = [_Steps(self.plan, self.time_steps, part, self.affine) for part in parts]
        self.args_iter = iter([images])
        out: Any = None
        for n in self.plan.traced.graph.nodes:
            self.node = n
            if is_activation(self.plan.traced, n):
                self._wait(n)
                self._catch_up()
                out = self.env[n] = self.run_node(n)
            else:
                out = self.env[n] = self.run_node(n)
                if n in self.plan.before:
                    self._wait(n)
            for used in self.user_to_last_uses.get(n, []):
                self.env.pop(used, None)
        return out

    def _wait(self, n: fx.Node) -> None:
        """Leaves the node to the steps, or, where the images alone decide it, gives them its value."""
        self.waiting.append(n)
        if is_activation(self.plan.traced, n) or is_size(n) or any(source in self.later for source in n.all_input_nodes):
            self.later.add(n)
            return
        value = self.env[n]
        for steps in self.steps:
            alone = isinstance(value, Tensor) and n.op != "get_attr"
            steps.env[n] = value.detach()[steps.part] if alone else value

    @torch.no_grad()
    def _catch_up(self) -> None:
        """Takes the steps through the layers that wait, up to the activation, chunk by chunk."""
        for steps in self.steps:
            for n in self.waiting:
                if n in self.later:
                    steps.env[n] = steps.run_node(n)
                for used in self.user_to_last_uses.get(n, []):
                    steps.env.pop(used, None)
        self.waiting.clear()

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.time_steps == 1 and (out := convolutions.following(self.traced, self.node, args[0])) is not None:
            return out  # the rates of one step are its spikes
        norm: Any = self.fetch_attr(target)
        if not isinstance(norm, BATCH_NORMS):
            return super().call_module(target, args, kwargs)
        norm = cast(Any, norm)
        if isinstance(norm, nn.SyncBatchNorm) and norm.training:
            raise ConversionError(f"layer `{target}` is nn.SyncBatchNorm: joint training needs nn.BatchNorm2d")
        alone = not self.penalize and (not self.steps or any(source in self.later for source in self.node.all_input_nodes))
        if alone and (taken := self.takes(norm, args[0], 1)):
            self._fold(norm, taken[0].mean, taken[1])
            return args[0]
        if not norm.training:
            out, mean, variance = norm(*args), norm.running_mean, norm.running_var
        else:
            if args[0].numel() == args[0].shape[1]:
                raise InputError(
                    f"layer `{target}` is batch-norm, and has one value a channel in a batch: it needs more images, a higher "
                    "--batch-size"
                )
            norm.num_batches_tracked.add_(1)
            share = 1 / int(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            affine = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
            out, mean, inverse = torch.native_batch_norm(args[0], *affine, True, share, norm.eps)
            variance = inverse.square().reciprocal() - norm.eps
        self._fold(norm, mean, variance)
        return out

    @torch.no_grad()
    def _fold(self, norm: Any, mean: Tensor, variance: Tensor) -> None:
        before = self.plan.weighted.get(self.node)
        weight = torch.ones_like(variance) if norm.weight is None else norm.weight
        bias = torch.zeros_like(variance) if norm.bias is None else norm.bias
        if before is None:
            scale = weight * torch.rsqrt(variance + norm.eps)
            self.affine[self.node] = (scale, bias - mean * scale)
        else:
            fuse = fuse_linear_bn_weights if isinstance(before, nn.Linear) else fuse_conv_bn_weights
            self.affine[self.node] = fuse(before.weight, before.bias, mean, variance, norm.eps, weight, bias)

    def activate(self, name: str, module: Any, z: Tensor) -> Tensor:
        log_theta, v0 = scale_gradients(module, z)
        norm, plus = self.taken.pop(self.node, (None, None))
        if norm is not None and self.time_steps == 1:
            rate = fire_once(z, norm, module.theta, module.v0, plus)
        else:
            rate = torch.empty_like(z)
            if self.time_steps == 1:
                fire(z.detach()[None], module.theta, module.v0, False, rate[None])
            for steps in self.steps:
                rate[steps.part] = steps.counts
            if self.penalize:
                self.penalties.append(residual_penalty(z.float(), rate.float(), log_theta.exp(), v0, self.time_steps))
            rate *= over_channels(log_theta.detach().exp(), rate) / self.time_steps
        if norm is None:
            return straight_through(z, rate, log_theta, v0, self.time_steps)
        return cast(Tensor, StraightThrough.apply(z, plus, log_theta, v0, rate, self.time_steps, *norm))


def residual_penalty(mean_current: Tensor, count: Tensor, theta: Tensor, v0: Tensor, time_steps: int) -> Tensor:
    """Mean of relu(-u)^2 + relu(u - 1)^2 over the unsaturated neurons, u = v(T)/theta: charge left below 0 or above theta.

    mean_current, count: [N, ...]; theta, v0: scalar or [C]. By charge balance u = v0 + T*z/theta - n, so the gradient
    passes through mean current, theta and v0, while the count is held. Our choice, after SRP's residual potential (Hao et
    al., AAAI 2023).

    >>> mean, count = torch.tensor([[-0.125]]), torch.tensor([[1.0]])  # one spike too early: 0.5 - 2*0.125 - 1 = -0.75
    >>> residual_penalty(mean, count, torch.tensor(1.0), torch.tensor(0.5), time_steps=2)
    tensor(0.5625)
    """
    u = over_channels(v0, mean_current) + time_steps * mean_current / over_channels(theta, mean_current) - count
    outside = (F.relu(-u).square() + F.relu(u - 1).square()) * (count < time_steps)
    return outside.mean()
