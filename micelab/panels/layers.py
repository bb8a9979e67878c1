"""Panels about a layer or a whole network: where its threshold lies, how an error grows with depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from micelab import figures
from micelab.errors import ErrorTable
from micelab.exceptions import InputError
from micelab.figures.style import Spec
from micelab.one_neuron import ThresholdErrors, threshold_errors
from micelab.panels.panel import Panel, choice
from micelab.pictures import relative_errors


@dataclass(frozen=True)
class Threshold:
    """A threshold and the number of steps that it is judged at."""

    theta: float
    time_steps: int


class ThresholdPanel(Panel):
    """Real inputs `z` of one layer: a slider moves theta through them, another sets T; errors and the best theta beside.

    z: any shape, activation units, something above 0; `time_steps`: the T to choose from; `layer`: its name, for the axis.

    >>> ThresholdPanel(torch.linspace(-1, 2, 100), (2, 4), theta=1.0).state
    Threshold(theta=1.0, time_steps=4)
    """

    CANDIDATES = 60
    SAMPLES = 20_000

    def __init__(
        self, z: Tensor, time_steps: Sequence[int] = (1, 2, 4, 8, 16, 32), theta: float | None = None, start: int = 4,
        layer: str | None = None,
    ):  # fmt: skip
        z = z.detach().flatten().double().cpu()
        if not len(z) or float(z.max()) <= 0:
            raise InputError("z holds nothing above 0: give the inputs of a layer that says something")
        if not time_steps:
            raise InputError("time_steps is empty: give the T to choose from, such as (1, 2, 4)")
        top = float(z.max())
        picked = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))[: self.SAMPLES]
        self.z, self.layer = torch.cat([z[picked], z.max()[None]]), layer
        self.sampled = f" (of {len(picked):,} inputs)" if len(picked) < len(z) else ""
        self.thetas = torch.linspace(top / self.CANDIDATES, top, self.CANDIDATES, dtype=torch.float64)
        self.errors: dict[int, ThresholdErrors] = {t: threshold_errors(self.z, self.thetas, t) for t in time_steps}
        places = [float(f"{value:.3g}") for value in self.thetas.tolist()]
        self._theta_at = dict(zip(places, self.thetas.tolist(), strict=True))
        chosen = min(places, key=lambda place: abs(place - (top if theta is None else theta)))
        self.state = Threshold(self._theta_at[chosen], start if start in self.errors else next(iter(self.errors)))
        self.theta = choice("θ", places, chosen, lambda place: self.choose(replace(self.state, theta=self._theta_at[place])))
        self.steps = choice("T", time_steps, self.state.time_steps, lambda t: self.choose(replace(self.state, time_steps=t)))
        self.build(
            [self.theta, self.steps],
            r"$E^2(\theta) = \overline{(Q(z) - \mathrm{clip}(z, 0, \theta))^2}"
            r" + \overline{(\mathrm{clip}(z, 0, \theta) - \mathrm{relu}(z))^2}$",
        )

    def specs(self) -> list[Spec]:
        now = self.state
        choice = figures.threshold_choice.spec(self.errors[now.time_steps], now.theta, now.time_steps)
        return [figures.activation_histogram.spec(self.z, now.theta, layer=self.layer), choice]

    def _here(self) -> tuple[ThresholdErrors, int]:
        errors = self.errors[self.state.time_steps]
        return errors, int((errors.thetas - self.state.theta).abs().argmin())

    def sentence(self) -> str:
        errors, here = self._here()
        return (
            f"θ ≈ {self.state.theta:.2f}, T = {self.state.time_steps}: clipping ≈ {float(errors.clipping[here]):.3f}, "
            f"quantization ≈ {float(errors.quantization[here]):.3f}, both ≈ {float(errors.total[here]):.3f}{self.sampled}; "
            f"least at θ ≈ {float(errors.thetas[errors.best]):.2f}."
        )

    def live(self) -> str:
        errors, here = self._here()
        above = 100 * float((self.z > self.state.theta).double().sum() / (self.z > 0).double().sum())

        def bold(kind: str) -> str:
            return f'<b style="color:{figures.COLOURS[kind]}">{float(getattr(errors, kind)[here]):.3f}</b>'

        return (
            f"clipping {bold('clipping')}, paid by {above:.1f} % of the active inputs<br>"
            f"quantization {bold('quantization')}, paid by the others<br>"
            f"both <b>{float(errors.total[here]):.3f}</b>; least <b>{float(errors.total[errors.best]):.3f}</b> "
            f"at θ = {float(errors.thetas[errors.best]):.2f}"
        )


@dataclass(frozen=True)
class Depth:
    """The T whose errors are drawn strong."""

    time_steps: int


class DepthPanel(Panel):
    """The errors of every layer of one network: a slider over T; timing against depth, and all four terms at this T.

    >>> import micelab
    >>> ann, images = micelab.small_cnn(activation="quant_clip"), torch.rand(4, 1, 8, 8)
    >>> snn = micelab.convert(ann, "qcfs")
    >>> DepthPanel({T: micelab.error_breakdown(ann, snn, images, T) for T in (2, 4)}, start=4).state
    Depth(time_steps=4)
    """

    def __init__(self, tables: Mapping[int, ErrorTable], start: int | None = None):
        if not tables:
            raise InputError("there are no error tables: give one for each T, {4: micelab.error_breakdown(..., time_steps=4)}")
        self.tables = dict(sorted(tables.items()))
        self.state = Depth(start if start in self.tables else next(iter(self.tables)))
        self.steps = choice("T", list(self.tables), self.state.time_steps, lambda t: self.choose(Depth(t)))
        self._drawn = {t: self._drawings(t) for t in self.tables}
        self.build([self.steps])

    def _drawings(self, t: int) -> list[Spec]:
        rows = [relative_errors(table) for table in self.tables.values()]
        depth = figures.error_over_depth(self.tables, t, title=f"Timing error against depth (T = {t} strong)")
        depth.update_yaxes(range=[0, 105 * max(max(row["timing"]) for row in rows)])
        bars = figures.error_bars(self.tables[t], title=f"All four terms at T = {t}")
        bars.update_yaxes(range=[0, 105 * max(max(values) for row in rows for values in row.values())])
        return [figure.to_plotly_json() for figure in (depth, bars)]

    def specs(self) -> list[Spec]:
        return self._drawn[self.state.time_steps]

    def sentence(self) -> str:
        table = self.tables[self.state.time_steps]
        timing = relative_errors(table)["timing"]
        total = list(table.layers.values())[-1].relative
        return (
            f"T = {table.time_steps}: timing error ≈ {100 * timing[0]:.0f} % of the signal in the first spiking layer, "
            f"≈ {100 * timing[-1]:.0f} % in the last; total there ≈ {100 * total:.0f} %."
        )
