"""How long the kernel takes for one move in every panel: `python benchmarks/panels.py`, half a minute, no browser.

A move is what the browser sends when a slider goes one place further, a box is ticked or a button clicked; the time ends when
the last message to the browser is written. Printed is the median of all moves, to every place and back, in milliseconds.
The networks are untrained small ones on digits: what a panel draws is of the same size as in the notebooks.
"""

import statistics
import time
from collections.abc import Callable, Iterator

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
    TimePanel,
)
from micelab.remedies import try_remedies

STEPS = (1, 2, 4, 8)


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
        (TimePanel(curve, tables, *few[:2], snn.simulate(few[0], 8).predictions, data.classes, 0.5), "slider"),
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


def main() -> None:
    print(f"{machine()}\n\n| panel | control | median, ms |\n|---|---|---:|")
    for panel, controls in panels():
        for name, control in controls.items():
            print(f"| `{type(panel).__name__}` | {name} | {median(control):.0f} |")


if __name__ == "__main__":
    main()
