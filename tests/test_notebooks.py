"""The notebooks keep the course's bars: what each must contain, and how long and large it may be."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COURSE = PATHS
WORDS, LINES, WIDTH, BYTES = 900, 20, 96, 300_000


def cells(path, kind):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def code(path):
    return "\n".join(cell.source for cell in cells(path, "code"))


def prose(path):
    return "\n".join(cell.source for cell in cells(path, "markdown"))


def named(path):
    return path.stem


@pytest.mark.parametrize("path", PATHS, ids=named)
def test_it_was_run_top_to_bottom_and_holds_no_widget_state(path):
    book = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in cells(path, "code")] == list(range(1, len(cells(path, "code")) + 1))
    assert "widgets" not in book.metadata
    assert [cell.id for cell in book.cells] == [f"cell-{number:02d}" for number in range(len(book.cells))]
    assert not any("execution" in cell.metadata for cell in book.cells)
    assert not [o for cell in cells(path, "code") for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert "FigureWidget({" not in path.read_text()
    assert path.stat().st_size < BYTES


@pytest.mark.parametrize("path", PATHS, ids=named)
def test_it_is_short(path):
    assert len(prose(path).split()) <= WORDS
    for cell in cells(path, "code"):
        assert len(cell.source.splitlines()) <= LINES, cell.source


@pytest.mark.parametrize("path", COURSE, ids=named)
def test_no_line_of_code_is_cut_off_at_1100_pixels(path):
    assert not [line for line in code(path).splitlines() if len(line) > WIDTH]


@pytest.mark.parametrize("path", COURSE, ids=named)
def test_it_has_what_every_lesson_has(path):
    first, last = cells(path, "markdown")[0].source, cells(path, "markdown")[-1].source
    for part in ("**Goal**", "**You need**", "minutes. **GPU** not needed.", "**Question**", "(../docs/symbols.md)"):
        assert part in first
    for part in ("## What you can now do", "**References**"):
        assert part in last
    for part in ("**The naive", "**Diagnosis", "emed"):
        assert part in prose(path)
    source = code(path)
    assert len(re.findall(r"^predict\(", source, re.M)) >= 3
    assert len(re.findall(r"^check\(", source, re.M)) >= 2
    assert len(re.findall(r"^\s*assert ", source, re.M)) >= 5
    assert len(re.findall(r"^\w*Panel\(", source, re.M)) >= 1
    assert "error_breakdown(" in source


@pytest.mark.parametrize("path", COURSE, ids=named)
def test_links_lead_to_the_neighbours_and_to_what_is_there(path):
    number = int(path.name[:2])
    links = set(re.findall(r"\]\(([^)#]+)\)", prose(path)))
    starts = {link[:2] for link in links if link.endswith(".ipynb")}
    assert number == 7 or f"{number + 1:02d}" in starts
    assert number == 0 or f"{number - 1:02d}" in starts
    assert not [link for link in links if not link.startswith("http") and not (path.parent / link).exists()]


@pytest.mark.parametrize("path", COURSE, ids=named)
def test_every_panel_and_figure_can_be_seen_where_nothing_runs(path):
    for cell in cells(path, "code"):
        for output in cell.outputs:
            data = output.get("data", {})
            shown = data.get("text/plain", "")
            if "Panel:" in shown or shown.startswith("Figure:"):
                assert "image/png" in data
            elif "application/vnd.jupyter.widget-view+json" in data:
                assert "text/html" in data
            assert "application/vnd.plotly.v1+json" not in data


@pytest.mark.parametrize("path", COURSE, ids=named)
def test_numbers_that_depend_on_the_machine_are_marked(path):
    for cell in cells(path, "code"):
        for output in cell.outputs:
            for line in output.get("text", "").splitlines():
                assert "%" not in line or "≈" in line, line
