"""A network as a graph of layers: traced with torch.fx, batch-norm folded, refused by name where it cannot be converted.

A converted network is this graph with its activations replaced by spiking neurons. Everything between two activations must be
affine and act on each image by itself, since then the mean of its outputs over time is its output for the mean input.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from micelab.activation import TrainableClip
from micelab.exceptions import ConversionError, InputError
from micelab.machine import full_precision
from micelab.models import Normalize
from micelab.neuron import IntegrateFire

ACTIVATIONS = (nn.ReLU, TrainableClip)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_AFFINE = (*WEIGHTED, *BATCH_NORMS, *_POOLS, nn.Flatten, nn.Identity, nn.ZeroPad2d, Normalize)
_RELU_CALLS = {F.relu, torch.relu, "relu"}
_DROPOUT_CALLS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout}
_SUM_CALLS = {operator.add, operator.sub, torch.add, torch.sub, "add", "sub", operator.neg, torch.neg, "neg"}
_SCALE_CALLS = {operator.mul, operator.truediv, torch.mul, torch.div, "mul", "div"}
_CAT_CALLS = {torch.cat, torch.concat, torch.concatenate}
_POOL_CALLS: set[Any] = {F.avg_pool1d, F.avg_pool2d, F.avg_pool3d}
_POOL_CALLS |= {F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.pad}
_BATCH_SAFE_CALLS = {torch.flatten, "flatten", torch.mean, "mean", torch.sum, "sum", torch.squeeze, "squeeze"}
_SHAPE_CALLS = {"reshape", torch.reshape, "contiguous"}
_SIZES = {"shape", "ndim"}
_OUT_OF_PLACE: dict[Any, Any] = {
    F.relu_: F.relu,
    torch.relu_: F.relu,
    "relu_": "relu",
    "view": "reshape",
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    "add_": "add",
    "sub_": "sub",
    "mul_": "mul",
    "div_": "div",
    "neg_": "neg",
}
_REMEDIES = {
    "MaxPool": "the maximum of spikes is not the spike count of the maximum: use nn.AvgPool2d or a stride, before training",
    "Softmax": "it is not affine: leave it out, the largest logit stays the largest",
    "LayerNorm": "it normalizes each image by its own statistics: use nn.BatchNorm2d",
    "GroupNorm": "it normalizes each image by its own statistics: use nn.BatchNorm2d",
    "InstanceNorm": "it normalizes each image by its own statistics: use nn.BatchNorm2d",
    "Attention": "it multiplies activations, which spikes cannot: use convolutions or linear layers",
    "LSTM": "it carries a state of its own from step to step: use convolutions or linear layers",
    "GRU": "it carries a state of its own from step to step: use convolutions or linear layers",
    "RNN": "it carries a state of its own from step to step: use convolutions or linear layers",
    "Upsample": "it has not been tried with spikes: use nn.ConvTranspose2d",
}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (TrainableClip, Normalize)) or super().is_leaf_module(m, module_qualified_name)


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
    """
    check_numbers(model)
    traced = as_graph(model)
    make_plain(traced)
    return traced


def as_graph(model: nn.Module) -> fx.GraphModule:
    """The graph of `model` as it stands, nothing checked or changed but that it has one."""
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:  # whatever a forward does with a stand-in for its tensors
        where = f"{type(model).__name__}.forward"
        raise ConversionError(
            f"{where} cannot be read as a fixed graph of layers ({_first_line(error)}): it decides by the values of its "
            "tensors or takes more than images: move that outside the network"
        ) from error
    return fx.GraphModule(tracer.root, graph)


def make_plain(traced: fx.GraphModule, refuse: Refuse = stop) -> None:
    """Takes dropout and in-place writing out of the graph, in place, and checks every part; `refuse` hears what cannot be."""
    _drop_dropout(traced, refuse)
    _undo_in_place(traced, refuse)
    _check_nodes(traced, refuse)


def activations(traced: fx.GraphModule) -> dict[str, nn.Module]:
    """The activations by name, from input to output."""
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
    """Whether the node is an activation of the ANN or, after conversion, a layer of neurons."""
    return node.op == "call_module" and isinstance(module_of(traced, str(node.target)), _NEURONS)


def module_of(traced: nn.Module, name: str) -> Any:
    """The module `name` of a network: what `get_submodule` gives, in a tenth of its time, which one image would notice."""
    for part in name.split("."):
        traced = traced._modules[part]  # type: ignore[assignment]
    return traced


def replace_activations(traced: fx.GraphModule, make: Callable[[str, nn.Module], nn.Module]) -> fx.GraphModule:
    """The same graph, in place, with every activation replaced by `make(name, activation)`."""
    for name, module in activations(traced).items():
        traced.add_submodule(name, make(name, module))
    return traced


