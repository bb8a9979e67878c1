"""A network of one's own to convert: copied, with finite weights that nothing else makes anew, and no hooks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from micelab.exceptions import ConversionError, first_line
from micelab.graph.affine import Refuse, stop
from micelab.graph.batch_norm import takes_rows


def own_copy(model: nn.Module, refuse: Refuse = stop) -> nn.Module:
    """A copy in eval mode; refuses hooks and parametrized weights, which a graph of layers leaves out."""
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            why = "make it plain with torch.nn.utils.parametrize.remove_parametrizations"
            refuse(None, ConversionError(f"{who(name, module)} has a parametrized weight: {why}"))
        hooks = _hooks_of_others(module._forward_pre_hooks) | _hooks_of_others(module._forward_hooks)
        if hooks:
            refuse(None, ConversionError(f"{who(name, module)} has {_in_words(module, next(iter(hooks.values())))}"))
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
    return (
        "a forward hook, which the converted network would not run, and none tells beforehand whether it only watches: take it "
        "away with handle.remove(), handle being what register_forward_hook gave back"
    )


def _hooks_of_others(hooks: dict[int, Any]) -> dict[int, Any]:
    """All but those that `fold_batch_norm` registers, which belong to the layer."""
    return {key: hook for key, hook in hooks.items() if getattr(hook, "func", None) is not takes_rows}


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


def who(name: str, module: nn.Module) -> str:
    """How an error names a module of a network: the network itself has no name in it."""
    return f"layer `{name}`" if name else type(module).__name__


def check_numbers(model: nn.Module, refuse: Refuse = stop) -> None:
    """Refuses parameters and buffers that are not finite."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not is_lazy(tensor) and not bool(torch.isfinite(tensor).all()):
            why = "the network is broken, train or load it again"
            refuse(None, ConversionError(f"`{name}` holds NaN or infinite numbers: {why}"))
