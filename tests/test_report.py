"""Comparison, figures and report: the page holds what was measured, and opens without network."""

import json
import re
from dataclasses import replace

import pytest

import micelab
from micelab import figures
from micelab.checkpoint import CheckpointError
from micelab.errors import KINDS
from micelab.exceptions import InputError
from micelab.pictures import COLOURS, curve_and_errors
from micelab.report.compare import compare, drawable, fitting, merged, rows
from micelab.report.page import write_report


@pytest.fixture(scope="module")
def result():
    data = micelab.load_data("digits")
    networks = fitting({"relu": micelab.small_cnn(), "quant_clip": micelab.small_cnn(activation="quant_clip")})
    return compare(networks, data, time_steps=(1, 2, 4), explain_at=4, limit=40, error_images=20)


def test_each_method_takes_the_network_it_is_meant_for():
    nets = {
        "relu": micelab.small_cnn(),
        "clip": micelab.small_cnn(activation="clip"),
        "quant_clip": micelab.small_cnn(activation="quant_clip"),
    }
    chosen = fitting(nets)
    assert {name: next(kind for kind, net in nets.items() if net is chosen[name]) for name in chosen} == {
        "max": "relu",
        "percentile": "relu",
        "mse": "relu",
        "calibrated": "relu",
        "tcl": "clip",
        "half_start": "clip",
        **dict.fromkeys(("qcfs", "signed", "srp", "cos", "step_bias", "accumulate"), "quant_clip"),
    }
    assert set(fitting({"relu": nets["relu"]})) == {"max", "percentile", "mse", "calibrated"}
    assert fitting({"quant_clip": nets["quant_clip"]})["tcl"] is nets["quant_clip"]
    noisy = micelab.small_cnn(activation="noisy_quant_clip")
    assert fitting(nets | {"noisy_quant_clip": noisy})["noise"] is noisy
    assert fitting({"noisy_quant_clip": noisy}).keys() == micelab.methods.METHODS.keys() - {"mice"}
    joint = micelab.small_cnn(activation="spike_clip", levels=4)
    assert fitting(nets | {"spike_clip": joint})["mice"] is joint
    assert set(fitting({"spike_clip": joint})) == {"mice"}


def test_several_networks_of_one_kind_are_told_apart_by_the_row():
    four, eight = (micelab.small_cnn(activation="spike_clip", levels=levels) for levels in (4, 8))
    assert rows([four, eight]) == {"mice T=4": four, "mice T=8": eight}
    coarse, fine = (micelab.small_cnn(activation="quant_clip", levels=levels) for levels in (2, 8))
    named = rows([micelab.small_cnn(), coarse, fine, four])
    assert {"max", "qcfs L=2", "qcfs L=8", "cos L=2", "mice"} <= named.keys()
    assert named["qcfs L=2"] is coarse
    with pytest.raises(micelab.MicelabError, match=r"two of the networks are small_cnn .*: evaluate them one after the other"):
        rows([micelab.small_cnn(activation="quant_clip"), micelab.small_cnn(activation="quant_clip")])


def test_networks_that_share_a_method_have_a_page_with_every_one_of_them(tmp_path):
    nets = rows([micelab.small_cnn(activation="spike_clip", levels=levels) for levels in (2, 4)])
    both = compare(nets, micelab.load_data("digits"), time_steps=(1, 2), explain_at=2, limit=40, error_images=20)
    assert [row.curve.method for row in both.results.values()] == ["mice T=2", "mice T=4"]
    text = write_report(tmp_path / "page.html", both, "test").read_text()
    for name in nets:
        assert f"<summary>{name}</summary>" in text
        assert f"ANN {name}" in text or len({row.ann_accuracy for row in both.results.values()}) == 1
    assert text.count("<li><b>mice</b>: ") == 1


def test_a_network_of_other_classes_is_refused_before_anything_is_measured():
    with pytest.raises(micelab.MicelabError, match=r"row 'qcfs' tells 7 classes apart, digits has 10"):
        compare({"qcfs": micelab.small_cnn(activation="quant_clip", num_classes=7)}, micelab.load_data("digits"))