def own_copy(model: nn.Module, refuse: Refuse = stop) -> nn.Module:
    """A copy in eval mode, without the caller's hooks: they watch the caller's network, not this one."""
    try:
        model = copy.deepcopy(model).eval()
    except Exception as error:
        raise ConversionError(
            f"{type(model).__name__} cannot be copied ({_first_line(error)}): remove what wraps its weights, such as weight_norm"
        ) from error
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            why = "make it plain with torch.nn.utils.parametrize.remove_parametrizations"
            refuse(None, ConversionError(f"layer `{name}` has a parametrized weight: {why}"))
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return model


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def check_numbers(model: nn.Module, refuse: Refuse = stop) -> None:
    """Refuses parameters and buffers that are not finite."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            why = "the network is broken, train or load it again"
            refuse(None, ConversionError(f"`{name}` holds NaN or infinite numbers: {why}"))


def _drop_dropout(traced: fx.GraphModule, refuse: Refuse) -> None:
    for node in list(traced.graph.nodes):
        module = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        if is_dropout(traced, node):
            if module is None and node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True):
                why = "pass training=self.training, or use nn.Dropout"
                refuse(node, ConversionError(f"{_where(node)} stays active in evaluation: {why}"))
            node.replace_all_uses_with(_source(node))
            traced.graph.erase_node(node)


def is_dropout(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node is dropout, which evaluation leaves out."""
    if node.op == "call_module":
        return isinstance(traced.get_submodule(str(node.target)), _DROPOUTS)
    return node.op == "call_function" and node.target in _DROPOUT_CALLS


