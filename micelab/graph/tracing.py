"""A network as a graph of layers: traced with torch.fx, batch-norm folded, refused by name where it cannot be converted.

A converted network is this graph with its activations replaced by spiking neurons; `graph.affine` says what may stand between.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from micelab.activation import TrainableClip
from micelab.exceptions import ConversionError, InputError, first_line
from micelab.graph.affine import (
    ACTIVATIONS,
    BATCH_NORMS,
    CONVOLUTIONS,
    OUT_OF_PLACE,
    RELU_CALLS,
    TRANSPOSED,
    call_name,
    check_node,
    is_dropout,
    is_size,
    scope,
    source_of,
    where,
)
from micelab.models import Normalize
from micelab.neuron.firing import IntegrateFire


def _writing(plain: Callable[[Any, Any], Any]) -> Any:
    def write(self: fx.Proxy, other: Any) -> fx.Proxy:
        result = plain(self, other)
        result.node.meta["writes"] = True
        return result

    return write


class _Proxy(fx.Proxy):
    """Notes of `x += y` that it writes into x, where fx sees x = x + y."""

    __iadd__, __isub__ = _writing(operator.add), _writing(operator.sub)
    __imul__, __itruediv__ = _writing(operator.mul), _writing(operator.truediv)


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

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


Refuse = Callable[[Any, ConversionError], None]
"""What is done about a part that cannot be converted: called with its graph node (None for the whole network), and why."""


def stop(_: Any, error: ConversionError) -> None:
    """Refuses by raising: the first part that cannot be converted ends the reading."""
    raise error


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
        _fold_batch_norm(traced)
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
            raise ConversionError(f"{_who(name, module)} only wraps a network, hiding its layers: use {inside} instead")
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:  # whatever a forward does with a stand-in for its tensors
        where = f"{type(model).__name__}.forward"
        raise ConversionError(
            f"{where} cannot be read as a fixed graph of layers ({first_line(error)}): it decides by the values of its "
            "tensors or takes more than images: move that outside the network"
        ) from error
    for node in graph.nodes:
        if node.op == "call_module" and not node.args and len(node.kwargs) == 1:  # act(input=x) is act(x)
            node.args, node.kwargs = tuple(node.kwargs.values()), {}
    return fx.GraphModule(tracer.root, graph)


def make_plain(traced: fx.GraphModule, refuse: Refuse = stop) -> None:
    """Takes dropout and in-place writing out of the graph, in place, and checks every part; `refuse` hears what cannot be."""
    _drop_dropout(traced, refuse)
    _undo_in_place(traced, refuse)
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


def own_copy(model: nn.Module, refuse: Refuse = stop) -> nn.Module:
    """A copy in eval mode; refuses hooks and parametrized weights, which a graph of layers leaves out."""
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            why = "make it plain with torch.nn.utils.parametrize.remove_parametrizations"
            refuse(None, ConversionError(f"{_who(name, module)} has a parametrized weight: {why}"))
        hooks = _hooks_of_others(module._forward_pre_hooks) | _hooks_of_others(module._forward_hooks)
        if hooks:
            refuse(None, ConversionError(f"{_who(name, module)} has {_in_words(module, next(iter(hooks.values())))}"))
    try:
        model = copy.deepcopy(model).eval()
    except Exception as error:
        raise ConversionError(
            f"{type(model).__name__} cannot be copied ({first_line(error)}): remove what wraps its weights, such as weight_norm"
        ) from error
    for module in model.modules():  # where they were only noted, reading the graph must not run them
        for known in (module._forward_pre_hooks, module._forward_hooks):
            for key in _hooks_of_others(known):
                del known[key]
    return model


_WEIGHT_MAKERS: tuple[tuple[type, str, str], ...] = (
    (SpectralNorm, "spectral_norm", "torch.nn.utils.remove_spectral_norm"),
    (WeightNorm, "weight_norm", "torch.nn.utils.remove_weight_norm"),
    (BasePruningMethod, "pruning", "torch.nn.utils.prune.remove"),
)
"""Hooks of torch that make a weight anew at each call: their class, their name, what makes the weight plain."""


def _in_words(module: nn.Module, hook: Any) -> str:
    """What a module with this hook has, and what to do about it."""
    if isinstance(module, LazyModuleMixin):
        return "no weights yet: run the network once on images"
    for kind, name, remedy in _WEIGHT_MAKERS:
        if isinstance(hook, kind):
            return f"a weight that {name} makes anew at each call: make it plain with {remedy}"
    return "a forward hook, which the converted network would not run: take it away, with the remove() of its handle"


def _hooks_of_others(hooks: dict[int, Any]) -> dict[int, Any]:
    """All but those that `_fold_batch_norm` registers, which belong to the layer."""
    return {key: hook for key, hook in hooks.items() if getattr(hook, "func", None) is not _takes_rows}


def wrapped(module: nn.Module) -> str | None:
    """What to use instead of a module that only wraps another and hides its layers; None for all others.

    >>> wrapped(nn.DataParallel(nn.Linear(4, 4))), wrapped(nn.Linear(4, 4))
    ('its .module', None)
    """
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "its .module"
    if isinstance(module, torch.jit.ScriptModule):
        return "the Python module that was scripted"
    return "its ._orig_mod" if "_orig_mod" in module._modules else None  # of torch.compile, whose class is slow to import


def _who(name: str, module: nn.Module) -> str:
    """How an error names a module of a network: the network itself has no name in it."""
    return f"layer `{name}`" if name else type(module).__name__


def check_numbers(model: nn.Module, refuse: Refuse = stop) -> None:
    """Refuses parameters and buffers that are not finite."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not is_lazy(tensor) and not bool(torch.isfinite(tensor).all()):
            why = "the network is broken, train or load it again"
            refuse(None, ConversionError(f"`{name}` holds NaN or infinite numbers: {why}"))


