"""A plotly figure in a notebook whose first message to the browser holds all of it."""

from __future__ import annotations

from micelab.exceptions import MicelabError
from micelab.figures.style import Spec

try:
    import plotly.graph_objects as go
except ImportError as error:
    raise MicelabError("panels need ipywidgets and plotly: run `pip install micelab[course]`") from error


class Drawing(go.FigureWidget):
    """A FigureWidget that opens its channel to the browser when it is complete.

    plotly opens it with an empty figure and sends traces and layout in further messages. A browser that takes long to load
    plotly's code (a slow machine, a first visit) can draw between these messages, and that figure stays empty.
    """

    _complete = False

    def __init__(self, figure: go.Figure | Spec):
        super().__init__(figure)
        self._complete = True
        self.open()

    def open(self) -> None:
        """Opens the channel, once the figure is complete."""
        if self._complete:
            super().open()
