"""The course in a real browser: JupyterLab, all cells run, sliders by keyboard, ticks, clicks; figure and number follow."""

import re
from pathlib import Path

import pytest
from lab import CHROMIUM, QUIET, Page, jupyter

from micelab import MicelabError, load_data

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: `pip install micelab[test]`")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a notebook takes a minute, and ten where other work has the machine
    pytest.mark.skipif(
        not Path(CHROMIUM).exists(), reason=f"no Chromium at {CHROMIUM}: apt-get install chromium, or $MICELAB_CHROMIUM"
    ),
]
HARMLESS = re.compile(r"favicon|Failed to load resource.*40[34]")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with jupyter(tmp_path_factory.mktemp("lab")) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield running
        running.close()


@pytest.fixture
def lesson(request, address, browser):
    """A notebook, all cells run and all figures drawn; afterwards, that it logged no error and asked no other machine."""
    notebook, figures, sliders = request.param
    if "cifar" in notebook:
        try:
            load_data("cifar10", download=False)
        except MicelabError as error:
            pytest.skip(str(error))
    page = Page(browser, address, f"notebooks/{notebook}.ipynb")
    page.run_all()
    page.figures_drawn(figures)
    assert page.page.locator(".noUi-handle").count() == sliders
    yield page
    errors = [text for text in page.errors if not HARMLESS.search(text)]
    page.close()
    assert not errors
    assert not page.strays


def of(notebook, figures, sliders):
    """The notebook that a test opens, and how many figures and sliders stand in it."""
    return pytest.mark.parametrize("lesson", [(notebook, figures, sliders)], indirect=True, ids=[notebook])


def predicts(lesson, option):
    """Commits to the right answer of a prediction."""
    lesson.page.get_by_role("button", name=option, exact=True).first.click()
    lesson.page.get_by_text("✓ Right.").first.wait_for()


@of("00_start_here", 2, 3)
def test_image_step_and_layer_move_the_spikes_and_the_answer(lesson):
    for slider, key in enumerate(("ArrowRight", "ArrowLeft", "ArrowRight")):  # the step stands at its last
        lesson.changes(lambda slider=slider, key=key: lesson.press(slider, key, key))
    predicts(lesson, "2")


@of("01_from_relu_to_spikes", 1, 3)
def test_current_steps_and_start_move_a_neurons_spikes_and_rate(lesson):
    for slider, key in enumerate(("ArrowRight", "ArrowRight", "ArrowLeft")):
        lesson.changes(lambda slider=slider, key=key: lesson.press(slider, key, key, key))
    predicts(lesson, "3")


@of("02_quantization_error", 2, 3)
def test_steps_start_and_input_move_staircase_and_error(lesson):
    for slider in range(3):
        lesson.changes(lambda slider=slider: lesson.press(slider, "ArrowRight", "ArrowRight"))
    predicts(lesson, "5")


@of("03_clipping_error", 2, 2)
def test_threshold_and_steps_move_histogram_and_error(lesson):
    lesson.changes(lambda: lesson.press(0, "ArrowLeft", "ArrowLeft"))
    lesson.changes(lambda: lesson.press(1, "ArrowRight"))
    predicts(lesson, "rises")


@of("04_timing_error", 3, 1)
def test_the_order_of_the_same_spikes_makes_a_neuron_over_fire_and_under_fire(lesson):
    lesson.changes(lambda: lesson.press(0, "ArrowRight"))
    lesson.says("sent: 3")
    lesson.changes(lesson.page.get_by_role("button", name="push first").click)
    lesson.says("over-fires by 2")
    lesson.changes(lesson.page.get_by_role("button", name="hold first").dblclick)
    lesson.says("under-fires by 1")
    predicts(lesson, "zero")


@of("05_mice", 2, 0)
def test_a_tick_restacks_the_errors_and_joint_training_takes_others_along(lesson):
    boxes = lesson.page.locator(".widget-checkbox input")
    assert boxes.count() == 4
    for box in range(4):
        lesson.changes(boxes.nth(box).click)
    lesson.page.wait_for_function(
        "[...document.querySelectorAll('.widget-checkbox input')].filter(box => box.disabled).length === 2"
    )
    assert [boxes.nth(box).is_disabled() for box in range(4)] == [True, True, False, False]
    lesson.changes(boxes.nth(3).click)
    boxes.nth(2).dblclick()
    assert boxes.nth(2).is_checked()


@of("06_resnet20_cifar", 3, 4)
def test_method_image_step_and_layer_move_by_keyboard(lesson):
    for slider, key in enumerate(("ArrowLeft", "ArrowRight", "ArrowLeft")):
        lesson.changes(lambda slider=slider, key=key: lesson.press(slider, key))
    curves = "document.querySelectorAll('.js-plotly-plot')[2]._fullLayout"
    lesson.page.evaluate(f"() => {{ window.before = {curves}; }}")
    lesson.changes(lambda: lesson.press(2, "ArrowLeft"))
    assert lesson.page.evaluate(f"window.before === {curves}")  # a line came to light and another went: nothing was made anew
    lesson.changes(lambda: lesson.press(3, "ArrowRight"), what=("curves", "drawing"))  # its name stands in the title
    assert "blocks.0.act1" in lesson.page.locator(".js-plotly-plot .gtitle").first.text_content()


@of("07_your_own_network", 1, 1)
def test_the_report_walks_from_problem_to_problem_and_to_another_network(lesson):
    button = lesson.page.get_by_role
    lesson.says("nn.MaxPool2d")
    lesson.changes(button("button", name="next problem").click, what=("drawing", "numbers"))
    lesson.says("nn.GELU")
    button("button", name="next problem").dblclick()
    lesson.says("softmax")
    lesson.changes(button("button", name="mended").click, what=("drawing", "numbers"))
    lesson.says("nn.Conv2d")
    lesson.changes(button("button", name="ResNet-20").click, what=("drawing", "numbers"))
    lesson.changes(lambda: lesson.press(0, "ArrowRight"), what=("drawing", "numbers"))
