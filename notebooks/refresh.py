"""Runs every notebook from a fresh kernel, stores its outputs, cleans and checks it: `make notebooks`.

Widget state is dropped (a plotly widget would store 5 MB), timing and random cell ids too, so that a refresh without a
change leaves no difference.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
LARGEST = 300_000


def refresh(path: Path) -> list[str]:
    """Runs and rewrites one notebook; gives back what is wrong with it."""
    book = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(HERE)}}
    NotebookClient(book, timeout=600, kernel_name="python3", resources=place, record_timing=False).execute()
    book.metadata.pop("widgets", None)
    book.metadata["language_info"] = {"name": "python"}
    for number, cell in enumerate(book.cells):
        cell["id"] = f"cell-{number:02d}"
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell["outputs"] = joined(cell.outputs)
    nbformat.write(book, path)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    wrong = [f"cell {cell.id} was not run" for cell in code if not cell.execution_count]
    wrong += [f"cell {cell.id} has more than 20 lines" for cell in code if len(cell.source.splitlines()) > 20]
    if path.stat().st_size > LARGEST:
        wrong.append(f"it has {path.stat().st_size // 1000} kB, more than {LARGEST // 1000}")
    if "FigureWidget({" in path.read_text():
        wrong.append("it stores a raw FigureWidget")
    return [f"{path.name}: {text}" for text in wrong]


def joined(outputs: list) -> list:
    """Printed lines that a kernel happened to send in several pieces, in one."""
    whole = []
    for output in outputs:
        if whole and output.output_type == whole[-1].output_type == "stream" and output.name == whole[-1].name:
            whole[-1].text += output.text
        else:
            whole.append(output)
    return whole


if __name__ == "__main__":
    chosen = [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb"))
    problems = [problem for path in chosen for problem in refresh(path)]
    print("\n".join(problems) or f"{len(chosen)} notebook(s) refreshed")
    sys.exit(bool(problems))
