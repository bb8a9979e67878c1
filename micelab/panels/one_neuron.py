"""Panels about one neuron: its timeline, its staircase over ReLU, the order of its input spikes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from micelab import figures
from micelab.activation import quantize
from micelab.exceptions import InputError
from micelab.figures.style import Spec
from micelab.one_neuron import DUST, NeuronTrace, staircase_error, trace_neuron
from micelab.panels.panel import Panel, slider, widgets


@dataclass(frozen=True)
class Steady:
    """One neuron under the same current at every step; theta is 1."""

    current: float = 0.3
    time_steps: int = 8
    v0: float = 0.5

    def trace(self) -> NeuronTrace:
        """All that happens in it."""
        return trace_neuron(torch.full((self.time_steps,), self.current, dtype=torch.float64), 1.0, self.v0)


class NeuronPanel(Panel):
    """One neuron step by step: sliders for its steady current I, the number of steps T and the start v0.

    >>> NeuronPanel(current=0.3, time_steps=8).sentence()
    'I = 0.30, T = 8, v0 = 0.50: 2 spikes, rate 0.250, ReLU 0.300; 0.90 left in the membrane.'
    """

    wide = True

    def __init__(self, current: float = 0.3, time_steps: int = 8, v0: float = 0.5):
        self.state = Steady(current, time_steps, v0)
        self.current = slider("I", current, -0.5, 1.5, 0.05, lambda value: self.choose(replace(self.state, current=value)))
        self.steps = slider("T", time_steps, 1, 32, 1, lambda value: self.choose(replace(self.state, time_steps=int(value))))
        self.start = slider("v0", v0, 0.0, 1.0, 0.05, lambda value: self.choose(replace(self.state, v0=value)))
        formula = r"$v \leftarrow v + I,\quad s = [\,v \ge \theta\,],\quad v \leftarrow v - \theta s \qquad (\theta = 1)$"
        self.build([self.current, self.steps, self.start], formula)

    def specs(self) -> list[Spec]:
        return [figures.neuron_timeline.spec(self.state.trace())]

    def sentence(self) -> str:
        trace = self.state.trace()
        return (
            f"I = {self.state.current:.2f}, T = {self.state.time_steps}, v0 = {self.state.v0:.2f}: {trace.count} spikes, "
            f"rate {trace.rate:.3f}, ReLU {max(0.0, self.state.current):.3f}; {trace.residual:.2f} left in the membrane."
        )

    def live(self) -> str:
        trace = self.state.trace()
        charge = self.state.v0 + self.state.current * self.state.time_steps
        return (
            rf"$\theta n + v(T) = {trace.count} + {_signed(trace.residual)} = {charge:.2f} = \theta v_0 + \sum I$<br>"
            rf"$\varphi = \theta n / T = {trace.rate:.3f}$, ReLU says {max(0.0, self.state.current):.3f}"
        )


@dataclass(frozen=True)
class Stairs:
    """A staircase of T steps with start v0 and threshold theta, looked at in the point z."""

    time_steps: int = 4
    v0: float = 0.0
    z: float = 0.4
    theta: float = 1.0

    def says(self) -> float:
        """Q(z)."""
        return float(quantize(torch.tensor(self.z, dtype=torch.float64), self.theta, self.time_steps, self.v0 + DUST))


class StaircasePanel(Panel):
    """The staircase over ReLU: sliders for T, the start v0 and the input z; both errors shaded, the best start beside them.

    >>> StaircasePanel(time_steps=4, v0=0.5, z=0.4).sentence()
    'T = 4, v0 = 0.50: Q(0.40) = 0.500; quantization error: mean 0.000, rms 0.072, at most 0.125.'
    """

    def __init__(self, time_steps: int = 4, v0: float = 0.0, z: float = 0.4):
        self.state = Stairs(time_steps, v0, z)
        self.steps = slider("T", time_steps, 1, 32, 1, lambda value: self.choose(replace(self.state, time_steps=int(value))))
        self.start = slider("v0", v0, 0.0, 1.0, 0.05, lambda value: self.choose(replace(self.state, v0=value)))
        self.input = slider("z", z, -0.25, 1.5, 0.05, lambda value: self.choose(replace(self.state, z=value)))
        self.build(
            [self.steps, self.start, self.input],
            r"$Q(z) = \frac{\theta}{T}\,\mathrm{clip}(\lfloor T z/\theta + v_0 \rfloor, 0, T), \quad \theta = 1$",
        )

    def specs(self) -> list[Spec]:
        now = self.state
        stairs = figures.staircase_over_relu.spec(now.time_steps, now.v0, now.theta, now.z)
        return [stairs, figures.start_choice.spec(now.time_steps, now.v0)]

    def sentence(self) -> str:
        now, error = self.state, staircase_error(self.state.time_steps, self.state.v0)
        return (
            f"T = {now.time_steps}, v0 = {now.v0:.2f}: Q({now.z:.2f}) = {now.says():.3f}; "
            f"quantization error: mean {error.mean:.3f}, rms {error.rms:.3f}, at most {error.largest:.3f}."
        )

    def live(self) -> str:
        now, error = self.state, staircase_error(self.state.time_steps, self.state.v0)
        inside = f"{now.time_steps} \\cdot {_signed(now.z)} + {now.v0:.2f}"
        return (
            rf"$Q({now.z:.2f}) = \frac{{1}}{{{now.time_steps}}}\,\mathrm{{clip}}(\lfloor {inside} \rfloor, 0, {now.time_steps}) "
            rf"= {now.says():.3f}$<br>"
            f"quantization error: mean <b>{error.mean:.3f}</b>, rms <b>{error.rms:.3f}</b>, at most <b>{error.largest:.3f}</b>"
        )


@dataclass(frozen=True)
class Order:
    """Input spikes [inputs, T] as rows of 0 and 1; `lifted` is the one that the reader holds, (row, step)."""

    trains: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...]
    lifted: tuple[int, int] | None = None

    def tensor(self) -> Tensor:
        """The spikes as a tensor [inputs, T]."""
        return torch.tensor(self.trains, dtype=torch.float64)

    def trace(self) -> NeuronTrace:
        """The neuron under the current that these spikes make; theta = 1, v0 = 1/2."""
        weights = torch.tensor(self.weights, dtype=torch.float64)
        return trace_neuron(weights @ self.tensor(), 1.0, 0.5)

    def touched(self, row: int, step: int) -> Order:
        """A click: on a spike lifts it (or lays it back), on an empty place of its row sets the lifted spike there."""
        if self.trains[row][step]:
            return replace(self, lifted=None if self.lifted == (row, step) else (row, step))
        if self.lifted is None or self.lifted[0] != row:
            return self
        moved = [int(t == step) if t in (step, self.lifted[1]) else spike for t, spike in enumerate(self.trains[row])]
        return replace(self, trains=tuple(tuple(moved) if r == row else t for r, t in enumerate(self.trains)), lifted=None)

    def arranged(self, offsets: Sequence[str]) -> Order:
        """Every row's spikes "first", "last" or "even" in time; their number stays."""
        length = len(self.trains[0])
        rows = []
        for row, offset in zip(self.trains, offsets, strict=True):
            n = sum(row)
            at = {"first": set(range(n)), "last": set(range(length - n, length))}
            places = at[offset] if offset in at else {(2 * k + 1) * length // (2 * n) for k in range(n)}
            rows.append(tuple(int(t in places) for t in range(length)))
        return replace(self, trains=tuple(rows), lifted=None)


class OrderPanel(Panel):
    """Two inputs of one neuron, one pushing and one holding back: click a spike to lift it, then where it shall go.

    However the spikes are ordered, each input sends as many as before; what the neuron makes of them changes.

    >>> print(OrderPanel().sentence().split(":")[0])
    mean current 0.375 asks for 3 spikes, the neuron sends 3
    """

    wide = True
    NAMES = ("push", "hold")
    ORDERS = {"even": ("even", "even"), "push first": ("first", "last"), "hold first": ("last", "first")}  # noqa: RUF012

    def __init__(
        self, push: Sequence[int] = (1, 0, 1, 0, 1, 0, 1, 0), hold: Sequence[int] = (0, 1, 0, 1, 0, 1, 0, 0),
        weights: tuple[float, float] = (1.5, -1.0),
    ):  # fmt: skip
        trains = (tuple(int(s) for s in push), tuple(int(s) for s in hold))
        if len(trains[0]) != len(trains[1]) or not trains[0] or not {*trains[0], *trains[1]} <= {0, 1}:
            raise InputError(f"push and hold are {trains}: give two rows of 0 and 1 of the same length")
        self.state = Order(trains, weights)
        small = widgets.Layout(width="34px", margin="1px", padding="0")
        self.grid = [[widgets.Button(layout=small) for _ in row] for row in trains]
        rows = []
        for number, (name, weight, buttons) in enumerate(zip(self.NAMES, weights, self.grid, strict=True)):
            rows.append(widgets.HBox([widgets.Label(f"{name} ({weight:+g})", layout=widgets.Layout(width="80px")), *buttons]))
            for step, button in enumerate(buttons):
                button.on_click(lambda _, row=number, step=step: self.choose(self.state.touched(row, step)))
        self.orders = {name: widgets.Button(description=name, layout=widgets.Layout(width="110px")) for name in self.ORDERS}
        for name, button in self.orders.items():
            button.on_click(lambda _, name=name: self.choose(self.state.arranged(self.ORDERS[name])))
        self.build(
            [*rows, widgets.HBox(list(self.orders.values()))],
            r"Click a spike to lift it, then an empty place of its row. $\theta = 1,\ v_0 = 1/2$",
        )
        self._paint()

    def choose(self, state: Any) -> None:
        super().choose(state)
        self._paint()

    def _paint(self) -> None:
        for row, buttons in enumerate(self.grid):
            for step, button in enumerate(buttons):
                spike = self.state.trains[row][step]
                button.description = "┃" if spike else " "
                lifted = self.state.lifted == (row, step)
                button.button_style = "warning" if lifted else "primary" if spike else ""
                button.tooltip = f"{self.NAMES[row]}, step {step + 1}: {'spike' if spike else 'nothing'}"

    def specs(self) -> list[Spec]:
        now = self.state
        return [figures.input_order.spec(now.tensor(), now.weights, now.trace(), self.NAMES)]

    def sentence(self) -> str:
        trace = self.state.trace()
        return (
            f"mean current {trace.mean_current:.3f} asks for {trace.asked} spikes, the neuron sends {trace.count}: "
            f"it {trace.verdict()}; v(T) = {trace.residual:.2f}, timing error {0.0 + trace.timing_error:+.3f}."
        )

    def live(self) -> str:
        trace = self.state.trace()
        return (
            rf"$\bar z = {trace.mean_current:.3f}$ asks for <b>{trace.asked}</b> spikes; sent: <b>{trace.count}</b>; "
            rf"$v(T) = {trace.residual:.2f}$<br>the neuron <b>{trace.verdict()}</b>: timing error "
            rf"$\varphi - Q(\bar z) = {0.0 + trace.timing_error:+.3f}$"
        )


def _signed(value: float) -> str:
    return f"({value:.2f})" if value < 0 else f"{value:.2f}"
