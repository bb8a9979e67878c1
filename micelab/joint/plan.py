"""What both passes of joint training share: the order of the layers, what a pass gives back, the scale of two gradients."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from micelab.graph.affine import BATCH_NORMS, CONVOLUTIONS
from micelab.graph.tracing import is_activation


class JointPass(NamedTuple):
    """`logits` [N, classes], mean over T steps; `penalty`: the residual potential penalty, a scalar."""

    logits: Tensor
    penalty: Tensor


class Plan:
    """The layers in order, which of them need not run at every step, and where batch-norm can be folded."""

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
        self.normed: dict[fx.Node, fx.Node] = {}  # batch-norm -> the sum, or activation, that alone reads it
        for node in traced.graph.nodes:
            if is_activation(traced, node) and (found := self._norm_before(node)):
                self.normed[found[0]] = found[1]

    def _norm_before(self, activation: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """The batch-norm whose output the activation takes, alone or plus another current, and the node that reads it."""
        source: Any = activation.args[0]
        adds = source.target in (operator.add, torch.add) and len(source.all_input_nodes) == len(source.args) == 2
        single = adds and not source.kwargs and len(source.users) == 1
        for node, reader in [(node, source) for node in source.all_input_nodes] if single else [(source, activation)]:
            if node.op == "call_module" and isinstance(self.module(node), BATCH_NORMS) and len(node.users) == 1:
                return node, reader
        return None

    def module(self, node: fx.Node) -> Any:
        return self.traced.get_submodule(str(node.target))


def scale_gradients(module: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """log(theta) and v0 of an activation with input z [N, ...]: the same numbers, their gradients divided by the root of the
    number of neurons that share them. Every neuron adds to these; unscaled, they run away (LSQ, Esser et al., ICLR 2020).
    """
    scale = (z[0].numel() / max(1, module.log_theta.numel())) ** -0.5
    log_theta, v0 = (value * scale + (value * (1 - scale)).detach() for value in (module.log_theta, module.v0))
    return log_theta, v0
