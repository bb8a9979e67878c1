"""Accuracy after each number of time-steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from micelab.errors import check_spiking
from micelab.exceptions import InputError
from micelab.graph.runner import check_time_steps, labelled_batches
from micelab.network.spiking import Precision, SpikingNetwork


@dataclass(frozen=True)
class AccuracyCurve:
    """Accuracy in [0, 1] after each of `time_steps`; `true_steps` counts what a method spends beyond them.

    That is `hidden_steps` more, and `turns` times as many where so many layers in a row wait for one another.

    >>> curve = AccuracyCurve((1, 2, 4), (0.6, 0.8, 0.9), images=1000, method="srp", hidden_steps=4)
    >>> curve.true_steps, curve.true_words, curve.at(2), curve.within(true_steps=6), curve.within(true_steps=4)
    ((5, 6, 8), 'T + 4', 0.8, 0.8, None)
    """

    time_steps: tuple[int, ...]
    accuracy: tuple[float, ...]
    images: int
    method: str
    hidden_steps: int = 0
    turns: int = 1

    @property
    def true_steps(self) -> tuple[int, ...]:
        """T x turns + hidden steps, for each T."""
        return tuple(self.true(steps) for steps in self.time_steps)

    @property
    def true_words(self) -> str:
        """The same as a formula: "T", "T + 4", "19 T"."""
        steps = "T" if self.turns == 1 else f"{self.turns} T"
        return f"{steps} + {self.hidden_steps}" if self.hidden_steps else steps

    def true(self, time_steps: int) -> int:
        """The steps that a run of T = `time_steps` takes in truth."""
        return time_steps * self.turns + self.hidden_steps

    def within(self, true_steps: int) -> float | None:
        """Accuracy at the largest T that takes at most so many true steps; None where not even the smallest does."""
        fitting = [a for steps, a in zip(self.time_steps, self.accuracy, strict=True) if self.true(steps) <= true_steps]
        return fitting[-1] if fitting else None

    def at(self, time_steps: int) -> float:
        """Accuracy after so many steps."""
        if time_steps not in self.time_steps:
            raise InputError(f"accuracy at T = {time_steps} was not measured: choose T from {self.time_steps}")
        return self.accuracy[self.time_steps.index(time_steps)]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and names."""
        return asdict(self) | {"true_steps": self.true_steps}


def accuracy_curve(
    snn: SpikingNetwork,
    loader: Iterable[tuple[Tensor, Tensor]],
    time_steps: Sequence[int] = (1, 2, 4, 8, 16, 32),
    precision: Precision = "auto",
) -> AccuracyCurve:
    """Accuracy of `snn` after each number of steps, over batches of (images in [0, 1], labels [N] of an integer type).

    One simulation at the largest T gives every T, since the logits after t steps do not depend on what comes later; only
    a network whose layers wait for one another is simulated for each T by itself. `precision`: as in
    `SpikingNetwork.simulate`.

    >>> import micelab
    >>> snn = micelab.convert(micelab.small_cnn(activation="quant_clip"), "qcfs")
    >>> curve = accuracy_curve(snn, micelab.load_data("digits").validation.batches(), (1, 2, 4))
    >>> curve.time_steps, curve.images, 0 <= curve.at(4) <= 1
    ((1, 2, 4), 143, True)

    Raises InputError where `snn` is no spiking network or its answers are no logits [N, classes].
    """
    check_spiking(snn)
    several = isinstance(time_steps, Iterable) and getattr(time_steps, "ndim", 1) > 0  # an array of one number is a number
    wanted = tuple(sorted({check_time_steps(t) for t in (time_steps if several else [time_steps])}))
    if not wanted:
        raise InputError(f"time_steps is {time_steps}: give at least one, as in (1, 2, 4, 8)")
    right, seen = torch.zeros(len(wanted), dtype=torch.long), 0
    for images, labels in labelled_batches(loader):
        if snn.turns == 1:
            logits = snn.simulate(images, wanted[-1], record=False, precision=precision).logits[[t - 1 for t in wanted]]
        else:
            logits = torch.stack([snn(images, t, precision) for t in wanted])
        predictions = torch.stack([classes(after) for after in logits])
        right += (predictions == labels.to(predictions.device)).sum(1).cpu()
        seen += len(labels)
    accuracy = tuple(count / seen for count in right.tolist())
    return AccuracyCurve(wanted, accuracy, seen, snn.method, snn.hidden_steps, snn.turns)


def classes(logits: Tensor) -> Tensor:
    """The class of each image, [N], by logits [N, classes]; raises InputError where they are of another shape."""
    if logits.dim() != 2:
        raise InputError(f"the network answers {tuple(logits.shape)}: an accuracy needs logits [N, classes], one row an image")
    return logits.argmax(1)
