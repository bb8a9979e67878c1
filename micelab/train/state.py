"""A run's state in one file: weights, the optimizer's memory, options, counters. A stopped run goes on from it bit for bit."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from micelab import checkpoint
from micelab.exceptions import CheckpointError, InputError
from micelab.train.recipe import Recipe


def write(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, words: dict[str, Any]) -> None:
    """Writes all of it at once: the last state stays whole where this one cannot be written. `words` hold "config"."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        kept = optimizer.state.get(parameter, {})
        tensors |= {f"optimizer.{key}.{name}": value for key, value in kept.items() if isinstance(value, Tensor)}
    checkpoint.write_tensors(path, tensors, words)


def differences(was: dict[str, Any], config: Recipe) -> list[str]:
    """Each option in which a run of other options, as its file tells them, differs from `config`.

    One that the file does not name is newer than it: there it had the default.
    """
    then = {field.name: field.default for field in fields(config)} | was
    then, now = (json.loads(json.dumps(choices)) for choices in (then, asdict(config)))  # as read from a file
    return [f"{name} was {then[name]!r}, is {now[name]!r}" for name in now if then[name] != now[name]]


def read(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, config: Any) -> dict[str, Any]:
    """Puts the state at `path` into model and optimizer, and gives back its words.

    Raises CheckpointError where there is none, and InputError naming each option in which it differs from `config`.
    """
    if not path.exists():
        raise CheckpointError(f"{path.parent} holds no run to resume: start it without --resume")
    tensors, words = checkpoint.read_tensors(path)
    if "config" not in words:
        raise CheckpointError(f"{path} holds a network and no state of a run: put the run's own file there, or begin it again")
    if differ := differences(words["config"], config):
        raise InputError(f"{path.parent} was started with other options: {'; '.join(differ)}. Resume with the same ones")
    weights = {name[6:]: value for name, value in tensors.items() if name.startswith("model.")}
    checkpoint.load_weights(model, weights, path)
    parameters = dict(model.named_parameters())
    for place, value in tensors.items():
        if place.startswith("optimizer."):
            _, key, name = place.split(".", 2)
            like = parameters[name]
            if value.shape == like.shape and key != "step":  # laid out in memory as the weights are
                value = torch.empty_like(like, memory_format=torch.preserve_format).copy_(value)
            optimizer.state[like][key] = value
    return words
