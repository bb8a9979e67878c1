"""Exercises: every answer passes its checker, every slip is named, every stub of the notebooks is refused with a sentence."""

import ast
import inspect
import re
import time
from pathlib import Path

import nbformat
import pytest
import torch

import micelab
from micelab.exceptions import InputError
from micelab.exercises import EXERCISES, answer_key, check, checking, limited, predict

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
FUNCTIONS = [name for name, task in EXERCISES.items() if not task.asks_value]
SLIPS = [(name, slip) for name in EXERCISES for slip in EXERCISES[name].slips]


def stub_cells():
    """(exercise, source) of every cell that checks something."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            for name in re.findall(r'^check\("([^"]+)"', cell.source, re.M) if cell.cell_type == "code" else ():
                yield name, cell.source


STUBS = dict(stub_cells())


def one_sentence(text):
    return text and "\n" not in text and text.endswith(".")


@pytest.mark.parametrize("name", EXERCISES)
def test_every_answer_passes_its_own_checker(name):
    task = EXERCISES[name]
    verdict = check(name, task.answer() if task.asks_value else task.answer)
    assert verdict, verdict
    assert repr(verdict).startswith("✓ Right.")


@pytest.mark.parametrize(("name", "slip"), SLIPS)
def test_every_known_slip_is_named(name, slip):
    verdict = check(name, EXERCISES[name].slips[slip])
    assert not verdict
    assert verdict.message == slip


@pytest.mark.parametrize("name", EXERCISES)
def test_every_exercise_stands_in_its_notebook_as_a_stub_that_is_refused(name):
    source = STUBS[name]
    space = {"torch": torch, "nn": torch.nn, "micelab": micelab}
    *before, last = ast.parse(source).body
    exec(compile(ast.Module(before, []), name, "exec"), space)
    work = space[last.value.args[1].id]
    verdict = check(name, work)
    assert not verdict
    assert "nothing" in verdict.message
    task = EXERCISES[name]
    if not task.asks_value:
        assert list(inspect.signature(work).parameters) == list(inspect.signature(task.answer).parameters)
        assert work.__name__ == task.answer.__name__


def test_every_checked_cell_of_a_notebook_is_a_known_exercise():
    assert STUBS.keys() == EXERCISES.keys()


def nothing(*_):
    return None


def wrong_type(*_):
    return "three"


def wrong_shape(*_):
    return torch.zeros(3, 7)


def not_a_number(*_):
    return torch.tensor(float("nan"))


def exception(*_):
    raise RuntimeError("a\nlong   story")


def system_exit(*_):
    raise SystemExit(3)


def endless(*_):
    while True:
        pass


def stubborn(*_):
    while True:
        try:
            while True:
                pass
        except Exception:
            pass


@pytest.mark.parametrize("work", [nothing, wrong_type, wrong_shape, exception, system_exit, endless, stubborn])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_work_is_refused_in_one_sentence(name, work, monkeypatch):
    monkeypatch.setattr(checking, "SECONDS", 0.2)
    verdict = check(name, work)
    assert not verdict
    assert one_sentence(verdict.message), verdict.message
    assert one_sentence(verdict.hint), verdict.hint


def test_each_kind_of_bad_work_is_called_by_its_name(monkeypatch):
    monkeypatch.setattr(checking, "SECONDS", 0.2)
    said = {work.__name__: check("02-staircase", work).message for work in (nothing, wrong_type, wrong_shape, exception, endless)}
    assert "gives nothing: end the function with `return ...`" in said["nothing"]
    assert "gives a str, numbers of shape (6,) was expected" in said["wrong_type"]
    assert "gives numbers of shape (3, 7), numbers of shape (6,) was expected" in said["wrong_shape"]
    assert "raises RuntimeError: a long story" in said["exception"]
    assert "runs for more than 0.2 s: look for a loop that never ends" in said["endless"]
    assert "gives NaN" in check("02-mean-error", lambda *_: float("nan")).message
    assert "an int" in check("02-staircase", 3).message
    assert "takes 1 arguments, the checker gives 4: (z, theta, v0, time_steps)" in check("02-staircase", lambda z: z).message


def test_an_endless_loop_is_stopped_and_leaves_no_thread_behind():
    begun = time.perf_counter()
    result, said = limited(endless, 0.2)
    assert (result, "0.2 s" in said) == (None, True)
    assert time.perf_counter() - begun < 3
    assert not [thread for thread in checking.threading.enumerate() if thread.daemon and thread.name.endswith("(run)")]


def test_work_that_writes_into_its_arguments_is_told_so():
    def careless(z, theta, v0, time_steps):
        return theta * torch.floor(z.mul_(time_steps / theta).add_(v0)).clamp(0, time_steps) / time_steps

    assert "changes what it is given" in check("02-staircase", careless).message


@pytest.mark.parametrize("kind", [lambda t: t.tolist(), lambda t: t.numpy(), lambda t: t.double(), lambda t: t.requires_grad_()])
def test_a_right_answer_may_come_as_list_array_or_tensor(kind):
    answer = EXERCISES["02-staircase"].answer
    assert check("02-staircase", lambda *case: kind(answer(*case)))


def test_a_wrong_number_is_shown_beside_the_right_one():
    def off(z, theta, v0, time_steps):
        return EXERCISES["02-staircase"].answer(z, theta, v0, time_steps) + 9.0 * (z > 1.2)

    assert "gives 0.5, right is -0.125" in check("02-mean-error", lambda *_: 0.5).message
    assert "gives 10 at place 5, right is 1." in check("02-staircase", off).message


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (([1, 1, 1, 1], [0, 1, 1, 1]), "4 and 4 steps"),
        (([1] * 8, [0] * 8), "8 push and 0 hold"),
        (([0, 0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0, 0]), "sends 2 spikes, 4 are asked for"),
        (7, "cannot be read"),
        ("push", "cannot be read"),
        (([1, 1, 1, 1, 0, 0, 0, "x"], [0] * 8), "cannot be read"),
        (([1, 1, 1, 2, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1]), "zeros and ones"),
    ],
)
def test_an_order_of_spikes_is_judged_with_its_reason(value, part):
    verdict = check("04-order", value)
    assert not verdict
    assert part in verdict.message
    assert one_sentence(verdict.message)


def test_an_unknown_exercise_is_named():
    with pytest.raises(InputError, match="exercise '99' is unknown: choose one of 00-rate"):
        check("99", nothing)


def test_the_answer_is_folded_and_never_in_the_plain_text():
    verdict = check("02-staircase", nothing)
    folded = verdict._repr_html_().split("<details>")[1]
    assert "torch.floor" in folded
    assert "torch.floor" not in repr(verdict) + verdict._repr_html_().split("<details>")[0]


def test_the_teachers_key_holds_every_answer_as_the_checker_runs_it():
    key = answer_key()
    for name, task in EXERCISES.items():
        assert f"## {name}\n" in key
        assert task.source() in key
        assert task.answer.__doc__ in key


def question():
    return predict("How <many>?", (2, 4, 8), answer=4, because="Two & two.")


def test_a_prediction_keeps_its_answer_until_the_reader_commits():
    asked = question()
    assert (asked.reply.value, asked.committed) == ("", None)
    asked.buttons[0].click()
    assert asked.committed == 0
    assert "You said 2; it is <b>4</b>" in asked.reply.value
    assert "Two &amp; two." in asked.reply.value
    assert [button.button_style for button in asked.buttons] == ["danger", "success", ""]
    assert all(button.disabled for button in asked.buttons)


@pytest.mark.parametrize("clicks", [(1, 1), (1, 0, 2), (2, 1, 1, 0)])
def test_the_first_choice_stands_whatever_is_clicked_after(clicks):
    asked = question()
    for number in clicks:
        asked.buttons[number].click()
    assert asked.committed == clicks[0]
    assert ("✓ Right." in asked.reply.value) == (clicks[0] == 1)


def test_a_prediction_at_rest_is_a_question_with_a_folded_answer():
    data, _ = question()._repr_mimebundle_()
    assert data["text/plain"] == "Predict. How <many>?  [ 2 | 4 | 8 ]"
    before, folded = data["text/html"].split("<details>")
    assert "How &lt;many&gt;?" in before
    assert "Two" not in before
    assert "<b>4.</b> Two &amp; two." in folded


def test_an_answer_that_is_none_of_the_options_stops_the_notebook():
    with pytest.raises(InputError, match="'5' is none of the options"):
        predict("?", (2, 4), answer=5, because="")
    with pytest.raises(InputError, match="at least two, each once"):
        predict("?", (2, 2), answer=2, because="")
