"""A plotly figure in a notebook that comes up on a slow machine too: whole in one message, plotly's code once for all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from micelab.exceptions import MicelabError
from micelab.figures.style import Spec

try:
    import anywidget
    import ipywidgets as widgets
    import plotly.graph_objects as go
    import traitlets
except ImportError as error:
    raise MicelabError("panels need ipywidgets and plotly: run `pip install micelab[course]`") from error


_MARK = re.compile(r"(\w+)\._doNotReportToPy=!0,(?=[\w.]+\.relayout\()")


def without_mark(code: str) -> str:
    """plotly's code with a change to the layout from which it takes no false one.

    It notes on the list of changes that they are the kernel's, and then takes the note for a change that it does not know: the
    whole figure is drawn anew, 25 ms instead of 1. Here the note is hidden from whoever goes through the list. Of a plotly in
    which this is not found the code stays as it is.

    >>> without_mark("a._doNotReportToPy=!0,M.default.relayout(this.el,a)")
    'Object.defineProperty(a,"_doNotReportToPy",{value:!0}),M.default.relayout(this.el,a)'
    """
    return _MARK.sub(r'Object.defineProperty(\1,"_doNotReportToPy",{value:!0}),', code)


class Library(anywidget.AnyWidget):
    """The code that draws, as text: a browser gets it once, however many figures there are."""

    _esm = "export default {}"
    code = traitlets.Unicode().tag(sync=True)

    _shared: Library | None = None

    @classmethod
    def shared(cls) -> Library:
        """The one of this kernel; a new one if it was closed."""
        if cls._shared is None or cls._shared.comm is None:
            cls._shared = cls(code=without_mark(str(go.FigureWidget._esm)))
        return cls._shared


class Drawing(go.FigureWidget):
    """A FigureWidget that is there at once and complete.

    plotly's own sends 5 MB of code with every figure, then an empty figure, then its traces. Where that code is not ready
    within two seconds, anywidget drops all that follows: the figure stays empty, or stands still. Here the first message
    holds the whole figure, and the code comes from `Library`; drawing.js says what becomes of early messages.
    """

    _esm = Path(__file__).with_name("drawing.js")
    _library = traitlets.Instance(widgets.Widget, allow_none=True).tag(sync=True, **widgets.widget_serialization)
    _complete = False

    def __init__(self, figure: go.Figure | Spec):
        super().__init__(figure)
        self._library = Library.shared()
        self._complete = True
        self.open()

    def open(self, *args: Any) -> None:
        """Opens the channel to the browser, once the figure is complete."""
        if self._complete:
            super().open(*args)
