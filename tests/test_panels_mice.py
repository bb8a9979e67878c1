"""The panels of notebooks 05 to 07: every corner of their controls, any order of clicks, and quick enough to drag."""

import itertools
import random
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

import micelab
from micelab.data import to_float
from micelab.errors import KINDS
from micelab.exceptions import InputError
from micelab.panels import CheckupPanel, MethodPanel, RemedyPanel
from micelab.report.remedies import HALF, JOINT, QUANTIZED, REMEDIES, SIGNED, every_set, try_remedies, with_included

STEPS = (1, 2, 4)


@pytest.fixture(scope="module")
def split():
    return micelab.load_data("digits").test.head(24)


@pytest.fixture(scope="module")
def trials(split):
    torch.manual_seed(0)
    clip = micelab.small_cnn(width=4, activation="clip", theta=1.0).eval()
    quantized = micelab.small_cnn(width=4, activation="quant_clip", levels=2, theta=1.0).eval()
    networks = {"clip": clip, "quantized": quantized, "joint": micelab.joint.prepare(quantized, 2)}
    return try_remedies(networks, split, 2, STEPS, error_images=8)


def quick(move):
    """The move, which must take less than a tenth of a second (the fastest of three, on a busy machine)."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        move()
        times.append(time.perf_counter() - start)
    assert min(times) < 0.1


def check_remedies(panel, trials, ticked):
    shown = with_included(ticked)
    trial = trials[shown]
    assert panel.trial is trial
    assert {name for name, box in panel.boxes.items() if box.value} == shown
    for trace in (trace for trace in panel.drawn[0].data if trace.name in KINDS):
        wanted = [100 * getattr(layer, trace.name).rms / layer.signal for layer in trial.table.layers.values()]
        assert list(trace.y) == pytest.approx(wanted)
    assert list(panel.drawn[1].data[1].y) == pytest.approx([100 * a for a in trial.curve.accuracy])
    assert panel.drawn[1].data[-1].y[0] == pytest.approx(100 * trial.curve.at(2))
    assert f"{100 * trial.curve.at(2):.1f} %" in panel.numbers.value


def test_every_set_of_remedies_shows_its_own_numbers(trials):
    for ticked in itertools.chain.from_iterable(itertools.combinations(REMEDIES, n) for n in range(len(REMEDIES) + 1)):
        panel = RemedyPanel(trials, 0.9)
        for name in ticked:
            panel.boxes[name].set_state({"value": True})  # the browser's own path
        check_remedies(panel, trials, ticked)


def test_remedies_may_be_clicked_in_any_order_and_twice(trials):
    panel, ticked, draw = RemedyPanel(trials, 0.9), set(), random.Random(0)
    for _ in range(60):
        name, on = draw.choice(REMEDIES), draw.random() < 0.5
        taken_along = name in with_included(ticked - {name})
        panel.boxes[name].set_state({"value": on})
        if not taken_along:
            ticked = ticked | {name} if on else ticked - {name}
        check_remedies(panel, trials, ticked)


def test_joint_training_takes_along_what_it_starts_from_and_gives_it_back(trials):
    panel = RemedyPanel(trials, 0.9)
    panel.boxes[SIGNED].value = True
    panel.boxes[JOINT].value = True
    assert panel.boxes[HALF].disabled
    assert panel.boxes[QUANTIZED].disabled
    panel.boxes[HALF].set_state({"value": False})  # a click that was on its way: it does not count
    assert panel.boxes[HALF].value
    panel.boxes[JOINT].value = False
    assert panel.state.remedies == {SIGNED}
    assert not panel.boxes[HALF].disabled
    check_remedies(panel, trials, {SIGNED})


def test_a_panel_may_start_with_remedies_ticked(trials):
    panel = RemedyPanel(trials, 0.9, ticked=(JOINT,))
    check_remedies(panel, trials, {JOINT})
    assert panel.boxes[HALF].disabled
    panel.boxes[JOINT].value = False
    check_remedies(panel, trials, set())


def test_a_tick_is_quick(trials):
    panel = RemedyPanel(trials, 0.9)
    quick(lambda: setattr(panel.boxes[SIGNED], "value", not panel.boxes[SIGNED].value))


def test_trials_come_from_the_network_and_the_start_that_their_remedies_name(trials):
    assert list(trials) == every_set()
    assert len(trials) == 10
    for chosen, trial in trials.items():
        layer = next(iter(trial.table.layers.values()))
        assert trial.curve.method == trial.table.method == ("mice" if JOINT in chosen else "tcl")
        assert layer.v0 == (0.5 if HALF in chosen else 0.0)
        assert trial.remedies == chosen


def test_what_is_missing_is_named(split, trials):
    with pytest.raises(InputError, match="network 'joint' is missing"):
        try_remedies({"clip": micelab.small_cnn(), "quantized": micelab.small_cnn()}, split)
    with pytest.raises(InputError, match="is unknown"):
        with_included(["prayer"])
    with pytest.raises(InputError, match="no trial of"):
        RemedyPanel({chosen: trial for chosen, trial in trials.items() if JOINT not in chosen}, 0.9)


@pytest.fixture(scope="module")
def conversions(split):
    torch.manual_seed(1)
    anns = {"plain": micelab.small_cnn(width=4), "bounded": micelab.small_cnn(width=4, activation="quant_clip", theta=1.0)}
    images = to_float(split.images)
    snns = {
        "percentile": micelab.convert(anns["plain"], "percentile", images),
        "qcfs": micelab.convert(anns["bounded"], "qcfs"),
    }
    curves = {name: micelab.accuracy_curve(snn, split.batches(), STEPS) for name, snn in snns.items()}
    return snns, curves, {"percentile": 0.91, "qcfs": 0.89}, images[:3], split.labels[:3], micelab.load_data("digits").classes


def test_every_corner_of_the_methods_panel_shows_its_own_numbers(conversions):
    snns, curves, anns, images, labels, classes = conversions
    panel = MethodPanel(*conversions, time_steps=4)
    runs = {name: snn.simulate(images, 4, spikes=True) for name, snn in snns.items()}
    layers = list(runs["qcfs"].layers)
    corners = list(itertools.product(range(2), (0, 2), (1, 4), (0, len(layers) - 1)))
    random.Random(0).shuffle(corners)
    for method, image, step, layer in [*corners, corners[-1]]:
        panel.layer.set_state({"index": layer})
        panel.image.set_state({"value": image})
        panel.method.set_state({"index": method})
        panel.step.set_state({"value": step})
        name = list(snns)[method]
        run = runs[name]
        assert panel.answer() == classes[int(run.logits[step - 1, image].argmax())]
        assert list(panel.drawn[1].data[0].y) == pytest.approx(
            [100 * p for p in run.logits[step - 1, image].softmax(-1).tolist()], abs=1e-3
        )
        fired = int(run.layers[layers[layer]].spikes[step - 1, image].sum())
        assert f": {fired} of" in panel.drawn[0].layout.title.text
        assert list(panel.drawn[2].data[method].y) == pytest.approx([100 * a for a in curves[name].accuracy])
        upright, level, curve = [shape for shape in panel.drawn[2].layout.shapes if shape.opacity]
        assert upright.x0 == upright.x1 == step
        assert level.y0 == level.y1 == pytest.approx(100 * anns[name])
        drawn = [[float(number) for number in point.split(",")] for point in curve.path[1:].split("L")]
        assert drawn == [[t, pytest.approx(100 * a)] for t, a in zip(STEPS, curves[name].accuracy, strict=True)]
        assert curve.line.color == panel.drawn[2].data[method].line.color
        assert [note.text for note in panel.drawn[2].layout.annotations if note.opacity] == [f"ANN {100 * anns[name]:.1f} %"]
        assert f"{100 * anns[name]:.1f} %" in panel.numbers.value
        assert panel.truth() == classes[int(labels[image])]


def test_the_line_of_a_method_with_hidden_steps_stands_at_its_true_steps(conversions):
    snns, curves, *rest = conversions
    hidden = {name: replace(curve, hidden_steps=4 * (name == "qcfs")) for name, curve in curves.items()}
    panel = MethodPanel(snns, hidden, *rest, time_steps=4)
    for method, name in enumerate(snns):
        for step in (1, 4):
            panel.method.set_state({"index": method})
            panel.step.set_state({"value": step})
            upright = next(shape for shape in panel.drawn[2].layout.shapes if shape.opacity)
            assert upright.x0 == upright.x1 == step + hidden[name].hidden_steps


def test_a_move_of_the_methods_panel_is_quick(conversions):
    panel = MethodPanel(*conversions, time_steps=4)
    steps = itertools.cycle((1, 2, 3))
    quick(lambda: panel.step.set_state({"value": next(steps)}))


def test_the_methods_panel_refuses_what_does_not_belong_together(conversions):
    snns, curves, anns, images, labels, classes = conversions
    with pytest.raises(InputError, match="accuracy curve"):
        MethodPanel(snns, {}, anns, images, labels, classes)
    with pytest.raises(InputError, match="3 images and 2 labels"):
        MethodPanel(snns, curves, anns, images, labels[:2], classes)
    other = micelab.convert(micelab.resnet20(width=1, in_channels=1), "max", images)
    with pytest.raises(InputError, match="different layers"):
        MethodPanel(snns | {"other": other}, curves | {"other": curves["qcfs"]}, anns | {"other": 1.0}, images, labels, classes)


@pytest.fixture
def reports():
    usual = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10), nn.Softmax(-1))
    return {
        "mine": micelab.checkup(usual),
        "resnet20": micelab.checkup(micelab.resnet20()),
        "cnn": micelab.checkup(micelab.small_cnn()),
    }


def test_the_report_shows_every_layer_of_every_network(reports):
    panel = CheckupPanel(reports)
    places = [(name, number) for name, report in reports.items() for number in range(len(report.findings))]
    random.Random(0).shuffle(places)
    for name, number in places[:60] + [("mine", 0), ("resnet20", len(reports["resnet20"].findings) - 1), ("mine", 5)]:
        panel.network.set_state({"index": list(reports).index(name)})
        panel.layer.set_state({"value": number + 1})
        found = reports[name].findings[number]
        assert panel.finding == found
        assert panel.layer.value == number + 1
        assert found.layer in panel.numbers.value
        assert ("Remedy" in panel.numbers.value) == (found.verdict == "refused")
        marks = {trace.name: len(trace.x) for trace in panel.drawn[0].data[:4]}
        assert marks == {verdict: reports[name].count(verdict) for verdict in marks}
        assert list(panel.drawn[0].data[4].x) == [number + 1]


def test_the_next_problem_follows_and_starts_again(reports):
    panel = CheckupPanel(reports)
    seen = []
    for _ in range(4):
        seen.append(panel.finding.layer)
        panel.next.click()
    assert seen == ["1", "2", "5", "1"]
    panel.network.value = "cnn"
    assert panel.next.disabled
    panel.next.click()
    assert panel.state.layer == 0


def test_a_network_switched_to_is_shown_from_its_first_problem_or_layer(reports):
    panel = CheckupPanel(reports)
    for name in ("resnet20", "mine", "cnn", "mine"):
        panel.network.value = name
        assert panel.state.layer == (1 if name == "mine" else 0)
        assert panel.layer.max == len(reports[name].findings)
    with pytest.raises(InputError, match="no layer to show"):
        CheckupPanel({})


def test_at_rest_each_panel_is_a_picture_and_a_sentence(reports, trials, conversions):
    for panel in (CheckupPanel(reports), RemedyPanel(trials, 0.9), MethodPanel(*conversions, time_steps=4)):
        data, _ = panel._repr_mimebundle_()
        assert "application/vnd.jupyter.widget-view+json" in data
        assert data["text/plain"].startswith(f"{type(panel).__name__}: ")
        assert data["image/png"].startswith("iVBOR")
        assert len(data["image/png"]) < 150_000
