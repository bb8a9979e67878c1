"""How long one move in every panel takes: `python benchmarks/panels.py`, the kernel's part, half a minute, no browser;
`python benchmarks/panels.py --browser`, all of it for every slider of the course, ten minutes, wants Chromium and CIFAR-10.

A move is what the browser sends when a slider goes one place further, a box is ticked or a button clicked; the time ends when
the last message to the browser is written. Printed is the median of all moves, to every place and back, in milliseconds.
The networks are untrained small ones on digits: what a panel draws is of the same size as in the notebooks.

In the browser each notebook is run in JupyterLab, as its tests do it. A move is an arrow key on a slider; the time ends with the
frame that shows the last change of a figure or of the numbers beside it.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import micelab
from micelab.data import to_float
from micelab.machine import machine
from micelab.panels import (
    CheckupPanel,
    DepthPanel,
    ImagePanel,
    MethodPanel,
    NeuronPanel,
    OrderPanel,
    RemedyPanel,
    StaircasePanel,
    ThresholdPanel,
)
from micelab.report.remedies import try_remedies

STEPS = (1, 2, 4, 8)
ROOT = Path(__file__).resolve().parent.parent
WATCH = """() => {
    window.moves = {};
    document.addEventListener("keydown", () => { moves.down = performance.now(); moves.seen = null; }, true);
    const shows = node => (node.nodeType === 1 ? node : node.parentElement)?.closest(".js-plotly-plot, .widget-htmlmath");
    new MutationObserver(changes => {
        if (changes.some(change => shows(change.target))) requestAnimationFrame(() => { moves.seen = performance.now(); });
    }).observe(document.body, {subtree: true, childList: true, attributes: true, characterData: true});
}"""
STILL = "moves.seen && performance.now() - moves.seen > 400"


def panels() -> Iterator[tuple[object, dict[str, object]]]:
    """Each panel with its controls by name."""
    torch.manual_seed(0)
    data = micelab.load_data("digits")
    split = data.test.head(64)
    images, labels = to_float(split.images), split.labels
    ann = micelab.small_cnn(activation="quant_clip", theta=1.0).eval()
    snn = micelab.convert(ann, "qcfs")
    curve = micelab.accuracy_curve(snn, split.batches(), STEPS)
    tables = {t: micelab.error_breakdown(ann, snn, images, t) for t in STEPS}
    clip = micelab.small_cnn(activation="clip", theta=1.0).eval()
    trials = try_remedies({"clip": clip, "quantized": ann, "joint": micelab.joint.prepare(ann, 2)}, split, 2, STEPS)
    few = images[:8], labels[:8], data.classes
    found: list[tuple[object, str]] = [
        (ImagePanel(snn, *few), "image step layer"),
        (NeuronPanel(), "current steps start"),
        (StaircasePanel(), "steps start input"),
        (ThresholdPanel(torch.randn(20_000)), "theta steps"),
        (DepthPanel(tables), "steps"),
        (
            MethodPanel({"a": snn, "b": snn}, dict.fromkeys("ab", curve), dict.fromkeys("ab", 0.5), *few),
            "method image step layer",
        ),
        (
            CheckupPanel({"resnet": micelab.checkup(micelab.resnet20()), "mine": micelab.checkup(nn.Sequential(nn.GELU()))}),
            "layer",
        ),
    ]
    for panel, names in found:
        yield panel, {name: getattr(panel, name) for name in names.split()}
    remedy, order = RemedyPanel(trials, 0.9), OrderPanel()
    yield remedy, remedy.boxes
    yield order, order.orders


def moves(control: object) -> Iterator[Callable[[], None]]:
    """Every place of a control in order, and back."""
    if hasattr(control, "click"):
        yield from [control.click] * 10
    elif hasattr(control, "options"):
        places = range(len(control.options))
        yield from (lambda place=place: control.set_state({"index": place}) for place in [*places, *reversed(places)])
    elif isinstance(control.value, bool):
        yield from (lambda on=on: control.set_state({"value": on}) for on in (True, False) * 5)
    else:
        many = round((control.max - control.min) / control.step) + 1
        places = [control.min + place * control.step for place in range(many)]
        yield from (lambda value=value: control.set_state({"value": value}) for value in [*places, *reversed(places)])


def median(control: object) -> float:
    """Milliseconds a move."""
    times = []
    for move in moves(control):
        begun = time.perf_counter()
        move()
        times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times)


def in_kernel() -> None:
    print("| panel | control | median, ms |\n|---|---|---:|")
    for panel, controls in panels():
        for name, control in controls.items():
            print(f"| `{type(panel).__name__}` | {name} | {median(control):.0f} |")


def in_browser(chosen: list[str]) -> None:
    from playwright.sync_api import sync_playwright

    sys.path.insert(0, str(ROOT / "tests"))
    from lab import CHROMIUM, QUIET, Page, jupyter

    print("| notebook | slider | median, ms | slowest, ms |\n|---|---|---:|---:|")
    with tempfile.TemporaryDirectory() as folder, jupyter(Path(folder)) as address, sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        for notebook in sorted(path.name for path in (ROOT / "notebooks").glob("0*.ipynb")):
            if chosen and notebook[:2] not in chosen:
                continue
            page: Any = Page(browser, address, f"notebooks/{notebook}")
            page.run_all()
            page.page.wait_for_timeout(5_000)
            page.page.evaluate(WATCH)
            for slider in range(page.page.locator(".noUi-handle").count()):
                page.press(slider, "Home")  # from its first place it can go right
                page.page.wait_for_timeout(1_000)
                times = [moved(page, slider, key) for key in ("ArrowRight", "ArrowLeft") * 10]
                print(f"| {notebook[:2]} | {slider + 1} | {statistics.median(times):.0f} | {max(times):.0f} |", flush=True)
            page.close()
        browser.close()


def moved(page: Any, slider: int, key: str) -> float:
    """Milliseconds from the key to the last frame that it changed."""
    page.press(slider, key)
    page.page.wait_for_function(STILL, timeout=20_000)
    return page.page.evaluate("moves.seen - moves.down")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--browser", nargs="*", metavar="NUMBER", help="all of a move, in JupyterLab; of some notebooks only")
    options = parser.parse_args(arguments)
    print(f"{machine()}\n")
    in_kernel() if options.browser is None else in_browser(options.browser)


if __name__ == "__main__":
    main()
