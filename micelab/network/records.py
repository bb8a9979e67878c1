"""What is kept of a simulation: of every layer its spike counts and what is left on its membranes; of the network its logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from micelab.exceptions import InputError
from micelab.machine import ran_out
from micelab.neuron.firing import left
from micelab.neuron.layout import over_channels

Record = Literal["counts"] | bool
"""What is kept of every layer: all that `LayerRun` tells (True), its spike counts (5 times less memory), or nothing (False)."""


@dataclass
class LayerRun:
    """What one spiking layer did in the T = `time_steps` steps that count: tensors [N, ...].

    membrane: the residual, or None where spike counts alone were recorded, or a current that is the same at every step tells it;
    theta: as in the layer, in the membrane's type; v0: the start it took in the end, scalar, [C] or [N, ...]; `hidden`: spikes of
    hidden steps; `current`: the mean current where charge balance does not tell it, or None.

    >>> import micelab, torch
    >>> snn = micelab.convert(micelab.small_cnn(activation="quant_clip"), "qcfs")
    >>> layer = snn.simulate(torch.rand(2, 1, 8, 8), 4).layers["stem.2"]
    >>> layer.count.shape, int(layer.count.max()) <= layer.time_steps, layer.v0
    (torch.Size([2, 16, 8, 8]), True, tensor(0.5000))
    """

    count: Tensor
    membrane: Tensor | None
    theta: Tensor
    v0: Tensor
    time_steps: int
    current: Tensor | None = None
    spikes: Tensor | None = None
    hidden: Tensor | None = None

    @property
    def residual(self) -> Tensor:
        """v(T), what is left on the membranes, [N, ...], activation units. Raises InputError where it was not recorded."""
        if self.membrane is not None:
            return self.membrane
        if self.current is None:
            raise InputError("of this layer spike counts alone were recorded: simulate with record=True")
        return left(self.current, self.theta, self.v0, self.time_steps)

    @property
    def mean_current(self) -> Tensor:
        """Mean over T of the current that charged the neurons, [N, ...], activation units.

        What came in is what is left and what was sent, so that it need not be kept: (theta*n + v(T) - theta*v0)/T.
        Raises InputError where the residual was not recorded.
        """
        if self.current is not None:
            return self.current
        theta, v0 = over_channels(self.theta, self.residual), over_channels(self.v0, self.residual)
        return (self.count.to(self.residual.dtype) * theta + self.residual - theta * v0) / self.time_steps

    @property
    def rate(self) -> Tensor:
        """theta*n/T in activation units, [N, ...]: what the layer says."""
        count = self.count.to(self.theta.dtype)
        return count * over_channels(self.theta, count) / self.time_steps

    @property
    def spike_rate(self) -> float:
        """Spikes per neuron and step, mean over neurons and images (a taken-back spike counts as one less)."""
        return float(self.count.double().mean()) / self.time_steps

    def tensors(self) -> dict[str, tuple[Tensor, int]]:
        """Each tensor of the run, with the dimension along which its images lie."""
        found = {"count": (self.count, 0)}
        found |= {} if self.membrane is None else {"membrane": (self.membrane, 0)}
        found |= {} if self.current is None else {"current": (self.current, 0)}
        found |= {"v0": (self.v0, 0)} if self.v0.dim() > 1 else {}
        found |= {} if self.hidden is None else {"hidden": (self.hidden, 0)}
        return found if self.spikes is None else found | {"spikes": (self.spikes, 1)}

    def room_for(self, images: int) -> LayerRun:
        """An empty run of the same layer for so many images."""
        rooms: dict[str, Any] = {name: _room(tensor, dim, images) for name, (tensor, dim) in self.tensors().items()}
        return replace(self, **rooms)

    def to_dict(self) -> dict[str, Any]:
        """Summary in plain numbers."""
        words = {
            "theta": self.theta.tolist(),
            "v0": self.v0.tolist() if self.v0.dim() < 2 else float(self.v0.mean()),
            "spike_rate": self.spike_rate,
        }
        if self.membrane is None and self.current is None:
            return words
        return words | {"mean_residual": float(self.residual.mean()), "mean_current": float(self.mean_current.mean())}


@dataclass
class SimulationRun:
    """`logits` [T, N, classes], the running mean over time; `layers` from input to output, named as in the ANN.

    >>> import micelab, torch
    >>> snn = micelab.convert(micelab.small_cnn(activation="quant_clip"), "qcfs")
    >>> run = snn.simulate(torch.rand(2, 1, 8, 8), 4)
    >>> run.logits.shape, run.predictions.shape, list(run.layers)
    (torch.Size([4, 2, 10]), torch.Size([4, 2]), ['stem.2', 'blocks.0.2', 'blocks.1.2', 'blocks.2.2'])
    """

    logits: Tensor
    layers: dict[str, LayerRun]

    def room_for(self, images: int) -> SimulationRun:
        """An empty run for so many images.

        Chunks are copied into one such run: kept piece by piece they would lie between the large tensors of the simulation
        and cut the memory into holes too small for the next ones (13 GB instead of 3 for 1,000 images at T = 64). Raises
        InputError where the memory does not suffice.
        """
        try:
            layers = {name: layer.room_for(images) for name, layer in self.layers.items()}
            return SimulationRun(_room(self.logits, 1, images), layers)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            raise InputError(
                f"the memory of {self.logits.device} does not suffice to keep what every layer did for {images} images: use "
                'record="counts" or record=False, or `stream`, which gives it chunk by chunk'
            ) from error

    def put(self, part: SimulationRun, start: int) -> None:
        """Copies the run of a chunk to its place, from image `start` on."""
        pairs = [(self.logits, part.logits, 1)]
        for name, layer in self.layers.items():
            new = part.layers[name].tensors()
            pairs += [(tensor, new[key][0], dim) for key, (tensor, dim) in layer.tensors().items()]
        for whole, piece, dim in pairs:
            whole.narrow(dim, start, piece.shape[dim]).copy_(piece)

    @property
    def predictions(self) -> Tensor:
        """Class after every step, [T, N]."""
        return self.logits.argmax(-1)

    def to_dict(self) -> dict[str, Any]:
        """Summary in plain numbers."""
        return {"logits": self.logits.tolist(), "layers": {name: run.to_dict() for name, run in self.layers.items()}}


def _room(tensor: Tensor, dim: int, images: int) -> Tensor:
    return tensor.new_empty((*tensor.shape[:dim], images, *tensor.shape[dim + 1 :]))
