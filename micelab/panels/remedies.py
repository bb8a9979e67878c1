"""The panel of the remedies: tick them, alone or together, and every layer's errors and the accuracy follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from micelab import figures
from micelab.exceptions import InputError
from micelab.figures.style import CHOSEN, Spec
from micelab.panels.panel import Panel, connect, widgets
from micelab.pictures import relative_errors
from micelab.report.remedies import REMEDIES, Trial, every_set, with_included


@dataclass(frozen=True)
class Ticked:
    """What the reader has ticked, without what it takes along."""

    remedies: frozenset[str] = frozenset()

    def toggled(self, remedy: str, on: bool) -> Ticked:
        """With this remedy or without it."""
        return replace(self, remedies=self.remedies | {remedy} if on else self.remedies - {remedy})


class RemedyPanel(Panel):
    """A box to tick for each remedy: the four errors of every layer at one T, and accuracy over T, for what is ticked.

    trials: of `micelab.report.remedies.try_remedies`, all of one T; ann_accuracy: in [0, 1]; ticked: at the start. What joint
    training takes along is ticked with it and cannot be unticked.

    >>> import micelab
    >>> from micelab.report.remedies import try_remedies
    >>> networks = {"clip": micelab.small_cnn(activation="clip"), "quantized": micelab.small_cnn(activation="quant_clip")}
    >>> networks["joint"] = micelab.joint.prepare(networks["quantized"], time_steps=4)
    >>> trials = try_remedies(networks, micelab.load_data("digits").validation.head(8), time_steps=4)
    >>> sorted(RemedyPanel(trials, ann_accuracy=0.1, ticked=["joint training"]).trial.remedies)
    ['joint training', 'quantized training', 'start at v0 = 1/2']
    """

    def __init__(self, trials: Mapping[frozenset[str], Trial], ann_accuracy: float, ticked: Iterable[str] = ()):
        missing = [sorted(chosen) for chosen in every_set() if chosen not in trials]
        if missing:
            raise InputError(f"there is no trial of {missing[0] or 'no remedy'}: give all that try_remedies gives")
        self.trials, self.ann_accuracy = dict(trials), ann_accuracy
        self.state, self._painting = Ticked(frozenset(ticked)), False
        self._drawn = {chosen: self._drawings(trial) for chosen, trial in self.trials.items()}
        wide = widgets.Layout(width="360px")
        self.boxes = {name: widgets.Checkbox(value=False, description=name, indent=False, layout=wide) for name in REMEDIES}
        for name, box in self.boxes.items():
            connect(box, partial(self._clicked, name))
        self.build(list(self.boxes.values()))
        self._paint()

    @property
    def time_steps(self) -> int:
        """The T of the errors."""
        return next(iter(self.trials.values())).table.time_steps

    @property
    def trial(self) -> Trial:
        """What is shown."""
        return self.trials[with_included(self.state.remedies)]

    def _clicked(self, name: str, on: bool) -> None:
        if self._painting:
            return
        taken_along = with_included(self.state.remedies - {name})
        self.choose(self.state if name in taken_along else self.state.toggled(name, on))

    def choose(self, state: Ticked) -> None:
        super().choose(state)
        self._paint()

    def _paint(self) -> None:
        """Sets the boxes as the state has them."""
        ticked, self._painting = with_included(self.state.remedies), True
        try:
            for name, box in self.boxes.items():
                box.value = name in ticked
                box.disabled = name in with_included(self.state.remedies - {name})
        finally:
            self._painting = False

    def _drawings(self, trial: Trial) -> list[Spec]:
        rows = [relative_errors(t.table) | {"total": [e.relative for e in t.table.layers.values()]} for t in self.trials.values()]
        bars = figures.error_bars(trial.table, title=f"Errors of every layer, T = {self.time_steps}")
        bars.update_yaxes(range=[0, 105 * max(max(values) for row in rows for values in row.values())])
        naive = replace(self.trials[frozenset()].curve, method="nothing ticked")
        curves = [naive, replace(trial.curve, method="what is ticked")]
        over_time = figures.accuracy_over_time(curves, self.ann_accuracy, title="Accuracy over time-steps")
        ring = {"symbol": "circle-open", "size": 16, "color": CHOSEN, "line": {"width": 3, "color": CHOSEN}}
        x, y = [trial.curve.true(self.time_steps)], [100 * trial.curve.at(self.time_steps)]
        over_time.add_scatter(x=x, y=y, mode="markers", marker=ring, showlegend=False, hoverinfo="skip")
        bars.update_layout(height=420)
        over_time.update_layout(height=420)
        return [bars.to_plotly_json(), over_time.to_plotly_json()]

    def specs(self) -> list[Spec]:
        return self._drawn[self.trial.remedies]

    def named(self) -> str:
        """What is ticked, in words."""
        return " + ".join(name for name in REMEDIES if name in self.trial.remedies) or "no remedy"

    def sentence(self) -> str:
        reached = 100 * self.trial.curve.at(self.time_steps)
        last = list(self.trial.table.layers.values())[-1]
        return (
            f"{self.named()}, T = {self.time_steps}: accuracy ≈ {reached:.1f} % (ANN ≈ {100 * self.ann_accuracy:.1f} %); "
            f"error in the last spiking layer ≈ {100 * last.relative:.0f} % of its signal."
        )

    def live(self) -> str:
        layers = self.trial.table.layers.values()
        wrong = sum(layer.over_firing + layer.under_firing for layer in layers) / len(layers)
        reached = 100 * self.trial.curve.at(self.time_steps)
        return (
            f'T = {self.time_steps}: <b style="font-size:1.4em">{reached:.1f} %</b> of the images right '
            f"(ANN {100 * self.ann_accuracy:.1f} %)<br>{100 * wrong:.1f} % of the neurons over- or under-fire<br>"
            f"error in the last spiking layer: {100 * list(layers)[-1].relative:.0f} % of its signal"
        )
