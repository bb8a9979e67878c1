"""Interactive figures as pure functions: data in, plotly Figure out. Nothing below this module imports plotly.

Every figure carries a sentence for those who cannot see it in `figure.layout.meta["alt"]`, made from its own numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from micelab.errors import KINDS, ErrorTable
from micelab.exceptions import MicelabError
from micelab.metrics import AccuracyCurve, Energy, LostPoints
from micelab.pictures import COLOURS, relative_errors

try:
    import plotly.graph_objects as go
except ImportError as error:
    raise MicelabError("figures need plotly: run `pip install micelab[figures]`") from error

METHOD_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
METHOD_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "x", "cross")
_TOTAL = "#333333"


def accuracy_over_time(curves: Sequence[AccuracyCurve], ann_accuracy: float | None = None, title: str | None = None) -> go.Figure:
    """Accuracy in % over true steps (T + hidden), a line for each conversion; the ANN's own as a dashed line."""
    figure = go.Figure()
    for number, curve in enumerate(curves):
        figure.add_scatter(
            x=list(curve.true_steps),
            y=[100 * a for a in curve.accuracy],
            name=curve.method,
            mode="lines+markers",
            line={"color": METHOD_COLOURS[number % len(METHOD_COLOURS)], "width": 2.5},
            marker={"symbol": METHOD_SYMBOLS[number % len(METHOD_SYMBOLS)], "size": 9},
            hovertemplate="T = %{x}: %{y:.2f} %",
        )
    ticks = sorted({t for curve in curves for t in curve.true_steps})
    if ann_accuracy is not None:
        figure.add_hline(y=100 * ann_accuracy, line={"dash": "dash", "color": _TOTAL, "width": 1.5})
        figure.add_annotation(
            text=f"ANN {100 * ann_accuracy:.2f} %",
            xref="paper",
            x=0.01,
            y=100 * ann_accuracy,
            yshift=10,
            showarrow=False,
            xanchor="left",
        )
    figure.update_xaxes(
        type="log", tickvals=ticks, ticktext=[str(t) for t in ticks], title="true time-steps, T + hidden", minor_ticks=""
    )
    figure.update_yaxes(title="accuracy (%)", range=[0, 103])
    said = "; ".join(f"{c.method} reaches {100 * c.accuracy[-1]:.1f} % at T = {c.time_steps[-1]}" for c in curves)
    return _styled(figure, title or "Accuracy over time", f"Accuracy over time-steps: {said}.", 420)


def error_bars(table: ErrorTable, title: str | None = None) -> go.Figure:
    """Each layer's four error terms side by side (rms in % of the layer's signal) and their total as a line."""
    figure, names = go.Figure(), list(table.layers)
    for kind, values in relative_errors(table).items():
        figure.add_bar(
            x=names, y=[100 * v for v in values], name=kind, marker_color=COLOURS[kind], hovertemplate="%{x}: %{y:.1f} %"
        )
    figure.add_scatter(
        x=names,
        y=[100 * layer.relative for layer in table.layers.values()],
        name="total",
        mode="lines+markers",
        line={"color": _TOTAL, "width": 1.5, "dash": "dot"},
        marker={"size": 6},
        hovertemplate="%{x}: %{y:.1f} %",
    )
    figure.update_layout(barmode="group", bargap=0.25, bargroupgap=0.0)
    figure.update_xaxes(tickangle=-50 if len(names) > 6 else 0, title="spiking layer, from input to output", automargin=True)
    figure.update_yaxes(title="error (rms, % of the signal)", rangemode="tozero")
    worst = max(table.layers, key=lambda name: table.layers[name].relative)
    alt = f"Errors of {len(names)} layers at T = {table.time_steps}: the total is largest in {worst}, "
    alt += f"{100 * table.layers[worst].relative:.0f} % of its signal."
    return _styled(figure, title or f"Errors of every layer: {table.method}, T = {table.time_steps}", alt, 460)


def lost_points_waterfall(points: LostPoints, title: str | None = None) -> go.Figure:
    """From the ANN's accuracy down to the SNN's: the points lost to clipping, quantization and timing."""
    kinds = ("clipping", "quantization", "timing")
    level, figure = 100 * points.ann, go.Figure()
    figure.add_bar(x=["ANN"], y=[level], marker_color=_TOTAL, text=[f"{level:.1f} %"], textposition="outside")
    for kind in kinds:
        lost = 100 * getattr(points, kind)
        figure.add_bar(
            x=[kind],
            y=[abs(lost)],
            base=[min(level, level - lost)],
            marker_color=COLOURS[kind],
            text=[f"{0.0 - round(lost, 1):+.1f}"],
            textposition="outside",
        )
        level -= lost
    figure.add_bar(
        x=["SNN"], y=[100 * points.snn], marker_color=_TOTAL, text=[f"{100 * points.snn:.1f} %"], textposition="outside"
    )
    figure.update_layout(showlegend=False, barmode="overlay")
    figure.update_yaxes(title="accuracy (%)", range=[0, 112])
    figure.update_xaxes(title=None)
    said = ", ".join(f"{100 * getattr(points, kind):.1f} to {kind}" for kind in kinds)
    alt = f"Accuracy falls from {100 * points.ann:.1f} % to {100 * points.snn:.1f} % at T = {points.time_steps}; lost: {said}."
    return _styled(figure, title or f"Where the points go at T = {points.time_steps}", alt, 380)


def spike_rates(energy: Energy, title: str | None = None) -> go.Figure:
    """Spikes per neuron and time-step, layer by layer."""
    names, rates = list(energy.spike_rates), list(energy.spike_rates.values())
    figure = go.Figure(go.Bar(x=names, y=rates, marker_color=METHOD_COLOURS[0], hovertemplate="%{x}: %{y:.3f}"))
    figure.update_xaxes(tickangle=-50 if len(names) > 6 else 0, title="spiking layer, from input to output", automargin=True)
    figure.update_yaxes(title="spikes per neuron and step", rangemode="tozero")
    alt = f"Spike rates of {len(names)} layers, from {min(rates):.3f} to {max(rates):.3f} spikes per neuron and step."
    return _styled(figure, title or f"Spike rates, T = {energy.time_steps}", alt, 360)


def images_strip(images: Tensor, captions: Sequence[str]) -> go.Figure:
    """A row of small pictures [N, C, H, W] in [0, 1], each with its caption."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=len(images), horizontal_spacing=0.01, subplot_titles=list(captions))
    for column, image in enumerate(images, start=1):
        pixels = (image.expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
        figure.add_trace(go.Image(z=pixels, hoverinfo="skip"), row=1, col=column)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.update_annotations(font_size=12)
    figure = _styled(figure, "", f"{len(images)} images: {', '.join(captions)}.", 140)
    return figure.update_layout(margin={"l": 5, "r": 5, "t": 30, "b": 5}, title=None)


def _styled(figure: go.Figure, title: str, alt: str, height: int) -> go.Figure:
    figure.update_layout(
        template="plotly_white",
        title={"text": title, "x": 0.01, "font": {"size": 17}},
        font={"size": 13},
        height=height,
        margin={"l": 70, "r": 20, "t": 90, "b": 60},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        meta={"alt": alt},
    )
    return figure


assert tuple(COLOURS) == KINDS  # one colour for each term, in the order of the tables
