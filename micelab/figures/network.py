"""Figures of a network at work on one image: the spikes of a layer at one step, and the answer so far."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np
from torch import Tensor

from micelab.exceptions import InputError
from micelab.figures.style import CHOSEN, NEUTRAL, SPIKE, Drawing, Spec, look


@Drawing
def spike_map(spikes: Tensor, layer: str, step: int, title: str | None = None) -> Spec:
    """Which neurons of a layer fire at one step: spikes [C, H, W] or [C] of 0 and 1, each channel a tile of its own.

    >>> import torch
    >>> spike_map(torch.eye(4)[None], "conv1", step=2).layout.title.text
    'conv1, step 2: 4 of 16 neurons fire'
    """
    if spikes.dim() not in (1, 3):
        raise InputError(f"spikes have shape {tuple(spikes.shape)}: one step of one image is [C, H, W] or [C]")
    tiles = spikes.reshape(-1, 1, 1) if spikes.dim() == 1 else spikes
    fired, neurons = int((tiles != 0).sum()), tiles.numel()
    heat = {"type": "heatmap", "z": _mosaic(tiles), "zmin": -1, "zmax": 1, "showscale": False, "hoverinfo": "skip"}
    heat["colorscale"] = [[0, "white"], [0.5, "#E8E8E8"], [1, SPIKE]]
    alt = f"Layer {layer} at step {step}: {fired} of {neurons} neurons fire, in {len(tiles)} channels."
    shown = title or f"{layer}, step {step}: {fired} of {neurons} neurons fire"
    layout = look(shown, alt, 400)
    layout["xaxis"] = {"visible": False}
    layout["yaxis"] = {"visible": False, "scaleanchor": "x", "autorange": "reversed"}
    return {"data": [heat], "layout": layout}


@Drawing
def running_answer(probabilities: Sequence[float], classes: Sequence[str], step: int, title: str | None = None) -> Spec:
    """What the network would answer if it stopped after this step: a probability for each class, the largest marked.

    >>> running_answer([0.2, 0.8], ["cat", "dog"], step=3).layout.title.text
    'Answer after step 3: dog'
    """
    best = max(range(len(probabilities)), key=lambda k: probabilities[k])
    colours = [CHOSEN if k == best else NEUTRAL for k in range(len(probabilities))]
    bar = {"type": "bar", "x": list(classes), "y": [100 * p for p in probabilities], "marker": {"color": colours}}
    bar["hovertemplate"] = "%{x}: %{y:.1f} %<extra></extra>"
    alt = f"After step {step} the answer is {classes[best]}, with {100 * probabilities[best]:.0f} %."
    layout = look(title or f"Answer after step {step}: {classes[best]}", alt, 400)
    layout["xaxis"] = {"type": "category", "title": {"text": "class"}}
    layout["yaxis"] = {"title": {"text": "probability (%)"}, "range": [0, 104]}
    return {"data": [bar], "layout": layout}


def _mosaic(tiles: Tensor) -> np.ndarray:
    """Channels [C, H, W] side by side in a near square, with a gap (-1) between them."""
    channels, height, width = tiles.shape
    across = ceil(channels**0.5)
    down = ceil(channels / across)
    room = np.full((down * (height + 1), across * (width + 1)), -1, dtype=np.int8)
    places = room.reshape(down, height + 1, across, width + 1)
    for number, tile in enumerate(tiles.ne(0).numpy()):
        places[number // across, :height, number % across, :width] = tile
    return room[:-1, :-1]
