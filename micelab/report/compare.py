"""Every method through the same call and into the same table: what the demo, `evaluate`, `explain` and the report show."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn
from tqdm import tqdm

from micelab import methods
from micelab.convert import convert
from micelab.data import ImageData, SplitName, to_float
from micelab.errors import ErrorTable, error_breakdown
from micelab.exceptions import InputError
from micelab.graph.tracing import activations, trace
from micelab.machine import machine
from micelab.metrics import AccuracyCurve, Energy, LostPoints, Size, accuracy_curve, energy, lost_points, size
from micelab.models import describe
from micelab.network.spiking import Precision
from micelab.train.answers import accuracy, must_tell_the_classes

TIME_STEPS = (1, 2, 4, 8, 16, 32)
ERROR_IMAGES = 256
"""Errors and energy are means over so many images."""


@dataclass(frozen=True)
class MethodResult:
    """One method on the network it is meant for. `network`: that network in words; `ann_accuracy`: its own, in [0, 1];
    `precision`: of the simulation that gave the curve."""

    network: str
    ann_accuracy: float
    curve: AccuracyCurve
    errors: ErrorTable
    points: LostPoints | None
    energy: Energy
    size: Size
    machine: str
    command: str = ""
    precision: Precision = "auto"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and names."""
        return {
            "network": self.network,
            "ann_accuracy": self.ann_accuracy,
            "curve": self.curve.to_dict(),
            "errors": self.errors.to_dict(),
            "points": self.points.to_dict() if self.points else None,
            "energy": self.energy.to_dict(),
            "parameters": self.size.parameters,
            "macs": self.size.macs,
            "machine": self.machine,
            "command": self.command,
            "precision": self.precision,
        }


@dataclass(frozen=True)
class Comparison:
    """Several methods on the same images; `images` of them for accuracy, `error_images` for errors and energy.

    `before`: the row that the other one is to be held against, layer by layer, where the two are one network at two stages.
    """

    dataset: str
    split: str
    images: int
    error_images: int
    time_steps: int
    results: dict[str, MethodResult]
    before: str | None = None

    @property
    def size(self) -> Size:
        """Of the first network."""
        return next(iter(self.results.values())).size

    @property
    def machine(self) -> str:
        """Where it was measured."""
        return next(iter(self.results.values())).machine

    def stages(self) -> tuple[str, str] | None:
        """The rows (before, after) to hold against each other; None where none was named."""
        return (self.before, next(row for row in self.results if row != self.before)) if self.before else None

    def best(self) -> MethodResult:
        """The method that is most accurate in as many true steps as the T of the error tables (or the measured T next to it)."""
        rows = list(self.results.values())
        return rows[_best_of([row.curve for row in rows], self.time_steps)]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and names, with its circumstances."""
        return {
            "dataset": self.dataset,
            "split": self.split,
            "images": self.images,
            "error_images": self.error_images,
            "errors_at_time_steps": self.time_steps,
            "before": self.before,
            "results": {name: result.to_dict() for name, result in self.results.items()},
        }


def compare(
    networks: Mapping[str, nn.Module],
    data: ImageData,
    split: SplitName = "test",
    time_steps: Sequence[int] = TIME_STEPS,
    explain_at: int = 8,
    limit: int | None = None,
    error_images: int = ERROR_IMAGES,
    calibration_images: int = 256,
    points: bool = True,
    progress: bool = False,
    command: str = "",
    before: str | None = None,
    precision: Precision = "auto",
    **options: Any,
) -> Comparison:
    """Converts, simulates and explains: `networks` maps each row to the trained network it converts.

    A row is named for its method, with a note where there are several: "mice T=4". `command`: what was typed, kept with each.
    Accuracy over the first `limit` images of `split` (all for None), errors and energy over the first `error_images` at
    T = `explain_at`; thresholds from the first `calibration_images` training images; `precision`: of the simulations for
    accuracy, as in `SpikingNetwork.simulate` (errors are told in "auto"); `options` go to `convert`.
    """
    chosen = data.split(split).head(limit)
    calibration = to_float(data.train.images[:calibration_images])
    images = to_float(chosen.images[:error_images])
    accuracies: dict[int, float] = {}
    results = {}
    for name, ann in networks.items():
        must_tell_the_classes(ann, data, f"the network of row {name!r}")
    if before is not None:
        _check_same_layers(networks)
    for name, ann in tqdm(networks.items(), desc="methods", disable=not progress, leave=False):
        if id(ann) not in accuracies:
            accuracies[id(ann)] = accuracy(ann, chosen)
        method = name.split(" ")[0]
        made_for = max(*time_steps, explain_at) if methods.get(method).each_step else explain_at
        snn = convert(ann, method, calibration, **{"time_steps": made_for} | options)
        batches = tqdm(chosen.batches(), desc=name, total=-(-len(chosen) // 256), disable=not progress, leave=False)
        curve = accuracy_curve(snn, batches, time_steps, precision)
        known = curve.at(explain_at) if explain_at in curve.time_steps and precision == "auto" else None
        results[name] = MethodResult(
            network=describe(ann.spec) if hasattr(ann, "spec") else type(ann).__name__,
            ann_accuracy=accuracies[id(ann)],
            curve=replace(curve, method=name),
            errors=replace(error_breakdown(ann, snn, images, explain_at), method=name),
            points=lost_points(ann, snn, chosen.batches(), explain_at, known) if points else None,
            energy=energy(snn, images, explain_at),
            size=size(ann, data.shape),
            machine=machine(),
            command=command,
            precision=snn.precision_here(precision, images.device),
        )
    return Comparison(data.name, split, len(chosen), len(images), explain_at, results, before)


def _best_of(curves: Sequence[AccuracyCurve], time_steps: int) -> int:
    """The number of the most accurate curve in as many true steps as `time_steps`, or as the measured T next to it."""
    nearest = min(curves[0].time_steps, key=lambda t: abs(t - time_steps))
    reached = [(curve.within(nearest) or 0.0, curve.at(nearest) if nearest in curve.time_steps else 0.0) for curve in curves]
    return reached.index(max(reached))


def _check_same_layers(networks: Mapping[str, nn.Module]) -> None:
    """Raises InputError, naming a layer, where not all networks have the same activations."""
    layers = {row: list(activations(trace(network))) for row, network in networks.items()}
    for row, own in layers.items():
        for other, there in layers.items():
            if alone := [layer for layer in own if layer not in there]:
                raise InputError(
                    f"layer `{alone[0]}` of {row!r} is not in {other!r}: networks of one shape alone can be held against each "
                    "other, layer by layer"
                )


def fitting(networks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Each method's network: the one trained with the activation it is meant for, or else any with a trained bound.

    `networks` maps "relu", "clip", "quant_clip", "noisy_quant_clip", "spike_clip" to what there is; methods for which there
    is none are left out, and so are "noise" and "mice" where no network was trained for them.
    """
    chosen = {}
    bounded = ["clip", "quant_clip", "noisy_quant_clip"]
    for name, method in methods.METHODS.items():
        alone = method.trained_with in ("noisy_quant_clip", "spike_clip")
        others = [] if alone else ["relu", *bounded] if method.calibrates else bounded
        candidates = [method.trained_with, *others]
        found = [kind for kind in candidates if kind in networks]
        if found:
            chosen[name] = networks[found[0]]
    return chosen


