"""Biases that bring the mean of every channel to the ANN's, layer by layer in order, in one forward pass.

Once the layers before have theirs, a layer's currents no longer change, and its own bias is found from them alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from micelab.graph.runner import LayerRunner
from micelab.network.folded import TimeFolded
from micelab.network.spiking import SpikingNetwork
from micelab.neuron.firing import fire
from micelab.neuron.layout import over_channels

IMAGES = 256
"""At most so many calibration images give biases: all their steps are in memory at once."""

ROUNDS = 3
SAMPLES = 2**14
"""At most so many neurons of a channel, evenly chosen, decide on the bias of a step."""


def channel_means(values: Tensor) -> Tensor:
    """Mean over images and places of [N, C, ...], [C].

    >>> channel_means(torch.tensor([[[1.0, 3.0], [0.0, 0.0]]])).tolist()
    [2.0, 0.0]
    """
    return values.mean([dim for dim in range(values.dim()) if dim != 1])


def rate_bias(current: Tensor, theta: Tensor, v0: Tensor, target: Tensor, signed: bool = False, rounds: int = ROUNDS) -> Tensor:
    """The bias [C] that, added to the current of every step, brings the mean rate of each channel near `target` [C].

    current: [T, N, C, ...]; all in activation units; theta > 0 and v0 (in thetas): scalar or [C]. Each round the bias falls by
    as much as the mean rate is too high; the best is kept. Source: Li et al., ICML 2021, and their code, with one round.

    >>> current = torch.full((4, 1, 1), 0.3)  # 0.5 + 4*0.3 = 1.7: one spike, a rate of 0.25, where the ANN says 0.5
    >>> round(rate_bias(current, torch.tensor(1.0), torch.tensor(0.5), target=torch.tensor([0.5])).item(), 3)
    0.25
    """
    room, bias = torch.empty_like(current), torch.zeros_like(target)
    best, least = bias, torch.full_like(target, torch.inf)
    for number in range(rounds + 1):  # the last one only looks
        drive = current if number == 0 else current + over_channels(bias, current, channel_dim=2)
        count, _ = fire(drive, theta, v0, signed, room, amplitude=True, count=True)
        error = channel_means(count * over_channels(theta, count)) / len(current) - target
        best, least = torch.where(error.abs() < least, bias, best), torch.minimum(error.abs(), least)
        bias = bias - error
    return best


def step_bias(potential: Tensor, theta: Tensor, target: Tensor, halvings: int = 24) -> Tensor:
    """The bias [C] of one step with which the share of neurons that fire, times theta, is nearest to `target` [C].

    potential: [N, C, ...], the membrane with the step's current, before it may fire; all in activation units; theta > 0:
    scalar or [C]. No bias where none brings it nearer. Our choice: the level that so many neurons reach is found by
    halving; the authors' code moves part of the mean error of this step (FTBC, Wu et al., ECCV 2024).

    >>> potential = torch.tensor([[0.1], [0.2], [0.3], [1.2]])  # one of four fires, and two should
    >>> 0.7 < step_bias(potential, torch.tensor(1.0), target=torch.tensor([0.5])).item() < 0.8
    True
    """
    rows = potential.transpose(0, 1).flatten(1)
    stride = max(1, rows.shape[1] // SAMPLES)
    rows = rows[:, :: stride + (stride % 2 == 0)]  # odd, so that it does not fall in step with the image's rows
    theta = theta.expand(len(rows))

    def error(level: Tensor) -> Tensor:
        return theta * (rows >= level[:, None]).float().mean(1) - target

    low, high = rows.amin(1), rows.amax(1) + theta
    for _ in range(halvings):
        middle = (low + high) / 2
        many = error(middle) > 0
        low, high = torch.where(many, middle, low), torch.where(many, high, middle)
    level = theta
    for other in (high, low):
        level = torch.where(error(other).abs() < error(level).abs(), other, level)
    return theta - level


def step_biases(current: Tensor, theta: Tensor, v0: Tensor, target: Tensor) -> Tensor:
    """The bias of each step and channel, [T, C]: step by step, `step_bias` of neurons that had the biases before.

    current: [T, N, C, ...]; theta, v0 (in thetas): scalar or [C]; target: [C]; all others in activation units. What is found
    for a step does not depend on those after it, so the biases for T steps begin as those for fewer.
    """
    over = over_channels(theta, current, channel_dim=2)
    v = (over_channels(v0, current, channel_dim=2) * over).expand_as(current[0])
    found, room = [], torch.empty_like(current[:1])
    for now in current.split(1):
        bias = step_bias(v + now[0], theta, target)
        _, v = fire(now + over_channels(bias, current, channel_dim=2), theta, v / over, False, room)
        found.append(bias)
    return torch.stack(found)


def match_rates(snn: SpikingNetwork, images: Tensor, means: dict[str, Tensor], time_steps: int) -> None:
    """Sets the constant bias of every `ChannelBias` neuron: mean rates at T = `time_steps` as the ANN's `means` [C]."""

    def find(neuron: Any, current: Tensor, target: Tensor) -> Tensor:
        return rate_bias(current, neuron.theta, neuron.v0, target, neuron.signed)

    _in_order(snn, images, means, time_steps, find)


def match_steps(snn: SpikingNetwork, images: Tensor, means: dict[str, Tensor], time_steps: int) -> None:
    """Sets the bias of every step of every `StepBias` neuron: the mean of theta*s(t) as the ANN's `means` [C] at each t."""

    def find(neuron: Any, current: Tensor, target: Tensor) -> Tensor:
        return step_biases(current, neuron.theta, neuron.v0, target)

    _in_order(snn, images, means, time_steps, find)


def _in_order(
    snn: SpikingNetwork, images: Tensor, means: dict[str, Tensor], time_steps: int, find: Callable[[Any, Tensor, Tensor], Tensor]
) -> None:
    with torch.no_grad():
        _Calibrator(snn, len(images), means, time_steps, find).run(images)


class _Calibrator(TimeFolded):
    """Gives each layer its bias when its currents are known, then runs it."""

    def __init__(self, snn: SpikingNetwork, images: int, means: dict[str, Tensor], time_steps: int, find: Callable[..., Tensor]):
        super().__init__(snn.layers, time_steps, images, record=False, spikes=False)
        self.means, self.find = means, find

    def activate(self, name: str, module: Any, z: Tensor) -> Tensor:
        bias = self.find(module, self.current(z), self.means[name].to(z))
        module.bias = bias.to(module.theta).clone()
        return super().activate(name, module, z)


def ann_means(traced: fx.GraphModule, images: Tensor) -> dict[str, Tensor]:
    """The mean of every activation of the ANN over `images` [N, C, H, W], channel by channel, by name."""
    runner = _Means(traced)
    with torch.no_grad():
        for part in images.split(64):
            runner.run(part)
    return {name: total / len(images) for name, total in runner.sums.items()}


class _Means(LayerRunner):
    def __init__(self, traced: fx.GraphModule):
        super().__init__(traced)
        self.sums: dict[str, Tensor] = {}

    def activate(self, name: str, module: nn.Module, z: Tensor) -> Tensor:
        y = module(z)
        self.sums[name] = self.sums.get(name, torch.zeros(())) + len(y) * channel_means(y)
        return y
