"""A still picture (PNG) of interactive figures, drawn from their own data, for where nothing interactive can be shown.

Covers what `figures` draws: lines, markers, filled bands, bars, pictures and heat maps, in stacked axes, on category, linear or
log scales. A picture takes a tenth of a second; a browser would take three.
"""

from __future__ import annotations

import io
import re
from base64 import b64encode
from collections.abc import Collection, Sequence
from html import escape, unescape
from math import ceil
from typing import Any

from micelab.exceptions import MicelabError

DPI = 80
_DASHES = {"dash": "--", "dot": ":", "dashdot": "-.", "longdash": (0, (8, 3))}
_MARKS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "triangle-down": "v", "x": "X", "cross": "P"}
_MARKS |= {"pentagon": "p", "bowtie": ">", "hourglass": "<", "star-diamond": "d"}
_MARKS |= {"star": "*", "hexagon": "h", "circle-open": "o", "line-ns": "|", "line-ew": "_"}


def still(figures: Sequence[Any]) -> bytes:
    """PNG of plotly figures, two in a row."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from PIL import Image
    except ImportError as error:
        raise MicelabError("pictures need matplotlib: run `pip install micelab[course]`") from error
    height = max((figure.layout.height or 400) for figure in figures) / 90
    columns = min(2, len(figures))
    rows = ceil(len(figures) / columns)
    picture = Figure(figsize=(5.6 * columns + 1.2, rows * height))
    FigureCanvasAgg(picture)
    parts = picture.subfigures(rows, columns, squeeze=False).ravel()
    for part, figure in zip(parts, figures, strict=False):  # the last place of a row may stay empty
        _draw(part, figure)
    out = io.BytesIO()
    picture.savefig(out, format="png", dpi=DPI)
    small = io.BytesIO()  # 256 colours are enough, and half the bytes in a notebook
    with Image.open(out) as drawn:
        drawn.convert("RGB").quantize(256).save(small, "PNG", optimize=True)
    return small.getvalue()


class Still:
    """A figure at rest, as a notebook stores it: a picture, and its sentence for those who cannot see it."""

    def __init__(self, figures: Sequence[Any]):
        self.figures = tuple(figures)

    def __repr__(self) -> str:
        return "Figure: " + " ".join((figure.layout.meta or {}).get("alt", "") for figure in self.figures)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"image/png": b64encode(still(self.figures)).decode(), "text/plain": repr(self)}


def show(*figures: Any) -> Still:
    """Figures side by side as the last value of a notebook cell; a bare one would vanish wherever no kernel runs."""
    return Still(figures)


def _draw(part: Any, figure: Any) -> None:
    """One plotly figure into one part of the picture."""
    axes: dict[tuple[str, str], Any] = {}
    wide, tall = (size / part.figure.dpi for size in (part.bbox.width, part.bbox.height))  # inches
    left, right, low, high = _room(figure, wide, tall)
    for trace in figure.data:
        key = (getattr(trace, "xaxis", None) or "x", getattr(trace, "yaxis", None) or "y")
        if key not in axes:
            x, y = (figure.layout[_axis_name(name)] for name in key)
            (x0, x1), (y0, y1) = x.domain or (0, 1), y.domain or (0, 1)
            place = (left + x0 * (right - left), low + y0 * (high - low), (x1 - x0) * (right - left), (y1 - y0) * (high - low))
            axes[key] = part.add_axes(place)
        grouped = [bar for bar in figure.data if bar.type == "bar" and figure.layout.barmode == "group"]
        grouped = [bar for bar in grouped if (bar.xaxis, bar.yaxis) == (trace.xaxis, trace.yaxis)]
        slots = list(dict.fromkeys(bar.offsetgroup or bar.name for bar in grouped))  # bars of one group share a place
        slot = (slots.index(trace.offsetgroup or trace.name), len(slots)) if trace in grouped else ()
        _TRACES[trace.type](axes[key], trace, *slot)
    for key, ax in axes.items():
        _dress(ax, figure.layout[_axis_name(key[0])], figure.layout[_axis_name(key[1])])
    first = next(iter(axes.values()))
    for shape in (shape for shape in figure.layout.shapes if shape.opacity != 0):
        if shape.type == "line" and shape.yref == "paper" and shape.x0 == shape.x1:
            first.axvline(shape.x0, color=shape.line.color, linestyle=_DASHES.get(shape.line.dash, "-"))
        elif shape.type == "line" and shape.xref == "paper" and shape.y0 == shape.y1:
            first.axhline(shape.y0, color=shape.line.color, linestyle=_DASHES.get(shape.line.dash, "-"), linewidth=1.5)
        elif shape.type == "line" and shape.yref in (None, "y"):
            look = {"color": shape.line.color, "linestyle": _DASHES.get(shape.line.dash, "-"), "linewidth": 1, "zorder": 1}
            first.plot([shape.x0, shape.x1], [shape.y0, shape.y1], **look)
        elif shape.type == "path":
            places = zip(*(map(float, place.split(",")) for place in shape.path[1:].split("L")), strict=True)
            first.plot(*places, color=shape.line.color, linewidth=0.8 * shape.line.width)
    for note in (note for note in figure.layout.annotations if note.opacity != 0):
        if note.xref == note.yref == "paper" and note.text:  # the heading of one of several axes
            spot = (left + note.x * (right - left), low + note.y * (high - low) + 0.005)
            part.text(*spot, _plain(note.text), ha="center", va="bottom", fontsize=10)
        elif note.yref == "paper" and note.text:
            first.annotate(_plain(note.text), (note.x, 1.01), xycoords=("data", "axes fraction"), ha="center", fontsize=9)
        elif note.xref == "paper" and note.text:  # above its height, from the left edge on
            units = ("axes fraction", "data")
            first.annotate(_plain(note.text), (0.01, note.y), xycoords=units, ha="left", va="bottom", fontsize=9)
        elif note.text and note.showarrow is False and note.yref in (None, "y"):
            _word(first, _plain(note.text), _places(first, [note.x])[0], note.y, 0.7 * (note.yshift or 0))
    part.text(0.03, 1 - 0.13 / tall, _plain(figure.layout.title.text or ""), ha="left", va="top", fontsize=12)
    if _has_legend(figure):
        _legend(part, axes, wide, tall, [_plain(trace.name or "") for trace in figure.data])


def _room(figure: Any, wide: float, tall: float) -> tuple[float, float, float, float]:
    """Left, right, lower and upper end of the axes, as shares: room for title, legend, and names that stand aslant."""
    names = [list(trace.x) for trace in figure.data if getattr(trace, "x", None) is not None]
    aslant = any(len(x) > 6 and len(str(x[0])) > 2 for x in names if x and isinstance(x[0], str))
    if all(trace.type == "image" for trace in figure.data):  # pictures have no axes to leave room for
        return 0.02, 0.98, 0.05 / tall, 1 - 0.35 / tall
    left = 0.0098 * (figure.layout.margin.l or 70) / wide
    named = {_plain(trace.name) for trace in figure.data if trace.name and trace.showlegend is not False}
    lines = ceil(len(named) / _columns(named, wide)) if _has_legend(figure) else 0
    headed = any(note.text and note.xref == note.yref == "paper" for note in figure.layout.annotations)
    above = 0.58 if not lines else 0.89 + 0.17 * max(0, lines + headed - 2)  # inches
    return left, 0.97, (1.2 if aslant else 0.76) / tall, 1 - above / tall


def _has_legend(figure: Any) -> bool:
    return figure.layout.showlegend is not False and sum(bool(trace.name) for trace in figure.data) > 1


def _axis_name(short: str) -> str:
    return f"{short[0]}axis{short[1:]}"


def _columns(texts: Collection[str], wide: float) -> int:
    """How many entries of a legend stand beside each other in so many inches."""
    return min(len(texts), max(1, int(wide * 16 / (max(map(len, texts)) + 5))))


def _legend(part: Any, axes: dict[tuple[str, str], Any], wide: float, tall: float, order: Sequence[str]) -> None:
    found = [pair for ax in axes.values() for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
    found.sort(key=lambda pair: order.index(pair[1]) if pair[1] in order else 0)
    if len(found) > 1:
        handles, texts = zip(*found, strict=True)
        place = {"loc": "upper left", "bbox_to_anchor": (0.02, 1 - 0.33 / tall)}
        part.legend(handles, texts, frameon=False, fontsize=8, ncols=_columns(texts, wide), **place)


def _scatter(ax: Any, trace: Any) -> None:
    line, marker, mode = trace.line, trace.marker, trace.mode or "lines"
    label = _plain(trace.name) if trace.name and trace.showlegend is not False else "_"
    if trace.fill == "tonexty":
        below = ax.micelab_previous
        ax.fill_between(list(trace.x), list(below.y), list(trace.y), color=_rgba(trace.fillcolor), linewidth=0, label=label)
    options: dict[str, Any] = {"alpha": trace.opacity, "label": label}
    if "lines" in mode:
        options |= {"color": line.color, "linewidth": 0 if line.width == 0 else (line.width or 2) * 0.8}
        options |= {"linestyle": _DASHES.get(line.dash, "-"), "drawstyle": "steps-post" if line.shape == "hv" else "default"}
    else:
        options |= {"linestyle": "none", "color": marker.color or marker.line.color}
    if "markers" in mode:
        symbol = marker.symbol or "circle"
        options |= {"marker": _MARKS.get(symbol, "o"), "markersize": (marker.size or 6) * 0.7}
        if symbol.startswith("line") or symbol.endswith("open"):
            options |= {"markeredgewidth": (marker.line.width or 2) * 0.8, "fillstyle": "none"}
    if trace.fill != "tonexty" and not (mode == "lines" and line.width == 0):
        ax.plot(_places(ax, trace.x), list(trace.y), **options)
    ax.micelab_previous = trace


def _bar(ax: Any, trace: Any, number: int = 0, of: int = 1) -> None:
    """Bars, side by side with those of `of` traces in the same places."""
    colour = trace.marker.color
    label = _plain(trace.name) if trace.name and trace.showlegend is not False else "_"
    hatches = trace.marker.pattern.shape
    width = (trace.width or 0.8) / of
    bars = ax.bar(
        _places(ax, trace.x) if of == 1 else [place + (number - (of - 1) / 2) * width for place in _places(ax, trace.x)],
        list(trace.y),
        width,
        bottom=0 if trace.base is None else list(trace.base),
        color=list(colour) if isinstance(colour, (list, tuple)) else colour,
        label=label,
    )
    for bar, text in zip(bars, trace.text or [], strict=False):
        end = bar.get_y() + bar.get_height()
        _word(ax, text, bar.get_x() + bar.get_width() / 2, end, -3 if bar.get_height() < 0 else 3)
    for bar, hatch in zip(bars, [hatches] * len(bars) if isinstance(hatches, str) else hatches or [], strict=False):
        bar.set(hatch="///" if hatch else None, edgecolor="white", linewidth=0)


def _word(ax: Any, text: str, x: float, y: float, shift: float) -> None:
    """Text so many points above a place of the axes, or below it."""
    vertical = "bottom" if shift > 0 else "top"
    ax.annotate(text, (x, y), (0, shift), textcoords="offset points", ha="center", va=vertical, fontsize=9)


def _places(ax: Any, values: Any) -> list[Any]:
    """Where values lie along x: names get places in the order in which they come."""
    values = list(values)
    if values and isinstance(values[0], str):
        names = ax.__dict__.setdefault("micelab_names", {})
        return [names.setdefault(value, len(names)) for value in values]
    return values


def _image(ax: Any, trace: Any) -> None:
    ax.imshow(trace.z, interpolation="nearest")


def _heatmap(ax: Any, trace: Any) -> None:
    """A map of numbers, first row on top; what is None stays white."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("micelab", [(float(place), colour) for place, colour in trace.colorscale])
    rows = [[float("nan") if value is None else float(value) for value in row] for row in trace.z]
    ax.imshow(rows, cmap=colours, vmin=trace.zmin, vmax=trace.zmax, interpolation="nearest")


