"""What of a network converts and what does not, layer by layer, with the remedy: every problem at once, nothing changed."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from micelab.exceptions import ConversionError, InputError, first_line
from micelab.graph.affine import becomes_neurons, call_name, check_module, is_dropout, is_size
from micelab.graph.batch_norm import folds
from micelab.graph.own_copy import check_numbers, own_copy, wrapped
from micelab.graph.runner import LayerRunner, check_images
from micelab.graph.tracing import as_graph, make_plain, trace

Verdict = Literal["spikes", "stays", "folds away", "refused"]
VERDICTS: tuple[Verdict, ...] = ("spikes", "stays", "folds away", "refused")
"""What becomes of a layer: neurons, the same affine layer, nothing (batch-norm, dropout), or a refusal."""

_WHY = {
    "spikes": "an activation: each of its units becomes a spiking neuron",
    "stays": "affine: its mean output over time is its output for the mean input",
    "refused": "",
}


@dataclass(frozen=True)
class Finding:
    """One layer or call, in the order in which the network runs: what becomes of it, why, and what to do where it is refused."""

    layer: str
    kind: str
    verdict: Verdict
    why: str
    remedy: str = ""


@dataclass(frozen=True)
class Checkup:
    """What `checkup` found; true where the network converts."""

    network: str
    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """What is refused, in order."""
        return tuple(finding for finding in self.findings if finding.verdict == "refused")

    def __bool__(self) -> bool:
        return not self.problems

    def count(self, verdict: Verdict) -> int:
        """How many layers have this verdict."""
        return sum(finding.verdict == verdict for finding in self.findings)

    def words(self) -> str:
        """The report in plain words: how much converts, then each problem with its remedy."""
        found = ", ".join(f"{self.count(verdict)} {name}" for verdict, name in _COUNTED if self.count(verdict))
        if self:
            return f"{self.network} converts: {found}."
        many = len(self.problems)
        lines = [f"{self.network} does not convert yet: {many} problem{'s' * (many > 1)} ({found})."]
        for number, problem in enumerate(self.problems, start=1):
            lines += [f"{number}. {problem.why[0].upper()}{problem.why[1:]}.", f"   Remedy: {problem.remedy}."]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain words."""
        return asdict(self) | {"converts": bool(self)}


_COUNTED: tuple[tuple[Verdict, str], ...] = (
    ("spikes", "to become neurons"),
    ("stays", "kept"),
    ("folds away", "folded away"),
    ("refused", "refused"),
)