def natural(network: Any) -> str:
    """The method that a network of micelab was trained for: what to convert it with where nothing else is asked."""
    return {"relu": "mse", "clip": "half_start", "noisy_quant_clip": "noise", "spike_clip": "mice"}.get(
        network.spec["activation"], "qcfs"
    )


def rows(networks: Sequence[Any]) -> dict[str, nn.Module]:
    """What `compare` takes, of any number of networks that micelab built: a row for each method and network that it fits.

    Where several were trained with one activation, the row's name says which: "mice T=4", "qcfs L=8".
    """
    alike: dict[str, list[Any]] = {}
    for network in networks:
        alike.setdefault(network.spec["activation"], []).append(network)
    found: dict[str, nn.Module] = {}
    for name, first in fitting({kind: members[0] for kind, members in alike.items()}).items():
        members = alike[cast(Any, first).spec["activation"]]
        for member in members:
            level = f"{'T' if member.spec['activation'] == 'spike_clip' else 'L'}={member.spec['levels']}"
            if sum(other.spec["levels"] == member.spec["levels"] for other in members) > 1:
                level += f" {describe(member.spec).split(',')[0]}"
            row = name if len(members) == 1 else f"{name} {level}"
            if row in found:
                raise InputError(f"two of the networks are {describe(member.spec)}: evaluate them one after the other")
            found[row] = member
    return found


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`to_dict` of an earlier comparison with the rows of a new one added or renewed.

    Raises InputError where they were not measured alike: on the same images, with errors at the same T.
    """
    check_alike(old, new)
    return {**new, "results": {**old["results"], **new["results"]}}


def check_alike(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises InputError where rows measured as `new` says cannot stand beside those of `old`; both as in `to_dict`."""
    alike = ("dataset", "split", "images", "error_images", "errors_at_time_steps")
    differ = [f"{key} {old.get(key)} there, {new[key]} now" for key in alike if old.get(key) != new[key]]
    if differ:
        raise InputError(f"the results stored there were measured otherwise ({'; '.join(differ)}): choose another --out")


def drawable(stored: Mapping[str, Any]) -> tuple[list[AccuracyCurve], ErrorTable, float]:
    """Of stored results (`to_dict`, `merged`): every row's curve, the errors of the best row, and the best ANN's accuracy.

    The best row is the most accurate within as many true steps as the T of the error tables. Curves and errors are named for
    their rows, "mice T=4"; three and more of those are one curve, "mice, each at its T".
    """
    rows = list(stored["results"].values())
    names = list(stored["results"])
    curves = []
    for name, row in zip(names, rows, strict=True):
        words = {key: value for key, value in row["curve"].items() if key != "true_steps"} | {"method": name}
        curves.append(AccuracyCurve(**words | {key: tuple(words[key]) for key in ("time_steps", "accuracy")}))
    best = _best_of(curves, stored["errors_at_time_steps"])
    errors = replace(ErrorTable.from_dict(rows[best]["errors"]), method=names[best])
    return _each_at_its_own(curves), errors, max(row["ann_accuracy"] for row in rows)


def _each_at_its_own(curves: Sequence[AccuracyCurve]) -> list[AccuracyCurve]:
    """The curves, of which three and more "mice T=..." become one, of every network at the T that it was trained for."""
    made = [(re.fullmatch(r"mice T=(\d+)", curve.method), curve) for curve in curves]
    joint = {int(found[1]): curve for found, curve in made if found}
    own = {t: curve.at(t) for t, curve in sorted(joint.items()) if t in curve.time_steps}
    if len(own) < 3:
        return list(curves)
    line = replace(joint[min(own)], time_steps=tuple(own), accuracy=tuple(own.values()), method="mice, each at its T")
    return [*(curve for curve in curves if curve not in joint.values()), line]
