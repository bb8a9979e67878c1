"""Questions to be answered before the result is seen: the answer stays folded until the reader has committed to one."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from micelab.exceptions import InputError, MicelabError

_GOOD, _BAD = "#007a5a", "#b34700"


class Prediction:
    """A question with its options: buttons where a kernel runs, a question with a folded answer where none does.

    `committed` is the option chosen, None before; a choice stands, since what counts is the first thought.

    >>> asked = Prediction("What is 1 + 1?", ("1", "2"), right=1, because="Count.")
    >>> asked.committed is None
    True
    """

    def __init__(self, question: str, options: Sequence[str], right: int, because: str):
        try:
            import ipywidgets as widgets
        except ImportError as error:
            raise MicelabError("predictions need ipywidgets: run `pip install micelab[course]`") from error
        self.question, self.options, self.right, self.because = question, tuple(options), right, because
        self.committed: int | None = None
        wide = widgets.Layout(width="auto", min_width="90px")
        self.buttons = [widgets.Button(description=option, layout=wide) for option in self.options]
        self.reply = widgets.HTML()
        asked = widgets.HTML(f"<b>Predict.</b> {escape(question)}")
        row = widgets.HBox(self.buttons, layout=widgets.Layout(flex_flow="row wrap"))
        self.view = widgets.VBox([asked, row, self.reply])
        for number, button in enumerate(self.buttons):
            button.on_click(lambda _, number=number: self.commit(number))

    def commit(self, number: int) -> None:
        """Takes the reader's choice, the first one only, and unfolds the answer."""
        if self.committed is not None:
            return
        self.committed = number
        for place, button in enumerate(self.buttons):
            button.disabled = True
            if place in (number, self.right):
                button.button_style = "success" if place == self.right else "danger"
        hit = number == self.right
        said = "✓ Right." if hit else f"✗ You said {self.options[number]}; it is <b>{escape(self.options[self.right])}</b>."
        self.reply.value = f'<span style="color:{_GOOD if hit else _BAD}">{said}</span> {escape(self.because)}'

    def __repr__(self) -> str:
        return f"Predict. {self.question}  [ {' | '.join(self.options)} ]"

    def _repr_html_(self) -> str:
        choices = " &nbsp;|&nbsp; ".join(escape(option) for option in self.options)
        answer = f"<b>{escape(self.options[self.right])}.</b> {escape(self.because)}"
        return (
            f"<div><b>Predict.</b> {escape(self.question)}<br>{choices}"
            f"<details><summary>Choose one, then open the answer</summary>{answer}</details></div>"
        )

    def _repr_mimebundle_(self, **options: Any) -> Any:
        bundle = self.view._repr_mimebundle_(**options) or {}
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        return data | {"text/html": self._repr_html_(), "text/plain": repr(self)}, metadata


def predict(question: str, options: Sequence[Any], answer: Any, because: str) -> Prediction:
    """A question to think about: the reader commits to one of `options`, then sees which is right, and why.

    answer: the right option, as the code has just computed it; raises InputError where it is none of the options, so an
    answer that is no longer true cannot stay in a notebook.

    >>> predict("What is 1 + 1?", (1, 2, 3), answer=1 + 1, because="Count.")
    Predict. What is 1 + 1?  [ 1 | 2 | 3 ]
    """
    shown = [str(option) for option in options]
    if len(set(shown)) < 2 or len(set(shown)) < len(shown):
        raise InputError(f"the options are {shown}: give at least two, each once")
    if str(answer) not in shown:
        raise InputError(f"the answer {str(answer)!r} is none of the options {shown}: correct the question or what computes it")
    return Prediction(question, shown, shown.index(str(answer)), because)
