"""Notebooks as documents: their parameters, their bare source, outputs that are the same at every run."""

import os
import re
from pathlib import Path
from typing import Any

import nbformat

PACKAGE = Path(__file__).resolve().parents[1]
# The repository, or the part of it that a wheel carries: parameters, notebooks and rows of the track *start*.
ROOT = PACKAGE / "companion" if (PACKAGE / "companion").exists() else PACKAGE.parent
NOTEBOOKS = ROOT / "notebooks"
ADDRESSES = re.compile(r" at 0x[0-9a-f]+")
STYLES = re.compile(r"\bT_[0-9a-f]{5}")  # pandas' random ids of tables
PAPERMILL = ("injected-parameters",)  # tags of cells that papermill adds


def parameters(notebook: Path) -> dict[str, Any]:
    """The values that the cell tagged "parameters" gives, by name."""
    cells = nbformat.read(notebook, as_version=4).cells
    found: dict[str, Any] = {}
    for cell in cells:
        if "parameters" in cell.metadata.get("tags", []):
            exec(cell.source, {}, found)  # assignments of literals
    return found


def bare(notebook: Path) -> nbformat.NotebookNode:
    """The notebook without outputs: what a run of it depends on."""
    book: nbformat.NotebookNode = cleaned(nbformat.read(notebook, as_version=4))
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return book


def store(notebook: Path, executed: nbformat.NotebookNode) -> None:
    """Keep the outputs of an executed copy in the notebook: what a reader sees, what nbval compares."""
    book = nbformat.read(notebook, as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    done = [cell for cell in executed.cells if cell.cell_type == "code"]
    if [cell.source for cell in code] != [cell.source for cell in done]:
        raise ValueError(f"{notebook.name} has changed since it was executed: execute it again (dvc repro)")
    for number, (cell, other) in enumerate(zip(code, done, strict=True), 1):
        cell.outputs, cell.execution_count = other.outputs, number
    nbformat.write(cleaned(book), notebook)


def execute(notebook: Path) -> None:
    """Execute a notebook that has no parameters, and keep the outputs in it."""
    from nbclient import NotebookClient  # loads slowly, and few need it

    prepare(progress="off")
    book = nbformat.read(notebook, as_version=4)
    NotebookClient(book, timeout=1200, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    nbformat.write(cleaned(book), notebook)


def prepare(progress: str) -> None:
    """What the kernel inherits: its kind of progress bar, and one thread per process, so that sums are taken in the
    same order whatever the number of cores (`workers.solve_alone`)."""
    os.environ["I2F_PROGRESS"] = progress
    os.environ["OMP_NUM_THREADS"] = "1"


def cleaned(book: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without times, random ids, machine details, what papermill adds and what was written to stderr."""
    book.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    book.cells = [cell for cell in book.cells if not {*PAPERMILL} & {*cell.metadata.get("tags", [])}]
    for number, cell in enumerate(book.cells):
        tags = cell.metadata.get("tags", [])
        cell.metadata = {"tags": tags} if tags else {}
        cell.id = f"cell-{number:02d}"
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")]
            for output in cell.outputs:
                output.pop("execution_count", None)
                if output.output_type == "execute_result":
                    output.execution_count = None
                data = output.get("data", {})
                for kind in data.keys() & {"text/html", "text/plain"}:
                    data[kind] = ADDRESSES.sub("", STYLES.sub("T", data[kind]))
    return book
