"""A simulation recorded as a CUDA graph: with few images a card waits for many small launches; here they are one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn

from micelab.exceptions import InputError
from micelab.graph.runner import check_images

WARM_UP = 3
"""Runs before the recording, as torch asks for: in them libraries choose their algorithms and Triton compiles."""


class Replay:
    """The simulation `walk` of `network` for images like `images`, recorded once (`micelab.SpikingNetwork.recorded`).

    `walk` maps images [N, ...] to logits [T, N, classes] by operations of the device alone. What it reads must stay where it
    is: weights, thresholds and starts may change in place between calls, and a network that was moved, or whose tensors were
    replaced, is refused. Elsewhere than on CUDA there are no graphs, and every call walks.
    """

    def __init__(self, network: nn.Module, images: Tensor, walk: Callable[[Tensor], Tensor]):
        self.network, self.walk = network, walk
        with torch.inference_mode(False):  # wherever it is recorded, it may be written into later
            self.images = images.clone()
        self.places, self.graph = self._places(), None
        if recordable(images.device):
            self.graph, self.logits = record(lambda: walk(self.images))

    def __call__(self, images: Tensor) -> Tensor:
        """Mean logits after the last step, [N, classes]."""
        if not isinstance(images, Tensor) or not images.is_floating_point():
            check_images(images)  # says what is wrong
        if (images.shape, images.device) != (self.images.shape, self.images.device):
            given, own = (f"{tuple(each.shape)} on {each.device}" for each in (images, self.images))
            raise InputError(f"images are {given}, and the simulation was recorded for {own}: record one for them")
        if self._places() != self.places:
            raise InputError("the network was moved, or got new tensors, since its simulation was recorded: record it again")
        self.images.copy_(images)
        if self.graph is None:
            return self.walk(self.images)[-1]
        self.graph.replay()
        return self.logits[-1].clone()

    def _places(self) -> list[int]:
        return [tensor.data_ptr() for tensor in chain(self.network.parameters(), self.network.buffers())]


def recordable(device: torch.device) -> bool:
    """Whether there are graphs on that device."""
    return device.type == "cuda"


def record(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """(graph that does what `run` does, the tensor that it writes): `run` is called on a stream of its own, then recorded."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out
