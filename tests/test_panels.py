"""The panels: every corner of their sliders, any order of clicks, and what they show when nothing runs."""

import functools
import itertools
import re
import subprocess
import sys
import time

import ipywidgets
import plotly
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import micelab
from micelab.activation import quantize
from micelab.data import to_float
from micelab.exceptions import InputError
from micelab.panels import DepthPanel, ImagePanel, NeuronPanel, OrderPanel, StaircasePanel, ThresholdPanel
from micelab.panels.drawing import without_mark

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


def test_changes_of_the_layout_are_freed_of_their_mark_in_the_plotly_that_is_installed():
    own = str(plotly.graph_objects.FigureWidget._esm)
    freed = without_mark(own)
    assert freed != own
    assert "_doNotReportToPy=!0" in freed  # of traces it stays: there plotly draws anew in any case
    assert re.sub(r'Object\.defineProperty\((\w+),"_doNotReportToPy",\{value:!0\}\)', r"\1._doNotReportToPy=!0", freed) == own


def shown(panel):
    """The numbers of every trace that the reader sees."""
    return [[(tuple(t.x or ()), tuple(t.y or ())) for t in figure.data] for figure in panel.drawn]


def drawn_afresh(panel):
    """The same, from new figures of the present state."""
    return [[(tuple(t.get("x", ())), tuple(t.get("y", ()))) for t in spec["data"]] for spec in panel.specs()]


def assert_true_picture(panel):
    """What is shown is what a fresh drawing of the state shows: numbers, titles, ranges, marks."""
    assert shown(panel) == drawn_afresh(panel)
    for figure, spec in zip(panel.drawn, panel.specs(), strict=True):
        assert figure.layout.title.text == spec["layout"]["title"]["text"]
        assert figure.layout.meta["alt"] == spec["layout"]["meta"]["alt"]
        assert [shape.x0 for shape in figure.layout.shapes] == [shape["x0"] for shape in spec["layout"].get("shapes", ())]
        for key, axis in spec["layout"].items():
            if key[1:5] == "axis" and "range" in axis:
                assert list(figure.layout[key].range) == list(axis["range"])
        for trace, wanted in zip(figure.data, spec["data"], strict=True):
            if isinstance(wanted.get("marker", {}).get("color"), list):
                assert list(trace.marker.color) == wanted["marker"]["color"]
    assert panel.numbers.value == panel.live()


def at_rest(panel, limit=150_000):
    data, _ = panel._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert data["image/png"].startswith("iVBOR")
    assert len(data["image/png"]) < limit
    assert data["text/plain"].startswith(f"{type(panel).__name__}: ")
    assert "\n" not in data["text/plain"]


