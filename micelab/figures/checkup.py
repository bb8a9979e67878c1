"""The figure of a checkup: every layer in its place, in the row of what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence

from micelab.exceptions import InputError
from micelab.figures.style import CHOSEN, NEUTRAL, SPIKE, Drawing, Spec, look
from micelab.graph.checkup import VERDICTS, Finding

VERDICT_COLOURS = {"spikes": SPIKE, "stays": NEUTRAL, "folds away": "#5E6B78", "refused": "#882255"}
"""None of these means a kind of error; each verdict has a row and a mark of its own besides."""

_MARKS = {"spikes": "star", "stays": "square", "folds away": "circle-open", "refused": "x"}
_ROWS = {verdict: number for number, verdict in enumerate(reversed(VERDICTS))}
NAMED = 26
"""So many layers have room for their names."""


@Drawing
def checkup_map(findings: Sequence[Finding], chosen: int | None = None, title: str | None = None) -> Spec:
    """One mark for each layer, from input to output, in the row of its verdict; the layer `chosen` is ringed.

    >>> import micelab
    >>> checkup_map(micelab.checkup(micelab.small_cnn()).findings).layout.meta["alt"]
    '17 layers: 4 spikes, 9 stays, 4 folds away, 0 refused.'
    """
    if not findings:
        raise InputError("the report holds no layers: nothing to show")
    data: list[Spec] = []
    for verdict in VERDICTS:
        places = [number for number, finding in enumerate(findings, start=1) if finding.verdict == verdict]
        mark = {"symbol": _MARKS[verdict], "size": 12, "color": VERDICT_COLOURS[verdict]}
        mark |= {"line": {"width": 2, "color": VERDICT_COLOURS[verdict]}}
        trace = {"type": "scatter", "x": places, "y": [_ROWS[verdict]] * len(places), "mode": "markers", "marker": mark}
        said = [f"{findings[number - 1].layer}: {findings[number - 1].kind}" for number in places]
        data.append(trace | {"text": said, "hovertemplate": "%{text}<extra></extra>", "name": verdict})
    ring = {"symbol": "circle-open", "size": 24, "color": CHOSEN, "line": {"width": 2, "color": CHOSEN}}
    rung = [] if chosen is None else [_ROWS[findings[chosen].verdict]]
    data.append({"type": "scatter", "x": [] if chosen is None else [chosen + 1], "y": rung, "mode": "markers", "marker": ring})
    data[-1] |= {"hoverinfo": "skip", "name": "chosen"}
    counts = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in VERDICTS}
    alt = f"{len(findings)} layers: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + "."
    layout = look(title or "What becomes of each layer", alt, 300) | {"showlegend": False}
    step = 1 if len(findings) <= NAMED else 5
    ticks = list(range(1, len(findings) + 1, step))
    names = [_short(findings[number - 1].layer) if step == 1 else str(number) for number in ticks]
    layout["xaxis"] = {"title": {"text": "layer, from input to output"}, "tickvals": ticks, "ticktext": names}
    layout["xaxis"] |= {"tickangle": -40 if step == 1 and len(ticks) > 8 else 0, "showgrid": False, "zeroline": False}
    layout["xaxis"] |= {"automargin": True}
    layout["yaxis"] = {"tickvals": list(_ROWS.values()), "ticktext": list(_ROWS), "range": [-0.6, len(_ROWS) - 0.4]}
    layout["yaxis"] |= {"zeroline": False, "title": {"text": ""}}
    layout["margin"] |= {"l": 90}
    return {"data": data, "layout": layout}


def _short(name: str) -> str:
    return name if len(name) <= 14 else f"…{name[-13:]}"
