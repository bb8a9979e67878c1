"""The teacher of a run: a trained network whose answers are learned beside the labels (Hinton et al., 2015)."""

from __future__ import annotations

import copy
from collections.abc import Hashable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Teacher:
    """`network`, frozen and on `device`, and how far another's logits are from its own.

    Of a batch that has a `key` and comes again under it the network is asked once: its logits stay in memory, on `device`
    (Shen and Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", ECCV 2022, keep them on disk).

    >>> import micelab
    >>> net = micelab.small_cnn(width=8)
    >>> images = torch.rand(2, 1, 8, 8)
    >>> abs(Teacher(net).divergence(net.eval()(images), images).item()) < 1e-6
    True
    """

    def __init__(self, network: nn.Module, device: torch.device | str = "cpu", temperature: float = 1.0):
        frozen = copy.deepcopy(network).eval().requires_grad_(False)
        self.network: nn.Module = frozen.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.temperature = temperature
        self.remembered: dict[Hashable, Tensor] = {}

    def logits(self, images: Tensor, key: Hashable | None = None) -> Tensor:
        """What the network says of `images` [n, C, H, W], or said when this `key` came first: [n, classes]."""
        if key in self.remembered:
            return self.remembered[key]
        with torch.no_grad():
            said: Tensor = self.network(images)
        if key is not None:
            self.remembered[key] = said
        return said

    def divergence(self, logits: Tensor, images: Tensor, key: Hashable | None = None) -> Tensor:
        """Kullback-Leibler divergence of `logits` [n, classes] from the teacher's, mean over the batch, times temperature².

        Both are divided by the temperature before; its square keeps the gradient at the size that it has at 1.
        """
        said = F.log_softmax(self.logits(images, key).float() / self.temperature, 1)
        answer = F.log_softmax(logits / self.temperature, 1)
        return self.temperature**2 * F.kl_div(answer, said, log_target=True, reduction="batchmean")