def corners(*sliders):
    """Every combination of the sliders' ends and middles."""
    ends = [
        range(len(s.options))
        if hasattr(s, "options")
        else (s.min, (s.min + s.max) / 2 if isinstance(s.value, float) else 3, s.max)
        for s in sliders
    ]
    ends = [(e[0], e[len(e) // 2], e[-1]) for e in ends]
    return itertools.product(*ends)


def move(widget, value):
    """As the browser does it."""
    widget.set_state({"index" if hasattr(widget, "options") else "value": value})


def latency(change, values):
    times = []
    for value in values:
        begun = time.perf_counter()
        change(value)
        times.append(time.perf_counter() - begun)
    return sorted(times)[len(times) // 2]


PANELS = {
    "neuron": (NeuronPanel, ("current", "steps", "start")),
    "staircase": (StaircasePanel, ("steps", "start", "input")),
    "threshold": (lambda: ThresholdPanel(activations()), ("theta", "steps")),
    "depth": (lambda: DepthPanel(depth_tables()), ("steps",)),
    "image": (lambda: ImagePanel(*small_network(), time_steps=4), ("image", "step", "layer")),
}


def activations():
    return torch.randn(3000, generator=torch.Generator().manual_seed(0)) * 2


@functools.cache
def small_network():
    data = micelab.load_data("digits")
    snn = micelab.convert(micelab.small_cnn(activation="quant_clip").eval(), "qcfs")
    return snn, to_float(data.test.images[:3]), data.test.labels[:3], data.classes


@functools.cache
def depth_tables():
    ann = micelab.small_cnn(activation="quant_clip").eval()
    snn, images = micelab.convert(ann, "qcfs"), to_float(micelab.load_data("digits").test.images[:16])
    return {t: micelab.error_breakdown(ann, snn, images, t) for t in (1, 4, 2)}


@pytest.mark.parametrize("name", PANELS)
def test_every_corner_of_the_sliders_shows_its_own_numbers(name):
    make, sliders = PANELS[name]
    panel = make()
    assert_true_picture(panel)
    moved = [getattr(panel, slider) for slider in sliders]
    for places in corners(*moved):
        for widget, place in zip(moved, places, strict=True):
            move(widget, place)
        assert_true_picture(panel)
    for widget in moved:  # and by hand, from Python
        widget.value = widget.options[0] if hasattr(widget, "options") else widget.min
    assert_true_picture(panel)
    at_rest(panel)


@pytest.mark.parametrize("name", PANELS)
def test_a_move_of_a_slider_takes_less_than_a_tenth_of_a_second(name):
    make, sliders = PANELS[name]
    panel = make()
    for slider in sliders:
        widget = getattr(panel, slider)
        ends = (0, len(widget.options) - 1) if hasattr(widget, "options") else (widget.min, widget.max)
        assert latency(functools.partial(move, widget), ends * 4) < 0.1


def test_two_panels_side_by_side_do_not_know_of_each_other():
    one, two = StaircasePanel(), StaircasePanel()
    before = shown(two)
    one.steps.value = 16
    assert shown(two) == before
    assert two.state.time_steps == 4


def test_the_neurons_panel_balances_its_charge_in_every_corner():
    panel = NeuronPanel()
    for current, steps, start in corners(panel.current, panel.steps, panel.start):
        move(panel.current, current)
        move(panel.steps, steps)
        move(panel.start, start)
        trace = panel.state.trace()
        assert trace.count + trace.residual == pytest.approx(panel.state.v0 + panel.state.current * panel.state.time_steps)
        assert f"{trace.count} spikes" in panel.sentence()


def test_the_drawn_staircase_is_q():
    panel = StaircasePanel()
    for steps, start in itertools.product((1, 3, 4, 32), (0.0, 0.05, 0.5, 1.0)):
        panel.steps.value, panel.start.value = steps, start
        line = next(trace for trace in panel.drawn[0].data if trace.name == "Q(z)")
        for left, right, says in zip(line.x, line.x[1:], line.y, strict=False):
            if right - left > 1e-9:
                middle = torch.tensor([(left + right) / 2], dtype=torch.float64)
                assert says == pytest.approx(quantize(middle, 1.0, steps, start).item())


def test_the_threshold_panel_keeps_its_star_at_the_least_error():
    panel = ThresholdPanel(activations(), time_steps=(1, 4, 32))
    for steps in (1, 4, 32):
        panel.steps.value = steps
        star = next(trace for trace in panel.drawn[1].data if trace.name == "least")
        both = next(trace for trace in panel.drawn[1].data if trace.name == "both")
        assert star.y[0] == min(both.y)
    assert "≈" in repr(panel)


ORDER_CLICKS = st.lists(st.one_of(st.tuples(st.integers(0, 1), st.integers(0, 7)), st.sampled_from(list(OrderPanel.ORDERS))))


@given(ORDER_CLICKS)
def test_any_order_of_clicks_keeps_every_inputs_count(clicks):
    panel = one_order_panel()
    panel.orders["even"].click()
    for click in clicks:
        (panel.orders[click] if isinstance(click, str) else panel.grid[click[0]][click[1]]).click()
        assert [sum(row) for row in panel.state.trains] == [4, 3]
    assert_true_picture(panel)
    for row, buttons in zip(panel.state.trains, panel.grid, strict=True):
        assert [int(button.description == "┃") for button in buttons] == list(row)


@functools.cache
def one_order_panel():
    return OrderPanel()


def test_the_same_spikes_over_fire_and_under_fire():
    panel = OrderPanel()
    counts = {}
    for name, button in panel.orders.items():
        button.click()
        button.click()  # a double click changes nothing more
        trace = panel.state.trace()
        counts[name] = trace.count
        assert trace.mean_current == pytest.approx(0.375)
        assert trace.verdict() in panel.sentence()
    assert counts == {"even": 3, "push first": 5, "hold first": 2}
    at_rest(panel)


def test_a_spike_is_lifted_and_set_down_elsewhere():
    panel = OrderPanel(push=(1, 0, 0, 0), hold=(0, 0, 0, 1))
    panel.grid[0][1].click()  # nothing in hand: an empty place does nothing
    assert panel.state.lifted is None
    panel.grid[0][0].click()
    assert panel.state.lifted == (0, 0)
    assert panel.grid[0][0].button_style == "warning"
    panel.grid[1][0].click()  # another input's row does not take it
    assert panel.state.trains == ((1, 0, 0, 0), (0, 0, 0, 1))
    panel.grid[0][2].click()
    assert panel.state.trains == ((0, 0, 1, 0), (0, 0, 0, 1))
    assert panel.state.lifted is None
    panel.grid[0][2].click()
    panel.grid[0][2].click()
    assert panel.state.lifted is None


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ThresholdPanel(torch.tensor([-1.0, 0.0])), "nothing above 0"),
        (lambda: ThresholdPanel(torch.zeros(0)), "nothing above 0"),
        (lambda: DepthPanel({}), "no error tables"),
        (lambda: OrderPanel(push=(1, 0), hold=(0, 1, 1)), "two rows of 0 and 1"),
        (lambda: OrderPanel(push=(2, 0), hold=(0, 1)), "two rows of 0 and 1"),
        (lambda: ImagePanel(small_network()[0], torch.zeros(2, 1, 8, 8), torch.zeros(3), "0123456789"), "2 images and 3 labels"),
    ],
)
def test_a_panel_without_its_data_says_what_it_needs(make, said):
    with pytest.raises(InputError, match=said):
        make()


def test_without_ipywidgets_one_sentence_names_the_remedy():
    code = "import sys; sys.modules['ipywidgets'] = None\nimport micelab\nfrom micelab.exercises import predict\n"
    code += "for do in (lambda: __import__('micelab.panels'), lambda: predict('?', (1, 2), 1, '')):\n"
    code += " try:\n  do()\n except micelab.MicelabError as error:\n  print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.strip().splitlines()
    assert first == "panels need ipywidgets and plotly: run `pip install micelab[course]`"
    assert second == "predictions need ipywidgets: run `pip install micelab[course]`"


def test_the_first_message_of_a_figure_holds_all_of_it(monkeypatch, parts):
    opened = []
    make = ipywidgets.widgets.widget.comm.create_comm

    def noting(**message):
        opened.append(message)
        return make(**message)

    monkeypatch.setattr(ipywidgets.widgets.widget.comm, "create_comm", noting)
    panels = [DepthPanel(parts[1]), StaircasePanel()]
    states = [message["data"]["state"] for message in opened if "_widget_data" in message["data"]["state"]]
    drawn = [figure for panel in panels for figure in panel.drawn]
    assert [len(figure.data) for figure in drawn] == [len(state["_widget_data"]) for state in states]
    assert all(state["_widget_layout"]["height"] for state in states)
    assert all(len(state["_esm"]) < 5_000 for state in states)  # plotly's own code is sent once, by the library
    assert len({state["_library"] for state in states}) == 1


def test_a_network_of_one_spiking_layer_has_a_panel_over_depth_too():
    ann = nn.Sequential(nn.Conv2d(1, 4, 3), micelab.QuantClip(levels=4, theta=1.0), nn.Flatten(), nn.Linear(144, 10)).eval()
    snn = micelab.convert(ann, "qcfs")
    tables = {t: micelab.error_breakdown(ann, snn, torch.rand(4, 1, 8, 8), t) for t in (1, 2)}
    assert "in the first spiking layer" in DepthPanel(tables).sentence()


def test_every_threshold_of_small_inputs_is_reachable():
    panel = ThresholdPanel(0.1 * torch.rand(1000))
    assert len(panel.theta.options) == panel.CANDIDATES
