"""Biases that bring the mean rate of every channel to the ANN's, layer by layer in order, in one pass through the network.

A layer's currents no longer depend on its own bias once the layers before have theirs, so everything is found forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from micelab.activation import over_channels
from micelab.exceptions import InputError
from micelab.graph import LayerRunner
from micelab.network import SpikingNetwork, TimeFolded
from micelab.neuron import fire
from micelab.rivals import ChannelBias, StepBias

IMAGES = 256
"""At most so many calibration images give biases: all their T steps are in memory at once."""

ROUNDS = 20


def channel_means(values: Tensor) -> Tensor:
    """Mean over images and places of [N, C, ...], [C].

    >>> channel_means(torch.tensor([[[1.0, 3.0], [0.0, 0.0]]])).tolist()
    [2.0, 0.0]
    """
    return values.mean([d for d in range(values.dim()) if d != 1])


def rate_bias(current: Tensor, theta: Tensor, v0: Tensor, signed: bool, target: Tensor, rounds: int = ROUNDS) -> Tensor:
    """The bias [C] (activation units, in every step) for which the mean rate of each channel is nearest to `target` [C].

    current: [T, N, C, ...] activation units; theta, v0: scalar or [C]. Round by round the bias falls by what the mean is too
    high, as Li et al. (ICML 2021, eq. 13) do in one round; the best round is taken.
    """
    bias, best = torch.zeros_like(target), torch.zeros_like(target)
    least = torch.full_like(target, torch.inf)
    room = torch.empty_like(current)
    for _ in range(rounds):
        count, _ = fire(current + over_channels(bias, current, 2), theta, v0, signed, room, amplitude=True, count=True)
        error = channel_means(count * over_channels(theta, count)) / len(current) - target
        best, least = torch.where(error.abs() < least, bias, best), torch.minimum(error.abs(), least)
        bias = bias - error
    return best
