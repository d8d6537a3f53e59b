"""Notebooks as pipeline stages: `python -m i2f.pipeline code | run | publish | claims | store`."""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import nbformat
import yaml

from i2f import checks

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
RESULTS = ROOT / "results"
DIGITS = "%.3g"  # what a published table keeps: the same from run to run, and nearly so from machine to machine


def code(notebook: Path, target: Path) -> None:
    """Write the notebook's code alone, so that a stage can depend on it: stored outputs and prose change nothing."""
    cells = [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n\n# %%\n".join(cells) + "\n", encoding="utf-8")


def run(notebook: Path, key: str, out: Path) -> None:
    """Execute a notebook with the parameters under `key` (dotted) of params.yaml, its results going to `out`.

    The executed code cells appear in `out` only when every cell has run, cleaned of all that differs between runs.
    """
    import papermill

    parameters = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for part in key.split("."):
        checks.one_of("--parameters", part, parameters)
        parameters = parameters[part]
    known = papermill.inspect_notebook(str(notebook))
    for name in parameters:
        checks.one_of(f"parameter of {notebook.name}", name, known)
    out.mkdir(parents=True, exist_ok=True)
    folder = os.path.relpath(out.resolve(), NOTEBOOKS)
    _prepare(progress="text")  # streamed to this terminal, not stored
    with tempfile.TemporaryDirectory() as scratch:
        executed = Path(scratch) / notebook.name
        papermill.execute_notebook(
            str(notebook), str(executed), {**parameters, "out": folder}, cwd=str(NOTEBOOKS),
            stderr_file=sys.stderr, progress_bar=False,
        )  # fmt: skip
        book = nbformat.read(executed, as_version=4)
        # a stage depends on the notebook's code alone, so that its output must not hold prose or tags
        book.cells = [cell for cell in book.cells if cell.cell_type == "code"]
        for cell in book.cells:
            cell.metadata = {}
        nbformat.write(_cleaned(book), out / notebook.name)


def store(notebook: Path) -> None:
    """Execute a notebook at its own small scale and keep the outputs in it: what a reader sees, what nbval compares."""
    from nbclient import NotebookClient

    _prepare(progress="off")
    book = nbformat.read(notebook, as_version=4)
    NotebookClient(book, timeout=1200, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    nbformat.write(_cleaned(book), notebook)


def _prepare(progress: str) -> None:
    """What the kernel inherits: its kind of progress bar, and one thread a process (see sweep.attack_all), so that
    sums are taken in the same order whatever the number of cores."""
    os.environ["I2F_PROGRESS"] = progress
    os.environ["OMP_NUM_THREADS"] = "1"


def _cleaned(book: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without times, random ids, machine details and what was written to stderr."""
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
                for kind in data.keys() & {"text/html", "text/plain"}:  # pandas' random table ids, addresses
                    data[kind] = re.sub(r" at 0x[0-9a-f]+", "", re.sub(r"\bT_[0-9a-f]{5}", "T", data[kind]))
    return book


def publish_eigenvectors(dataset: str) -> None:
    """results/eigenvectors-DATASET: table, claims' values, figure and pictures, from a run's problems and images."""
    import numpy as np
    import pandas as pd

    from i2f import claims, figures

    source, name = ROOT / "runs" / "eigenvectors" / dataset, f"eigenvectors-{dataset}"
    table = pd.read_csv(source / "problems.csv")
    RESULTS.mkdir(exist_ok=True)
    table.to_csv(RESULTS / f"{name}.csv", index=False, float_format=DIGITS)
    values = {c.id.removeprefix(f"{name}-"): c.value for c in claims.load(source / "claims.json")}
    (RESULTS / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    figures.save(figures.eigenvectors(table, table.cut[0]), RESULTS / f"{name}.svg")
    shown = table[(table.part == "paper") & (table.image == 0)]
    pictures = np.load(source / "pictures.npy")
    figures.save(figures.eigenvector_pictures(shown, pictures), RESULTS / f"{name}-pictures.png")


def publish_leakage(dataset: str) -> None:
    """results/leakage-DATASET: the table of the five attackers, and the figure with their images."""
    import numpy as np
    import pandas as pd

    from i2f import figures

    source, name = ROOT / "runs" / "leakage" / dataset, f"leakage-{dataset}"
    RESULTS.mkdir(exist_ok=True)
    pd.read_csv(source / "summary.csv").to_csv(RESULTS / f"{name}.csv", index=False, float_format=DIGITS)
    held = np.load(source / "pictures.npz")
    paths = pd.read_csv(source / "paths.csv")
    figure = figures.leakage(paths, held["truth"], held["images"], held["costs"].tolist())
    figures.save(figure, RESULTS / f"{name}.png")


PUBLISH: dict[str, Callable[[str], None]] = {
    "eigenvectors": publish_eigenvectors,
    "leakage": publish_leakage,
}


def collect_claims() -> None:
    """results/claims.json: the claims of every run, in the order of experiments and data sets."""
    from i2f import claims

    files = sorted((ROOT / "runs").glob("*/*/claims.json"))
    RESULTS.mkdir(exist_ok=True)
    claims.save([claim for file in files for claim in claims.load(file)], RESULTS / "claims.json")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m i2f.pipeline", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("code", help="a notebook's code alone")
    command.add_argument("notebook", type=Path)
    command.add_argument("target", type=Path)
    command = commands.add_parser("run", help="execute a notebook with parameters from params.yaml")
    command.add_argument("notebook", type=Path)
    command.add_argument("--parameters", required=True, metavar="KEY", help="dotted key in params.yaml")
    command.add_argument("--out", type=Path, required=True, help="folder for its results")
    command = commands.add_parser("publish", help="write the git-tracked tables and figures of a run")
    command.add_argument("experiment", choices=PUBLISH)
    command.add_argument("dataset")
    commands.add_parser("claims", help="collect every run's claims into results/claims.json")
    command = commands.add_parser("store", help="rerun notebooks at their own scale and store the outputs in them")
    command.add_argument("notebooks", type=Path, nargs="*")
    arguments = parser.parse_args(argv)
    if arguments.command == "code":
        code(arguments.notebook, arguments.target)
    elif arguments.command == "run":
        run(arguments.notebook, arguments.parameters, arguments.out)
    elif arguments.command == "publish":
        PUBLISH[arguments.experiment](arguments.dataset)
    elif arguments.command == "claims":
        collect_claims()
    else:
        for notebook in arguments.notebooks or sorted(NOTEBOOKS.glob("*.ipynb")):
            print(notebook.name, flush=True)
            store(notebook)
    return 0


if __name__ == "__main__":
    sys.exit(main())
