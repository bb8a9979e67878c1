"""The course in a real browser: JupyterLab, all cells run, a slider moved by keyboard, figure and number follow."""

import json
import re
from pathlib import Path

import pytest
from lab import CHROMIUM, QUIET, Page, jupyter

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: `pip install micelab[test]`")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("browser"),  # one JupyterLab for all
    pytest.mark.skipif(
        not Path(CHROMIUM).exists(), reason=f"no Chromium at {CHROMIUM}: apt-get install chromium, or $MICELAB_CHROMIUM"
    ),
]
NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
HARMLESS = re.compile(r"favicon|Failed to load resource.*40[34]")
PANELS = {"02_quantization_error": 3, "03_clipping_error": 2, "04_timing_error": 1}


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


@pytest.fixture(params=PANELS)
def lesson(request, address, browser):
    page = Page(browser, address, f"notebooks/{request.param}.ipynb")
    page.name = request.param
    page.run_all()
    page.page.wait_for_selector(".js-plotly-plot .trace path", state="attached", timeout=60_000)
    page.page.wait_for_timeout(1500)
    yield page
    page.close()


def test_a_slider_moved_by_keyboard_changes_figure_and_numbers(lesson):
    page = lesson.page
    assert page.locator(".noUi-handle").count() == PANELS[lesson.name]
    for number in range(PANELS[lesson.name]):
        before = (lesson.curves(), lesson.drawn(), lesson.numbers())
        handle = page.locator(".noUi-handle").nth(number)
        handle.scroll_into_view_if_needed()
        handle.focus()
        key = "ArrowLeft" if lesson.name.startswith("03") and number == 0 else "ArrowRight"
        page.keyboard.press(key)
        page.keyboard.press(key)
        page.wait_for_timeout(1200)
        after = (lesson.curves(), lesson.drawn(), lesson.numbers())
        assert json.dumps(after[0]) != json.dumps(before[0])
        assert after[1] != before[1]
        assert after[2] != before[2]
    if lesson.name.startswith("04"):
        assert "sent: 3" in lesson.numbers()
        page.get_by_role("button", name="push first").click()
        page.wait_for_timeout(1200)
        assert "over-fires by 2" in lesson.numbers()
        page.get_by_role("button", name="hold first").dblclick()
        page.wait_for_timeout(1200)
        assert "under-fires by 1" in lesson.numbers()
    page.get_by_role("button", name=OPTION[lesson.name], exact=True).first.click()
    page.wait_for_timeout(800)
    assert page.get_by_text("✓ Right.").count() == 1
    assert not [text for text in lesson.errors if not HARMLESS.search(text)]
    assert not lesson.strays


OPTION = {"02_quantization_error": "5", "03_clipping_error": "rises", "04_timing_error": "zero"}
