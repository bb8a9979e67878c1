"""Interactive panels for notebooks: ipywidgets around the figures, alive in JupyterLab, a picture where nothing runs."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from micelab import figures, pictures
from micelab.errors import ErrorTable
from micelab.exceptions import InputError
from micelab.metrics import AccuracyCurve
from micelab.panels.drawing import Drawing
from micelab.panels.image import as_png
from micelab.panels.panel import bundle, widgets


class TimePanel:
    """A slider over T: the accuracy reached, each layer's errors, and what the network says of a few images.

    curves, tables: accuracy and errors of one conversion, `tables` by T; images [N, C, H, W] in [0, 1] with their labels,
    and `predictions` [T, N] after every step; `classes` names them. `value` is T; the slider moves it.
    """

    def __init__(
        self,
        curve: AccuracyCurve,
        tables: dict[int, ErrorTable],
        images: Tensor,
        labels: Tensor,
        predictions: Tensor,
        classes: Sequence[str],
        ann_accuracy: float,
    ):
        missing = [t for t in tables if t not in curve.time_steps or t > len(predictions)]
        if not tables or missing:
            raise InputError(f"the curve and the predictions must hold every T of the tables; {missing or 'all'} are missing")
        self.curve, self.tables, self.ann_accuracy = curve, dict(sorted(tables.items())), ann_accuracy
        self.images, self.labels, self.predictions, self.classes = images, labels, predictions, tuple(classes)
        steps = list(self.tables)
        self.slider = widgets.SelectionSlider(
            options=steps, value=min(steps, key=lambda t: abs(t - 8)), description="T", continuous_update=True,
            layout=widgets.Layout(width="420px"),
        )  # fmt: skip
        self.words = widgets.HTML()
        accuracy = figures.accuracy_over_time([curve], ann_accuracy).update_layout(height=320)
        accuracy.add_scatter(
            x=[steps[0]], y=[0.0], mode="markers", marker={"size": 14, "symbol": "circle-open", "line": {"width": 3}}, name="now",
            showlegend=False, hoverinfo="skip",
        )  # fmt: skip
        top = max(max(values) for table in self.tables.values() for values in pictures.relative_errors(table).values())
        errors = figures.error_bars(self.tables[steps[0]]).update_layout(height=360).update_yaxes(range=[0, 105 * top])
        self.accuracy, self.errors, self.strip = Drawing(accuracy), Drawing(errors), widgets.HTML()
        self.view = widgets.VBox([self.slider, self.words, self.strip, self.accuracy, self.errors])
        self.slider.observe(self._moved, names="value")
        self._moved()

    @property
    def value(self) -> int:
        """The T that is shown."""
        return int(self.slider.value)

    def _moved(self, _: Any = None) -> None:
        t = self.value
        table = self.tables[t]
        with self.accuracy.batch_update():
            self.accuracy.data[-1].update(x=[self.curve.true(t)], y=[100 * self.curve.at(t)])
        fresh = figures.error_bars(table)
        with self.errors.batch_update():
            for now, new in zip(self.errors.data, fresh.data, strict=True):
                now.y = new.y
            self.errors.layout.title = fresh.layout.title
        self.words.value = f"<b>{self.sentence()}</b>"
        self.strip.value = _strip(self.images, self.captions(), self.right())

    def sentence(self) -> str:
        """What is shown, in words and numbers."""
        last = list(self.tables[self.value].layers)[-1]
        total = self.tables[self.value].layers[last].relative
        return (
            f"T = {self.value}: accuracy {100 * self.curve.at(self.value):.1f} % (ANN {100 * self.ann_accuracy:.1f} %); "
            f"error at the last spiking layer {100 * total:.0f} % of its signal."
        )

    def captions(self) -> list[str]:
        """The class that the network names for each image after T steps."""
        return [self.classes[int(p)] for p in self.predictions[self.value - 1]]

    def right(self) -> list[bool]:
        """Whether each of them is right."""
        return [bool(hit) for hit in self.predictions[self.value - 1] == self.labels]

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return bundle(self.view, self.png(), f"TimePanel: {self.sentence()}", options)

    def png(self) -> bytes:
        """The panel as a still picture."""
        return pictures.curve_and_errors([self.curve], self.tables[self.value], self.ann_accuracy, mark=self.value)


def _strip(images: Tensor, captions: Sequence[str], right: Sequence[bool]) -> str:
    """A row of small pictures as HTML, the caption of a wrong answer crossed and in another colour."""
    cells = []
    for image, caption, good in zip(images, captions, right, strict=True):
        mark, colour = ("✓", "#007a5a") if good else ("✗", "#b34700")
        source = base64.b64encode(as_png(image)).decode()
        cells.append(
            f'<figure style="display:inline-block;margin:2px 4px;text-align:center;font-size:12px;color:{colour}">'
            f'<img src="data:image/png;base64,{source}" width="64" height="64" style="image-rendering:pixelated" '
            f'alt="{caption}"><figcaption>{mark} {caption}</figcaption></figure>'
        )
    return "".join(cells)
