"""The course outside a kernel: links, the reference, the teacher's page, Binder, Colab; the site itself where Sphinx is there."""

import ast
import doctest
import importlib.util
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Thread

import nbformat
import pytest
from lab import CHROMIUM, QUIET

import micelab
from micelab.exercises import EXERCISES, answer_key

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
NOT_IN_THE_REFERENCE = {"__main__", "cli", "exercises.__main__"}  # the command line describes itself

_spec = importlib.util.spec_from_file_location("colab", ROOT / "notebooks" / "colab.py")
colab = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(colab)


def prose(path):
    """The Markdown of a page or notebook without its code."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def anchors(path):
    """The names that code hosts and the site give to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: page.name)
def test_every_link_inside_the_repository_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        name, _, place = link.partition("#")
        if re.match(r"https?:", link):
            continue
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not place or place in anchors(target), link


def test_the_reference_describes_every_module_once():
    named = re.findall(r"^\.\. automodule:: micelab\.([\w.]+)$", "\n".join(page.read_text() for page in PAGES), re.M)
    packages = {module.name for module in pkgutil.iter_modules(micelab.__path__) if module.ispkg}
    modules = {module.name.removeprefix("micelab.") for module in pkgutil.walk_packages(micelab.__path__, "micelab.")}
    inside = {name for name in modules if name.split(".")[0] in packages and "." in name}  # the package names them
    assert len(named) == len(set(named))
    assert set(named) - inside == modules - inside - NOT_IN_THE_REFERENCE


def test_every_public_name_has_an_example_that_the_doctests_run():
    found = pkgutil.walk_packages(micelab.__path__, "micelab.")
    modules = [micelab, *(importlib.import_module(module.name) for module in found if not module.name.endswith("__main__"))]
    examples = {test.name for module in modules for test in doctest.DocTestFinder().find(module) if test.examples}
    public = {
        f"{thing.__module__}.{name}"
        for module in modules
        if module is not micelab.cli
        for name, thing in inspect.getmembers(
            module, lambda thing: inspect.isroutine(inspect.unwrap(thing)) or inspect.isclass(thing)
        )
        if name in getattr(module, "__all__", ())
    }
    assert len(public) > 60
    assert not public - examples


@pytest.mark.parametrize("name", ["teaching.md", "index.md"])
def test_teachers_and_the_landing_page_name_every_notebook(name):
    linked = set(re.findall(r"notebooks/(\d\d_\w+\.ipynb)", prose(ROOT / "docs" / name)))
    assert linked >= {notebook.name for notebook in NOTEBOOKS}
    assert sorted(notebook[:2] for notebook in linked) == [f"{number:02d}" for number in range(8)]


def test_lesson_plans_fill_their_time_exactly():
    text = prose(ROOT / "docs" / "teaching.md")
    spans = [(int(a), int(b)) for a, b in re.findall(r"^\| (\d+)-(\d+) \|", text, re.M)]
    assert spans[0][0] == 0
    assert spans[-1][1] == 90
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    for day in re.findall(r"^\| day \d \| (.+) \| (.+) \|$", text, re.M):
        assert [sum(int(minutes) for minutes in re.findall(r"\b(\d+) min\b", half)) for half in day] == [180, 180]
    assert sum(int(share) for share in re.findall(r"\| (\d+) % \|", text)) == 100


