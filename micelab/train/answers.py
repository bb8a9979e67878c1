"""What a network answers: how many images it classifies rightly, and how many classes it tells apart at all."""

from __future__ import annotations

import copy

import torch
from torch import nn

from micelab.data import ImageData, Split
from micelab.exceptions import InputError, first_line
from micelab.graph.tracing import evaluating


def accuracy(model: nn.Module, split: Split, device: torch.device | str = "cpu") -> float:
    """Share of `split` that `model` (in eval mode for it, fp32) classifies rightly, in [0, 1]. Raises InputError if empty.

    >>> import micelab
    >>> 0 <= accuracy(micelab.small_cnn(), micelab.load_data("digits").test) <= 1
    True
    """
    if not len(split):
        raise InputError("there are no images to measure an accuracy on: give at least one")
    with evaluating(model), torch.inference_mode():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in split.batches(device=device))
    return right / len(split)


def classes_told(model: nn.Module, data: ImageData, who: str = "the network") -> int:
    """How many classes `model` tells apart, for images like those of `data`; an error calls it `who`."""
    with torch.inference_mode():
        try:
            return int(copy.deepcopy(model).eval().cpu()(torch.zeros(1, *data.shape)).shape[-1])
        except (RuntimeError, InputError) as error:
            raise InputError(f"{who} cannot take images of {data.name}, {data.shape}: {first_line(error)}") from error


def must_tell_the_classes(model: nn.Module, data: ImageData, who: str) -> None:
    """Raises InputError where `model`, called `who`, does not tell as many classes apart as `data` has."""
    if (found := classes_told(model, data, who)) != len(data.classes):
        raise InputError(
            f"{who} tells {found} classes apart, {data.name} has {len(data.classes)}: choose another, or the data that it was "
            "trained on"
        )
