"""One HTML page that tells the whole story of a comparison, with interactive figures, and opens without network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import count
from pathlib import Path
from typing import Any

from micelab import __version__, figures, methods
from micelab.checkpoint import write_whole
from micelab.errors import KINDS
from micelab.metrics import ENERGY_ASSUMPTIONS
from micelab.report.compare import Comparison, MethodResult
from micelab.still import as_html

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; padding-bottom: .3rem; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
th, td { padding: .25rem .55rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #888; } th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.text { white-space: normal; min-width: 6rem; }
figure { margin: 1rem 0; } figcaption, .small { font-size: 13px; color: #555; }
blockquote { margin: 1rem 0; padding: .5rem 1rem; background: #f4f6f8; border-left: 4px solid #0072B2; white-space: pre-line; }
code { background: #f4f4f4; padding: 0 .25em; } details { margin: 1rem 0; } summary { cursor: pointer; font-weight: 600; }
dt { font-weight: 600; margin-top: .5rem; } dd { margin-left: 1.2rem; }
@media (max-width: 800px) { th, td { padding: .25rem .4rem; } table { font-size: 13px; } }
@media print { body { max-width: none; margin: 0; } figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""

_NO_NETWORK = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""The browser itself refuses whatever the page might want to load."""

_SCRIPT = """
addEventListener("toggle", event => {  // a figure drawn while it was folded away does not know its width
  if (event.target.open) event.target.querySelectorAll(".js-plotly-plot").forEach(plot => Plotly.Plots.resize(plot));
}, true);
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(part => { part.open = true; }));
"""

_GLOSSARY = {
    "T, time-steps": "How long the spiking network runs; more steps are more accurate, slower and cost more energy. "
    "True steps count those that a method spends beside them.",
    "theta, threshold": "The membrane potential at which a neuron spikes; the most that it can say.",
    "v, membrane potential": "The charge a neuron holds: it grows by the input and falls by theta at each spike. "
    "It starts at v0 (in thetas) and ends as v(T).",
    "phi, rate": "theta times the number of spikes over T: what the neuron says.",
    "timing": "The same charge in another order makes more spikes (over-firing, v(T) < 0) or fewer (under-firing, "
    "v(T) >= theta). It is zero at T = 1 and in the first layer.",
    "quantization": "A spike count is a whole number, so a rate takes T + 1 values only.",
    "clipping": "A neuron cannot say more than theta.",
    "inherited": "What the layers before already got wrong.",
}


def write_report(path: str | Path, result: Comparison, command: str) -> Path:
    """Writes the page and gives back its path; nothing half-written is left where it cannot be written."""
    path = Path(path)
    write_whole(path, _page(result, command).encode())
    return path


def _page(result: Comparison, command: str) -> str:
    rows = result.results
    best = result.best().curve.method
    anns = _anns(rows)
    only = next(iter(anns.values())) if len(anns) == 1 else None
    curves = figures.accuracy_over_time([row.curve for row in rows.values()], anns if only is None else only)
    number = count(1)

    def figure(drawn: Any) -> str:
        return _figure(drawn, next(number))

    parts = [
        f"<h1>From a trained network to a spiking one: {escape(result.dataset)}</h1>",
        f"<p>{len(rows)} conversion{'s' * (len(rows) > 1)}, measured on {result.images:,} {escape(result.split)} images. "
        f"{escape(str(result.size))}. {escape(result.machine)}; micelab {__version__}.</p>",
        f"<p class=small>Made by <code>{escape(command)}</code></p>",
        "<h2>How accurate, after how many steps?</h2>",
        figure(curves),
        _accuracy_table(rows),
        f"<p class=small>Accuracy in % on {result.images:,} {escape(result.split)} images. True steps are T and the hidden steps "
        "that a method spends beside them, or T for every layer where each waits for the one before (an upper bound).</p>",
        f"<h2>Where do the points go, at T = {result.time_steps}?</h2>",
        "<p>Three networks stand between the ANN and the spiking one, each with one error more than the last: activations "
        "limited to theta (clipping), put on T + 1 levels (quantization), and sent as spikes in their order (timing). The losses "
        "sum to the whole.</p>",
        _points_table(rows, result.time_steps),
        "<p class=small>Points of accuracy: - lost, + gained (an error can happen to help).</p>",
    ]
    if (lost := rows[best].points) is not None:
        waterfall = figures.lost_points_waterfall(lost, f"{best}: where the points go at T = {result.time_steps}")
        parts.append(figure(waterfall))
    parts.append(f"<h2>Which layer, and why?</h2><p>Errors over {result.error_images} images.</p>")
    if (stages := result.stages()) is not None:
        parts.append(figure(figures.before_and_after(rows[stages[0]].errors, rows[stages[1]].errors, stages)))
    parts += [
        _method_section(name, row, result.time_steps, figure(figures.error_bars(row.errors)), opened=name == best)
        for name, row in rows.items()
    ]
    parts += [
        "<h2>Spikes and energy</h2>",
        _energy_table(rows, result.time_steps),
        f"<p class=small>{escape(ENERGY_ASSUMPTIONS)}</p>",
    ]
    parts += [figure(figures.spike_rates(rows[best].energy, f"{best}: spike rates, T = {result.time_steps}"))]
    words = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in _GLOSSARY.items())
    parts += ["<h2>Words</h2>", f"<dl>{words}</dl>", "<h2>Methods and sources</h2>", _sources(rows)]
    title = escape(f"micelab: {result.dataset}")
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_NO_NETWORK}">'
    head += f'<meta name="viewport" content="width=device-width"><title>{title}</title><style>{_STYLE}</style>'
    body = f"<main>{''.join(parts)}</main><script>{_SCRIPT}</script>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _anns(rows: dict[str, MethodResult]) -> dict[str, float]:
    """Accuracy of every ANN, named for its activation, or for its row where several have that."""
    kinds: dict[str, dict[str, float]] = {}
    for name, row in rows.items():
        kinds.setdefault(row.network.split("), ")[-1].split()[0], {})[name] = row.ann_accuracy
    found: dict[str, float] = {}
    for kind, members in kinds.items():
        alone = len(set(members.values())) == 1
        found |= {f"ANN {kind if alone else name}": value for name, value in members.items()}
    return found


