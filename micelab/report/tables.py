"""Comparisons as tables and sentences in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from micelab.data import ImageData
from micelab.errors import KINDS, ErrorTable
from micelab.metrics import ENERGY_ASSUMPTIONS
from micelab.report.compare import Comparison

_console = Console(highlight=False)
if not _console.is_terminal:
    _console.width = 118


def say(words: str) -> None:
    """One line on the terminal."""
    _console.print(words, markup=False)


def show(result: Comparison) -> None:
    """Accuracy over T, lost points, energy, and the error table of the best method."""
    say(f"\n{result.dataset}, {result.images:,} {result.split} images; {result.size}")
    say(f"{result.machine}")
    _console.print(accuracy_table(result))
    _console.print(points_table(result))
    shown = result.best()
    over = f"over {result.error_images} images, rms in % of its signal"
    steps = f"T = {result.time_steps} ({shown.curve.true(result.time_steps)} true steps)"
    if (stages := result.stages()) is not None:
        before, after = (result.results[name].errors for name in stages)
        say(f"Each layer at T = {result.time_steps}, {stages[0]} -> {stages[1]}, {over}:")
        _console.print(before_and_after(before, after))
    say(f"{shown.curve.method}: errors of each layer at {steps} {over}:")
    _console.print(error_table(shown.errors))
    say(shown.errors.words())
    say("\n" + ENERGY_ASSUMPTIONS)


def accuracy_table(result: Comparison) -> Table:
    """One row a method: its network, the ANN's accuracy, the true steps of a run of T, accuracy at each T."""
    steps = next(iter(result.results.values())).curve.time_steps
    table = Table(title="Accuracy in % after T time-steps, which take as many true steps", title_justify="left")
    for heading in ("method", "network", "ANN", "true steps"):
        table.add_column(heading, justify="left" if heading in ("method", "network") else "right")
    for t in steps:
        table.add_column(f"T={t}", justify="right")
    for name, row in result.results.items():
        values = [f"{100 * a:.2f}" for a in row.curve.accuracy]
        table.add_row(name, row.network, f"{100 * row.ann_accuracy:.2f}", row.curve.true_words, *values)
    return table


def points_table(result: Comparison) -> Table:
    """One row a method: points of accuracy lost to each error at `time_steps`, spikes and energy beside the ANN's."""
    title = f"Where the points go at T = {result.time_steps}, and what an image costs"
    table = Table(title=title, title_justify="left")
    costs = ("spike rate", "SNN energy", "ANN energy")
    for heading in ("method", "true steps", "ANN", "clipping", "quantization", "timing", "SNN", *costs):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, row in result.results.items():
        points = row.points
        lost = ["-"] * 5
        if points is not None:
            lost = [f"{100 * points.ann:.2f}"]
            lost += [f"{0.0 - round(100 * getattr(points, kind), 2):+.2f}" for kind in ("clipping", "quantization", "timing")]
            lost += [f"{100 * points.snn:.2f}"]
        rate = sum(row.energy.spike_rates.values()) / len(row.energy.spike_rates)
        energies = [f"{row.energy.snn_microjoule:.2f} µJ", f"{row.energy.ann_microjoule:.2f} µJ"]
        table.add_row(name, str(row.curve.true(result.time_steps)), *lost, f"{rate:.3f}", *energies)
    return table


def error_table(errors: ErrorTable) -> Table:
    """One row a layer: each error's rms over the layer's signal, shares of over-, under-firing and saturated neurons."""
    table = Table()
    for heading in ("layer", "theta", *KINDS, "total", "over-fire", "under-fire", "saturated"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for name, layer in errors.layers.items():
        shares = [layer.share(kind) for kind in (*KINDS, "total")]
        shares += [layer.over_firing, layer.under_firing, layer.saturated]
        table.add_row(name, f"{layer.theta:.3g}", *[f"{100 * share:.1f} %" for share in shares])
    return table


def before_and_after(before: ErrorTable, after: ErrorTable) -> Table:
    """One row a layer: each error's rms over the layer's signal, and the shares of odd neurons, before -> after."""
    table = Table()
    for heading in ("layer", *KINDS, "total", "over-fire", "under-fire"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for name, old in before.layers.items():
        shares = []
        for layer in (old, after.layers[name]):
            of_signal = [layer.share(kind) for kind in (*KINDS, "total")]
            shares.append([*of_signal, layer.over_firing, layer.under_firing])
        table.add_row(name, *[f"{100 * a:.0f} -> {100 * b:.0f} %" for a, b in zip(*shares, strict=True)])
    return table


def data_words(data: ImageData) -> str:
    """What a data set holds, in three lines."""
    shape = "x".join(str(side) for side in data.shape)
    counts = ", ".join(f"{len(data.split(name)):,} {name}" for name in ("train", "validation", "test"))
    names = ", ".join(data.classes[:10]) + (", ..." if len(data.classes) > 10 else "")
    return f"{data.name}: {shape} images: {counts}\n{len(data.classes)} classes: {names}\nmean {data.mean}, spread {data.std}"
