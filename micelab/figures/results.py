"""Figures of a conversion's results: accuracy over time, points lost, spike rates, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle
from math import ceil, log10

from torch import Tensor

from micelab import methods
from micelab.exceptions import InputError
from micelab.figures.style import (
    METHOD_SYMBOLS,
    NEUTRAL,
    TOTAL,
    go,
    labels,
    layer_axis,
    make_subplots,
    styled,
)
from micelab.metrics import AccuracyCurve, Energy, LostPoints
from micelab.pictures import COLOURS, line_colours, method_of

_LOST = ("clipping", "quantization", "timing")
_LEAST = 0.5
"""Fewer points lost than these are shown as these: a logarithmic axis has no place for none."""


def accuracy_over_time(
    curves: Sequence[AccuracyCurve],
    ann_accuracy: float | Mapping[str, float] | None = None,
    title: str | None = None,
    below: str | None = None,
) -> go.Figure:
    """Accuracy in % over true steps (T + hidden), a line for each conversion, a dashed one for the ANN's own accuracy.

    ann_accuracy: one number in [0, 1], or one for each network by its name. A method keeps its colour in every figure;
    of several networks ("mice T=4", "mice T=8") each has another shade of it and another symbol. below: the name of one of
    the ANNs; then the axis counts the points lost against it, on a log scale, where curves that crowd at the top part.

    >>> figure = accuracy_over_time([AccuracyCurve((1, 2), (0.6, 0.8), 100, "qcfs")], ann_accuracy=0.9)
    >>> [line.name for line in figure.data]
    ['qcfs', 'ANN 90.0 %']
    """
    if not curves:
        raise InputError("there is no accuracy curve to show: give at least one")
    anns = {"ANN": ann_accuracy} if isinstance(ann_accuracy, (int, float)) else dict(ann_accuracy or {})
    if below is not None and below not in anns:
        raise InputError(f"below is {below!r}: give the name of an ANN of ann_accuracy, one of {', '.join(anns) or 'none'}")

    def placed(accuracies: Sequence[float]) -> list[float]:
        return [100 * a if below is None else max(_LEAST, 100 * (anns[below] - a)) for a in accuracies]

    figure, known = go.Figure(), list(methods.METHODS)
    said_there = "%{y:.2f} %" if below is None else "%{y:.2f} points lost"
    drawn: list[str | None] = []
    for number, (curve, colour) in enumerate(zip(curves, line_colours([c.method for c in curves]), strict=True)):
        method = method_of(curve.method)
        place, before = len(known) + number if method is None else known.index(method), drawn.count(method)
        drawn.append(method)
        hidden = f" ({curve.hidden_steps} hidden)" if curve.hidden_steps else ""
        hidden = f" (upper bound, {curve.true_words} steps)" if curve.turns > 1 else hidden
        figure.add_scatter(
            x=list(curve.true_steps),
            y=placed(curve.accuracy),
            name=escape(curve.method + hidden, quote=False),
            mode="lines+markers",
            line={"color": colour, "width": 2.5},
            marker={"symbol": METHOD_SYMBOLS[(place + (before if method else 0)) % len(METHOD_SYMBOLS)], "size": 9},
            hovertemplate=f"%{{x}} true steps: {said_there}",
        )
    usual = [curve for curve in curves if curve.turns == 1] or curves  # an upper bound may run out of the picture
    ticks = sorted({t for curve in usual for t in curve.true_steps})
    lines = {name: value for name, value in anns.items() if name != below}
    for (name, value), dash in zip(lines.items(), cycle(("dash", "dot", "dashdot", "longdash")), strict=False):
        figure.add_scatter(
            x=[ticks[0], ticks[-1]],
            y=placed([value]) * 2,
            name=escape(f"{name} {100 * value:.1f} %", quote=False),
            mode="lines",
            line={"dash": dash, "color": TOTAL, "width": 1.5},
            hovertemplate=said_there,
        )
    figure.update_xaxes(
        range=[log10(ticks[0]) - 0.05, log10(ticks[-1]) + 0.05] if len(usual) < len(curves) else None,
        type="log",
        tickvals=ticks,
        ticktext=[str(t) for t in ticks],
        title="true time-steps T (hidden ones counted)" if any(c.hidden_steps for c in curves) else "time-steps T",
    )
    if below is None:
        figure.update_yaxes(title="accuracy (%)", range=[0, 103])
    else:
        marks = [_LEAST, 1, 2, 5, 10, 20, 50, 100]
        figure.update_yaxes(title=f"points below {escape(below, quote=False)} {100 * anns[below]:.1f} %")
        figure.update_yaxes(
            type="log", range=[2, log10(0.9 * _LEAST)], tickvals=marks, ticktext=[f"≤ {_LEAST}", *map(str, marks[1:])]
        )
    said = "; ".join(f"{c.method} {100 * c.accuracy[-1]:.1f} % at T = {c.time_steps[-1]}" for c in curves)
    ann_said = "".join(f"; {name} {100 * value:.1f} %" for name, value in anns.items())
    return styled(figure, title or "Accuracy over time", f"Accuracy over time-steps: {said}{ann_said}.", 420)


def lost_points_waterfall(points: LostPoints, title: str | None = None) -> go.Figure:
    """From the ANN's accuracy to the SNN's: the points lost to clipping, quantization and timing, as hanging bars.

    The axis need not start at zero, since the bars are differences and the two accuracies are marks.

    >>> figure = lost_points_waterfall(LostPoints(0.9, 0.875, 0.75, 0.5, time_steps=2, images=1000))
    >>> [bar.text[0] for bar in figure.data if bar.type == "bar"]
    ['-2.5', '-12.5', '-25.0']
    """
    levels = [100 * value for value in (points.ann, points.clipped, points.quantized, points.snn)]
    figure, places = go.Figure(), ["ANN", *_LOST, "SNN"]
    _accuracy_mark(figure, "ANN", levels[0])
    for kind, before, after in zip(_LOST, levels, levels[1:], strict=False):
        figure.add_bar(
            x=[kind],
            y=[after - before],
            base=[before],
            marker_color=COLOURS[kind],
            text=[f"{0.0 + round(after - before, 1):+.1f}" if round(after - before, 1) else "0.0"],
            textposition="outside",
            hovertemplate=f"{kind}: %{{text}} points<extra></extra>",
            cliponaxis=False,
        )
    _accuracy_mark(figure, "SNN", levels[-1])
    for number, level in enumerate(levels):  # each accuracy leads to the next bar
        ends = {"x0": number, "x1": number + 1, "y0": level, "y1": level}
        figure.add_shape(type="line", **ends, line={"color": "#999999", "width": 1, "dash": "dot"}, layer="below")
    spread = max(max(levels) - min(levels), 2.0)
    figure.update_layout(showlegend=False, barmode="overlay", bargap=0.35)
    figure.update_yaxes(title="accuracy (%)", range=[min(levels) - 0.2 * spread, max(levels) + 0.25 * spread])
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=places, range=[-0.5, 4.5])
    said = ", ".join(f"{0.0 - round(100 * getattr(points, kind), 1):+.1f} by {kind}" for kind in _LOST)
    alt = f"From the ANN's {levels[0]:.1f} % to the SNN's {levels[-1]:.1f} % at T = {points.time_steps}, in points: {said}."
    return styled(figure, title or f"Where the points go at T = {points.time_steps}", alt, 380)


def _accuracy_mark(figure: go.Figure, name: str, level: float) -> None:
    figure.add_scatter(
        x=[name],
        y=[level],
        mode="markers",
        marker={"symbol": "line-ew", "size": 60, "line": {"width": 5, "color": TOTAL}},
        hovertemplate=f"{name}: %{{y:.2f}} %<extra></extra>",
    )
    figure.add_annotation(x=name, y=level, yshift=14, text=f"<b>{level:.1f} %</b>", showarrow=False)


def spike_rates(energy: Energy, title: str | None = None) -> go.Figure:
    """Spikes per neuron and time-step, layer by layer.

    >>> spike_rates(Energy(4, 1e6, 1e5, 5e5, 200.0, {"conv1": 0.1, "conv2": 0.05})).data[0].y
    (0.1, 0.05)
    """
    if not energy.spike_rates:
        raise InputError("there are no spike rates to show: the network holds no spiking layer")
    names, rates = labels(energy.spike_rates), list(energy.spike_rates.values())
    figure = go.Figure(go.Bar(x=names, y=rates, marker_color=NEUTRAL, hovertemplate="%{x}: %{y:.3f}<extra></extra>"))
    layer_axis(figure, names)
    figure.update_yaxes(title="spikes per neuron and step", rangemode="tozero")
    busiest = max(energy.spike_rates, key=lambda name: energy.spike_rates[name])
    alt = f"Spike rates of {len(names)} layers, from {min(rates):.3f} to {max(rates):.3f} ({busiest}) spikes per neuron and step."
    return styled(figure, title or f"Spike rates, T = {energy.time_steps}", alt, 360)


def images_strip(images: Tensor, captions: Sequence[str], across: int = 5) -> go.Figure:
    """Small pictures [N, C, H, W] in [0, 1], C = 1 or 3, `across` of them in a row, each with its caption.

    >>> import torch
    >>> images_strip(torch.rand(2, 1, 8, 8), ["a three", "a five"]).layout.annotations[1].text
    'a five'
    """
    if len(images) != len(captions) or not captions:
        raise InputError(f"{len(images)} images have {len(captions)} captions: give one for each, and at least one")
    titles = [escape(caption, quote=False) for caption in captions]
    columns = min(across, len(images))
    rows = ceil(len(images) / columns)
    room = {"horizontal_spacing": 0.02, "vertical_spacing": 0.2 / rows}
    figure = make_subplots(rows=rows, cols=columns, subplot_titles=titles, **room)
    for number, image in enumerate(images):
        pixels = (image.expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1) * 255).round().byte().cpu().numpy()
        figure.add_trace(go.Image(z=pixels, hoverinfo="skip"), row=number // columns + 1, col=number % columns + 1)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.update_annotations(font_size=12)
    figure = styled(figure, "", f"{len(images)} images: {', '.join(captions)}.", 30 + 150 * rows)
    return figure.update_layout(margin={"l": 5, "r": 5, "t": 30, "b": 5}, title=None)