def checkup(model: nn.Module, images: Tensor | None = None) -> Checkup:
    """What of `model` converts and what does not, every problem at once; the model is not changed.

    images [N, C, H, W]: where given, the network as micelab reads it also runs, and must say what the model says. Raises
    InputError only where `model` is no network or `images` are none.

    >>> import micelab
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10))
    >>> [(problem.layer, problem.remedy) for problem in micelab.checkup(net).problems][0]
    ('1', 'use nn.ReLU or micelab.QuantClip')
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"a {type(model).__name__} was given where a network (torch.nn.Module) is needed")
    name, given = type(model).__name__, None if images is None else check_images(images)
    general: list[Finding] = []

    def refuse(_: Any, error: ConversionError) -> None:
        general.append(_problem(_layer_of(error), name, error))

    try:
        own = own_copy(model, refuse)
    except ConversionError as error:  # what follows only reads
        refuse(None, error)
        own = model
    check_numbers(own, refuse)
    try:
        traced = as_graph(own)
    except ConversionError as error:
        refuse(None, error)
        return Checkup(name, (*general, *_by_module(own)))
    findings = _by_node(traced, refuse)
    if not general and not any(finding.verdict == "refused" for finding in findings):
        general += _by_running(model, given)
    return Checkup(name, (*general, *findings))


def _by_node(traced: fx.GraphModule, refuse: Any) -> tuple[Finding, ...]:
    """A finding for each part of the graph, in the order in which it runs."""
    rows: dict[fx.Node, Finding] = {}
    calls: Counter[str] = Counter()
    for node in traced.graph.nodes:
        module = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        if node.op in ("placeholder", "output", "get_attr") or is_size(node):
            continue
        layer = str(node.target) if module is not None else node.name
        calls[layer] += 1
        if (again := calls[layer]) > 1:  # a neuron layer has this name after conversion
            layer += f"_{again - 1}" if becomes_neurons(traced, node) else f" (call {again})"
        kind = call_name(node) if module is None else f"nn.{type(module).__name__}"
        rows[node] = Finding(layer, kind, *_fate(traced, node))
    refused: dict[fx.Node, ConversionError] = {}

    def hear(node: fx.Node | None, error: ConversionError) -> None:
        if node is None:
            refuse(node, error)
        else:
            refused.setdefault(node, error)

    make_plain(traced, hear)
    for norm, weighted in folds(traced).items():
        rows[norm] = replace(
            rows[norm], verdict="folds away", why=f"its scale and shift go into the weights of `{weighted.target}`"
        )
    for node, error in refused.items():
        known = rows.get(node)
        rows[node] = _problem(known.layer if known else node.name, known.kind if known else call_name(node), error)
    return tuple(rows.values())


def _fate(traced: fx.GraphModule, node: fx.Node) -> tuple[Verdict, str]:
    """What becomes of a node by itself; `folds` says which batch-norms go into the layer before them."""
    if becomes_neurons(traced, node):
        return "spikes", _WHY["spikes"]
    if is_dropout(traced, node):
        return "folds away", "dropout does nothing in evaluation"
    return "stays", _WHY["stays"]


def _by_module(model: nn.Module) -> list[Finding]:
    """Where a network has no graph: its layers one by one, so that the other problems are seen as well."""
    findings: list[Finding] = []
    for name, module in model.named_modules():
        if wrapped(module) or isinstance(module, (nn.Sequential, nn.ModuleList)):
            continue
        if type(module).__module__.startswith("torch.nn"):
            kind = f"nn.{type(module).__name__}"
            if any(name.startswith(f"{finding.layer}.") for finding in findings):
                continue  # a part of a layer that was judged as a whole
            try:
                verdict: tuple[Verdict, str] = _fate_of_module(name, module)
                findings.append(Finding(name, kind, *verdict))
            except ConversionError as error:
                findings.append(_problem(name, kind, error))
    return findings


def _fate_of_module(name: str, module: nn.Module) -> tuple[Verdict, str]:
    """The fate of a layer by itself: as a graph of one node."""
    graph = fx.Graph()
    node = graph.call_module("layer", (graph.placeholder("x"),))
    graph.output(node)
    alone = fx.GraphModule({"layer": module}, graph)
    if not is_dropout(alone, node):
        check_module(name, module)
    return _fate(alone, node)


def _by_running(model: nn.Module, images: Tensor | None) -> list[Finding]:
    """Problems that show only in the whole network, or when it runs."""
    name = type(model).__name__
    try:
        traced = trace(model)
        if images is None:
            return []
        numbers = (value.dtype for value in chain(model.parameters(), model.buffers()) if value.is_floating_point())
        given = images.to(next(numbers, images.dtype))  # as a simulation does
        with torch.inference_mode():  # the network itself may write into its images, and into its buffers
            said, wanted = LayerRunner(traced).run(given), copy.deepcopy(model).eval()(given.clone())
    except (ConversionError, InputError) as error:
        return [_problem(_layer_of(error), name, error)]
    except Exception as error:
        if images is None:
            return [_problem("the network", name, ConversionError(f"{name} cannot be made plain layers ({first_line(error)})"))]
        text = f"{name} cannot run on images of shape {tuple(images.shape)} ({error})"
        return [_problem("the network", name, InputError(f"{text}: give images of the shape that it was trained with"))]
    if torch.allclose(said, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max())):
        return []
    text = f"{name}, read as a graph of layers, says something else than the network itself: "
    return [
        _problem("the network", name, ConversionError(text + "its forward changes from call to call, make it always the same"))
    ]


def _problem(layer: str, kind: str, error: Exception) -> Finding:
    """A refusal in two parts: an error of micelab says what is wrong, then, after its last colon, what to do."""
    text = " ".join(str(error).split())
    why, _, remedy = text.rpartition(": ")
    return Finding(layer, kind, "refused", why or text, remedy if why else "see docs/conversion.md")


def _layer_of(error: Exception) -> str:
    """The first name in backticks, where the error names a layer."""
    parts = str(error).split("`")
    return parts[1] if len(parts) > 2 else "the network"
