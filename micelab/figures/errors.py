"""Figures of every layer's errors: side by side, over the depth, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from micelab.errors import KINDS, ErrorTable
from micelab.exceptions import InputError
from micelab.figures.style import (
    METHOD_SYMBOLS,
    TOTAL,
    go,
    labels,
    layer_axis,
    make_subplots,
    styled,
)
from micelab.pictures import COLOURS, relative_errors

_TRAINED_IN = "the ANN clips too"
"""What hatched bars of clipping mean."""


def error_bars(table: ErrorTable, title: str | None = None) -> go.Figure:
    """Each layer's four error terms side by side (rms in % of the layer's signal) and their total as a line.

    The terms have signs and are correlated, so their sizes do not add up to the total's: they stand beside each other.
    Hatched clipping is the ANN's own, trained in, and costs it nothing; the legend says so where there is any.

    >>> import micelab, torch
    >>> ann = micelab.small_cnn(activation="quant_clip")
    >>> table = micelab.error_breakdown(ann, micelab.convert(ann, "qcfs"), torch.rand(4, 1, 8, 8), time_steps=4)
    >>> [bars.name for bars in error_bars(table).data]
    ['timing', 'quantization', 'clipping', 'the ANN clips too', 'inherited', 'total']
    """
    if not table.layers:
        raise InputError("the error table holds no layers: nothing to show")
    figure, names = go.Figure(), labels(table.layers)
    hatch = _hatches(table)
    for kind, values in relative_errors(table).items():
        figure.add_bar(
            x=names,
            y=[100 * v for v in values],
            name=kind,
            marker=_of_kind(kind, hatch),
            offsetgroup=kind,
            hovertemplate=f"%{{x}}, {kind}: %{{y:.1f}} %<extra></extra>",
        )
        if kind == "clipping":
            figure.add_bar(**_hatch_said(names, any(hatch)))
    figure.add_scatter(
        x=names,
        y=[100 * layer.relative for layer in table.layers.values()],
        name="total",
        mode="lines+markers",
        line={"color": TOTAL, "width": 1.5, "dash": "dot"},
        marker={"size": 6},
        hovertemplate="%{x}, total: %{y:.1f} %<extra></extra>",
    )
    figure.update_layout(barmode="group", bargap=0.25, bargroupgap=0.0)
    layer_axis(figure, names)
    figure.update_yaxes(title="error (rms, % of the signal)", rangemode="tozero")
    worst, errors = max(table.layers.items(), key=lambda item: item[1].relative)
    kind = max(KINDS, key=lambda k: getattr(errors, k).rms)
    alt = f"Errors of {len(names)} layers at T = {table.time_steps}: the total is largest in {worst}, "
    alt += f"{100 * errors.relative:.0f} % of its signal, and its largest term is {kind}."
    return styled(figure, title or f"Errors of every layer: {table.method}, T = {table.time_steps}", alt, 460)


def _hatches(table: ErrorTable) -> list[str]:
    """A pattern for each layer whose clipping is the ANN's own."""
    return ["/" if layer.trained_clip else "" for layer in table.layers.values()]


def _hatch_said(names: list[str], shown: bool) -> dict[str, Any]:
    """A bar of no height beside that of clipping: the legend's entry for the pattern."""
    look = {"color": COLOURS["clipping"], "pattern": {"shape": "/", "size": 5}}
    bar = {"x": names[:1], "y": [0], "name": _TRAINED_IN, "marker": look, "offsetgroup": "clipping"}
    return bar | {"showlegend": shown, "hoverinfo": "skip"}


def _of_kind(kind: str, hatches: list[str]) -> dict[str, Any]:
    """How the bars of an error look; clipping is hatched where it was trained in."""
    return {"color": COLOURS[kind]} | ({"pattern": {"shape": hatches, "size": 5}} if kind == "clipping" else {})


