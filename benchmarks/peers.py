"""The same converted network in other simulators: spikingjelly, snnTorch and sinabs, each as its documentation has it.

Weights, thresholds, starts and images are micelab's own; only the neurons are replaced, and what is installed is used. norse
has no integrate-and-fire neuron with reset by subtraction (its IAF resets to a value, its LIF leaks).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

import micelab
from micelab.graph import replace_activations


class Peer:
    """A network with a peer's neurons: `run(images, T)` gives mean logits [N, classes], `counts` each layer's spikes [N, ...]."""

    def __init__(self, snn: micelab.SpikingNetwork, neuron: Callable[[float, float], nn.Module]):
        make = lambda _, layer: neuron(float(layer.theta), float(layer.v0))
        self.net = replace_activations(copy.deepcopy(snn.layers), make).eval().to(memory_format=torch.channels_last)
        self.neurons = {name: self.net.get_submodule(name) for name in snn.neurons}

    def run(self, images: Tensor, time_steps: int, count: bool = False) -> Tensor:
        for neuron in self.neurons.values():
            neuron.start(time_steps)
            neuron.counts = 0 if count else None
        return self.simulate(images.contiguous(memory_format=torch.channels_last), time_steps)

    def simulate(self, images: Tensor, time_steps: int) -> Tensor:
        """The network once a step."""
        return sum(self.net(images) for _ in range(time_steps)) / time_steps  # type: ignore[return-value]

    @property
    def counts(self) -> dict[str, Tensor]:
        return {name: neuron.counts for name, neuron in self.neurons.items()}


class MultiStep(Peer):
    """All steps of a layer in one call, time before the batch."""

    def simulate(self, images: Tensor, time_steps: int) -> Tensor:
        return self.net(images.repeat(time_steps, 1, 1, 1)).unflatten(0, (time_steps, -1)).mean(0)


class BatchMajor(Peer):
    """All steps of a layer in one call, the batch before time."""

    def simulate(self, images: Tensor, time_steps: int) -> Tensor:
        return self.net(images.repeat_interleave(time_steps, 0)).unflatten(0, (-1, time_steps)).mean(1)


class Neuron(nn.Module):
    """What the three have in common: theta is sent at every spike, and spikes are counted where that is asked for."""

    counts: Any = None

    def __init__(self, theta: float, v0: float):
        super().__init__()
        self.theta, self.v0, self.steps = theta, v0 * theta, 1

    def sent(self, spikes: Tensor, per_image: Tensor | None = None) -> Tensor:
        if self.counts is not None:
            self.counts = self.counts + (spikes if per_image is None else per_image)
        return spikes * self.theta


class SpikingJelly(Neuron):
    def __init__(self, theta: float, v0: float):
        super().__init__(theta, v0)
        from spikingjelly.activation_based import neuron

        self.node = neuron.IFNode(v_threshold=theta, v_reset=None)

    def start(self, time_steps: int) -> None:
        self.node.reset()
        self.node.v = self.v0

    def forward(self, x: Tensor) -> Tensor:
        return self.sent(self.node(x))


class SpikingJellyMultiStep(SpikingJelly):
    def start(self, time_steps: int) -> None:
        self.node.reset()
        self.node.step_mode, self.steps = "m", time_steps

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(0, (self.steps, -1))
        self.node.v = torch.full_like(x[0], self.v0)
        spikes = self.node(x)
        return self.sent(spikes.flatten(0, 1), None if self.counts is None else spikes.sum(0))


class SnnTorch(Neuron):
    """Fires above the threshold, where the others fire at it: on a grid of powers of two that is a difference."""

    def __init__(self, theta: float, v0: float):
        super().__init__(theta, v0)
        import snntorch

        self.node = snntorch.Leaky(beta=1.0, threshold=theta, reset_mechanism="subtract", reset_delay=False)

    def start(self, time_steps: int) -> None:
        self.membrane: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        membrane = torch.full_like(x, self.v0) if self.membrane is None else self.membrane
        spikes, self.membrane = self.node(x, membrane)
        return self.sent(spikes)


class Sinabs(Neuron):
    def __init__(self, theta: float, v0: float):
        super().__init__(theta, v0)
        import sinabs.layers as layers
        from sinabs.activation import MembraneSubtract, SingleSpike

        self.node = layers.IAF(spike_threshold=theta, reset_fn=MembraneSubtract(), spike_fn=SingleSpike)

    def start(self, time_steps: int) -> None:
        self.steps = time_steps

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(0, (-1, self.steps))
        self.node.init_state_with_shape((len(x), *x.shape[2:]))
        self.node.v_mem.fill_(self.v0)
        spikes = self.node(x)
        return self.sent(spikes.flatten(0, 1), None if self.counts is None else spikes.sum(1))


PEERS: dict[str, tuple[str, type[Peer], type[Neuron]]] = {
    "spikingjelly, step by step": ("spikingjelly", Peer, SpikingJelly),
    "spikingjelly, multi-step": ("spikingjelly", MultiStep, SpikingJellyMultiStep),
    "snnTorch": ("snntorch", Peer, SnnTorch),
    "sinabs": ("sinabs", BatchMajor, Sinabs),
}


def installed() -> dict[str, str]:
    """The peers that are here, with their versions."""
    found = {}
    for name, (package, _, _) in PEERS.items():
        try:
            found[name] = f"{package} {version(package)}"
        except PackageNotFoundError:
            print(f"{package} is not installed (make bench installs it): its row is left out")
    return found


def peer(name: str, snn: micelab.SpikingNetwork) -> Peer:
    """The network `snn` with the neurons of the peer `name`."""
    _, kind, neuron = PEERS[name]
    return kind(snn, neuron)