def _drop_dropout(traced: fx.GraphModule, refuse: Refuse) -> None:
    for node in list(traced.graph.nodes):
        module = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        if is_dropout(traced, node):
            if module is None and node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True):
                why = "pass training=self.training, or use nn.Dropout"
                refuse(node, ConversionError(f"{where(node)} stays active in evaluation: {why}"))
            node.replace_all_uses_with(source_of(node))
            traced.graph.erase_node(node)


def _undo_in_place(traced: fx.GraphModule, refuse: Refuse) -> None:
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


def _may_be_view(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node's value may be a view of its input's."""
    if node.op == "call_module":
        return isinstance(traced.get_submodule(str(node.target)), nn.Flatten)
    return node.op in ("call_function", "call_method") and node.target in _VIEWS and isinstance(source_of(node), fx.Node)


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


def _name_activations(traced: fx.GraphModule) -> None:
    """Gives every call of an activation a module of its own, out of place, under the model's own name."""
    taken = {name for name, _ in traced.named_modules()}
    seen: set[str] = set()
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and isinstance(traced.get_submodule(node.target), ACTIVATIONS):
            module, name = traced.get_submodule(node.target), node.target
            module = nn.ReLU() if isinstance(module, nn.ReLU) else copy.deepcopy(module)
            free = name not in seen
        elif node.op in ("call_function", "call_method") and node.target in RELU_CALLS:
            module, name = nn.ReLU(), f"{scope(node)}.relu".lstrip(".")
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


def _takes_rows(name: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Refuses sequences [N, L, F] with L = F, which the graph does not tell from rows [N, F]: there F are not the channels."""
    if inputs[0].dim() > 2:
        raise ConversionError(
            f"layer `{name}`: batch-norm was folded into it as for inputs [N, features], and it gets "
            f"{tuple(inputs[0].shape)}, where batch-norm has its channels in dimension 1: use fold=False"
        )


def folds(traced: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Which batch-norm goes into the weights of which layer, in the order in which the network runs.

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


def _fold_batch_norm(traced: fx.GraphModule) -> None:
    for node, before in folds(traced).items():
        weighted, norm = (cast(Any, traced.get_submodule(str(each.target))) for each in (before, node))
        if isinstance(weighted, nn.Linear):
            folded: nn.Module = fuse_linear_bn_eval(weighted, norm)
            folded.register_forward_pre_hook(partial(_takes_rows, str(before.target)))
        else:
            folded = fuse_conv_bn_eval(weighted, norm, transpose=isinstance(weighted, TRANSPOSED))
        traced.add_submodule(str(before.target), folded)
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
