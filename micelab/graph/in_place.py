"""Calls that write into their input, as the graph has them: calls that do not, whose readers read the result."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from micelab.exceptions import ConversionError
from micelab.graph.affine import OUT_OF_PLACE, TRANSPOSES, Refuse, call_name, is_size, source_of, where


def _writing(plain: Callable[[Any, Any], Any]) -> Any:
    def write(self: fx.Proxy, other: Any) -> fx.Proxy:
        result = plain(self, other)
        result.node.meta["writes"] = True
        return result

    return write


class WritingProxy(fx.Proxy):
    """Notes of `x += y` that it writes into x, where fx sees x = x + y."""

    __iadd__, __isub__ = _writing(operator.add), _writing(operator.sub)
    __imul__, __itruediv__ = _writing(operator.mul), _writing(operator.truediv)

    def __setitem__(self, part: Any, value: Any) -> None:
        inside = self.tracer.scope.module_path or "forward"
        raise ConversionError(
            f"`x[...] = y` in `{inside}` writes into a part of a tensor, which cannot be undone here: put the whole "
            "together, as in torch.cat([x[:, :8] + a, x[:, 8:] + b], 1)"
        )


def undo_in_place(traced: fx.GraphModule, refuse: Refuse) -> None:
    """Every call that writes into its input becomes one that does not; what reads the input later reads the result.

    So does what reads the same tensor under another name, given before. Another part of its memory (a view of it, the tensor
    that it is a view of) would have to change too: where such a part is read later, the call is refused.
    """
    order = {node: number for number, node in enumerate(traced.graph.nodes)}
    tensor: dict[fx.Node, fx.Node] = {}  # the node that made the very tensor that is the node's value
    memory: dict[fx.Node, list[fx.Node]] = {}  # all nodes so far that may look into the same memory
    for node in traced.graph.nodes:
        source, writes = source_of(node), _writes(traced, node)
        for other in memory[source] if writes else ():
            later = [user for user in other.users if order[user] > order[node]]
            if tensor[other] is tensor[source]:
                for user in later:
                    user.replace_input_with(other, node)
            elif later:
                why = "do it out of place, with inplace=False or as x = x + y"
                what = f"writes into its input, and `{call_name(other)}`, which shares its memory, is read afterwards"
                refuse(node, ConversionError(f"{_place(node)} {what}: {why}"))
        if node.kwargs.get("out") is not None:
            refuse(node, ConversionError(f"{_place(node)} writes its result into another tensor: leave out= away"))
        same = writes or _gives_back(traced, node)
        tensor[node] = tensor[source] if same else node
        memory[node] = memory[source] if same or _may_be_view(traced, node) else []
        memory[node].append(node)
    for node in traced.graph.nodes:
        node.meta.pop("writes", None)
        if node.op in ("call_function", "call_method"):
            node.target = OUT_OF_PLACE.get(node.target, node.target)


def _place(node: fx.Node) -> str:
    return f"layer `{node.target}`" if node.op == "call_module" else where(node)


def _writes(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node writes into its input, and gives it back."""
    if not isinstance(source_of(node), fx.Node) or is_size(source_of(node)):
        return False
    if node.op == "call_module":
        return bool(getattr(traced.get_submodule(str(node.target)), "inplace", False))
    named = node.op in ("call_function", "call_method") and node.target in OUT_OF_PLACE.keys() - {"view"}
    return bool(named or node.meta.get("writes") or node.kwargs.get("inplace"))


def _gives_back(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node's value is its input, the tensor itself."""
    return node.op == "call_module" and isinstance(traced.get_submodule(str(node.target)), nn.Identity)


_VIEWS = {"view", "reshape", "contiguous", "flatten", "squeeze", torch.reshape, torch.flatten, torch.squeeze, operator.getitem}
_VIEWS |= TRANSPOSES


def _may_be_view(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node's value may be a view of its input's."""
    if node.op == "call_module":
        return isinstance(traced.get_submodule(str(node.target)), nn.Flatten)
    return node.op in ("call_function", "call_method") and node.target in _VIEWS and isinstance(source_of(node), fx.Node)