def test_the_answers_are_printed_for_all_notebooks_or_some():
    ran = subprocess.run([sys.executable, "-m", "micelab.exercises"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout == answer_key()
    assert [line[3:] for line in ran.stdout.splitlines() if line.startswith("## ")] == list(EXERCISES)
    for task in EXERCISES.values():
        assert task.source() in ran.stdout
    assert all(line.startswith("## 02-") for line in answer_key("02").splitlines() if line.startswith("## "))


def test_a_notebook_without_exercises_is_named_in_one_line():
    with pytest.raises(micelab.MicelabError, match=r"notebook '99' has no exercises: choose from 00, 01"):
        answer_key("99")


def test_binder_installs_the_course_as_pyproject_says_and_nothing_else():
    binder = ROOT / ".binder"
    assert {file.name for file in binder.iterdir()} == {"requirements.txt", "runtime.txt"}
    extra = re.fullmatch(r"-e \.\[(\w+)\]", (binder / "requirements.txt").read_text().strip())[1]
    assert "jupyterlab" in " ".join(PROJECT["optional-dependencies"][extra])
    python = re.fullmatch(r"python-(\d+\.\d+)", (binder / "runtime.txt").read_text().strip())[1]
    assert PROJECT["requires-python"] == f">={python}"


def plain_python(cell):
    """The cell as IPython runs it."""
    from IPython.core.inputtransformer2 import TransformerManager

    return TransformerManager().transform_cell(cell)


@pytest.mark.parametrize("address", [None, "https://example.org/micelab"])
def test_the_colab_cell_does_nothing_elsewhere(address):
    cell = colab.colab_cell(address)
    assert len(cell.splitlines()) <= 20
    assert max(len(line) for line in cell.splitlines()) <= 96
    code = plain_python(cell)
    assert len(ast.parse(code).body) == 2  # the import and the `if`: nothing stands outside
    exec(code, {})  # get_ipython() is unknown here: any command would raise


def test_the_colab_cell_installs_an_extra_that_is_there_and_brings_the_data_where_it_can():
    extra = re.search(r"micelab\[(\w+)\]", colab.colab_cell(None))[1]
    assert extra in PROJECT["optional-dependencies"]
    assert "jupyterlab" not in str(PROJECT["optional-dependencies"][extra])  # Colab has its own
    cell = colab.colab_cell("https://example.org/micelab")
    assert "git clone --quiet --depth 1 https://example.org/micelab /content/micelab" in cell
    assert "MICELAB_DATA=/content/micelab/data" in cell
    assert colab.repository() == PROJECT.get("urls", {}).get("Repository")


def test_the_colab_cell_is_put_below_the_title_once_and_replaced_where_it_changed():
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_code_cell("1 + 1"), nbformat.v4.new_code_cell("2")]
    )
    book.cells[1].execution_count = 1
    book.cells[1].outputs = [nbformat.v4.new_output("execute_result", {"text/plain": "2"}, execution_count=1)]
    assert colab.put_in(book, colab.colab_cell(None))
    assert not colab.put_in(book, colab.colab_cell(None))
    assert colab.put_in(book, colab.colab_cell("https://example.org/micelab"))
    assert [cell.source.splitlines()[0] for cell in book.cells] == ["# Title", colab.HEAD.splitlines()[0], "1 + 1", "2"]
    assert [cell.execution_count for cell in book.cells[1:]] == [1, 2, None]
    assert book.cells[2].outputs[0].execution_count == 2
    assert [cell.id for cell in book.cells] == ["cell-00", "cell-01", "cell-02", "cell-03"]
    nbformat.validate(book)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for module in ("sphinx", "myst_nb", "furo"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: `make site` installs it")
    folder = tmp_path_factory.mktemp("site")
    recipe = re.search(
        r"^site:.*\n\t\$\(BIN\)/python (.+) build/site-cache \. build/site$", (ROOT / "Makefile").read_text(), re.M
    )
    command = [sys.executable, *recipe[1].split(), str(folder / "cache"), ".", str(folder / "html")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert built.returncode == 0, built.stderr
    return folder / "html"


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_has_every_page(site):
    assert "docs/index.html" in (site / "index.html").read_text()
    for page in [*PAGES, *NOTEBOOKS]:
        assert (site / page.relative_to(ROOT)).with_suffix(".html").is_file(), page
    assert (site / "searchindex.js").is_file()


@pytest.mark.slow
def test_no_page_of_the_site_loads_anything_from_another_host(site):
    for page in site.rglob("*.html"):
        loads = re.findall(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=\"((?:https?:)?//[^\"]+)", page.read_text())
        assert loads == [], page


@pytest.mark.slow
def test_pictures_of_panels_say_in_words_what_they_show(site):
    for notebook in (site / "notebooks").glob("*.html"):
        for words in re.findall(r'<img alt="([^"]*)"', notebook.read_text()):
            assert len(words) > 10, notebook
            assert "_images/" not in words, notebook


@pytest.mark.slow
def test_in_a_browser_the_site_asks_nobody_else_and_draws_formulas_and_pictures(site):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"there is no {CHROMIUM}")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    own, asked, errors = f"http://127.0.0.1:{server.server_port}/", [], []
    try:
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
            for width in (1100, 400):
                page = browser.new_page(viewport={"width": width, "height": 900})
                page.on("request", lambda request: asked.append(request.url))
                page.on("pageerror", lambda error: errors.append(str(error)))
                page.goto(f"{own}notebooks/02_quantization_error.html")
                page.wait_for_selector("mjx-container svg")
                assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                page.goto(f"{own}search.html?q=staircase")
                page.wait_for_selector("#search-results li")
                page.goto(own)
                page.wait_for_url("**/docs/index.html")
            browser.close()
    finally:
        server.shutdown()
        server.server_close()
    assert errors == []
    assert [url for url in asked if not url.startswith((own, "data:", "blob:"))] == []


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and logs nothing."""

    def log_message(self, *words):
        pass
