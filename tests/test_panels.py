"""The panel over T: every corner of its slider, and what it shows when nothing runs."""

import pytest

import micelab
from micelab.data import to_float
from micelab.exceptions import InputError
from micelab.panels import TimePanel

STEPS = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def parts():
    data = micelab.load_data("digits")
    ann = micelab.small_cnn(activation="quant_clip").eval()
    snn = micelab.convert(ann, "qcfs")
    split = data.test.head(32)
    images = to_float(split.images)
    curve = micelab.accuracy_curve(snn, split.batches(), STEPS)
    tables = {t: micelab.error_breakdown(ann, snn, images, t) for t in STEPS}
    predictions = snn.simulate(images[:6], STEPS[-1]).predictions
    return curve, tables, images[:6], split.labels[:6], predictions, data.classes, 0.5


def test_every_position_of_the_slider_shows_its_own_numbers(parts):
    panel = TimePanel(*parts)
    curve, tables, _, labels, predictions, classes, _ = parts
    for t in (*STEPS, *reversed(STEPS), 1, 1, 8):
        panel.slider.set_state({"index": STEPS.index(t)})  # the browser's own path
        assert panel.value == t
        assert f"T = {t}:" in panel.words.value
        assert panel.accuracy.data[-1].y[0] == pytest.approx(100 * curve.at(t))
        for trace in panel.errors.data[:4]:
            wanted = [100 * getattr(layer, trace.name).rms / layer.signal for layer in tables[t].layers.values()]
            assert list(trace.y) == pytest.approx(wanted)
        assert panel.captions() == [classes[p] for p in predictions[t - 1]]
        assert panel.strip.value.count("✓") == int((predictions[t - 1] == labels).sum())


def test_at_rest_the_panel_is_a_picture_and_a_sentence(parts):
    data, _ = TimePanel(*parts)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert data["text/plain"].startswith("TimePanel: T = 8: accuracy")
    assert len(data["image/png"]) < 120_000
    assert data["image/png"].startswith("iVBOR")


def test_a_curve_that_lacks_a_step_of_the_tables_is_refused(parts):
    curve, tables, *rest = parts
    with pytest.raises(InputError, match="must hold every T"):
        TimePanel(curve, tables | {3: tables[2]}, *rest)
