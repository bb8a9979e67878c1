"""Puts the cell that sets up Google Colab below the title of every notebook: `python notebooks/colab.py`.

The cell is made here and nowhere else: from the repository's address where pyproject.toml has one (`[project.urls]
Repository`), by the package's name until then. Cells need not be run again: it has no output, and their numbers move by one.
"""

import sys
import tomllib
from pathlib import Path

import nbformat

HERE = Path(__file__).parent
TAG = "colab"
HEAD = """\
# For Google Colab: installs micelab there and lets panels draw. Elsewhere it does nothing.
import sys

if "google.colab" in sys.modules:
"""
BY_NAME = """\
    %pip install --quiet "micelab[panels]"
"""
BY_REPOSITORY = """\
    !git clone --quiet --depth 1 {repository} /content/micelab
    %pip install --quiet "/content/micelab[panels]"
    %env MICELAB_DATA=/content/micelab/data
    %cd -q /content/micelab/notebooks
"""
TAIL = """\
    from google.colab import output

    output.enable_custom_widget_manager()"""


def colab_cell(repository: str | None) -> str:
    """The cell's text; with the repository come the trained networks and stored results that notebook 06 reads."""
    return HEAD + (BY_REPOSITORY.format(repository=repository) if repository else BY_NAME) + TAIL


def repository() -> str | None:
    """The repository's address, from the one place that has it."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    return project.get("urls", {}).get("Repository")


def put_in(book: nbformat.NotebookNode, text: str) -> bool:
    """Makes `text` the first code cell of `book`, below the title, once; whether that changed anything."""
    own = [cell for cell in book.cells if TAG in cell.metadata.get("tags", [])]
    if [cell.source for cell in own] == [text] and book.cells[1] is own[0]:
        return False
    if own:
        book.cells = [cell for cell in book.cells if cell not in own]
    else:
        for cell in book.cells:
            if cell.cell_type == "code" and cell.execution_count:
                renumber(cell, cell.execution_count + 1)
    # hidden in JupyterLab and left out of the site: it teaches nothing
    cell = nbformat.v4.new_code_cell(text, metadata={"tags": [TAG, "remove-cell"], "jupyter": {"source_hidden": True}})
    cell.execution_count = 1
    book.cells.insert(1, cell)
    for number, cell in enumerate(book.cells):
        cell["id"] = f"cell-{number:02d}"
    return True


def renumber(cell: nbformat.NotebookNode, count: int) -> None:
    """Sets the number of a cell that has been run, and of its results."""
    cell.execution_count = count
    for output in cell.outputs:
        if output.output_type == "execute_result":
            output.execution_count = count


if __name__ == "__main__":
    text = colab_cell(repository())
    for path in [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        book = nbformat.read(path, as_version=4)
        if put_in(book, text):
            nbformat.write(book, path)
            print(f"{path.name}: the Colab cell is in place")
