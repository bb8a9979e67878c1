"""Still pictures (PNG, matplotlib) for where nothing interactive can be shown: the README, code hosts, notebooks at rest."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from itertools import cycle

from micelab import methods
from micelab.errors import KINDS, ErrorTable
from micelab.exceptions import MicelabError
from micelab.metrics import AccuracyCurve

COLOURS = {"timing": "#D55E00", "quantization": "#0072B2", "clipping": "#E69F00", "inherited": "#999999"}
"""One colour for each kind of error in the whole project (Okabe & Ito, safe for colour-blind readers)."""

METHOD_COLOURS = (
    *("#332288", "#44AA99", "#882255", "#999933", "#117733", "#88CCEE", "#17BECF", "#661100"),
    *("#CC6677", "#5F6B00", "#E377C2", "#8C564B", "#7A49A5", "#AA4499"),
)
"""One for each method, in their order: Paul Tol's muted ones first, safe for colour-blind readers; none means an error."""

OTHER_COLOURS = ("#7A8FA6", "#111111", "#4B6A5A", "#B5A48F")
"""Of lines that name no method."""


def line_colours(labels: Sequence[str]) -> list[str]:
    """A colour for each line: that of the method which its label begins with, in another shade for each further line of it.

    >>> line_colours(["max, v0 = 0", "max, v0 = 1/2", "qcfs", "what is ticked"])
    ['#332288', '#847ab7', '#117733', '#7A8FA6']
    """
    colours, lines, others = [], [method_of(label) for label in labels], 0
    for number, method in enumerate(lines):
        if method is None:
            colours.append(OTHER_COLOURS[others % len(OTHER_COLOURS)])
            others += 1
        else:
            base = METHOD_COLOURS[list(methods.METHODS).index(method) % len(METHOD_COLOURS)]
            colours.append(shade(base, lines[:number].count(method)))
    return colours


def method_of(label: str) -> str | None:
    """The method that a line's label begins with, None where it names none.

    >>> method_of("mice T=4"), method_of("max, v0 = 0"), method_of("what is ticked")
    ('mice', 'max', None)
    """
    first = re.split("[ ,]", label, maxsplit=1)[0]
    return first if first in methods.METHODS else None


def shade(colour: str, times: int) -> str:
    """A colour "#rrggbb", so many times darker by a quarter; where it is dark already, lighter.

    >>> shade("#80C0FF", 1), shade("#332288", 1)
    ('#6090bf', '#847ab7')
    """
    if not times:
        return colour
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    dark = sum(share * part for share, part in zip((0.3, 0.59, 0.11), parts, strict=True)) < 75
    towards, kept = (255, 0.6**times) if dark else (0, 0.75**times)
    return "#" + "".join(f"{int(kept * part + (1 - kept) * towards):02x}" for part in parts)


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
    left.axhline(100 * ann_accuracy, color="0.3", linestyle="--", label=f"ANN {100 * ann_accuracy:.1f} %")
    drawn = [curve for curve in curves if curve.turns == 1] or list(curves)
    styles, colours = cycle(("o-", "s-", "^-", "v-", "D-", "x-", "P-")), line_colours([curve.method for curve in drawn])
    for curve, style, colour in zip(drawn, styles, colours, strict=False):
        left.plot(curve.true_steps, [100 * a for a in curve.accuracy], style, color=colour, markersize=5, label=curve.method)
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