def error_over_depth(
    tables: Mapping[int, ErrorTable], time_steps: int, kind: str = "timing", title: str | None = None
) -> go.Figure:
    """One error term of every layer (rms in % of its signal), a line for each T; the one of `time_steps` is drawn strong.

    >>> import micelab, torch
    >>> ann, images = micelab.small_cnn(activation="quant_clip"), torch.rand(4, 1, 8, 8)
    >>> snn = micelab.convert(ann, "qcfs")
    >>> tables = {T: micelab.error_breakdown(ann, snn, images, T) for T in (2, 4)}
    >>> [line.name for line in error_over_depth(tables, 4).data]
    ['T = 2', 'T = 4']
    """
    if time_steps not in tables or kind not in COLOURS:
        raise InputError(
            f"T = {time_steps} or {kind!r} is not there: T is one of {sorted(tables)}, the kind of {', '.join(KINDS)}"
        )
    figure, names = go.Figure(), labels(tables[time_steps].layers)
    for number, (t, table) in enumerate(sorted(tables.items())):
        strong = t == time_steps
        figure.add_scatter(
            x=names,
            y=[100 * value for value in relative_errors(table)[kind]],
            name=f"T = {t}",
            mode="lines+markers",
            opacity=1.0 if strong else 0.4,
            line={"color": COLOURS[kind], "width": 3.5 if strong else 1.2},
            marker={"symbol": METHOD_SYMBOLS[number % len(METHOD_SYMBOLS)], "size": 9 if strong else 6},
            hovertemplate=f"%{{x}}, T = {t}: %{{y:.1f}} %<extra></extra>",
        )
    layer_axis(figure, names)
    figure.update_yaxes(title=f"{kind} error (rms, % of the signal)", rangemode="tozero")
    values = relative_errors(tables[time_steps])[kind]
    alt = f"The {kind} error of {len(names)} layers at T = {time_steps}: {100 * values[0]:.0f} % of the signal in the first, "
    alt += f"{100 * values[-1]:.0f} % in the last, at most {100 * max(values):.0f} %."
    return styled(figure, title or f"{kind.capitalize()} error against depth, T = {time_steps} drawn strong", alt, 420)


def before_and_after(before: ErrorTable, after: ErrorTable, names: tuple[str, str], title: str | None = None) -> go.Figure:
    """The same layers' errors of two networks, one above the other on one scale: what a training took away, and where.

    names: what the two are called, "qcfs" and "mice", say. Raises InputError where the layers are not the same.

    >>> import micelab, torch
    >>> ann, images = micelab.small_cnn(activation="quant_clip"), torch.rand(4, 1, 8, 8)
    >>> tables = [micelab.error_breakdown(ann, micelab.convert(ann, name), images, 4) for name in ("qcfs", "tcl")]
    >>> before_and_after(*tables, ("v0 = 1/2", "v0 = 0")).layout.annotations[0].text
    'v0 = 1/2, T = 4'
    """
    if list(before.layers) != list(after.layers):
        raise InputError("the two tables are of different layers: compare networks of one shape")
    rows = [relative_errors(before), relative_errors(after)]
    hatches = [_hatches(before), _hatches(after)]
    layers, totals = labels(before.layers), [[layer.relative for layer in t.layers.values()] for t in (before, after)]
    heads = [f"{escape(name, quote=False)}, T = {t.time_steps}" for name, t in zip(names, (before, after), strict=True)]
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.09, subplot_titles=heads)
    for row, (values, total, hatch) in enumerate(zip(rows, totals, hatches, strict=True), start=1):
        for kind in KINDS:
            figure.add_bar(
                x=layers,
                y=[100 * v for v in values[kind]],
                name=kind,
                marker=_of_kind(kind, hatch),
                offsetgroup=kind,
                showlegend=row == 1,
                legendgroup=kind,
                hovertemplate=f"%{{x}}, {kind}: %{{y:.1f}} %<extra></extra>",
                row=row,
                col=1,
            )
            if row == 1 and kind == "clipping":
                figure.add_bar(**_hatch_said(layers, any(map(any, hatches))), row=1, col=1)
        figure.add_scatter(
            x=layers,
            y=[100 * v for v in total],
            name="total",
            mode="lines+markers",
            line={"color": TOTAL, "width": 1.5, "dash": "dot"},
            showlegend=row == 1,
            legendgroup="total",
            hovertemplate="%{x}, total: %{y:.1f} %<extra></extra>",
            row=row,
            col=1,
        )
    top = 105 * max([*totals[0], *totals[1], *(v for values in rows for kind in KINDS for v in values[kind])], default=0.0)
    figure.update_layout(barmode="group", bargap=0.25, bargroupgap=0.0)
    layer_axis(figure, layers)
    figure.update_xaxes(title=None, showticklabels=False, row=1, col=1)
    figure.update_yaxes(title="error (rms, % of signal)", range=[0, top or 1])
    means = [100 * sum(t) / len(t) for t in totals]
    steps = " and ".join(f"T = {t}" for t in dict.fromkeys((before.time_steps, after.time_steps)))
    said = f"Errors of {len(layers)} layers at {steps}: mean total {means[0]:.0f} % of the signal with {names[0]}, "
    figure = styled(figure, title or "Errors of every layer, before and after", said + f"{means[1]:.0f} % with {names[1]}.", 620)
    return figure.update_layout(margin_t=23 + figure.layout.margin.t)  # the upper row has its heading below the legend
