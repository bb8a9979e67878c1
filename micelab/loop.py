"""The joint pass: true spikes forward, the gradient of their rates backward.

One walk over the layers carries two values side by side: the currents and spikes of all T steps, without gradient, by the
code that simulates (micelab.network), and their mean over time, with gradient, as in an ordinary ANN. A layer's mean
output is the true rate phi = theta*n/T of its neurons; its gradient is that of Q at the mean current (`straight_through`).
No back-propagation through time: an epoch costs about (T + 3)/3 of an ANN's. Batch-norm takes its statistics from the mean
current and is the same affine map at every step.

Rates in the forward pass and an ANN's gradient in the backward pass: tandem learning (Wu et al., arXiv 1907.01167).
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from micelab.activation import over_channels, straight_through
from micelab.exceptions import ConversionError
from micelab.graph import BATCH_NORMS, CONVOLUTIONS, LayerRunner, is_activation, read
from micelab.network import TimeFolded
from micelab.neuron import fire


class JointPass(NamedTuple):
    """`logits` [N, classes], mean over T steps; `penalty`: the residual potential penalty, a scalar."""

    logits: Tensor
    penalty: Tensor


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
        self._graph = _Graph(read(model))

    def forward(self, images: Tensor, time_steps: int, penalize: bool = False) -> JointPass:
        """Images [N, C, H, W] in [0, 1] through T = `time_steps` steps; the penalty is 0 unless asked for."""
        steps = _Steps(self._graph, time_steps, len(images))
        mean = _Mean(self._graph, steps, penalize)
        logits = mean.walk(images)
        return JointPass(logits, torch.stack(mean.penalties).mean() if penalize else logits.new_zeros(()))


class _Graph:
    """The layers in order, and which of them need not run at every step."""

    def __init__(self, traced: fx.GraphModule):
        self.traced = traced
        self.before: set[fx.Node] = set()  # what some activation still depends on: the head runs on the mean alone
        for node in reversed(traced.graph.nodes):
            if is_activation(traced, node) or any(user in self.before for user in node.users):
                self.before.add(node)
        self.weighted: dict[fx.Node, Any] = {}  # batch-norm -> the layer before it, whose weights it is folded into
        for node in traced.graph.nodes:
            if node.op == "call_module" and isinstance(self.module(node), BATCH_NORMS):
                source = node.args[0]
                foldable = source.op == "call_module" and isinstance(self.module(source), (*CONVOLUTIONS, nn.Linear))
                if foldable and len(source.users) == 1:
                    self.weighted[node] = self.module(source)
        self.folded = {node.args[0] for node in self.weighted}

    def module(self, node: fx.Node) -> Any:
        return self.traced.get_submodule(str(node.target))


class _Steps(TimeFolded):
    """The T steps, without gradient: the simulator, with batch-norm as the mean's walk found it."""

    def __init__(self, graph: _Graph, time_steps: int, images: int):
        super().__init__(graph.traced, time_steps, images, record=False, spikes=False)
        self.plan = graph
        self.norms: dict[fx.Node, tuple[Tensor, Tensor]] = {}  # mean and variance that batch-norm used
        self.counts: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.norms and n not in self.plan.folded:
            return super().run_node(n)
        self.over_time.add(n)
        x = self.env[n.all_input_nodes[0]]
        if n in self.plan.folded:  # its batch-norm comes next and takes it along
            return x
        norm, (mean, variance) = self.plan.module(n), self.norms[n]
        before = self.plan.weighted.get(n)
        if before is None:
            scale = norm.weight * torch.rsqrt(variance + norm.eps)
            return x * over_channels(scale, x) + over_channels(norm.bias - mean * scale, x)
        affine = (before.weight, before.bias, mean, variance, norm.eps, norm.weight, norm.bias)
        if isinstance(before, nn.Linear):
            return F.linear(x, *fuse_linear_bn_weights(*affine))
        return before._conv_forward(x, *fuse_conv_bn_weights(*affine))

    def activate(self, name: str, module: Any, z: Tensor) -> Tensor:
        z = z.float()
        out = self.room(z)
        steps = out.unflatten(0, (self.steps, self.images))
        self.counts[name], _ = fire(self.current(z), module.theta, module.v0, False, steps, amplitude=True, count=True)
        return out


class _Mean(LayerRunner):
    """The mean over the steps, with gradient; it leads the walk and hands every layer to the steps too."""

    def __init__(self, graph: _Graph, steps: _Steps, penalize: bool):
        super().__init__(graph.traced)
        self.plan, self.steps, self.penalize = graph, steps, penalize
        self.penalties: list[Tensor] = []

    def walk(self, images: Tensor) -> Tensor:
        self.args_iter = iter([images])
        out: Any = None
        for n in self.plan.traced.graph.nodes:
            self.node = n
            if is_activation(self.plan.traced, n):
                self._step(n)
                out = self.env[n] = self.run_node(n)
            else:
                out = self.env[n] = self.run_node(n)
                if n in self.plan.before:
                    self._step(n)
            for used in self.user_to_last_uses.get(n, []):
                self.env.pop(used, None)
                self.steps.env.pop(used, None)
        return out

    def _step(self, n: fx.Node) -> None:
        steps = self.steps
        timed = any(source in steps.over_time for source in n.all_input_nodes)
        if timed or is_activation(self.plan.traced, n):
            with torch.no_grad():
                steps.env[n] = steps.run_node(n)
        else:  # the images alone decide it: the same at every step
            value = self.env[n]
            steps.env[n] = value.detach() if isinstance(value, Tensor) else value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        norm: Any = self.fetch_attr(target)
        if not isinstance(norm, BATCH_NORMS):
            return super().call_module(target, args, kwargs)
        norm = cast(Any, norm)
        if not norm.training:
            self.steps.norms[self.node] = (norm.running_mean, norm.running_var)
            return norm(*args)
        if isinstance(norm, nn.SyncBatchNorm):
            raise ConversionError(f"layer `{target}` is nn.SyncBatchNorm: joint training needs nn.BatchNorm2d")
        norm.num_batches_tracked.add_(1)
        share = 1 / int(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        affine = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        out, mean, inverse = torch.native_batch_norm(args[0], *affine, True, share, norm.eps)
        self.steps.norms[self.node] = (mean.detach(), inverse.detach().square().reciprocal() - norm.eps)
        return out

    def activate(self, name: str, module: Any, z: Tensor) -> Tensor:
        count, time_steps = self.steps.counts.pop(name), self.steps.time_steps
        z = z.float()
        # every neuron adds to the gradient of theta and v0: scaled as LSQ does, or they run away (Esser et al., ICLR 2020)
        neurons = z[0].numel() / max(1, module.log_theta.numel())
        log_theta, v0 = (_scale_gradient(p, neurons**-0.5) for p in (module.log_theta, module.v0))
        theta = over_channels(log_theta.detach().exp(), z)
        if self.penalize:
            self.penalties.append(residual_penalty(z, count, log_theta.exp(), v0, time_steps))
        return straight_through(z, count * (theta / time_steps), log_theta, v0, time_steps)


def _scale_gradient(value: Tensor, scale: float) -> Tensor:
    return value * scale + (value * (1 - scale)).detach()


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