def test_a_method_with_a_choice_for_each_step_is_made_for_the_longest_run(monkeypatch):
    made = []
    own = micelab.report.compare.convert
    monkeypatch.setattr(
        "micelab.report.compare.convert", lambda *given, **more: made.append(more["time_steps"]) or own(*given, **more)
    )
    net = micelab.small_cnn(activation="quant_clip")
    data = micelab.load_data("digits")
    compare({"step_bias": net}, data, time_steps=(1, 2), explain_at=4, limit=20, error_images=10, points=False)
    compare({"step_bias": net}, data, time_steps=(1, 8), explain_at=4, limit=20, error_images=10, points=False)
    assert made == [4, 8]


def test_stored_rows_are_kept_and_renewed_but_not_mixed_with_others(result):
    old = result.to_dict()
    new = {**old, "results": {"max": {"renewed": True}, "mice": {"added": True}}}
    both = merged(old, new)["results"]
    assert both["max"] == {"renewed": True}
    assert both["mice"] == {"added": True}
    assert both["qcfs"] == old["results"]["qcfs"]
    with pytest.raises(micelab.MicelabError, match=r"measured otherwise .images 40 there, 50 now.: choose another --out"):
        merged(old, {**new, "images": 50})


def test_stored_rows_can_be_drawn_again_as_they_were(result):
    stored = json.loads(json.dumps(result.to_dict()))
    curves, errors, ann = drawable(stored)
    assert curves == [row.curve for row in result.results.values()]
    assert errors in [row.errors for row in result.results.values()]
    assert errors.method == result.best().curve.method
    assert ann == max(row.ann_accuracy for row in result.results.values())
    assert curve_and_errors(curves, errors, ann).startswith(b"\x89PNG")


def test_networks_trained_for_three_t_are_one_curve_each_at_its_own(result):
    stored = json.loads(json.dumps(result.to_dict()))
    row = stored["results"]["qcfs"]
    steps = row["curve"]["time_steps"]
    for number, t in enumerate(steps[:3]):
        accuracy = [0.1 * number + 0.01 * place for place in range(len(steps))]
        stored["results"][f"mice T={t}"] = {**row, "curve": {**row["curve"], "accuracy": accuracy}}
    *others, joint = drawable(stored)[0]
    assert [curve.method for curve in others] == list(result.results)
    assert joint.method == "mice, each at its T"
    assert joint.time_steps == tuple(steps[:3])
    assert joint.accuracy == pytest.approx([0.0, 0.11, 0.22])


def test_two_stages_of_a_network_stand_side_by_side(tmp_path):
    data = micelab.load_data("digits")
    nets = {"qcfs": micelab.small_cnn(activation="quant_clip"), "mice": micelab.small_cnn(activation="spike_clip", levels=4)}
    found = compare(nets, data, time_steps=(1, 4), explain_at=4, limit=20, error_images=20, before="qcfs")
    assert found.stages() == ("qcfs", "mice")
    figure = figures.before_and_after(found.results["qcfs"].errors, found.results["mice"].errors, found.stages())
    layers = found.results["mice"].errors.layers
    bars = [trace for trace in figure.data if trace.name in KINDS]
    assert [bar.name for bar in bars] == [*KINDS, *KINDS]
    for bar, kind in zip(bars[4:], KINDS, strict=True):
        assert list(bar.y) == pytest.approx([100 * getattr(layer, kind).rms / layer.signal for layer in layers.values()])
        assert bar.marker.color == COLOURS[kind]
    assert "before and after" in write_report(tmp_path / "page.html", found, "micelab explain").read_text()
    with pytest.raises(micelab.MicelabError, match="of different layers"):
        figures.before_and_after(replace(found.results["qcfs"].errors, layers={}), found.results["mice"].errors, ("a", "b"))


def test_points_lost_and_the_curve_tell_the_same_story(result):
    for row in result.results.values():
        assert row.points.snn == pytest.approx(row.curve.at(4))
        assert row.points.ann == pytest.approx(row.ann_accuracy)
    assert json.loads(json.dumps(result.to_dict()))["results"].keys() == result.results.keys()


