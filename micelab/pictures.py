"""Still pictures (PNG, matplotlib) for where nothing interactive can be shown: the README, code hosts, notebooks at rest."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import cycle

from micelab.errors import KINDS, ErrorTable
from micelab.exceptions import MicelabError
from micelab.metrics import AccuracyCurve

COLOURS = {"timing": "#D55E00", "quantization": "#0072B2", "clipping": "#E69F00", "inherited": "#999999"}
"""One colour for each kind of error in the whole project (Okabe & Ito, safe for colour-blind readers)."""

METHOD_COLOURS = (
    *("#332288", "#44AA99", "#882255", "#999933", "#117733", "#88CCEE", "#AA4499", "#661100"),
    *("#CC6677", "#5F6B00", "#E377C2", "#8C564B", "#7A49A5", "#17BECF"),
)
"""Lines of methods, one for each: first Paul Tol's muted colours, safe for colour-blind readers; none means an error."""


def curve_and_errors(curves: Sequence[AccuracyCurve], table: ErrorTable, ann_accuracy: float) -> bytes:
    """PNG: accuracy over T on the left, each layer's errors at one T on the right.

    Upper bounds, whose layers wait for one another, are left out: their true steps lie far beyond the others'.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MicelabError("pictures need matplotlib: run `pip install micelab[course]`") from error
    picture = Figure(figsize=(12, 4.2), layout="constrained")
    FigureCanvasAgg(picture)
    left, right = picture.subplots(1, 2, width_ratios=[1, 2])
    left.set_prop_cycle(color=METHOD_COLOURS)
    left.axhline(100 * ann_accuracy, color="0.3", linestyle="--", label=f"ANN {100 * ann_accuracy:.1f} %")
    drawn = [curve for curve in curves if curve.turns == 1] or list(curves)
    for curve, style in zip(drawn, cycle(("o-", "s-", "^-", "v-", "D-", "x-", "P-")), strict=False):
        left.plot(curve.true_steps, [100 * a for a in curve.accuracy], style, markersize=5, label=curve.method)
    steps = curves[0].true_steps
    left.set_xscale("log", base=2)
    left.set_xticks(steps, [str(t) for t in steps])
    left.set(xlabel="true steps T", ylabel="accuracy (%)", title="accuracy over time")
    left.set_ylim(0, 100)
    picture.legend(*left.get_legend_handles_labels(), loc="outside lower left", frameon=False, ncols=8, fontsize=9)
    width = 0.8 / len(KINDS)
    for number, (kind, values) in enumerate(relative_errors(table).items()):
        places = [i + (number - (len(KINDS) - 1) / 2) * width for i in range(len(values))]
        right.bar(places, [100 * v for v in values], width, color=COLOURS[kind], label=kind)
    right.set_xticks(range(len(table.layers)), list(table.layers), rotation=60, ha="right", fontsize=8)
    right.set(ylabel="error (rms, % of the layer's signal)", title=f"each layer's errors, {table.method}, T = {table.time_steps}")
    right.legend(frameon=False, ncols=len(KINDS), fontsize=8, loc="upper left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    out = io.BytesIO()
    picture.savefig(out, format="png", dpi=80)
    return out.getvalue()


def relative_errors(table: ErrorTable) -> dict[str, list[float]]:
    """Each term's rms over the layer's signal, layer by layer."""
    layers = table.layers.values()
    return {kind: [layer.share(kind) for layer in layers] for kind in KINDS}
