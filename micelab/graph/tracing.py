"""A network as a graph of layers: traced with torch.fx, batch-norm folded, refused by name where it cannot be converted.

A converted network is this graph with its activations replaced by spiking neurons; `graph.affine` says what may stand between.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from micelab.activation import TrainableClip
from micelab.exceptions import ConversionError, InputError, first_line
from micelab.graph.affine import (
    ACTIVATIONS,
    RELU_CALLS,
    Refuse,
    check_node,
    is_dropout,
    scope,
    source_of,
    stop,
    where,
)
from micelab.graph.batch_norm import fold_batch_norm
from micelab.graph.in_place import WritingProxy, undo_in_place
from micelab.graph.own_copy import check_numbers, own_copy, who, wrapped
from micelab.models import Normalize
from micelab.neuron.firing import IntegrateFire


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return WritingProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (TrainableClip, Normalize)) or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """The network is called with images alone: what else its forward takes keeps its default, where it has one."""
        _, *parameters = inspect.signature(root_fn).parameters.values()
        idle = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        needed = [each for each in parameters[1:] if each.default is each.empty and each.kind not in idle]
        by_name = [each for each in needed if each.kind is each.KEYWORD_ONLY]

        def given(parameter: inspect.Parameter) -> fx.Proxy:
            return self.create_proxy("placeholder", parameter.name, (), {})

        args = [self.root, *map(given, parameters[:1] + [each for each in needed if each not in by_name])]
        return partial(root_fn, **{each.name: given(each) for each in by_name}), args


def trace(model: nn.Module, fold: bool = True) -> fx.GraphModule:
    """A copy of `model` in eval mode as a graph whose every activation is a module of its own, named as in the model.

    A second call of one nn.ReLU becomes `name_1`, a call of F.relu `block.relu`. With `fold`, batch-norm is folded into the
    convolution or linear layer before it. Raises ConversionError, naming the layer, where a part has no spiking
    counterpart; the caller's model is not changed.

    >>> from micelab import small_cnn
    >>> list(activations(trace(small_cnn()))), list(activations(trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))))
    (['stem.2', 'blocks.0.2', 'blocks.1.2', 'blocks.2.2'], ['1'])
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"a {type(model).__name__} was given where a network (torch.nn.Module) is needed")
    traced = read(own_copy(model))
    _name_activations(traced)
    if fold:
        fold_batch_norm(traced)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    traced.delete_all_unused_submodules()
    if not activations(traced):
        raise ConversionError(f"{type(model).__name__} holds no nn.ReLU and no clip activation: there is nothing to convert")
    return traced


def read(model: nn.Module) -> fx.GraphModule:
    """`model` as a graph of its own layers: they are shared, so what trains the one trains the other.

    Dropout is left out, calls that write into their input do so no more. Raises ConversionError as `trace` does.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.ReLU())
    >>> traced = read(model)
    >>> traced.get_submodule("0") is model[0], [str(node.target) for node in traced.graph.nodes]
    (True, ['input', '0', '2', 'output'])
    """
    check_numbers(model)
    traced = as_graph(model)
    make_plain(traced)
    return traced


def as_graph(model: nn.Module) -> fx.GraphModule:
    """The graph of `model` as it stands, nothing checked or changed but that it has one."""
    if any(isinstance(module, IntegrateFire) for module in model.modules()):
        raise ConversionError(f"{type(model).__name__} is a spiking network already: give the ANN that it was converted from")
    for name, module in model.named_modules():
        if (inside := wrapped(module)) is not None:
            raise ConversionError(f"{who(name, module)} only wraps a network, hiding its layers: use {inside} instead")
    tracer = _Tracer()
    try:
        with evaluating(model):  # what a network in training does otherwise is no part of it
            graph = tracer.trace(model)
    except ConversionError:  # of WritingProxy, which knows more
        raise
    except Exception as error:  # whatever a forward does with a stand-in for its tensors
        where = f"{type(model).__name__}.forward"
        raise ConversionError(
            f"{where} cannot be read as a fixed graph of layers ({first_line(error)}): it decides by the values of its "
            "tensors or takes more than images: move that outside the network"
        ) from error
    for node in graph.nodes:
        if node.op == "call_module" and not node.args and len(node.kwargs) == 1:  # act(input=x) is act(x)
            node.args, node.kwargs = tuple(node.kwargs.values()), {}
        elif node.target in ("reshape", "view", torch.reshape):  # x.reshape(shape=(2, 3)) is x.reshape((2, 3))
            named = {key: node.kwargs[key] for key in ("input", "shape", "size") if key in node.kwargs}
            node.kwargs = {key: value for key, value in node.kwargs.items() if key not in named}
            node.args = (*node.args, *named.values())
    return fx.GraphModule(tracer.root, graph)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts `model` in eval mode, and every part of it back into its own mode afterwards.

    >>> model = nn.Sequential(nn.Dropout()).train()
    >>> with evaluating(model):
    ...     model[0].training
    False
    >>> model[0].training
    True
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def make_plain(traced: fx.GraphModule, refuse: Refuse = stop) -> None:
    """Takes dropout and in-place writing out of the graph, in place, and checks every part; `refuse` hears what cannot be."""
    _drop_dropout(traced, refuse)
    undo_in_place(traced, refuse)
    _check_nodes(traced, refuse)


