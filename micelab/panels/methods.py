"""The panel of several conversions of one problem: choose method, image, step and layer; spikes, answer and accuracy follow."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from micelab import figures
from micelab.exceptions import InputError
from micelab.figures.style import CHOSEN, TOTAL, Spec
from micelab.metrics import AccuracyCurve
from micelab.network.spiking import SpikingNetwork
from micelab.panels.image import as_png
from micelab.panels.panel import Panel, choice, slider


@dataclass(frozen=True)
class View:
    """What the reader looks at: one conversion, one image, after step T, one layer."""

    method: str
    image: int
    step: int
    layer: str


class MethodPanel(Panel):
    """Sliders for method, image, T and layer: the layer's spikes, the answer after T steps, accuracy over T of the method.

    snns: converted networks with the same layers, by name; curves: the accuracy of each (over any images); images
    [N, C, H, W] in [0, 1] with labels [N]; ann_accuracy: of each network, in [0, 1]. Simulated once, for `time_steps` steps.

    >>> import micelab
    >>> ann, test = micelab.small_cnn(activation="quant_clip"), micelab.load_data("digits").test.head(8)
    >>> snns = {name: micelab.convert(ann, "qcfs", signed=name == "signed") for name in ("plain", "signed")}
    >>> curves = {name: micelab.accuracy_curve(snn, test.batches(), (1, 2, 4)) for name, snn in snns.items()}
    >>> images, labels = next(test.batches())
    >>> MethodPanel(snns, curves, dict.fromkeys(snns, 0.1), images, labels, [str(n) for n in range(10)], time_steps=4).state
    View(method='signed', image=0, step=4, layer='stem.2')
    """

    def __init__(
        self,
        snns: Mapping[str, SpikingNetwork],
        curves: Mapping[str, AccuracyCurve],
        ann_accuracy: Mapping[str, float],
        images: Tensor,
        labels: Tensor,
        classes: Sequence[str],
        time_steps: int = 8,
    ):
        if not snns or snns.keys() - curves.keys() or snns.keys() - ann_accuracy.keys():
            raise InputError("each conversion needs its accuracy curve and the accuracy of its ANN: give both under one name")
        if not len(images) or len(images) != len(labels):
            raise InputError(f"there are {len(images)} images and {len(labels)} labels: give one label for each")
        self.images, self.labels, self.classes = images.detach().cpu(), labels.cpu(), tuple(classes)
        self.curves, self.ann_accuracy = {name: curves[name] for name in snns}, dict(ann_accuracy)
        self.spikes: dict[str, dict[str, Tensor]] = {}
        self.answers: dict[str, Tensor] = {}
        for name, snn in snns.items():
            run = snn.simulate(images, time_steps, spikes=True)
            self.answers[name] = run.logits.softmax(-1).cpu()
            self.spikes[name] = {key: layer.spikes.char().cpu() for key, layer in run.layers.items() if layer.spikes is not None}
        names, layers = list(snns), list(next(iter(self.spikes.values())))
        if any(list(spikes) != layers for spikes in self.spikes.values()):
            raise InputError("the conversions have different layers: show networks of one shape together")
        self.state = View(names[-1], 0, time_steps, layers[0])
        named = [replace(curve, method=name) for name, curve in self.curves.items()]
        faint = figures.accuracy_over_time(named).update_traces(opacity=0.4)
        self._curves = faint.update_layout(height=400).to_plotly_json()
        steps = range(1, time_steps + 1)
        self._true = sorted({curve.true(step) for curve in self.curves.values() for step in steps})
        self._levels = [_level(self.ann_accuracy[name]) for name in names] + [_bold(line) for line in self._curves["data"]]
        last = len(images) - 1
        self.method = choice("method", names, names[-1], lambda name: self.choose(replace(self.state, method=name)))
        self.image = slider("image", 0, 0, last, 1, lambda value: self.choose(replace(self.state, image=int(value))))
        self.step = slider("T", time_steps, 1, time_steps, 1, lambda value: self.choose(replace(self.state, step=int(value))))
        self.layer = choice("layer", layers, layers[0], lambda name: self.choose(replace(self.state, layer=name)))
        self.build([self.method, self.image, self.step, self.layer])

    def _over_time(self) -> Spec:
        """All curves, faint, and over them a line for every T, every ANN and every method, those that are not meant unseen:
        plotly draws a figure anew where a line moves or a curve is dimmed, but not where a line comes to light."""
        now, layout = self.state, self._curves["layout"]
        chosen = [name == now.method for name in self.curves]
        seen = [true == self.curves[now.method].true(now.step) for true in self._true] + chosen + chosen
        marks = zip([_upright(true) for true in self._true] + self._levels, seen, strict=True)
        notes = [_said(self.ann_accuracy[name]) | {"opacity": float(name == now.method)} for name in self.curves]
        shapes = [mark | {"opacity": float(lit)} for mark, lit in marks]
        return {"data": self._curves["data"], "layout": layout | {"shapes": shapes, "annotations": notes}}

    def specs(self) -> list[Spec]:
        now = self.state
        spikes = self.spikes[now.method][now.layer][now.step - 1, now.image]
        answer = self.answers[now.method][now.step - 1, now.image].tolist()
        return [
            figures.spike_map.spec(spikes, now.layer, now.step),
            figures.running_answer.spec(answer, self.classes, now.step),
            self._over_time(),
        ]

    def answer(self) -> str:
        """The class that the network names after T steps."""
        return self.classes[int(self.answers[self.state.method][self.state.step - 1, self.state.image].argmax())]

    def truth(self) -> str:
        """The image's own class."""
        return self.classes[int(self.labels[self.state.image])]

    def _reached(self) -> str:
        curve, step = self.curves[self.state.method], self.state.step
        known = max((t for t in curve.time_steps if t <= step), default=curve.time_steps[0])
        return f"≈ {100 * curve.at(known):.1f} % of {curve.images:,} images right at T = {known}"

    def sentence(self) -> str:
        now = self.state
        firing = 100 * float((self.spikes[now.method][now.layer][now.step - 1, now.image] != 0).double().mean())
        return (
            f"{now.method}, image {now.image} (a {self.truth()}), T = {now.step}: the answer is {self.answer()}; in layer "
            f"{now.layer} ≈ {firing:.0f} % of the neurons fire; {self._reached()}."
        )

    def live(self) -> str:
        now, right = self.state, self.answer() == self.truth()
        mark, colour = ("✓", "#007a5a") if right else ("✗", "#b34700")
        source = base64.b64encode(as_png(self.images[now.image])).decode()
        so_far = [self.classes[int(answer[now.image].argmax())] for answer in self.answers[now.method][: now.step]]
        return (
            f'<img src="data:image/png;base64,{source}" width="96" height="96" alt="image {now.image}, a {self.truth()}" '
            'style="image-rendering:pixelated;float:left;margin-right:12px">'
            f'a {self.truth()}; after {now.step} steps: <b style="color:{colour}">{self.answer()} {mark}</b><br>'
            f"step by step: {' · '.join(so_far)}<br>{now.method}: {self._reached()} "
            f"(ANN {100 * self.ann_accuracy[now.method]:.1f} %)"
        )

    def __repr__(self) -> str:
        return f"MethodPanel: {self.sentence()}"


def _upright(step: int) -> Spec:
    """A dotted line at so many true steps."""
    look = {"color": CHOSEN, "dash": "dot"}
    return {"type": "line", "x0": step, "x1": step, "y0": 0, "y1": 1, "yref": "paper", "line": look}


def _level(accuracy: float) -> Spec:
    """A dashed line at the accuracy of an ANN, from edge to edge."""
    look = {"color": TOTAL, "dash": "dash", "width": 1.5}
    return {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": 100 * accuracy, "y1": 100 * accuracy, "line": look}


def _bold(curve: Spec) -> Spec:
    """The curve as a thick line."""
    points = (f"{x},{y}" for x, y in zip(curve["x"], curve["y"], strict=True))
    return {"type": "path", "path": "M" + "L".join(points), "line": curve["line"] | {"width": 4}}


def _said(accuracy: float) -> Spec:
    """What that line is, above its left end."""
    place = {"x": 0, "xref": "paper", "xanchor": "left", "y": 100 * accuracy, "yanchor": "bottom", "showarrow": False}
    return place | {"text": f"ANN {100 * accuracy:.1f} %"}
