"""What every panel is made of: sliders and live numbers around figures, a picture and a sentence where nothing runs."""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from micelab.exceptions import MicelabError
from micelab.figures.style import Spec, legend_rows
from micelab.panels.drawing import Drawing
from micelab.still import still

try:
    import ipywidgets as widgets
    import plotly.graph_objects as go
except ImportError as error:
    raise MicelabError("panels need ipywidgets and plotly: run `pip install micelab[course]`") from error

WIDTH = 440
"""Pixels of one figure: two stand side by side in a notebook, one below the other where there is less room."""


class Panel(ABC):
    """Base of the panels: `state` holds all that the reader has chosen, `specs()` draws it, `sentence()` says it.

    A subclass sets `state`, then calls `build`. Whatever the reader moves changes `state` by `choose` and nothing else;
    only what differs from the last picture is sent to the browser.

    >>> class Level(Panel):
    ...     def __init__(self):
    ...         self.state = 1.0
    ...         self.build([slider("level", 1.0, 0.0, 2.0, 0.1, self.choose)])
    ...
    ...     def specs(self):
    ...         return [go.Figure(go.Bar(y=[self.state])).update_layout(margin={"l": 50}).to_plotly_json()]
    ...
    ...     def sentence(self):
    ...         return f"The level is {self.state}."
    >>> panel = Level()
    >>> panel.choose(0.5)
    >>> panel
    Level: The level is 0.5.
    """

    state: Any
    wide = False

    def build(self, controls: Sequence[widgets.Widget], formula: str = "") -> None:
        """Puts controls, formula (LaTeX) and live numbers above the figures."""
        self.formula, self.numbers = widgets.HTMLMath(formula), widgets.HTMLMath(self.live())
        self.shown = self.specs()
        self.drawn = [Drawing(go.Figure(spec).update_layout(self._frame(spec))) for spec in self.shown]
        left = widgets.VBox(list(controls), layout=widgets.Layout(width="380px"))
        right = widgets.VBox([self.formula, self.numbers], layout=widgets.Layout(flex="1 1 320px", min_width="320px"))
        top = widgets.HBox([left, right], layout=widgets.Layout(flex_flow="row wrap"))
        below = widgets.HBox(self.drawn, layout=widgets.Layout(flex_flow="row wrap"))
        self.view = widgets.VBox([top, below])

    @abstractmethod
    def specs(self) -> list[Spec]:
        """The figures of the present state, as plain dicts."""

    @abstractmethod
    def sentence(self) -> str:
        """What is shown, in words and numbers."""

    def live(self) -> str:
        """The numbers beside the picture, as HTML with LaTeX; the sentence, where a panel has nothing better."""
        return self.sentence()

    def choose(self, state: Any) -> None:
        """Takes a new state and shows it."""
        self.state = state
        fresh = self.specs()
        for now, before, after in zip(self.drawn, self.shown, fresh, strict=True):
            redraw(now, before, after)
        self.shown, self.numbers.value = fresh, self.live()

    def _frame(self, spec: Spec) -> dict[str, Any]:
        width = 2 * WIDTH if self.wide else WIDTH
        margin = spec["layout"]["margin"]
        names = [trace["name"] for trace in spec["data"] if trace.get("name") and trace.get("showlegend") is not False]
        rows = legend_rows(names, width - 85) if spec["layout"].get("showlegend") is not False else 0
        frame = {"template": "plotly_white", "autosize": False, "width": width, "font_size": 12, "title_font_size": 15}
        frame |= {"legend_font_size": 11, "margin_t": 44 + 20 * rows, "margin_b": 50}
        return frame | {"margin_l": margin["l"] if self.wide else 60}

    def png(self) -> bytes:
        """The panel as a still picture."""
        return still([go.Figure(spec) for spec in self.specs()])

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.sentence()}"

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return bundle(self.view, self.png(), repr(self), options)


def bundle(view: widgets.Widget, png: bytes, text: str, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a notebook stores of a panel: the widget where a kernel runs, the picture and the sentence elsewhere."""
    shown = view._repr_mimebundle_(**options) or {}
    data, metadata = shown if isinstance(shown, tuple) else (shown, {})
    return data | {"image/png": base64.b64encode(png).decode(), "text/plain": text}, metadata


def redraw(now: go.FigureWidget, before: Spec, after: Spec) -> None:
    """Brings a shown figure from one plain dict to another of the same traces, in one message of what differs.

    Where no trace differs it is a message about the layout: then the browser draws the curves not anew.
    """
    pairs = zip(before["data"], after["data"], strict=True)
    changes = [{key: value for key, value in new.items() if not _same(old.get(key), value)} for old, new in pairs]
    moved = dict(_layout_changes(before["layout"], after["layout"]))
    if not any(changes):
        if moved:
            now.plotly_relayout(moved)
        return
    with now.batch_update():
        for trace, changed in zip(now.data, changes, strict=True):
            for key, value in changed.items():
                trace[key] = value
        for place, value in moved.items():
            now.layout[place] = value


def _layout_changes(before: Spec, after: Spec) -> Iterator[tuple[str, Any]]:
    """(place in the layout, new value) of what differs, as fine as it can be told: what stays is not made anew."""
    for key, value in after.items():
        old = before.get(key)
        if old == value or key == "margin":
            continue
        if key == "title":
            yield "title.text", value["text"]
        elif key in ("shapes", "annotations") and old and len(value) == len(old):
            for number, (was, will) in enumerate(zip(old, value, strict=True)):
                yield from ((f"{key}[{number}].{part}", place) for part, place in will.items() if was.get(part) != place)
        elif isinstance(value, dict) and "range" in value:
            yield f"{key}.range", value["range"]
        else:
            yield key, value


def _same(old: Any, new: Any) -> bool:
    return np.array_equal(old, new) if isinstance(new, np.ndarray) else bool(old == new)


def slider(label: str, value: float, low: float, high: float, step: float, moved: Callable[[float], None]) -> widgets.Widget:
    """A slider for whole numbers or fractions, by the type of `step`; calls `moved` with each new value."""
    kind = widgets.IntSlider if isinstance(step, int) else widgets.FloatSlider
    return connect(kind(value=value, min=low, max=high, step=step, **_look(label)), moved)


def choice(label: str, options: Sequence[Any], value: Any, moved: Callable[[Any], None]) -> widgets.Widget:
    """A slider over given values only."""
    return connect(widgets.SelectionSlider(options=list(options), value=value, **_look(label)), moved)


def connect(widget: widgets.Widget, moved: Callable[[Any], None]) -> widgets.Widget:
    """The same widget, whose every change of value calls `moved` with the value."""
    widget.observe(lambda change: moved(change["new"]), names="value")
    return widget


def _look(label: str) -> dict[str, Any]:
    return {"description": label, "layout": widgets.Layout(width="360px"), "continuous_update": True}
