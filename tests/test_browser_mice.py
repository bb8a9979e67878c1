"""The panels of 05 to 07 in a real browser: ticks, sliders by keyboard, buttons; figure and numbers follow."""

import json
import re
from pathlib import Path

import pytest
from lab import CHROMIUM, QUIET, Page, jupyter

from micelab import MicelabError, load_data

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: `pip install micelab[test]`")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("browser"),  # one JupyterLab at a time
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
    if request.param.startswith("06"):
        try:
            load_data("cifar10", download=False)
        except MicelabError as error:
            pytest.skip(str(error))
    page = Page(browser, address, f"notebooks/{request.param}.ipynb")
    page.run_all()
    page.page.wait_for_selector(".js-plotly-plot .plot", timeout=60_000)
    page.page.wait_for_timeout(1500)
    yield page
    page.close()


def state(lesson):
    return json.dumps(lesson.curves()), lesson.drawn(), lesson.numbers()


def changes(lesson, act):
    """Acts, and checks that the curves, what is drawn and the numbers all changed."""
    before = state(lesson)
    act()
    lesson.page.wait_for_timeout(1200)
    after = state(lesson)
    assert all(new != old for new, old in zip(after, before, strict=True))


def quiet(lesson):
    assert not [text for text in lesson.errors if not HARMLESS.search(text)]
    assert not lesson.strays


@pytest.mark.parametrize("lesson", ["05_mice"], indirect=True)
def test_a_tick_restacks_the_errors_and_joint_training_takes_others_along(lesson):
    boxes = lesson.page.locator(".widget-checkbox input")
    assert boxes.count() == 4
    for number in range(4):
        changes(lesson, lambda number=number: boxes.nth(number).click())
    assert [boxes.nth(number).is_disabled() for number in range(4)] == [True, True, False, False]
    changes(lesson, lambda: boxes.nth(3).click())
    boxes.nth(2).dblclick()
    lesson.page.wait_for_timeout(1200)
    assert boxes.nth(2).is_checked()
    quiet(lesson)


@pytest.mark.parametrize("lesson", ["06_resnet20_cifar"], indirect=True)
def test_method_image_step_and_layer_move_by_keyboard(lesson):
    handles = lesson.page.locator(".noUi-handle")
    assert handles.count() == 4
    for number, key in enumerate(("ArrowLeft", "ArrowRight", "ArrowLeft", "ArrowRight")):

        def press(number=number, key=key):
            handles.nth(number).scroll_into_view_if_needed()
            handles.nth(number).focus()
            lesson.page.keyboard.press(key)

        before = state(lesson)
        press()
        lesson.page.wait_for_timeout(1500)
        after = state(lesson)
        assert after[0] != before[0] or after[1] != before[1] or number == 3
        assert after[2] != before[2] or number == 3  # the spikes of a layer are a picture, its name stands in the title
    assert "blocks.0.act1" in lesson.page.locator(".js-plotly-plot .gtitle").all_text_contents()[0]
    quiet(lesson)


@pytest.mark.parametrize("lesson", ["07_your_own_network"], indirect=True)
def test_the_report_walks_from_problem_to_problem_and_to_another_network(lesson):
    page = lesson.page
    assert "nn.MaxPool2d" in lesson.numbers()
    changes(lesson, lambda: page.get_by_role("button", name="next problem").click())
    assert "nn.GELU" in lesson.numbers()
    page.get_by_role("button", name="next problem").dblclick()
    page.wait_for_timeout(1200)
    assert "softmax" in lesson.numbers()
    changes(lesson, lambda: page.get_by_role("button", name="mended").click())
    assert "nn.Conv2d" in lesson.numbers()
    changes(lesson, lambda: page.get_by_role("button", name="ResNet-20").click())
    quiet(lesson)