def _figure(figure: Any, number: int) -> str:
    """The figure and its sentence; plotly itself comes with the first one."""
    name, config = (
        f"figure-{number}",
        {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["select2d", "lasso2d"]},
    )
    body = figure.to_html(full_html=False, include_plotlyjs=number == 1, div_id=name, config=config)
    words = escape(figure.layout.meta["alt"])
    return (
        f'<figure role="group" aria-labelledby="{name}-words">{body}<figcaption id="{name}-words">{words}</figcaption></figure>'
    )


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], text_columns: Sequence[int] = (0,)) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        kinds = [scope + (' class="text"' if number in text_columns else "") for number in range(len(values))]
        return "".join(f"<{tag}{kind}>{escape(value)}</{tag}>" for kind, value in zip(kinds, values, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells("th", headings)}</tr></thead><tbody>{body}</tbody></table></div>'


def _accuracy_table(rows: dict[str, MethodResult]) -> str:
    steps = next(iter(rows.values())).curve.time_steps
    headings = ["method", "network", "ANN %", "true steps", *[f"T = {t}" for t in steps]]
    lines = [
        [
            name,
            row.network,
            f"{100 * row.ann_accuracy:.2f}",
            row.curve.true_words,
            *[f"{100 * a:.2f}" for a in row.curve.accuracy],
        ]
        for name, row in rows.items()
    ]
    return _table(headings, lines, (0, 1))


def _points_table(rows: dict[str, MethodResult], time_steps: int) -> str:
    kinds = ("clipping", "quantization", "timing")
    lines = [
        [
            name,
            str(row.curve.true(time_steps)),
            f"{100 * p.ann:.2f}",
            *[f"{0.0 - round(100 * getattr(p, kind), 2):+.2f}" for kind in kinds],
            f"{100 * p.snn:.2f}",
        ]
        for name, row in rows.items()
        if (p := row.points) is not None
    ]
    return _table(["method", "true steps", "ANN %", *kinds, "SNN %"], lines)


def _method_section(name: str, row: MethodResult, time_steps: int, bars: str, opened: bool) -> str:
    headings = ["layer", "theta", *KINDS, "total", "over-firing", "under-firing", "saturated"]
    lines = []
    for layer, errors in row.errors.layers.items():
        shares = [errors.share(kind) for kind in (*KINDS, "total")]
        shares += [errors.over_firing, errors.under_firing, errors.saturated]
        lines.append([layer, f"{errors.theta:.3g}", *[f"{100 * share:.1f}" for share in shares]])
    table = _table(headings, lines)
    note = "<p class=small>Errors: root-mean-square in % of the layer's signal. Shares of neurons in %.</p>"
    words = as_html(row.errors.words())
    state = " open" if opened else ""
    true = row.curve.true(time_steps)
    spent = f" ({true} true steps)" if true != time_steps else ""
    return (
        f"<details{state}><summary>{escape(name)}{spent}</summary><blockquote>{words}</blockquote>{bars}{table}{note}</details>"
    )


def _energy_table(rows: dict[str, MethodResult], time_steps: int) -> str:
    headings = ["method", "true steps", "spikes an image", "synaptic operations", "multiply-accumulates", "SNN µJ", "ANN µJ"]
    lines = []
    for name, row in rows.items():
        e = row.energy
        counts = [f"{e.spikes:,.0f}", f"{e.synaptic_operations:,.0f}", f"{e.snn_macs:,.0f}"]
        lines.append([name, str(row.curve.true(time_steps)), *counts, f"{e.snn_microjoule:.2f}", f"{e.ann_microjoule:.2f}"])
    return _table(headings, lines)


def _sources(rows: dict[str, MethodResult]) -> str:
    used = dict.fromkeys(name.split(" ")[0] for name in rows)
    items = "".join(
        f"<li><b>{escape(name)}</b>: {escape(methods.get(name).source)}</li>" for name in used if name in methods.METHODS
    )
    note = (
        "MiCE (Ho &amp; Chang, IEEE JETCAS 2023), which trains all three errors away together, is what micelab is built towards; "
        "its full text is not openly available, and whatever micelab says of it is a reconstruction."
    )
    return f"<ul>{items}</ul><p class=small>{note}</p>"
