"""Notebooks as documents: the code that a run depends on, outputs that are the same at every run."""

import ast
import os
import re
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
ADDRESSES = re.compile(r" at 0x[0-9a-f]+")
STYLES = re.compile(r"\bT_[0-9a-f]{5}")  # pandas' random ids of tables


def code_of(notebook: Path, parameters: dict[str, Any]) -> nbformat.NotebookNode:
    """What a run depends on: bare code cells, without the notebook's own values of parameters that the run sets.

    So prose, tags, stored outputs and the notebook's own small scale can change, and no table is computed anew.
    """
    book: nbformat.NotebookNode = nbformat.read(notebook, as_version=4)
    book.cells = [cell for cell in book.cells if cell.cell_type == "code"]
    for cell in book.cells:
        tags = cell.metadata.get("tags", [])
        if "parameters" in tags:
            cell.source = _without(cell.source, set(parameters))
        cell.outputs, cell.execution_count = [], None
        cell.metadata = {"tags": ["parameters"]} if "parameters" in tags else {}
    return book


def _without(source: str, names: set[str]) -> str:
    """The source without the assignments to these names."""
    gone: set[int] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and {getattr(target, "id", "") for target in node.targets} <= names:
            gone |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return "\n".join(line for number, line in enumerate(source.splitlines(), 1) if number not in gone)


def parameters_of(notebook: Path) -> set[str]:
    """The names that the cells tagged "parameters" define."""
    cells = nbformat.read(notebook, as_version=4).cells
    source = "\n".join(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}


def store(notebook: Path) -> None:
    """Execute a notebook at its own small scale and keep the outputs in it: what a reader sees, what nbval compares."""
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
    """The notebook without times, random ids, machine details and what was written to stderr."""
    book.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(book.cells):
        tags = cell.metadata.get("tags", [])
        cell.metadata = {"tags": tags} if tags else {}
        cell.id = f"cell-{number:02d}"
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")]
            for output in cell.outputs:
                data = output.get("data", {})
                for kind in data.keys() & {"text/html", "text/plain"}:
                    data[kind] = ADDRESSES.sub("", STYLES.sub("T", data[kind]))
    return book
