"""Batch-norm in the weights of the layer before it: which goes into which, and how."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any, cast

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from micelab.exceptions import ConversionError
from micelab.graph.affine import BATCH_NORMS, CONVOLUTIONS, TRANSPOSED, source_of


def takes_rows(name: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Refuses sequences [N, L, F] with L = F, which the graph does not tell from rows [N, F]: there F are not the channels."""
    if inputs[0].dim() > 2:
        raise ConversionError(
            f"layer `{name}`: batch-norm was folded into it as for inputs [N, features], and it gets "
            f"{tuple(inputs[0].shape)}, where batch-norm has its channels in dimension 1: use fold=False"
        )


def folds(traced: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Which batch-norm goes into the weights of which layer, in the order in which the network runs.

    >>> from micelab.graph import read
    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2))
    >>> folds(read(net.eval()))
    {_1: _0}
    """
    uses = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    into: dict[fx.Node, fx.Node] = {}
    for node in traced.graph.nodes:
        before = source_of(node)
        if node.op != "call_module" or not isinstance(before, fx.Node) or len(before.users) > 1:
            continue
        before = into.get(before, before)  # a second batch-norm goes where the first went
        if before.op == "call_module" and uses[before.target] == 1:
            weighted, norm = (traced.get_submodule(str(each.target)) for each in (before, node))
            if isinstance(norm, BATCH_NORMS) and _folds_into(weighted, norm):
                into[node] = before
    return into


def _folds_into(weighted: nn.Module, norm: Any) -> bool:
    if isinstance(weighted, nn.Linear):  # of [N, L, F] batch-norm takes L for the channels, and torch folds none without a weight
        return isinstance(norm, nn.BatchNorm1d) and weighted.out_features == norm.num_features and norm.weight is not None
    return isinstance(weighted, CONVOLUTIONS) or (isinstance(weighted, TRANSPOSED) and weighted.groups == 1)


def fold_batch_norm(traced: fx.GraphModule) -> None:
    """Puts every batch-norm that `folds` names into the weights of its layer, in place."""
    for node, before in folds(traced).items():
        weighted, norm = (cast(Any, traced.get_submodule(str(each.target))) for each in (before, node))
        if isinstance(weighted, nn.Linear):
            folded: nn.Module = fuse_linear_bn_eval(weighted, norm)
            folded.register_forward_pre_hook(partial(takes_rows, str(before.target)))
        else:
            folded = fuse_conv_bn_eval(weighted, norm, transpose=isinstance(weighted, TRANSPOSED))
        traced.add_submodule(str(before.target), folded)
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
