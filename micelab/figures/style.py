"""What all figures share: colours, the names of layers, legends that leave the title free, and the sentence beside each.

Nothing below this module imports plotly. The colours of `COLOURS` mean the kinds of error and nothing else, so methods,
networks and spikes have others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import update_wrapper
from html import escape
from math import ceil
from typing import Any, Generic, ParamSpec

from micelab.errors import KINDS
from micelab.exceptions import MicelabError
from micelab.pictures import COLOURS

try:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots as make_subplots
except ImportError as error:
    raise MicelabError("figures need plotly: run `pip install micelab[figures]`") from error

METHOD_SYMBOLS = (
    *("circle", "square", "diamond", "triangle-up", "triangle-down", "x", "cross"),
    *("star", "hexagon", "pentagon", "bowtie", "hourglass", "star-diamond"),
)
TOTAL = "#333333"
NEUTRAL = "#7A8FA6"
SPIKE = "#111111"
MEMBRANE = "#009E73"
CHOSEN = "#111111"
"""What the reader has chosen: the mark that moves with a slider."""

_LAYERS = "spiking layer, from input to output"


def labels(names: Iterable[str]) -> list[str]:
    """Layer names as plotly shows them: it reads a few HTML tags otherwise."""
    return [escape(name, quote=False) for name in names]


def layer_axis(figure: go.Figure, names: list[str]) -> None:
    """Every layer by its name: "0" and "2" of a plain nn.Sequential are names too, not numbers."""
    steep = -60 if len(names) > 12 else -40 if len(names) > 6 else 0
    figure.update_xaxes(type="category", tickangle=steep, dtick=1, title=_LAYERS, automargin=True)
    if len(names) > 12:
        figure.update_xaxes(tickfont_size=11)


def legend_rows(entries: Sequence[str], width: int = 580) -> int:
    """How many rows the legend may take in a figure 700 pixels wide: plotly gives every entry the widest one's room."""
    widths = [48 + 6.5 * len(entry) for entry in entries]
    if len(entries) < 2 or sum(widths) <= width:
        return int(len(entries) > 1)
    return ceil(len(entries) / max(1, int(width // max(widths))))


def styled(figure: go.Figure, title: str, alt: str, height: int) -> go.Figure:
    """The figure in the common look, with the sentence `alt` for those who cannot see it."""
    entries = [trace.name for trace in figure.data if trace.name and trace.showlegend is not False]
    return figure.update_layout(look(title, alt, height, entries), template="plotly_white")


def look(title: str, alt: str, height: int, entries: Sequence[str] = ()) -> dict[str, Any]:
    """The layout that all figures share, as a plain dict; `entries` are the legend's."""
    rows = legend_rows(entries)
    return {
        "title": {
            "text": escape(title, quote=False),
            "x": 0.01,
            "y": 1,
            "yanchor": "top",
            "pad": {"t": 14},
            "font": {"size": 17},
        },
        "font": {"size": 13, "color": TOTAL},
        "height": height + 22 * max(0, rows - 1),
        "margin": {"l": 70, "r": 20, "t": 50 + 22 * rows, "b": 60},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "meta": {"alt": alt},
    }


Spec = dict[str, Any]
"""A figure as plotly's plain dict {"data": [...], "layout": {...}}."""
P = ParamSpec("P")


class Drawing(Generic[P]):
    """A figure function made of one that gives its plain dict: calling it gives the plotly Figure, `spec` the dict alone.

    A panel redraws from the dict, which takes a millisecond where a Figure takes fifty.
    """

    def __init__(self, spec: Callable[P, Spec]):
        self.spec = spec
        update_wrapper(self, spec)

    def __call__(self, *args: P.args, **options: P.kwargs) -> go.Figure:
        return go.Figure(self.spec(*args, **options)).update_layout(template="plotly_white")


assert tuple(COLOURS) == KINDS  # one colour for each term, in the order of the tables
