"""Figures: every trace holds the table's numbers, a colour means one thing, the sentence beside it says what is drawn."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import micelab
from micelab import figures
from micelab.exceptions import InputError
from micelab.metrics import AccuracyCurve, Energy, LostPoints
from micelab.pictures import COLOURS, OTHER_COLOURS
from micelab.train import TrainConfig, train

LOST = ("clipping", "quantization", "timing")


@pytest.fixture(scope="module")
def digits():
    return micelab.load_data("digits")


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    config = TrainConfig(activation="quant_clip", epochs=3, lr=0.05, theta=2.0)
    return train(config, tmp_path_factory.mktemp("run"), digits, progress=False)


@pytest.fixture(scope="module")
def snn(trained):
    return micelab.convert(trained, "qcfs")


@pytest.fixture(scope="module")
def table(trained, snn, digits):
    return micelab.error_breakdown(trained, snn, next(digits.test.batches(64))[0], time_steps=4)


def alt(figure):
    return figure.layout.meta["alt"]


def test_accuracy_stands_over_true_steps_with_the_anns_own_dashed(snn, digits):
    curve = micelab.accuracy_curve(snn, digits.test.head(64).batches(), (1, 2, 4))
    hidden = replace(curve, method="mice<b>", hidden_steps=2)
    figure = figures.accuracy_over_time([curve, hidden], 0.9375)
    assert [list(trace.x) for trace in figure.data[:2]] == [[1, 2, 4], [3, 4, 6]]
    assert list(figure.data[0].y) == pytest.approx([100 * a for a in curve.accuracy])
    assert [trace.name for trace in figure.data] == ["qcfs", "mice&lt;b&gt; (2 hidden)", "ANN 93.8 %"]
    assert (figure.data[2].line.dash, list(figure.data[2].y)) == ("dash", [93.75, 93.75])
    assert list(figure.layout.xaxis.tickvals) == [1, 2, 3, 4, 6]
    assert f"qcfs {100 * curve.accuracy[-1]:.1f} % at T = 4" in alt(figure)
    assert "ANN 93.8 %" in alt(figure)


def test_several_networks_have_a_line_each():
    curve = AccuracyCurve((1, 2), (0.5, 0.6), 100, "max")
    figure = figures.accuracy_over_time([curve], {"ANN relu": 0.9, "ANN clip": 0.8})
    assert [trace.name for trace in figure.data[1:]] == ["ANN relu 90.0 %", "ANN clip 80.0 %"]
    assert len({trace.line.dash for trace in figure.data[1:]}) == 2
    assert len(figures.accuracy_over_time([curve]).data) == 1


def test_a_method_keeps_its_colour_and_never_takes_that_of_an_error():
    curves = {name: AccuracyCurve((1,), (0.5,), 10, name) for name in micelab.methods.METHODS}
    together = figures.accuracy_over_time(list(curves.values()))
    for trace in together.data:
        alone = figures.accuracy_over_time([curves[trace.name]]).data[0]
        assert (alone.line.color, alone.marker.symbol) == (trace.line.color, trace.marker.symbol)
    assert not {*figures.METHOD_COLOURS, *OTHER_COLOURS} & set(COLOURS.values())
    assert not set(figures.METHOD_COLOURS) & set(OTHER_COLOURS)
    assert len(set(COLOURS.values()) | {figures.TOTAL}) == len(COLOURS) + 1


def test_error_bars_hold_every_term_of_every_layer(table):
    figure = figures.error_bars(table)
    assert [trace.name for trace in figure.data] == [*list(COLOURS)[:3], "the ANN clips too", "inherited", "total"]
    for trace in (trace for trace in figure.data if trace.name != "the ANN clips too"):
        wanted = [100 * getattr(layer, trace.name).rms / layer.signal for layer in table.layers.values()]
        assert list(trace.y) == pytest.approx(wanted)
        assert list(trace.x) == list(table.layers)
    worst = max(table.layers, key=lambda name: table.layers[name].relative)
    assert f"{worst}, {100 * table.layers[worst].relative:.0f} % of its signal" in alt(figure)


def test_clipping_that_was_trained_in_is_hatched(table):
    clipping, said = figures.error_bars(table).data[2:4]
    assert set(clipping.marker.pattern.shape) == {"/"}
    assert (said.name, said.showlegend, said.offsetgroup, list(said.y)) == ("the ANN clips too", True, "clipping", [0])
    foreign = replace(table, layers={name: replace(layer, trained_clip=False) for name, layer in table.layers.items()})
    clipping, said = figures.error_bars(foreign).data[2:4]
    assert set(clipping.marker.pattern.shape) == {""}
    assert not said.showlegend
    later = figures.before_and_after(foreign, table, ("before", "after"))
    assert [trace.showlegend for trace in later.data if trace.name == "the ANN clips too"] == [True]


def test_layers_named_by_numbers_or_tags_keep_their_names(table):
    ann = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    images = torch.rand(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    snn = micelab.convert(ann, "max", images)
    figure = figures.error_bars(micelab.error_breakdown(ann, snn, images, 2))
    assert (list(figure.data[0].x), figure.layout.xaxis.type) == (["2", "4"], "category")
    odd = figures.error_bars(replace(table, layers={"<b>stem</b>": next(iter(table.layers.values()))}, method="<i>"))
    assert odd.data[0].x[0] == "&lt;b&gt;stem&lt;/b&gt;"
    assert "&lt;i&gt;" in odd.layout.title.text


@pytest.mark.parametrize("levels", [(0.98, 0.97, 0.99, 0.9), (0.5, 0.5, 0.5, 0.5), (0.9, 0.1, 0.1, 0.1)])
def test_hanging_bars_lead_from_the_ann_to_the_spiking_network(levels):
    points = LostPoints(*levels, time_steps=8, images=100)
    figure = figures.lost_points_waterfall(points)
    level = 100 * points.ann
    for bar, kind in zip(figure.data[1:4], LOST, strict=True):
        assert (bar.x[0], bar.marker.color) == (kind, COLOURS[kind])
        assert bar.base[0] == pytest.approx(level)
        level += bar.y[0]
        assert bar.y[0] == pytest.approx(-100 * getattr(points, kind))
        assert "-0.0" not in bar.text[0]
    assert level == pytest.approx(100 * points.snn)
    low, high = figure.layout.yaxis.range
    assert low < 100 * min(levels) <= 100 * max(levels) < high
    assert f"{100 * points.ann:.1f} % to the SNN's {100 * points.snn:.1f} % at T = 8" in alt(figure)
    assert "-0.0" not in alt(figure)


def test_spike_rates_are_those_of_the_energy_estimate(snn, digits):
    energy = micelab.energy(snn, next(digits.test.batches(32))[0], 4)
    figure = figures.spike_rates(energy)
    assert dict(zip(figure.data[0].x, figure.data[0].y, strict=True)) == pytest.approx(energy.spike_rates)
    assert f"to {max(energy.spike_rates.values()):.3f}" in alt(figure)
    assert figure.data[0].marker.color not in COLOURS.values()


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_show_the_pixels_and_their_captions(channels):
    images = torch.rand(3, channels, 4, 4, generator=torch.Generator().manual_seed(1))
    figure = figures.images_strip(images, ["cat", "a <b>", "dog"])
    assert [note.text for note in figure.layout.annotations] == ["cat", "a &lt;b&gt;", "dog"]
    for trace, image in zip(figure.data, images, strict=True):
        assert (torch.as_tensor(trace.z)[..., 0] == (image[0] * 255).round().byte()).all()
    assert alt(figure) == "3 images: cat, a <b>, dog."


def test_nothing_to_show_is_said_in_words(table):
    for call in (
        lambda: figures.accuracy_over_time([]),
        lambda: figures.error_bars(replace(table, layers={})),
        lambda: figures.spike_rates(Energy(4, 1.0, 1.0, 0.0, 0.0, {})),
        lambda: figures.images_strip(torch.rand(2, 1, 4, 4), ["one"]),
    ):
        with pytest.raises(InputError):
            call()


def test_the_title_stands_clear_of_a_legend_of_several_rows():
    curves = [AccuracyCurve((1, 2), (0.5, 0.6), 10, f"a method of long name {n}") for n in range(9)]
    one, many = figures.accuracy_over_time(curves[:1], 0.9), figures.accuracy_over_time(curves, 0.9)
    assert many.layout.margin.t - one.layout.margin.t == many.layout.height - one.layout.height >= 66


def test_without_plotly_one_sentence_names_the_remedy():
    code = "import sys; sys.modules['plotly'] = None\nimport micelab\ntry:\n import micelab.figures\n"
    code += "except micelab.MicelabError as error:\n print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "figures need plotly: run `pip install micelab[figures]`"


def test_a_line_has_the_colour_of_the_method_that_its_label_begins_with():
    labels = ("max, v0 = 0", "max, v0 = 1/2", "qcfs, L = 4", "what is ticked")
    lines = figures.accuracy_over_time([AccuracyCurve((1, 2), (0.5, 0.6), 10, label) for label in labels]).data
    alone = [figures.accuracy_over_time([AccuracyCurve((1,), (0.5,), 10, name)]).data[0] for name in ("max", "qcfs")]
    assert [lines[0].line.color, lines[2].line.color] == [line.line.color for line in alone]
    assert [lines[0].marker.symbol, lines[2].marker.symbol] == [line.marker.symbol for line in alone]
    assert lines[1].line.color not in (lines[0].line.color, *figures.METHOD_COLOURS)
    assert lines[3].line.color == OTHER_COLOURS[0]


def test_points_lost_against_an_ann_stand_on_a_log_scale_that_has_a_place_for_none():
    curve = AccuracyCurve((1, 2, 4), (0.4, 0.88, 0.95), 100, "qcfs")
    figure = figures.accuracy_over_time([curve], {"ANN (relu)": 0.9, "ANN (qcfs)": 0.89}, below="ANN (relu)")
    assert list(figure.data[0].y) == pytest.approx([50, 2, 0.5])
    assert [trace.name for trace in figure.data] == ["qcfs", "ANN (qcfs) 89.0 %"]
    assert list(figure.data[1].y) == pytest.approx([1, 1])
    assert (figure.layout.yaxis.type, figure.layout.yaxis.title.text) == ("log", "points below ANN (relu) 90.0 %")
    low, high = figure.layout.yaxis.range
    assert low > high  # few points lost stand on top
    with pytest.raises(InputError, match=r"below is 'ANN': give the name of an ANN of ann_accuracy, one of none"):
        figures.accuracy_over_time([curve], below="ANN")


def test_many_pictures_stand_in_rows_of_five():
    figure = figures.images_strip(torch.rand(7, 1, 4, 4), "abcdefg")
    assert len(figure.data) == 7
    assert {tuple(figure.layout[f"yaxis{n or ''}"].domain) for n in ("", 2, 3, 4, 5)} == {tuple(figure.layout.yaxis.domain)}
    assert figure.layout.yaxis6.domain[1] < figure.layout.yaxis.domain[0]


def test_networks_of_one_method_are_darker_each_time_and_have_other_symbols():
    curves = [AccuracyCurve((1, 2), (0.5, 0.6), 10, name, 0) for name in ("qcfs", "mice T=4", "mice T=8", "mice")]
    lines = figures.accuracy_over_time(curves).data
    darker = [int(line.line.color[1:3], 16) for line in lines[1:]]
    assert darker[0] > darker[1] > darker[2]
    assert lines[1].marker.symbol != lines[2].marker.symbol
    alone = figures.accuracy_over_time(curves[3:]).data[0]
    assert (alone.line.color, alone.marker.symbol) == (lines[1].line.color, lines[1].marker.symbol)


def test_a_histogram_names_its_layer_and_its_unit():
    z = torch.linspace(-1, 2, 301)
    assert figures.activation_histogram(z, 1.5).layout.xaxis.title.text == "input current z (activation units)"
    named = figures.activation_histogram(z, 1.5, layer="act<2>")
    assert named.layout.xaxis.title.text == "input current z of act&lt;2&gt; (activation units)"
    assert "of act<2>" in alt(named)
