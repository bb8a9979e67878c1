"""Still pictures: every kind of figure can be drawn at rest, and carries its sentence."""

import functools

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

import micelab
from micelab import figures, still
from micelab.metrics import AccuracyCurve, LostPoints
from micelab.one_neuron import threshold_errors, trace_neuron
from micelab.still import show

Z = torch.randn(500, generator=torch.Generator().manual_seed(0))
CURVE = AccuracyCurve((1, 2, 4), (0.1, 0.5, 0.9), 10, "max")


@functools.cache
def table():
    ann = micelab.small_cnn(activation="quant_clip").eval()
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return micelab.error_breakdown(ann, micelab.convert(ann, "qcfs"), images, 4)


def order():
    trains = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]])
    return figures.input_order(trains, (1.5, -1.0), trace_neuron(torch.tensor([1.5, 1.5, -1, -1])), ("push", "hold"))


FIGURES = {
    "accuracy": lambda: figures.accuracy_over_time([CURVE], 0.95),
    "bars": lambda: figures.error_bars(table()),
    "depth": lambda: figures.error_over_depth({4: table()}, 4),
    "waterfall": lambda: figures.lost_points_waterfall(LostPoints(0.9, 0.8, 0.85, 0.6, 4, 10)),
    "strip": lambda: figures.images_strip(torch.rand(3, 1, 4, 4), "abc"),
    "timeline": lambda: figures.neuron_timeline(trace_neuron(torch.full((8,), 0.3))),
    "order": order,
    "staircase": lambda: figures.staircase_over_relu(4, 0.5, z=0.4),
    "start": lambda: figures.start_choice(4, 0.25),
    "histogram": lambda: figures.activation_histogram(Z, 1.0),
    "threshold": lambda: figures.threshold_choice(threshold_errors(Z, torch.linspace(0.1, 3, 20), 4), 1.0, 4),
    "map": lambda: figures.spike_map(torch.ones(5, 2, 3), "stem", 1),
    "flat map": lambda: figures.spike_map(torch.ones(7), "head", 1),
    "answer": lambda: figures.running_answer([0.25, 0.75], ("cat", "dog"), 3),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_a_picture_and_a_sentence(name, tmp_path):
    figure = FIGURES[name]()
    shown = show(figure)._repr_mimebundle_()
    assert shown["text/plain"] == f"Figure: {figure.layout.meta['alt']}"
    assert figure.layout.meta["alt"].endswith(".")
    (tmp_path / "picture.png").write_bytes(still.still([figure]))
    pixels = imread(tmp_path / "picture.png")[..., :3]
    assert 0.01 < float(np.mean(pixels.min(-1) < 0.95)) < 0.9
    assert np.all(pixels[:, -3:] > 0.99), "something is cut off at the right edge"
    assert np.all(pixels[:, :2] > 0.99), "something is cut off at the left edge"
    assert np.all(pixels[-2:] > 0.99), "something is cut off at the lower edge"


def test_figures_stand_side_by_side():
    one, two = FIGURES["staircase"](), FIGURES["start"]()
    assert repr(show(one, two)) == f"Figure: {one.layout.meta['alt']} {two.layout.meta['alt']}"


def test_without_matplotlib_one_sentence_names_the_remedy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(micelab.MicelabError, match=r"pictures need matplotlib: run `pip install micelab\[course\]`"):
        still.still([FIGURES["start"]()])


def test_bars_carry_their_words_and_lead_from_one_accuracy_to_the_next():
    picture = Figure(figsize=(6, 4))
    still._draw(picture.subfigures(), FIGURES["waterfall"]())
    (ax,) = picture.subfigs[0].axes
    said = [text.get_text() for text in ax.texts]
    assert sorted(said) == sorted(["-10.0", "+5.0", "-25.0", "90.0 %", "60.0 %"])
    below = {text.get_text() for text in ax.texts if text.get_va() == "top"}
    assert below == {"-10.0", "-25.0"}  # at the end that hangs
    levels = [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == ":"]
    assert levels == [90, 80, 85, 60]


def test_two_tables_hatch_the_clipping_that_was_trained_in():
    (clipping,) = {
        trace.marker.pattern.shape
        for trace in figures.before_and_after(table(), table(), ("a", "b")).data
        if trace.name == "clipping"
    }
    assert set(clipping) == {"/"}
