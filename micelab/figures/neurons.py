"""Figures of one neuron or one layer: its timeline, its staircase, where its threshold lies, what the order of spikes does."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from micelab.activation import quantize
from micelab.exceptions import InputError
from micelab.figures.style import CHOSEN, MEMBRANE, NEUTRAL, SPIKE, TOTAL, Drawing, Spec, look
from micelab.one_neuron import NeuronTrace, ThresholdErrors, staircase_error
from micelab.pictures import COLOURS


@Drawing
def neuron_timeline(trace: NeuronTrace, title: str | None = None) -> Spec:
    """Current, membrane potential, spikes and running rate of one neuron over its T steps, one below the other.

    >>> from micelab.one_neuron import trace_neuron
    >>> figure = neuron_timeline(trace_neuron(torch.full((8,), 0.3)))
    >>> figure.layout.meta["alt"]
    'One neuron over 8 steps: mean current 0.3, 2 spikes, rate 0.25 where ReLU says 0.3, 0.9 left in the membrane.'
    """
    steps, wanted = list(range(1, trace.time_steps + 1)), max(0.0, trace.mean_current)
    data = [
        _bars(steps, trace.current.tolist(), "I", NEUTRAL, 0.7, row=1),
        *_membrane(trace, row=2),
        _bars(steps, trace.spikes.tolist(), "s", SPIKE, 0.16, row=3),
        _line(steps, trace.running_rate.tolist(), "rate φ so far", SPIKE, row=4, shape="hv", mode="lines+markers"),
        _line([0.4, steps[-1] + 0.6], [wanted] * 2, "what ReLU says", TOTAL, row=4, dash="dash"),
    ]
    alt = f"One neuron over {trace.time_steps} steps: mean current {trace.mean_current:.3g}, {trace.count} spikes, "
    alt += f"rate {trace.rate:.3g} where ReLU says {wanted:.3g}, {trace.residual:.3g} left in the membrane."
    layout = look(title or "One neuron, step by step", alt, 470) | {"showlegend": False}
    layout |= _stacked((0.2, 0.36, 0.1, 0.34), ("I(t)", "v(t)", "s(t)", "φ"), trace.time_steps)
    layout["yaxis2"]["range"] = _membrane_range(trace)
    layout["yaxis3"] |= {"range": [0, 1.15], "showticklabels": False}
    layout["yaxis4"]["range"] = [-0.05 * trace.theta, 1.15 * max(trace.theta, wanted)]
    return {"data": data, "layout": layout}


@Drawing
def input_order(
    trains: Tensor, weights: Sequence[float], trace: NeuronTrace, names: Sequence[str], title: str | None = None
) -> Spec:
    """The input spikes [inputs, T] of one neuron, the current that they make, its membrane potential and its own spikes.

    >>> from micelab.one_neuron import trace_neuron
    >>> trains, weights = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]]), (1.5, -1.0)
    >>> trace = trace_neuron(torch.tensor(weights) @ trains)
    >>> print(input_order(trains, weights, trace, ["push", "hold"]).layout.title.text)
    The same spikes, in this order
    """
    if tuple(trains.shape) != (len(weights), trace.time_steps) or len(names) != len(weights):
        raise InputError(
            f"trains has shape {tuple(trains.shape)}: {len(weights)} weights, {len(names)} names and {trace.time_steps} steps "
            "ask for one row an input, one column a step"
        )
    steps = list(range(1, trace.time_steps + 1))
    places = [(t + 1, row) for row in range(len(weights)) for t in range(trace.time_steps) if trains[row, t]]
    tick = {"symbol": "line-ns", "size": 16, "line": {"width": 4, "color": SPIKE}}
    data: list[Spec] = [
        _placed({"type": "scatter", "x": [x for x, _ in places], "y": [y for _, y in places], "mode": "markers"}, 1),
        _bars(steps, trace.current.tolist(), "I", NEUTRAL, 0.7, row=2),
        *_membrane(trace, row=3),
        _bars(steps, trace.spikes.tolist(), "s", SPIKE, 0.16, row=4),
    ]
    data[0] |= {"marker": tick, "name": "input spikes"}
    alt = f"{int(trains.sum())} input spikes over {trace.time_steps} steps: the neuron sends {trace.count}, a steady current of "
    alt += f"the same mean {trace.asked}; it {trace.verdict()} and keeps {trace.residual:.3g} in its membrane."
    layout = look(title or "The same spikes, in this order", alt, 470) | {"showlegend": False}
    layout |= _stacked((0.2, 0.22, 0.46, 0.12), ("", "I(t)", "v(t)", "s(t)"), trace.time_steps)
    shown = [f"{name} ({weight:+.3g})" for name, weight in zip(names, weights, strict=True)]
    layout["yaxis"] |= {"tickvals": list(range(len(shown))), "ticktext": shown, "range": [len(shown) - 0.5, -0.5]}
    reach, counts = 1.1 * max(sum(w for w in weights if w > 0), -sum(w for w in weights if w < 0)), trains.sum(1).tolist()
    layout["yaxis2"]["range"] = [-reach, reach]
    down, up = (sum(sign * w * n for w, n in zip(weights, counts, strict=True) if sign * w > 0) for sign in (-1, 1))
    layout["yaxis3"]["range"] = [-down - 0.2, up + trace.theta]  # the same for every order, so that orders compare
    layout["yaxis4"] |= {"range": [0, 1.15], "showticklabels": False}
    layout["margin"] |= {"l": 100}
    return {"data": data, "layout": layout}


@Drawing
def staircase_over_relu(
    time_steps: int, v0: float = 0.5, theta: float = 1.0, z: float | None = None, title: str | None = None
) -> Spec:
    """What a neuron with a steady current says in T steps, Q(z), over what ReLU says; each error shaded in its colour.

    `z` rings one point of the staircase.

    >>> staircase_over_relu(time_steps=4, v0=0.5, z=0.4).layout.meta["alt"]
    'A staircase of 4 steps over ReLU, start v0 = 0.5: between 0 and theta = 1 it is off by at most 0.125, on average by 0.'
    """
    low, high, step = -0.25 * theta, 1.5 * theta, theta / time_steps
    jumps = [(k - v0) * step for k in range(1, time_steps + 1)]
    x = sorted([low, 0.0, theta, high, *jumps, *jumps])  # a jump has two points, one at each end
    says = [step * min(time_steps, sum(jump <= place for jump in jumps)) for place in x]
    for number in range(len(x) - 1):
        if x[number] == x[number + 1] and x[number] in jumps:
            says[number] -= step
    relu, limited = [max(0.0, place) for place in x], [min(max(0.0, place), theta) for place in x]
    data: list[Spec] = []
    for upper, kind in ((says, "quantization"), (relu, "clipping")):
        edge: Spec = {"type": "scatter", "x": x, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
        data.append(edge | {"y": limited, "showlegend": False})
        data.append(edge | {"y": upper, "fill": "tonexty", "fillcolor": _faint(COLOURS[kind]), "name": f"{kind} error"})
    data += [
        _line(x, relu, "ReLU", TOTAL, dash="dash"),
        _line(x, says, "Q(z)", SPIKE),
    ]
    if z is not None:
        said = float(quantize(torch.tensor(z, dtype=torch.float64), theta, time_steps, v0))
        data.append(_ring(z, said, f"Q({z:.3g}) = {said:.3g}"))
    error = staircase_error(time_steps, v0, theta)
    alt = f"A staircase of {time_steps} steps over ReLU, start v0 = {v0:.3g}: between 0 and theta = {theta:.3g} it is off by at "
    alt += f"most {error.largest:.3g}, on average by {error.mean:.3g}."
    layout = look(title or f"Q over ReLU: T = {time_steps}, v0 = {v0:.3g}", alt, 400, [t["name"] for t in data if "name" in t])
    layout["xaxis"] = {"title": {"text": "input current z (activation units)"}, "range": [low, high]}
    layout["yaxis"] = {"title": {"text": "what the neuron says (activation units)"}, "range": [-0.05 * theta, 1.55 * theta]}
    return {"data": data, "layout": layout}


@Drawing
def start_choice(time_steps: int, v0: float = 0.5, theta: float = 1.0, title: str | None = None) -> Spec:
    """Quantization error against the start v0, for an even spread of inputs: its rms, and its mean, which v0 = 1/2 removes.

    >>> start_choice(time_steps=4, v0=0.0).layout.meta["alt"].split("; ")[1]
    'at v0 = 0 they are 0.144 and -0.125.'
    """
    starts = [place / 20 for place in range(21)]
    errors = [staircase_error(time_steps, start, theta) for start in starts]
    now, best = staircase_error(time_steps, v0, theta), staircase_error(time_steps, 0.5, theta)
    data = [
        _line(starts, [e.rms for e in errors], "rms", COLOURS["quantization"]),
        _line(starts, [e.mean for e in errors], "mean", COLOURS["quantization"], dash="dash"),
        _ring(v0, now.rms, f"rms {now.rms:.3g}"),
        _ring(v0, now.mean, f"mean {now.mean:.3g}"),
    ]
    alt = f"Quantization error against the start at T = {time_steps}: the rms is least, {best.rms:.3g}, at v0 = 1/2, where the "
    alt += f"mean is 0; at v0 = {v0:.3g} they are {now.rms:.3g} and {now.mean:.3g}."
    layout = look(title or "Which start is best?", alt, 400, ["rms", "mean"])
    layout["margin"] |= {"l": 78}
    layout["xaxis"] = {"title": {"text": "start v0 (in units of θ)"}, "range": [-0.03, 1.03]}
    layout["yaxis"] = {
        "title": {"text": "quantization error (activation units)"},
        "range": [-0.55 * theta / time_steps, 0.65 * theta / time_steps],
    }
    return {"data": data, "layout": layout}


@Drawing
def activation_histogram(z: Tensor, theta: float, bins: int = 40, title: str | None = None, layer: str | None = None) -> Spec:
    """How the positive inputs of a `layer` are spread, on a log scale; what lies above theta has the colour of clipping.

    >>> activation_histogram(torch.linspace(-1, 2, 301), theta=1.5).layout.title.text
    '25.0 % of the active inputs are above θ'
    """
    positive = z.flatten()[z.flatten() > 0].double()
    if not len(positive):
        raise InputError("no input of the layer is above 0: there is nothing to spread out")
    top = float(positive.max())
    width, above = top / bins, 100 * float((positive > theta).double().mean())
    middles = [(number + 0.5) * width for number in range(bins)]
    shares = (torch.histc(positive, bins, 0, top) / len(positive) * 100).tolist()
    colours = [COLOURS["clipping"] if middle > theta else NEUTRAL for middle in middles]
    bar = {"type": "bar", "x": middles, "y": shares, "width": width * 0.92, "marker": {"color": colours}}
    alt = f"Spread of the positive inputs of {layer or 'a layer'}, up to {top:.3g}: "
    alt += f"{above:.2g} % of them lie above theta = {theta:.3g}."
    layout = look(title or f"{above:.1f} % of the active inputs are above θ", alt, 400)
    layout |= {"shapes": [_upright(theta)], "annotations": [_note(theta, f"θ = {theta:.2f}")]}
    of = f" of {escape(layer, quote=False)}" if layer else ""
    layout["xaxis"] = {"title": {"text": f"input current z{of} (activation units)"}, "range": [0, 1.02 * top]}
    layout["yaxis"] = {"title": {"text": "share of the active inputs (%)"}, "type": "log", "range": [-2.3, 1.8]}
    layout["yaxis"] |= {"tickvals": [0.01, 0.1, 1, 10], "ticktext": ["0.01", "0.1", "1", "10"]}
    return {"data": [bar | {"hovertemplate": "z = %{x:.2f}: %{y:.2f} %<extra></extra>"}], "layout": layout}


@Drawing
def threshold_choice(errors: ThresholdErrors, theta: float, time_steps: int, title: str | None = None) -> Spec:
    """Clipping and quantization error of a layer against theta, both together, and where that is least.

    >>> from micelab.one_neuron import threshold_errors
    >>> errors = threshold_errors(torch.linspace(-1, 2, 301), torch.linspace(0.5, 2, 31), time_steps=4)
    >>> [line.name for line in threshold_choice(errors, theta=1.5, time_steps=4).data]
    ['clipping', 'quantization', 'both', 'least', None]
    """
    x, total, best = errors.thetas.tolist(), errors.total.tolist(), errors.best
    place = int((errors.thetas - theta).abs().argmin())
    top = 1.2 * float(errors.quantization.max())  # clipping grows far beyond: it is cut off, the ring stays in sight
    star = {"symbol": "star", "size": 15, "color": TOTAL}
    data = [
        _line(x, errors.clipping.tolist(), "clipping", COLOURS["clipping"]),
        _line(x, errors.quantization.tolist(), "quantization", COLOURS["quantization"]),
        _line(x, total, "both", TOTAL, dash="dot"),
        {"type": "scatter", "x": [x[best]], "y": [total[best]], "mode": "markers", "marker": star, "name": "least"},
        _ring(x[place], min(total[place], 0.98 * top), f"θ = {x[place]:.3g}: {total[place]:.3g}"),
    ]
    data[3]["hovertemplate"] = f"least at θ = {x[best]:.3g}: {total[best]:.3g}<extra></extra>"
    alt = f"At T = {time_steps} clipping falls and quantization grows with theta; together they are least, {total[best]:.3g}, "
    alt += f"at theta = {x[best]:.3g}; at {x[place]:.3g} they are {total[place]:.3g}."
    names = ["clipping", "quantization", "both", "least"]
    layout = look(title or f"Who pays at T = {time_steps}?", alt, 400, names) | {"shapes": [_upright(x[place])]}
    layout["xaxis"] = {"title": {"text": "threshold θ (activation units)"}, "range": [0, 1.02 * x[-1]]}
    layout["yaxis"] = {"title": {"text": "error (rms, activation units)"}, "range": [0, top]}
    return {"data": data, "layout": layout}


def _stacked(heights: Sequence[float], names: Sequence[str], time_steps: int, gap: float = 0.05) -> Spec:
    """Axes over the same T steps, one below the other; `heights` are shares of the whole."""
    room, high, last = 1 - gap * (len(heights) - 1), 1.0, len(heights)
    axes: Spec = {}
    for row, (height, name) in enumerate(zip(heights, names, strict=True), start=1):
        low, key = max(0.0, high - height / sum(heights) * room), "" if row == 1 else str(row)
        axes[f"yaxis{key}"] = {"domain": [low, high], "anchor": f"x{key}", "title": {"text": name, "standoff": 4}}
        axes[f"xaxis{key}"] = {"anchor": f"y{key}", "range": [0, time_steps + 0.6], "dtick": max(1, time_steps // 8)}
        axes[f"xaxis{key}"] |= {"showticklabels": row == last, "zeroline": False}
        high = low - gap
    axes[f"xaxis{last}"]["title"] = {"text": "time-step t"}
    return axes


def _placed(trace: Spec, row: int) -> Spec:
    return trace if row == 1 else trace | {"xaxis": f"x{row}", "yaxis": f"y{row}"}


def _membrane(trace: NeuronTrace, row: int) -> list[Spec]:
    """v over time: up to its value before the reset, down by theta at a spike; the threshold is dotted."""
    x, y = [0.0], [trace.v0 * trace.theta]
    for t, (before, after) in enumerate(zip(trace.before.tolist(), trace.after.tolist(), strict=True), start=1):
        x, y = x + [t, t], y + [before, after]
    threshold = _line([0, trace.time_steps + 0.6], [trace.theta] * 2, "θ", TOTAL, row=row, dash="dot")
    return [_line(x, y, "v", MEMBRANE, row=row), threshold]


def _membrane_range(trace: NeuronTrace) -> list[float]:
    low, high = min(0.0, float(trace.after.min())), max(1.1 * trace.theta, float(trace.before.max()))
    return [low - 0.08 * (high - low), high + 0.08 * (high - low)]


def _bars(x: Sequence[float], y: Sequence[float], name: str, colour: str, width: float, row: int = 1) -> Spec:
    bars = {"type": "bar", "x": list(x), "y": list(y), "width": width, "name": name, "marker": {"color": colour}}
    return _placed(bars | {"hovertemplate": f"{name}(%{{x}}) = %{{y:.3g}}<extra></extra>"}, row)


def _line(
    x: Sequence[float], y: Sequence[float], name: str, colour: str,
    row: int = 1, dash: str = "solid", shape: str = "linear", mode: str = "lines",
) -> Spec:  # fmt: skip
    line: dict[str, Any] = {"color": colour, "width": 2.5 if dash == "solid" else 1.5, "dash": dash, "shape": shape}
    drawn = {"type": "scatter", "x": list(x), "y": list(y), "name": name, "mode": mode, "line": line}
    return _placed(drawn | {"hovertemplate": "%{y:.3g}"}, row)


def _ring(x: float, y: float, said: str) -> Spec:
    """The mark that moves with a slider."""
    marker = {"symbol": "circle-open", "size": 14, "color": CHOSEN, "line": {"width": 3}}
    ring = {"type": "scatter", "x": [x], "y": [y], "mode": "markers", "marker": marker, "showlegend": False}
    return ring | {"hovertemplate": f"{said}<extra></extra>"}


def _upright(x: float) -> Spec:
    line = {"color": CHOSEN, "width": 1.5, "dash": "dot"}
    return {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": line}


def _note(x: float, text: str) -> Spec:
    return {"x": x, "y": 1, "yref": "paper", "yshift": 9, "text": text, "showarrow": False}


def _faint(colour: str) -> str:
    """A colour "#RRGGBB" as plotly writes a see-through one."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.35)"
