"""Exercises that are checked: one answer each, from which come the reader's verdict and the teacher's key.

The checker runs the reader's work on small cases, beside the answer, for a few seconds at the most. What it says is one
sentence on what is wrong, and a hint; known slips are recognised by what they give and named.
"""

from __future__ import annotations

import ctypes
import inspect
import textwrap
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
from torch import Tensor

from micelab.exceptions import InputError
from micelab.still import as_html

SECONDS = 5.0
"""How long the reader's function may take in all: the cases are tiny, so more is an endless loop."""


@dataclass(frozen=True)
class Exercise:
    """One exercise: `answer` is its solution, a function that the checker compares with the reader's on every case.

    cases: the arguments of each call; slips: wrong functions that people write, each under the sentence that names the slip;
    asks_value: the reader hands in the value itself (a list, a number), and `judge` says what is wrong with it, or "".

    >>> one = Exercise("00-double", lambda x: 2 * x, "Add it to itself.", "Doubled.", cases=[(1,), (3,)])
    >>> one.answer(3)
    6
    """

    name: str
    answer: Callable[..., Any]
    hint: str
    praise: str
    cases: Sequence[tuple[Any, ...]] = ((),)
    slips: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    judge: Callable[[Any], str] | None = None

    @property
    def asks_value(self) -> bool:
        """Whether a value is asked for, not a function."""
        return self.judge is not None

    def source(self) -> str:
        """The answer as the teacher sees it: the very code that the checker runs."""
        lines = textwrap.dedent(inspect.getsource(self.answer)).splitlines()
        start = next(number for number, line in enumerate(lines) if line.startswith("def "))
        return "\n".join(lines[start:])


EXERCISES: dict[str, Exercise] = {}


def exercise(name: str, **parts: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: registers the function below it as the answer of exercise `name`; the rest as in `Exercise`.

    >>> @exercise("99-double", hint="Add it to itself.", praise="Doubled.", cases=[(1,), (3,)])
    ... def double(x):
    ...     return 2 * x
    >>> EXERCISES.pop("99-double").answer(3)  # and away again
    6
    """

    def registered(answer: Callable[..., Any]) -> Callable[..., Any]:
        if name in EXERCISES:
            raise InputError(f"an exercise named {name!r} is there already: choose another name")
        EXERCISES[name] = Exercise(name, answer, **parts)
        return answer

    return registered


@dataclass(frozen=True)
class Verdict:
    """What the checker says; true where the work is right. In a notebook the answer is folded below it.

    >>> bool(Verdict(False, "Not yet: of 3 it makes 9.", "Add it to itself.", "return 2 * x"))
    False
    """

    passed: bool
    message: str
    hint: str
    answer: str

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        return f"✓ Right. {self.message}" if self.passed else f"✗ Not yet: {self.message}\n  Hint: {self.hint}"

    def _repr_html_(self) -> str:
        mark, colour = ("✓ Right.", "#007a5a") if self.passed else ("✗ Not yet:", "#b34700")
        hint = "" if self.passed else f"<div>Hint: {as_html(self.hint)}</div>"
        return (
            f'<div style="border-left:4px solid {colour};padding:4px 12px">'
            f'<div><b style="color:{colour}">{mark}</b> {as_html(self.message)}</div>{hint}'
            f"<details><summary>Answer</summary><pre>{escape(self.answer)}</pre></details></div>"
        )


def check(name: str, work: Any) -> Verdict:
    """The verdict on `work`, the reader's function (or value) for exercise `name`; it never raises for what the work does.

    >>> from micelab.exercises import check
    >>> check("02-staircase", lambda z, theta, v0, time_steps: z.clamp(min=0))
    ✗ Not yet: you give the ReLU itself: the count must be rounded down to a whole number.
      Hint: scale z to steps, add v0, round down, keep the result between 0 and T, scale back.
    """
    if name not in EXERCISES:
        raise InputError(f"exercise {name!r} is unknown: choose one of {', '.join(EXERCISES)}")
    task = EXERCISES[name]
    wrong = _wrong_value(task, work) if task.asks_value else _wrong_function(task, work)
    return Verdict(not wrong, wrong or task.praise, task.hint, task.source())


def answer_key(*notebooks: str) -> str:
    """Every exercise with its hint and its answer, as Markdown, for those who teach; of `notebooks` ("02") where some are named.

    >>> print(answer_key("00").splitlines()[0])
    ## 00-rate

    Raises InputError where a notebook has no exercise.
    """
    known = {name.split("-")[0] for name in EXERCISES}
    for number in notebooks:
        if number not in known:
            raise InputError(f"notebook {number!r} has no exercises: choose from {', '.join(sorted(known))}")
    chosen = [task for name, task in EXERCISES.items() if not notebooks or name.split("-")[0] in notebooks]
    return "\n".join(
        f"## {task.name}\n\nHint: {task.hint}\n\n```python\n{task.source()}\n```\n\n{task.praise}\n" for task in chosen
    )


def _wrong_value(task: Exercise, value: Any) -> str:
    assert task.judge is not None
    if value is None or value is ...:
        return "nothing is handed in yet: put your answer in place of None."
    judged, said = limited(lambda: task.judge(value))  # type: ignore[misc]
    return judged if not said else f"your answer cannot be read ({said}): compare its form with the example above."


def _wrong_function(task: Exercise, work: Any) -> str:
    if not callable(work):
        return f"a function is needed, this is {_kind(work)}: hand over its name, without calling it."
    name = getattr(work, "__name__", "your function").replace("<lambda>", "your function")
    wanted, given = list(inspect.signature(task.answer).parameters), _parameters(work)
    if given is not None and len(given) != len(wanted):
        return f"{name} takes {len(given)} arguments, the checker gives {len(wanted)}: ({', '.join(wanted)})."
    results: list[Any] = []

    def run_all() -> None:
        for case in task.cases:
            own = _copied(case)
            results.append(work(*own))
            if not all(_same(a, b) for a, b in zip(own, case, strict=True)):
                raise _ChangedInputError

    _, said = limited(run_all)
    case = _call(name, wanted, task.cases[min(len(results), len(task.cases) - 1)])
    if said == _ChangedInputError.__name__:
        return f"{name} changes what it is given: make a new tensor instead of writing into the old one."
    if said:
        return f"{case} {said}."
    for case_number, result in enumerate(results):
        expected = _tensor(task.answer(*_copied(task.cases[case_number])))
        wrong = _differs(_call(name, wanted, task.cases[case_number]), result, expected)
        if wrong:
            return next((slip for slip, wrong_work in task.slips.items() if _matches(task, wrong_work, results)), wrong)
    return ""


class _ChangedInputError(Exception):
    """The reader's function has written into its arguments."""


class _TimeOver(BaseException):
    """Thrown into a thread whose time is over; not an Exception, so that a reader's `except Exception` lets it pass."""


def limited(work: Callable[[], Any], seconds: float | None = None) -> tuple[Any, str]:
    """(result, "") of `work()`, or (None, why there is none); after `seconds` it is given up, so a loop cannot hang the kernel.

    >>> limited(lambda: 1 / 0)
    (None, 'raises ZeroDivisionError: division by zero')
    """
    seconds = SECONDS if seconds is None else seconds
    outcome: list[Any] = [None, f"runs for more than {seconds:g} s: look for a loop that never ends"]

    def run() -> None:
        try:
            outcome[:] = [work(), ""]
        except _ChangedInputError as error:
            outcome[1] = type(error).__name__
        except _TimeOver:
            pass
        except BaseException as error:
            text = " ".join(str(error).split())
            outcome[1] = f"raises {type(error).__name__}" + (f": {text[:200]}" if text else "")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    result = list(outcome)
    for _ in range(20):  # the loop may catch everything, so it is told more than once
        if not thread.is_alive():
            break
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_TimeOver))
        thread.join(0.05)
    return result[0], result[1]


