"""A network as a graph of layers: traced with torch.fx, batch-norm folded, refused by name where it cannot be converted.

A converted network is this graph with its activations replaced by spiking neurons. Everything between two activations must be
affine and act on each image by itself, since then the mean of its outputs over time is its output for the mean input.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from micelab.activation import TrainableClip
from micelab.exceptions import ConversionError, InputError
from micelab.models import Normalize
from micelab.neuron import IntegrateFire

ACTIVATIONS = (nn.ReLU, TrainableClip)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_AFFINE = (*WEIGHTED, *_BATCH_NORMS, *_POOLS, nn.Flatten, nn.Identity, nn.ZeroPad2d, Normalize)
_RELU_CALLS = {F.relu, torch.relu, torch.relu_, F.relu_, "relu", "relu_"}
_DROPOUT_CALLS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout}
ADD_CALLS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_CAT_CALLS = {torch.cat, torch.concat, torch.concatenate}
_POOL_CALLS = {F.avg_pool1d, F.avg_pool2d, F.avg_pool3d}
_POOL_CALLS |= {F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d}
_SCALE_CALLS = {operator.mul, operator.truediv, torch.mul, torch.div, "mul", "div"}
_SHAPE_CALLS = {getattr, operator.getitem, "size", "dim", "contiguous", "view", "reshape"}
_BATCH_SAFE_CALLS = {torch.flatten, "flatten", torch.mean, "mean"}  # they may swallow the batch: checked below
_REMEDIES = {
    "MaxPool": "the maximum of spikes is not the spike count of the maximum: use nn.AvgPool2d or a stride, before training",
    "Softmax": "it is not affine: leave it out, the largest logit stays the largest",
    "LayerNorm": "it normalizes each image by its own statistics: use nn.BatchNorm2d",
    "GroupNorm": "it normalizes each image by its own statistics: use nn.BatchNorm2d",
    "InstanceNorm": "it normalizes each image by its own statistics: use nn.BatchNorm2d",
}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (TrainableClip, Normalize)) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, fold: bool = True) -> fx.GraphModule:
    """A copy of `model` in eval mode as a graph whose every activation is a module of its own, named as in the model.

    A second call of one nn.ReLU becomes `name_1`, a call of F.relu `block.relu`. With `fold`, batch-norm is folded into the
    convolution or linear layer before it. Raises ConversionError, naming the layer, where a part has no spiking
    counterpart; the caller's model is not changed.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"a {type(model).__name__} was given where a network (torch.nn.Module) is needed")
    model = copy.deepcopy(model).eval()
    _check_numbers(model)
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except (TraceError, TypeError, RuntimeError, AttributeError, ValueError, IndexError) as error:
        where = f"{type(model).__name__}.forward"
        raise ConversionError(
            f"{where} cannot be read as a fixed graph of layers ({str(error).splitlines()[0]}): it decides by the values of its "
            "tensors or takes more than images; move that outside the network"
        ) from error
    traced = fx.GraphModule(tracer.root, graph)
    _drop_dropout(traced)
    _check_nodes(traced)
    _name_activations(traced)
    if fold:
        _fold_batch_norm(traced)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    traced.delete_all_unused_submodules()
    if not activations(traced):
        raise ConversionError(f"{type(model).__name__} holds no nn.ReLU and no clip activation: there is nothing to convert")
    return traced


def activations(traced: fx.GraphModule) -> dict[str, nn.Module]:
    """The activations by name, from input to output."""
    return {node.target: traced.get_submodule(node.target) for node in traced.graph.nodes if is_activation(traced, node)}