def test_the_accuracy_figure_holds_the_curve_and_says_it_in_words(result):
    curve = result.results["qcfs"].curve
    figure = figures.accuracy_over_time([curve], 0.9)
    assert list(figure.data[0].x) == [1, 2, 4]
    assert list(figure.data[0].y) == pytest.approx([100 * a for a in curve.accuracy])
    assert f"{100 * curve.accuracy[-1]:.1f} %" in figure.layout.meta["alt"]


def test_the_error_figure_has_one_colour_for_each_kind_of_error(result):
    table = result.results["qcfs"].errors
    figure = figures.error_bars(table)
    bars = [trace for trace in figure.data if trace.name in KINDS]
    assert {trace.name: trace.marker.color for trace in bars} == COLOURS
    assert tuple(COLOURS) == KINDS
    for trace in bars:
        assert list(trace.x) == list(table.layers)
        assert list(trace.y) == pytest.approx([100 * getattr(e, trace.name).rms / e.signal for e in table.layers.values()])


def test_the_waterfall_ends_at_the_spiking_networks_accuracy(result):
    points = result.results["max"].points
    figure = figures.lost_points_waterfall(points)
    assert figure.data[0].y[0] == pytest.approx(100 * points.ann)
    assert figure.data[-1].y[0] == pytest.approx(100 * points.snn)
    ends = {trace.x[0]: (trace.base[0], trace.base[0] + trace.y[0]) for trace in figure.data[1:4]}
    assert min(abs(end - 100 * points.snn) for end in ends["timing"]) < 1e-9


def test_the_page_loads_nothing_and_names_every_method_layer_and_circumstance(result, tmp_path):
    page = write_report(tmp_path / "report.html", result, "micelab demo <script>alert(1)</script>").read_text()
    loads = re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="?(?!data:)([^">]+)', page)
    assert loads == []
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page
    for name, row in result.results.items():
        assert f"<summary>{name}" in page
        for layer in row.errors.layers:
            assert layer in page
    assert result.machine in page
    assert f"{100 * result.results['qcfs'].curve.at(4):.2f}" in page


def test_the_page_forbids_its_own_browser_to_load_anything_and_holds_plotly_once(result, tmp_path):
    page = write_report(tmp_path / "report.html", result, "micelab demo").read_text()
    assert """http-equiv="Content-Security-Policy" content="default-src 'none';""" in page
    assert page.count("plotly.js v") == 1
    drawn = re.findall(r'<div id="(figure-\d+)"', page)
    assert drawn == [f"figure-{n}" for n in range(1, len(result.results) + 4)]  # a section each; curve, points, spikes
    assert re.findall(r'aria-labelledby="(figure-\d+)-words"', page) == drawn
    assert write_report(tmp_path / "again.html", result, "micelab demo").read_text() == page


def test_names_of_data_and_layers_are_text_not_html(result, tmp_path):
    row = result.results["qcfs"]
    layers = {f"<img src=x onerror=alert({number})>": layer for number, layer in enumerate(row.errors.layers.values())}
    row = replace(row, network="<u>net</u>", errors=replace(row.errors, layers=layers))
    odd = replace(result, dataset="</title><script>alert(2)</script>", results={"qcfs": row})
    page = write_report(tmp_path / "report.html", odd, "micelab demo").read_text()
    for raw in ("<img src=x", "<u>net", "<script>alert(2)"):
        assert raw not in page
    assert "&lt;img src=x onerror=alert(0)&gt;</td>" in page


def test_a_page_that_cannot_be_written_says_so(result, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        write_report(tmp_path / "file" / "report.html", result, "micelab demo")


def test_the_still_picture_is_a_png(result):
    row = result.results["qcfs"]
    assert curve_and_errors([row.curve], row.errors, row.ann_accuracy).startswith(b"\x89PNG")


def test_two_resnets_of_one_activation_and_level_are_two_rows():
    wide, narrow = (micelab.resnet20(kind=kind, activation="quant_clip", levels=8) for kind in "BA")
    found = [row for row in rows([narrow, wide]) if row.startswith("qcfs")]
    assert found == ["qcfs L=8 ResNet-20 kind A (width 16)", "qcfs L=8 ResNet-20 kind B (width 64)"]
    with pytest.raises(InputError, match="evaluate them one after the other"):
        rows([narrow, micelab.resnet20(kind="A", activation="quant_clip", levels=8)])