def becomes_neurons(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node, module or call, is an activation that conversion turns into spiking neurons."""
    if node.op == "call_module":
        return isinstance(traced.get_submodule(str(node.target)), ACTIVATIONS)
    return node.op in ("call_function", "call_method") and _OUT_OF_PLACE.get(node.target, node.target) in _RELU_CALLS


def _undo_in_place(traced: fx.GraphModule, refuse: Refuse) -> None:
    """Every call that writes into its input becomes one that does not; what reads the input later reads the result."""
    order = {node: number for number, node in enumerate(traced.graph.nodes)}
    for node in traced.graph.nodes:
        module = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        writes = node.op in ("call_function", "call_method") and node.target in _OUT_OF_PLACE.keys() - {"view"}
        if not writes and not node.kwargs.get("inplace") and not getattr(module, "inplace", False):
            continue
        source = _source(node)
        if not isinstance(source, fx.Node):
            continue
        for user in [user for user in source.users if order[user] > order[node]]:
            user.replace_input_with(source, node)
        base = source
        while _shares_memory(traced, base):
            base = _source(base)
            if any(order[user] > order[node] for user in base.users):
                why = "do it out of place"
                refuse(node, ConversionError(f"{_where(node)} writes into a part of `{base}`, which is used again: {why}"))
    for node in traced.graph.nodes:
        if node.op in ("call_function", "call_method"):
            node.target = _OUT_OF_PLACE.get(node.target, node.target)


def _shares_memory(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node's value may be a view of its input's."""
    if node.op == "call_module":
        return isinstance(traced.get_submodule(str(node.target)), (nn.Flatten, nn.Identity))
    views = {"view", "reshape", "contiguous", "flatten", "squeeze", torch.reshape, torch.flatten, torch.squeeze, operator.getitem}
    return node.op in ("call_function", "call_method") and node.target in views and isinstance(_source(node), fx.Node)


def is_fresh(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node's value is a new tensor that nothing else looks into."""
    if node.op == "call_module":
        return isinstance(traced.get_submodule(str(node.target)), (*WEIGHTED, *BATCH_NORMS))
    return node.op in ("call_function", "call_method") and node.target in _SUM_CALLS


def is_size(node: Any) -> bool:
    """Whether the node is a number or a shape, not a tensor: `x.shape[0]`, `x.size(1) * 4`."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return False
    if node.target in ("size", "dim", "numel") or node.target is getattr:
        return True
    return bool(node.all_input_nodes) and node.target is not torch.cat and all(map(is_size, node.all_input_nodes))


def _source(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


def _check_nodes(traced: fx.GraphModule, refuse: Refuse) -> None:
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        names = ", ".join(node.target for node in inputs)
        error = ConversionError(f"the network takes {len(inputs)} inputs ({names}): it must take one tensor of images")
        refuse(None, error)
    for node in traced.graph.nodes:
        try:
            _check_node(traced, node)
        except ConversionError as error:
            refuse(node, error)


def _check_node(traced: fx.GraphModule, node: fx.Node) -> None:
    if node.op == "call_module":
        check_module(str(node.target), traced.get_submodule(str(node.target)))
    elif node.op in ("call_function", "call_method"):
        _check_call(node)
    elif node.op == "get_attr":
        raise ConversionError(
            f"the network uses its parameter `{node.target}` directly: put it into a layer, such as nn.Conv2d, nn.Linear or "
            "micelab.models.Normalize"
        )
    elif node.op == "output" and not isinstance(node.args[0], fx.Node):
        raise ConversionError("the network gives back more than one tensor: it must give back the logits alone")


def check_module(name: str, module: nn.Module) -> None:
    """Raises ConversionError, with the remedy, where a layer has no spiking counterpart and is not affine."""
    kind = type(module).__name__
    if isinstance(module, BATCH_NORMS) and module.running_mean is None:
        raise ConversionError(f"layer `{name}` is nn.{kind} without running statistics: train it with track_running_stats=True")
    if isinstance(module, nn.Flatten) and module.start_dim == 0:
        raise ConversionError(f"layer `{name}` flattens the images of a batch into one: use nn.Flatten(start_dim=1)")
    if not isinstance(module, ACTIVATIONS + _AFFINE):
        why = next((text for part, text in _REMEDIES.items() if part in kind), "use nn.ReLU or micelab.QuantClip")
        raise ConversionError(f"layer `{name}` is nn.{kind}, which has no spiking counterpart here: {why}")


def _check_call(node: fx.Node) -> None:
    call: Any = node.target
    arguments = [*node.args, *node.kwargs.values()]
    tensors = [argument for argument in arguments if isinstance(argument, fx.Node) and not is_size(argument)]
    sizes = [argument for argument in arguments if is_size(argument)]
    if call is getattr and node.args[1] not in _SIZES:
        raise ConversionError(f"`.{node.args[1]}` in `{_scope(node) or 'forward'}` has no spiking counterpart here: leave it out")
    if is_size(node):
        return
    if call in _SUM_CALLS | _SCALE_CALLS and sizes:
        raise ConversionError(f"{_where(node)} computes with the shape of its input: use a fixed number")
    if call in _SCALE_CALLS:
        if len(tensors) > 1:
            raise ConversionError(f"{_where(node)} multiplies two activations, which spikes cannot: use a sum or a concatenation")
        if call in (operator.truediv, torch.div) and not isinstance(_source(node), fx.Node):
            raise ConversionError(f"{_where(node)} divides by an activation, which is not affine: leave it out")
        if node.kwargs.get("rounding_mode"):
            raise ConversionError(f"{_where(node)} rounds, which is not affine: leave rounding_mode out")
    elif call is operator.getitem:
        index = node.args[1]
        if not isinstance(index, tuple) or index[0] not in (slice(None), ...):
            raise ConversionError(f"{_where(node)} picks images of the batch: index from dimension 1 on, as in x[:, :4]")
    elif call in _SHAPE_CALLS:
        shape = node.args[1:2] if len(node.args) > 1 else tuple(node.kwargs.values())
        first = shape[0][0] if shape and isinstance(shape[0], (tuple, list)) else next(iter(shape), -1)
        if isinstance(first, int) and first != -1:
            raise ConversionError(f"{_where(node)} fixes the number of images to {first}: use x.flatten(1) or x.shape[0]")
    elif call in _BATCH_SAFE_CALLS | _CAT_CALLS:
        given = {"dim", "axis", "start_dim"} & node.kwargs.keys()
        dims = node.kwargs[given.pop()] if given else node.args[1] if len(node.args) > 1 else None
        if dims in (None, 0) or (isinstance(dims, (tuple, list)) and (0 in dims or not dims)):
            raise ConversionError(
                f"{_where(node)} works across the images of a batch (dimension 0): give it the dimensions from 1 on"
            )
    elif call not in _RELU_CALLS | _SUM_CALLS | _POOL_CALLS:
        name = call_name(node).replace("_", "").lower()
        why = next((text for part, text in _REMEDIES.items() if part.lower() in name), "use one of those in docs/conversion.md")
        raise ConversionError(f"{_where(node)} has no spiking counterpart here: {why}")


def call_name(node: fx.Node) -> str:
    """The function, method or module that a node calls, as it is written."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _where(node: fx.Node) -> str:
    name = node.name if call_name(node) in ("fn", "boolean_dispatch") else call_name(node)
    return f"`{name}` in `{_scope(node) or 'forward'}`"


def _scope(node: fx.Node) -> str:
    """The module in whose forward the call stands: "blocks.3"."""
    stack = node.meta.get("nn_module_stack") or {}
    return [path for path, _ in stack.values()][-1] if stack else ""


def _name_activations(traced: fx.GraphModule) -> None:
    """Gives every call of an activation a module of its own, out of place, under the model's own name."""
    taken = {name for name, _ in traced.named_modules()}
    seen: set[str] = set()
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and isinstance(traced.get_submodule(node.target), ACTIVATIONS):
            module, name = traced.get_submodule(node.target), node.target
            module = nn.ReLU() if isinstance(module, nn.ReLU) else copy.deepcopy(module)
            free = name not in seen
        elif node.op in ("call_function", "call_method") and node.target in _RELU_CALLS:
            module, name = nn.ReLU(), f"{_scope(node)}.relu".lstrip(".")
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
            replacement = traced.graph.call_module(name, (_source(node),))
        replacement.meta = dict(node.meta)
        node.replace_all_uses_with(replacement)
        traced.graph.erase_node(node)


def _fold_batch_norm(traced: fx.GraphModule) -> None:
    uses: dict[str, int] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            uses[node.target] = uses.get(node.target, 0) + 1
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or not isinstance(traced.get_submodule(node.target), BATCH_NORMS):
            continue
        before = node.args[0]
        if before.op != "call_module" or len(before.users) > 1 or uses[before.target] > 1:
            continue
        weighted, norm = traced.get_submodule(before.target), cast(Any, traced.get_submodule(node.target))
        if isinstance(weighted, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
            folded: nn.Module = fuse_linear_bn_eval(weighted, norm)
        elif isinstance(weighted, CONVOLUTIONS) or (isinstance(weighted, TRANSPOSED) and weighted.groups == 1):
            folded = fuse_conv_bn_eval(weighted, norm, transpose=isinstance(weighted, TRANSPOSED))
        else:
            continue
        traced.add_submodule(before.target, folded)
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)


class LayerRunner(fx.Interpreter):
    """Runs the graph node by node, hands every activation to `activate(name, module, z)`, and names the layer that fails."""

    def __init__(self, traced: fx.GraphModule):
        super().__init__(traced, garbage_collect_values=True)
        self.traced = traced
        self.extra_traceback = False

    def activate(self, name: str, module: Any, z: Tensor) -> Tensor:
        """What the activation `name` gives back for its input z; here the module's own value."""
        return module(z)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return module_of(self.traced, target)(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with full_precision(args[0].device if isinstance(args[0], Tensor) else torch.device("cpu")):
            return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        try:
            if is_activation(self.traced, n):
                args, _ = self.fetch_args_kwargs_from_env(n)
                return self.activate(str(n.target), module_of(self.traced, str(n.target)), args[0])
            out = super().run_node(n)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if isinstance(error, InputError):
                raise InputError(f"layer `{call_name(n)}`: {error}") from error
            if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
                raise
            raise InputError(
                f"layer `{call_name(n)}` cannot take input of shape {self._shapes(n)}: {_first_line(error)}"
            ) from error
        if isinstance(out, Tensor) and n.op != "placeholder" and out.shape[:1] != self._inputs(n)[0].shape[:1]:
            raise InputError(
                f"layer `{call_name(n)}` mixes the images of a batch: {self._shapes(n)} in, {tuple(out.shape)} out; "
                "keep dimension 0 as it is"
            )
        return out

    def _inputs(self, n: fx.Node) -> list[Tensor]:
        return [self.env[source] for source in n.all_input_nodes if isinstance(self.env[source], Tensor)]

    def _shapes(self, n: fx.Node) -> str:
        return ", ".join(str(tuple(value.shape)) for value in self._inputs(n))


class InputCollector(LayerRunner):
    """Runs the ANN and keeps the input z of every activation."""

    def __init__(self, traced: Any):
        super().__init__(traced)
        self.activations = activations(traced)
        self.inputs: dict[str, Tensor] = {}

    def activate(self, name: str, module: nn.Module, z: Tensor) -> Tensor:
        self.inputs[name] = z
        return module(z)


def check_images(images: Any) -> Tensor:
    """`images` if it is a float tensor [N, ...] without NaN; raises InputError with the remedy otherwise."""
    if not isinstance(images, Tensor):
        raise InputError(f"images are a {type(images).__name__}: give a float tensor [N, C, H, W] in [0, 1]")
    if not images.is_floating_point():
        raise InputError(f"images are {images.dtype}: networks take float in [0, 1], so use images.float() / 255")
    if images.dim() < 2 or images.shape[0] == 0:
        raise InputError(f"images have shape {tuple(images.shape)}: give at least one image as [N, C, H, W]")
    if not bool(torch.isfinite(images).all()):
        bad = int((~torch.isfinite(images)).flatten(1).any(1).nonzero()[0])
        raise InputError(f"image {bad} of the batch holds NaN or infinite values: remove or mend it")
    return images