def is_activation(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node is an activation of the ANN or, after conversion, a layer of neurons."""
    return node.op == "call_module" and isinstance(traced.get_submodule(node.target), (*ACTIVATIONS, IntegrateFire))


def replace_activations(traced: fx.GraphModule, make: Callable[[str, nn.Module], nn.Module]) -> fx.GraphModule:
    """The same graph, in place, with every activation replaced by `make(name, activation)`."""
    for name, module in activations(traced).items():
        traced.add_submodule(name, make(name, module))
    return traced


def _check_numbers(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ConversionError(f"`{name}` holds NaN or infinite numbers: the network is broken, train or load it again")


def _drop_dropout(traced: fx.GraphModule) -> None:
    for node in list(traced.graph.nodes):
        module = traced.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, _DROPOUTS) or node.target in _DROPOUT_CALLS:
            node.replace_all_uses_with(node.args[0] if node.args else node.kwargs["input"])
            traced.graph.erase_node(node)


def _check_nodes(traced: fx.GraphModule) -> None:
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        names = ", ".join(node.target for node in inputs)
        raise ConversionError(f"the network takes {len(inputs)} inputs ({names}): it must take one tensor of images")
    for node in traced.graph.nodes:
        if node.op == "call_module":
            _check_module(node.target, traced.get_submodule(node.target))
        elif node.op in ("call_function", "call_method"):
            _check_call(node)
        elif node.op == "get_attr":
            raise ConversionError(
                f"the network uses its parameter `{node.target}` directly: put it into a layer such as nn.Conv2d or nn.Linear"
            )
        elif node.op == "output" and not isinstance(node.args[0], fx.Node):
            raise ConversionError("the network gives back more than one tensor: it must give back the logits alone")


def _check_module(name: str, module: nn.Module) -> None:
    kind = type(module).__name__
    if isinstance(module, _BATCH_NORMS) and module.running_mean is None:
        raise ConversionError(f"layer `{name}` is nn.{kind} without running statistics: train it with track_running_stats=True")
    if not isinstance(module, ACTIVATIONS + _AFFINE):
        why = next((text for part, text in _REMEDIES.items() if part in kind), "use nn.ReLU or micelab.QuantClip")
        raise ConversionError(f"layer `{name}` is nn.{kind}, which has no spiking counterpart here: {why}")


def _check_call(node: fx.Node) -> None:
    call: Any = node.target
    known = _RELU_CALLS | ADD_CALLS | _CAT_CALLS | _POOL_CALLS | _SHAPE_CALLS | _BATCH_SAFE_CALLS
    name = call if isinstance(call, str) else getattr(call, "__name__", str(call))
    where = f"`{name}` in `{_scope(node) or 'forward'}`"
    if call in _SCALE_CALLS:
        if sum(isinstance(argument, fx.Node) for argument in node.args) > 1:
            raise ConversionError(f"{where} multiplies two activations, which spikes cannot: use a sum or a concatenation")
        if call in (operator.truediv, torch.div) and not isinstance(node.args[0], fx.Node):
            raise ConversionError(f"{where} divides by an activation, which is not affine: leave it out")
    elif call not in known:
        why = next((text for part, text in _REMEDIES.items() if part.lower() in name.replace("_", "").lower()), None)
        raise ConversionError(
            f"{where} has no spiking counterpart here: {why or 'use the layers that docs/conversion.md lists, such as nn.ReLU'}"
        )
    dims = node.kwargs.get("dim", node.kwargs.get("start_dim", node.args[1] if len(node.args) > 1 else 0))
    swallows = 0 in dims if isinstance(dims, (tuple, list)) else dims == 0
    if call in _BATCH_SAFE_CALLS | _CAT_CALLS and swallows:
        raise ConversionError(f"{where} works across the images of a batch (dimension 0): give it the dimensions from 1 on")


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
            source = node.args[0] if node.args else node.kwargs["input"]
            replacement = traced.graph.call_module(name, (source,))
        replacement.meta = dict(node.meta)
        node.replace_all_uses_with(replacement)
        traced.graph.erase_node(node)


def _fold_batch_norm(traced: fx.GraphModule) -> None:
    uses: dict[str, int] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            uses[node.target] = uses.get(node.target, 0) + 1
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or not isinstance(traced.get_submodule(node.target), _BATCH_NORMS):
            continue
        before = node.args[0]
        if before.op != "call_module" or len(before.users) > 1 or uses[before.target] > 1:
            continue
        weighted, norm = traced.get_submodule(before.target), traced.get_submodule(node.target)
        if isinstance(weighted, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
            folded: nn.Module = fuse_linear_bn_eval(weighted, norm)
        elif isinstance(weighted, CONVOLUTIONS + TRANSPOSED):
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

    def activate(self, name: str, module: nn.Module, z: Tensor) -> Tensor:
        """What the activation `name` gives back for its input z; here the module's own value."""
        return module(z)

    def run_node(self, n: fx.Node) -> Any:
        try:
            if is_activation(self.module, n):
                args, _ = self.fetch_args_kwargs_from_env(n)
                return self.activate(n.target, self.fetch_attr(n.target), args[0])  # type: ignore[arg-type]
            return super().run_node(n)
        except (RuntimeError, ValueError) as error:
            if isinstance(error, (InputError, torch.OutOfMemoryError)) or "out of memory" in str(error):
                raise
            shapes = [tuple(a.shape) for a in self.fetch_args_kwargs_from_env(n)[0] if isinstance(a, Tensor)]
            raise InputError(f"layer `{n.target}` cannot take input of shape {shapes}: {str(error).splitlines()[0]}") from error


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