def activations(traced: fx.GraphModule) -> dict[str, nn.Module]:
    """The activations by name, from input to output.

    >>> activations(trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU())))
    {'1': ReLU()}
    """
    nodes = [node for node in traced.graph.nodes if is_activation(traced, node)]
    return {str(node.target): traced.get_submodule(str(node.target)) for node in nodes}


def depth(traced: fx.GraphModule) -> int:
    """How many activations lie in a row between input and output, on the longest way."""
    longest: dict[fx.Node, int] = {}
    for node in traced.graph.nodes:
        before = max((longest[source] for source in node.all_input_nodes), default=0)
        longest[node] = before + is_activation(traced, node)
    return max(longest.values())


_NEURONS = (*ACTIVATIONS, IntegrateFire)


def is_hooked(layer: nn.Module) -> bool:
    """Whether someone watches what goes through this layer, forward or backward: then it is to be called itself."""
    kinds = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    return any(kinds)


def is_activation(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node is an activation of the ANN or, after conversion, a layer of neurons.

    >>> traced = trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    >>> [str(node.target) for node in traced.graph.nodes if is_activation(traced, node)]
    ['1']
    """
    return node.op == "call_module" and isinstance(module_of(traced, str(node.target)), _NEURONS)


def module_of(traced: nn.Module, name: str) -> Any:
    """The module `name` of a network: what `get_submodule` gives, in a tenth of its time, which one image would notice."""
    for part in name.split("."):
        traced = traced._modules[part]  # type: ignore[assignment]
    return traced


def replace_activations(traced: fx.GraphModule, make: Callable[[str, nn.Module], nn.Module]) -> fx.GraphModule:
    """The same graph, in place, with every activation replaced by `make(name, activation)`.

    >>> from micelab import TrainableClip
    >>> traced = trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    >>> activations(replace_activations(traced, lambda name, relu: TrainableClip(theta=2.0)))
    {'1': TrainableClip(theta=2)}
    """
    for name, module in activations(traced).items():
        traced.add_submodule(name, make(name, module))
    return traced


def _drop_dropout(traced: fx.GraphModule, refuse: Refuse) -> None:
    for node in list(traced.graph.nodes):
        module = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        if is_dropout(traced, node):
            if module is None and node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True):
                why = "pass training=self.training, or use nn.Dropout"
                refuse(node, ConversionError(f"{where(node)} stays active in evaluation: {why}"))
            node.replace_all_uses_with(source_of(node))
            traced.graph.erase_node(node)


def _check_nodes(traced: fx.GraphModule, refuse: Refuse) -> None:
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        names = ", ".join(node.target for node in inputs)
        error = ConversionError(f"the network takes {len(inputs)} inputs ({names}): it must take one tensor of images")
        refuse(None, error)
    for node in traced.graph.nodes:
        try:
            _check_single(node)
            check_node(traced, node)
        except ConversionError as error:
            refuse(node, error)


def _check_single(node: fx.Node) -> None:
    """Refuses an output that holds one tensor and is none."""
    given = node.args[0] if node.op == "output" else None
    if isinstance(given, (tuple, list, dict)) and len(given) == 1:
        kind = next(kind.__name__ for kind in (tuple, list, dict) if isinstance(given, kind))
        raise ConversionError(f"the network gives back a {kind} of one tensor: it must give back the tensor itself, the logits")


def _out_of_place(activation: nn.Module) -> nn.Module:
    """A copy of an activation that does not write into its input."""
    if isinstance(activation, nn.Hardtanh):
        return nn.ReLU6() if isinstance(activation, nn.ReLU6) else nn.Hardtanh(0, activation.max_val)
    return nn.ReLU() if isinstance(activation, nn.ReLU) else copy.deepcopy(activation)


def _name_activations(traced: fx.GraphModule) -> None:
    """Gives every call of an activation a module of its own, out of place, under the model's own name."""
    taken = {name for name, _ in traced.named_modules()}
    seen: set[str] = set()
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and isinstance(traced.get_submodule(node.target), ACTIVATIONS):
            module, name = traced.get_submodule(node.target), node.target
            module = _out_of_place(module)
            free = name not in seen
        elif node.op in ("call_function", "call_method") and node.target in RELU_CALLS:
            module = RELU_CALLS[node.target]()
            name = f"{scope(node)}.{type(module).__name__.lower()}".lstrip(".")
            free = name not in taken
        else:
            continue
        number, base = 0, name
        while not free:
            number += 1
            name = f"{base}_{number}"
            free = name not in taken
        taken.add(name)
        seen.add(name)
        traced.add_submodule(name, module)
        with traced.graph.inserting_after(node):
            replacement = traced.graph.call_module(name, (source_of(node),))
        replacement.meta = dict(node.meta)
        node.replace_all_uses_with(replacement)
        traced.graph.erase_node(node)
