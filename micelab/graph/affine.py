"""What may stand between two activations: everything there must be affine and act on each image by itself, since then the mean
of its outputs over time is its output for the mean input. What is not is refused by name, with its remedy.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from micelab.activation import TrainableClip
from micelab.exceptions import ConversionError
from micelab.models import Normalize

ACTIVATIONS = (nn.ReLU, nn.Hardtanh, TrainableClip)
"""What becomes neurons; nn.Hardtanh (nn.ReLU6 is one) where it begins at 0."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
DIMENSIONS: dict[int, tuple[type[nn.Module], ...]] = {
    3: (nn.Conv1d, nn.ConvTranspose1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d),
    4: (nn.Conv2d, nn.ConvTranspose2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.BatchNorm2d, nn.ZeroPad2d, Normalize),
    5: (nn.Conv3d, nn.ConvTranspose3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.BatchNorm3d),
}
"""How many dimensions a batch has where it comes to such a layer."""
_AFFINE = (*WEIGHTED, *BATCH_NORMS, *POOLS, nn.Flatten, nn.Identity, nn.ZeroPad2d, Normalize)
RELU_CALLS: dict[Any, type[nn.Module]] = {F.relu: nn.ReLU, torch.relu: nn.ReLU, "relu": nn.ReLU, F.relu6: nn.ReLU6}
"""Calls that become neurons, and the layer that does the same."""
_DROPOUT_CALLS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout}
_SUM_CALLS = {operator.add, operator.sub, torch.add, torch.sub, "add", "sub", operator.neg, torch.neg, "neg"}
_SCALE_CALLS = {operator.mul, operator.truediv, torch.mul, torch.div, "mul", "div"}
_CAT_CALLS = {torch.cat, torch.concat, torch.concatenate}
_POOL_CALLS: set[Any] = {F.avg_pool1d, F.avg_pool2d, F.avg_pool3d}
_POOL_CALLS |= {F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.pad}
_BATCH_SAFE_CALLS = {torch.flatten, "flatten", torch.mean, "mean", torch.sum, "sum", torch.squeeze, "squeeze"}
_SHAPE_CALLS = {"reshape", torch.reshape, "contiguous"}
TRANSPOSES: set[Any] = {"transpose", torch.transpose, "permute", torch.permute}
_SIZES = {"shape", "ndim"}
OUT_OF_PLACE: dict[Any, Any] = {
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
    "Hardtanh": "write it as a layer, nn.Hardtanh(0, c) or micelab.TrainableClip(c)",
    "Clamp": "write it as a layer, nn.ReLU, nn.Hardtanh(0, c) or micelab.TrainableClip(c)",
    "Chunk": "it gives several tensors: take slices, as in x[:, :4] and x[:, 4:]",
    "Split": "it gives several tensors: take slices, as in x[:, :4] and x[:, 4:]",
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

Refuse = Callable[[Any, ConversionError], None]
"""What is done about a part that cannot be converted: called with its graph node (None for the whole network), and why."""


def stop(_: Any, error: ConversionError) -> None:
    """Refuses by raising: the first part that cannot be converted ends the reading."""
    raise error


def is_dropout(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node is dropout, which evaluation leaves out."""
    if node.op == "call_module":
        return isinstance(traced.get_submodule(str(node.target)), _DROPOUTS)
    return node.op == "call_function" and node.target in _DROPOUT_CALLS


def becomes_neurons(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node, module or call, is an activation that conversion turns into spiking neurons."""
    if node.op == "call_module":
        return isinstance(traced.get_submodule(str(node.target)), ACTIVATIONS)
    return node.op in ("call_function", "call_method") and OUT_OF_PLACE.get(node.target, node.target) in RELU_CALLS


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


def is_elementwise(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node, no activation, gives back as many dimensions as it takes, whatever they are."""
    if node.op == "call_module":
        return isinstance(traced.get_submodule(str(node.target)), nn.Identity)
    return node.op in ("call_function", "call_method") and node.target in _SUM_CALLS | _SCALE_CALLS


def source_of(node: fx.Node) -> Any:
    """The first input of a call: a node, or what else was given."""
    return node.args[0] if node.args else node.kwargs.get("input")


def check_node(traced: fx.GraphModule, node: fx.Node) -> None:
    """Raises ConversionError, with the remedy, where the node cannot be in a network of spikes."""
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
    if isinstance(module, nn.Hardtanh) and module.min_val != 0:
        raise ConversionError(
            f"layer `{name}` is nn.{kind} from {module.min_val:g} on, and a neuron says nothing below 0: train it with "
            f"nn.Hardtanh(0, {module.max_val:g}) or micelab.TrainableClip({module.max_val:g})"
        )
    if not isinstance(module, ACTIVATIONS + _AFFINE):
        of_activations = type(module).__module__ == nn.modules.activation.__name__
        usual = "use nn.ReLU or micelab.QuantClip" if of_activations else "use one of those in docs/conversion.md"
        why = next((text for part, text in _REMEDIES.items() if part in kind), usual)
        raise ConversionError(f"layer `{name}` is nn.{kind}, which has no spiking counterpart here: {why}")


def _check_call(node: fx.Node) -> None:
    call: Any = node.target
    arguments = [*node.args, *node.kwargs.values()]
    tensors = [argument for argument in arguments if isinstance(argument, fx.Node) and not is_size(argument)]
    sizes = [argument for argument in arguments if is_size(argument)]
    if call is getattr and node.args[1] not in _SIZES:
        raise ConversionError(f"`.{node.args[1]}` in `{scope(node) or 'forward'}` has no spiking counterpart here: leave it out")
    if is_size(node):
        return
    if call in _SUM_CALLS | _SCALE_CALLS and sizes:
        raise ConversionError(f"{where(node)} computes with the shape of its input: use a fixed number")
    if call in _SCALE_CALLS:
        if len(tensors) > 1:
            raise ConversionError(f"{where(node)} multiplies two activations, which spikes cannot: use a sum or a concatenation")
        if call in (operator.truediv, torch.div) and not isinstance(source_of(node), fx.Node):
            raise ConversionError(f"{where(node)} divides by an activation, which is not affine: leave it out")
        if node.kwargs.get("rounding_mode"):
            raise ConversionError(f"{where(node)} rounds, which is not affine: leave rounding_mode out")
    elif call is operator.getitem:
        index = node.args[1]
        if not isinstance(index, tuple) or index[0] not in (slice(None), ...):
            raise ConversionError(f"{where(node)} picks images of the batch: index from dimension 1 on, as in x[:, :4]")
    elif call in _SHAPE_CALLS:
        shape = node.args[1:2] if len(node.args) > 1 else tuple(node.kwargs.values())
        first = shape[0][0] if shape and isinstance(shape[0], (tuple, list)) else next(iter(shape), -1)
        if isinstance(first, int) and first != -1:
            raise ConversionError(f"{where(node)} fixes the number of images to {first}: use x.flatten(1) or x.shape[0]")
    elif call in TRANSPOSES:
        if not _keeps_images(node):
            raise ConversionError(
                f"{where(node)} moves the images of a batch (dimension 0) or counts from the end, where they may be: write it as "
                "x.transpose(1, 2) or x.permute(0, 2, 1)"
            )
    elif call in _BATCH_SAFE_CALLS | _CAT_CALLS:
        given = {"dim", "axis", "start_dim"} & node.kwargs.keys()
        dims = node.kwargs[given.pop()] if given else node.args[1] if len(node.args) > 1 else None
        if dims in (None, 0) or (isinstance(dims, (tuple, list)) and (0 in dims or not dims)):
            raise ConversionError(
                f"{where(node)} works across the images of a batch (dimension 0): give it the dimensions from 1 on"
            )
    elif call not in RELU_CALLS and call not in _SUM_CALLS | _POOL_CALLS:
        name = call_name(node).replace("_", "").lower()
        why = next((text for part, text in _REMEDIES.items() if part.lower() in name), "use one of those in docs/conversion.md")
        raise ConversionError(f"{where(node)} has no spiking counterpart here: {why}")


def _keeps_images(node: fx.Node) -> bool:
    """Whether a transposition leaves dimension 0 where it is, for inputs of any number of dimensions."""
    given: tuple[Any, ...] = (*node.args[1:], *(value for name, value in node.kwargs.items() if name != "input"))
    dims = given[0] if given and isinstance(given[0], (tuple, list)) else given
    if "permute" in call_name(node):
        return bool(dims) and isinstance(dims[0], int) and dims[0] == 0
    return len(dims) == 2 and all(isinstance(dim, int) and dim > 0 for dim in dims)


def call_name(node: fx.Node) -> str:
    """The function, method or module that a node calls, as it is written."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def where(node: fx.Node) -> str:
    """A call and the module it stands in, for an error: "`add` in `blocks.3`"."""
    name = node.name if call_name(node) in ("fn", "boolean_dispatch") else call_name(node)
    return f"`{name}` in `{scope(node) or 'forward'}`"


def scope(node: fx.Node) -> str:
    """The module in whose forward the call stands: "blocks.3"."""
    stack = node.meta.get("nn_module_stack") or {}
    return [path for path, _ in stack.values()][-1] if stack else ""
