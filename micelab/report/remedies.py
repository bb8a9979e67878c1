"""Remedies against the errors of conversion, alone and together: what each set of them reaches, with every layer's errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

from torch import nn

from micelab.convert import convert
from micelab.data import Split, to_float
from micelab.errors import ErrorTable, error_breakdown
from micelab.exceptions import InputError
from micelab.metrics import AccuracyCurve, accuracy_curve

HALF, QUANTIZED, SIGNED, JOINT = "start at v0 = 1/2", "quantized training", "signed spikes", "joint training"
REMEDIES = (HALF, QUANTIZED, SIGNED, JOINT)
"""In the order of the course: against quantization (two), against timing, against all three at once."""

INCLUDED = {JOINT: (HALF, QUANTIZED)}
"""Joint training goes on from the quantized network and its half start, and trains both."""


@dataclass(frozen=True)
class Trial:
    """What one set of remedies reaches: `curve` over T, `table` at one T."""

    remedies: frozenset[str]
    curve: AccuracyCurve
    table: ErrorTable


def with_included(remedies: Iterable[str]) -> frozenset[str]:
    """The remedies and what they take along.

    >>> sorted(with_included([JOINT]))
    ['joint training', 'quantized training', 'start at v0 = 1/2']
    """
    chosen = frozenset(remedies)
    unknown = chosen - set(REMEDIES)
    if unknown:
        raise InputError(f"remedy {min(unknown)!r} is unknown: choose of {', '.join(REMEDIES)}")
    return chosen.union(*(INCLUDED.get(remedy, ()) for remedy in chosen))


def try_remedies(
    networks: Mapping[str, nn.Module],
    split: Split,
    time_steps: int = 2,
    curve_at: Iterable[int] = (1, 2, 4, 8),
    error_images: int = 128,
) -> dict[frozenset[str], Trial]:
    """A trial for every set of remedies, each converted from the network that was trained for it.

    networks: "clip" (a trained bound alone), "quantized" and "joint"; accuracy over all of `split`, errors at T =
    `time_steps` over its first `error_images`. Raises InputError where a network is missing.
    """
    missing = {"clip", "quantized", "joint"} - networks.keys()
    if missing:
        raise InputError(f"network {min(missing)!r} is missing: give clip, quantized and joint")
    images, loader = to_float(split.images[:error_images]), list(split.batches())
    trials = {}
    for chosen in every_set():
        ann = networks["joint" if JOINT in chosen else "quantized" if QUANTIZED in chosen else "clip"]
        start = None if JOINT in chosen else 0.5 if HALF in chosen else 0.0
        snn = convert(ann, "mice" if JOINT in chosen else "tcl", v0=start, signed=SIGNED in chosen)
        curve = accuracy_curve(snn, loader, sorted({*curve_at, time_steps}))
        trials[chosen] = Trial(chosen, curve, error_breakdown(ann, snn, images, time_steps))
    return trials


def every_set() -> list[frozenset[str]]:
    """All sets of remedies that differ, the empty one first."""
    sets = [with_included(c) for size in range(len(REMEDIES) + 1) for c in combinations(REMEDIES, size)]
    return list(dict.fromkeys(sets))