_TRACES = {"scatter": _scatter, "bar": _bar, "image": _image, "heatmap": _heatmap}


def _dress(ax: Any, x: Any, y: Any) -> None:
    """Titles, ranges, ticks and grid of one pair of axes."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.92")
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=9)
    if y.type == "log":
        ax.set_yscale("log")
    if x.type == "log":
        ax.set_xscale("log")
    for axis, set_range, set_ticks in ((x, ax.set_xlim, ax.set_xticks), (y, ax.set_ylim, ax.set_yticks)):
        if axis.range is not None and axis.type != "category":
            set_range(*(10**end for end in axis.range) if axis.type == "log" else axis.range)
        if axis.tickvals is not None:
            set_ticks(list(axis.tickvals), [_plain(str(text)) for text in (axis.ticktext or axis.tickvals)])
            ax.minorticks_off()
    names = getattr(ax, "micelab_names", {})
    if names:
        aslant = {"rotation": 60, "ha": "right", "rotation_mode": "anchor", "fontsize": 7}
        turned = aslant if len(names) > 6 and len(next(iter(names))) > 2 else {"fontsize": 9}
        ax.set_xticks(range(len(names)), [_plain(name) for name in names], **turned)
    if y.showticklabels is False:
        ax.set_yticks([])
    if x.showticklabels is False:
        ax.tick_params(axis="x", labelbottom=False)
    if x.matches and not x.title.text:
        ax.tick_params(axis="x", labelbottom=False)
    ax.set_xlabel(_plain(x.title.text or ""), fontsize=10)
    ax.set_ylabel(_plain(y.title.text or ""), fontsize=10)
    if x.visible is False:
        ax.set_axis_off()


def _plain(text: str) -> str:
    """Text without plotly's tags."""
    return unescape(re.sub(r"<[^>]*>", "", text))


def _rgba(colour: str) -> tuple[float, ...]:
    """ "rgba(r,g,b,a)" as matplotlib writes it.

    >>> _rgba("rgba(255,0,0,0.5)")
    (1.0, 0.0, 0.0, 0.5)
    """
    *rgb, alpha = (float(part) for part in colour[colour.index("(") + 1 : -1].split(","))
    return (*(part / 255 for part in rgb), alpha)


def as_html(text: str) -> str:
    """Plain text as HTML; what stands in backquotes is code.

    >>> as_html("`a < b` holds")
    '<code>a &lt; b</code> holds'
    """
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
