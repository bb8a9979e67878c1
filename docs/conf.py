"""The course as a static site, by Sphinx: `make site` reads notebooks, pages and docstrings and writes build/site.

Nothing is run: the outputs stored in the notebooks are shown. Whoever opens the pages needs no network either.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes

import micelab

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "micelab"
author = "The micelab founders"
project_copyright = author
version = release = micelab.__version__

# Sphinx reads from the repository's root (`sphinx-build -c docs .`): a relative link means the same here and on a code host.
root_doc = "docs/index"
include_patterns = ["docs/**.md", "notebooks/*.ipynb", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
exclude_patterns = [".*", "build", "data", "dist", "micelab", "tests", "benchmarks", "**/.ipynb_checkpoints"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.viewcode", "sphinx_copybutton"]

nb_execution_mode = "off"
# A panel is a widget and a picture in one output: here the picture is meant. An output of plotly alone is a warning, so an error.
nb_mime_priority_overrides = [
    ("html", "application/vnd.jupyter.widget-view+json", None),
    ("html", "application/vnd.plotly.v1+json", None),
]
nb_merge_streams = True
nb_output_stderr = "warn"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # torch.nn.Module.forward has words of its own, in reStructuredText
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
viewcode_line_numbers = True

html_theme = "furo"
html_title = "micelab"
html_copy_source = False
html_show_sphinx = False
templates_path: list[str] = []
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

# MathJax from a Python package, as one file that draws without fonts: nothing is fetched when a page is opened.
_mathjax = find_spec("sphinx-mathjax-offline")
if _mathjax is None or _mathjax.origin is None:
    raise RuntimeError("the formulas need MathJax: run `pip install micelab[site]`")
html_static_path = ["site.css", str(Path(_mathjax.origin).parent / "static" / "mathjax" / "tex-svg.js")]
html_css_files = ["site.css"]
mathjax_path = "tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False, "enableAssistiveMml": True}}


def as_rst(lines: list[str]) -> list[str]:
    """A docstring of micelab, plain text with `code` and indented formulas, as reStructuredText.

    >>> as_rst(["Spikes of `N` neurons, *at* all.", "", "    v += I", "", ">>> 1 * 1", "1"])
    ['Spikes of ``N`` neurons, \\\\*at\\\\* all.', '', '::', '', '    v += I', '', '>>> 1 * 1', '1', '']
    """
    written: list[str] = []
    for block in "\n".join(lines).strip("\n").split("\n\n"):
        own = block.strip("\n").split("\n")
        if own[0].startswith(">>>"):
            written += own
        elif all(line.startswith("    ") for line in own):
            written += ["::", "", *own]
        else:
            text = "\n".join(line.strip() for line in own)
            code_and_words = re.split(r"(`[^`]+`)(?=\W|$)", text)
            written += "".join(
                f"`{piece}`" if piece.startswith("`") else re.sub(r"([*|\\_`])", r"\\\1", piece) for piece in code_and_words
            ).split("\n")
        written.append("")
    return written


def written_as_rst(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are written to be read in a terminal; the site shows the same words."""
    lines[:] = as_rst(lines)


def say_in_words(app: Sphinx, tree: nodes.document) -> None:
    """Gives each picture of an output, as its alternative text, the words that stand in the same output."""
    for output in tree.findall(lambda node: isinstance(node, nodes.container) and node.get("nb_element") == "mime_bundle"):
        kinds = {child.get("mime_type"): child for child in output.children if isinstance(child, nodes.Element)}
        if "image/png" in kinds and "text/plain" in kinds:
            for image in kinds["image/png"].findall(nodes.image):
                image["alt"] = kinds["text/plain"].astext()


def lead_to_the_course(app: Sphinx, failed: Exception | None) -> None:
    """The site's first address, index.html, leads to the landing page."""
    if failed is None and app.builder.name == "html":
        start = app.builder.get_target_uri(root_doc)
        page = f'<!doctype html><meta charset="utf-8"><title>micelab</title><meta http-equiv="refresh" content="0; url={start}">'
        (Path(app.outdir) / "index.html").write_text(f'{page}<a href="{start}">micelab</a>\n')


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this with itself."""
    app.connect("autodoc-process-docstring", written_as_rst)
    app.connect("doctree-read", say_in_words)
    app.connect("build-finished", lead_to_the_course)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
