"""The panel of a checkup: every layer of a reader's network by what becomes of it, with reason and remedy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

from micelab import figures
from micelab.exceptions import InputError
from micelab.figures.style import Spec
from micelab.graph.checkup import Checkup, Finding
from micelab.panels.panel import Panel, connect, widgets
from micelab.still import as_html


@dataclass(frozen=True)
class Place:
    """A network, and the number of one of its layers."""

    network: str
    layer: int = 0


class CheckupPanel(Panel):
    """Choose a network and walk through its layers: which become neurons, which stay, which are refused, and why.

    reports: `micelab.checkup(...)` of each network, by name.

    >>> import micelab
    >>> CheckupPanel({"ours": micelab.checkup(micelab.small_cnn())}).sentence()
    'ours, it converts; normalize (nn.Normalize) stays: affine: its mean output over time is its output for the mean input.'
    """

    wide = True

    def __init__(self, reports: Mapping[str, Checkup]):
        if not reports or not all(report.findings for report in reports.values()):
            raise InputError("there is no layer to show: give reports of networks, {'mine': micelab.checkup(net)}")
        self.reports, self._moving = dict(reports), False
        first = next(iter(self.reports))
        self.state = Place(first, self._first_problem(first))
        look = {"layout": widgets.Layout(width="360px")}
        self.network = widgets.ToggleButtons(options=list(self.reports), value=first, style={"button_width": "110px"}, **look)
        self.layer = widgets.IntSlider(self.state.layer + 1, 1, len(self.reports[first].findings), description="layer", **look)
        self.next = widgets.Button(description="next problem", layout=widgets.Layout(width="150px"))
        connect(self.network, lambda name: self.choose(Place(name, self._first_problem(name))))
        connect(self.layer, lambda number: None if self._moving else self.choose(Place(self.state.network, number - 1)))
        self.next.on_click(lambda _: self.choose(Place(self.state.network, self._next_problem())))
        self.build([self.network, self.layer, self.next])
        self.choose(self.state)

    @property
    def report(self) -> Checkup:
        """Of the network that is shown."""
        return self.reports[self.state.network]

    @property
    def finding(self) -> Finding:
        """Of the layer that is shown."""
        return self.report.findings[self.state.layer]

    def _problems(self, network: str) -> list[int]:
        return [number for number, finding in enumerate(self.reports[network].findings) if finding.verdict == "refused"]

    def _first_problem(self, network: str) -> int:
        return next(iter(self._problems(network)), 0)

    def _next_problem(self) -> int:
        problems = self._problems(self.state.network)
        return next((number for number in problems if number > self.state.layer), problems[0] if problems else self.state.layer)

    def choose(self, state: Place) -> None:
        super().choose(state)
        self._moving = True
        try:
            self.layer.max = len(self.report.findings)
            self.layer.value = state.layer + 1
            self.next.disabled = not self._problems(state.network)
            self.network.value = state.network
        finally:
            self._moving = False

    def specs(self) -> list[Spec]:
        return [figures.checkup_map.spec(self.report.findings, self.state.layer, f"{self.state.network}: {self.verdict()}")]

    def verdict(self) -> str:
        """In a few words, whether it converts."""
        many = len(self.report.problems)
        return "it converts" if not many else f"{many} problem{'s' * (many > 1)}"

    def sentence(self) -> str:
        found = self.finding
        remedy = f"; remedy: {found.remedy}" if found.remedy else ""
        return f"{self.state.network}, {self.verdict()}; {found.layer} ({found.kind}) {_IS[found.verdict]}: {found.why}{remedy}."

    def live(self) -> str:
        found = self.finding
        colour = figures.VERDICT_COLOURS[found.verdict]
        said = f'<b>{escape(found.layer)}</b> ({escape(found.kind)}) <b style="color:{colour}">{_IS[found.verdict]}</b><br>'
        said += as_html(found.why)
        return said + (f"<br><b>Remedy:</b> {escape(found.remedy)}" if found.remedy else "")


_IS = {"spikes": "becomes neurons", "stays": "stays", "folds away": "folds away", "refused": "is refused"}
