"""Noise training (NQ): how large the error is that conversion makes at each layer, for the noise of the next epoch."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from micelab.activation import NoisyQuantClip
from micelab.convert import convert
from micelab.exceptions import InputError
from micelab.graph.runner import InputCollector, check_images
from micelab.graph.tracing import trace


def measure_noise(model: nn.Module, images: Tensor, time_steps: int = 4) -> dict[str, float]:
    """Measures the conversion error of every `NoisyQuantClip` of `model`, sets its `sigma`, and gives back the sigmas by name.

    images: [N, C, H, W] in [0, 1], of the validation split (never the test split); time_steps: T of the spiking network. sigma
    is the standard deviation of (the ANN's output - the spiking layer's rate) over all neurons and images, in activation
    units, in eval mode. Nothing else of the model changes, its mode stays. Call it after every epoch; the first epoch then
    has no noise. Source: NQ (Huang et al., IEEE TNNLS 2025) and the authors' code, with T = 4; they average the variance of
    batches, here all images count as one.

    >>> import micelab
    >>> model = micelab.small_cnn(activation="noisy_quant_clip")
    >>> list(micelab.measure_noise(model, torch.rand(8, 1, 8, 8)))
    ['stem.2', 'blocks.0.2', 'blocks.1.2', 'blocks.2.2']

    Raises InputError where the model has no such activation.
    """
    noisy = {name: module for name, module in model.named_modules() if isinstance(module, NoisyQuantClip)}
    if not noisy:
        raise InputError('the network has no NoisyQuantClip: build it with activation="noisy_quant_clip"')
    spreads = _spreads(model, check_images(images), time_steps)
    modules = {name for name, _ in model.named_modules()}
    sigmas = {}
    for name, module in noisy.items():
        calls = [
            call for call in spreads if call == name or (call not in modules and re.fullmatch(rf"{re.escape(name)}_\d+", call))
        ]
        sigmas[name] = sum(spreads[call] ** 2 for call in calls) ** 0.5 / max(1, len(calls)) ** 0.5
        with torch.no_grad():
            module.sigma.fill_(sigmas[name])
    return sigmas


def _spreads(model: nn.Module, images: Tensor, time_steps: int) -> dict[str, float]:
    """Standard deviation of (ANN's output - rate) by activation, over all neurons and images."""
    snn = convert(model, "qcfs")
    collector = InputCollector(trace(model))
    sums = {name: [0.0, 0.0, 0.0] for name in snn.neurons}
    for part, run in snn.stream(images.to(next(snn.buffers()).device), time_steps):
        with torch.inference_mode():
            collector.run(part)
            for name, layer in run.layers.items():
                gap = (collector.activations[name](collector.inputs[name]) - layer.rate).double()
                new = (float(gap.sum()), float(gap.square().sum()), float(gap.numel()))
                sums[name] = [a + b for a, b in zip(sums[name], new, strict=True)]
    return {name: max(0.0, square / n - (total / n) ** 2) ** 0.5 for name, (total, square, n) in sums.items()}