def _parameters(work: Callable[..., Any]) -> list[str] | None:
    """The names of the arguments, None where any number is taken or Python cannot say."""
    try:
        found = inspect.signature(work).parameters.values()
    except (TypeError, ValueError):
        return None
    return None if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in found) else [p.name for p in found]


def _copied(case: Sequence[Any]) -> list[Any]:
    return [value.clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value for value in case]


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b


def _tensor(value: Any) -> Tensor:
    """Numbers of any form (float, list, NumPy, tensor) as a float64 tensor; raises TypeError or ValueError otherwise."""
    if isinstance(value, (str, bytes, dict, set)):
        raise TypeError
    if isinstance(value, (list, tuple)):
        return torch.stack([_tensor(v) for v in value]) if value else torch.zeros(0, dtype=torch.float64)
    return torch.as_tensor(value).detach().cpu().to(torch.float64)


def _differs(call: str, result: Any, expected: Tensor) -> str:
    """What is wrong with `result`, "" where it equals `expected` to rounding."""
    if result is None or result is ...:
        return f"{call} gives nothing: end the function with `return ...`."
    try:
        given = _tensor(result)
    except (TypeError, ValueError, RuntimeError):
        return f"{call} gives {_kind(result)}, {_wanted(expected)} was expected."
    if given.shape != expected.shape:
        return f"{call} gives {_wanted(given)}, {_wanted(expected)} was expected."
    if torch.isnan(given).any():
        return f"{call} gives NaN: look for a division by zero."
    if torch.allclose(given, expected, rtol=1e-4, atol=1e-5):
        return ""
    if not expected.dim():
        return f"{call} gives {_number(given)}, right is {_number(expected)}."
    place = int((given - expected).abs().flatten().argmax())
    return f"{call} gives {_number(given.flatten()[place])} at place {place}, right is {_number(expected.flatten()[place])}."


def _matches(task: Exercise, slip: Callable[..., Any], results: Sequence[Any]) -> bool:
    """Whether a known slip gives exactly what the reader's function gave, on every case."""
    return all(not _differs("", result, _tensor(slip(*_copied(case)))) for case, result in zip(task.cases, results, strict=True))


def _kind(value: Any) -> str:
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _wanted(value: Tensor) -> str:
    return f"numbers of shape {tuple(value.shape)}" if value.dim() else "a single number"


def _number(value: Tensor) -> str:
    return f"{float(value):.4g}"


def _call(name: str, parameters: Sequence[str], case: Sequence[Any]) -> str:
    """The call as text, long tensors shortened: "staircase(z=[-0.5, 0, ...], theta=1)"."""
    shown = [f"{key}={_short(value)}" for key, value in zip(parameters, case, strict=True)]
    return f"{name}({', '.join(shown)})"


def _short(value: Any) -> str:
    if isinstance(value, Tensor) and value.dim() > 1:
        return f"tensor of shape {tuple(value.shape)}"
    if isinstance(value, (Tensor, list)):
        numbers = [f"{float(v):.3g}" for v in value] if not (isinstance(value, Tensor) and not value.dim()) else []
        if isinstance(value, Tensor) and not value.dim():
            return f"{float(value):.3g}"
        return f"[{', '.join(numbers[:6])}{', ...' if len(numbers) > 6 else ''}]"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
