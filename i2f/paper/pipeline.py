"""Notebooks as pipeline stages, and what a notebook works with.

params.yaml lists the runs: a notebook and its parameters each. A run reads its rows from results/KEY, solves what is
missing, and writes the executed notebook, its figures, claims and tables into runs/executed/KEY. Only `publish` writes
to results/. This module and the command line alone read the environment.
"""

import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import yaml

from i2f.paper import books
from i2f.paper.books import ROOT

RESULTS = ROOT / "results"
RUNS = (Path.cwd() if ROOT.parent == books.PACKAGE else ROOT) / "runs"  # nothing is written into a wheel
PENDING = str(RESULTS / "{key}" / "pending")


class Run(NamedTuple):
    """What a notebook works with: key of params.yaml ("": parameters that are nobody's), parameters, settings."""

    key: str
    config: dict[str, Any]
    settings: Any


def study(notebook: str, names: dict[str, Any]) -> list[Run]:
    """The runs that a notebook shows: first that of its own parameters, taken from `names` (its globals()), then the
    other ones of params.yaml. Rows are read from what is published of all of them."""
    published = books.parameters(books.NOTEBOOKS / f"{notebook}.ipynb")
    mine = {name: names[name] for name in published if name != "out"}
    others = {key: {**mine, **entry["parameters"]} for key, entry in runs().items() if entry["notebook"] == notebook}
    key = next((key for key, config in others.items() if config == mine), "")
    found = {key: mine} | {other: config for other, config in others.items() if other != key}
    folders = [RESULTS / other for other in others]
    return [Run(key, config, settings(folders, key)) for key, config in found.items()]


def settings(published: list[Path] | None = None, key: str = "") -> Any:
    """How this process's sweeps run, as the environment says (`sweep.Settings`).

    I2F_JOBS, I2F_DEVICE, I2F_SCHEDULER, I2F_PROGRESS: the fields of `sweep.Settings`. I2F_CHUNKS: the folder of
    finished chunks (runs/rows by default), "{key}" in it standing for the run's; I2F_MISSING=refuse: a row that is not
    published is an error. published: folders of published tables; None: nothing is known, and nothing kept.
    """
    from i2f.paper import devices  # which brings PyTorch, seconds that most commands need not spend
    from i2f.paper.rows import Store
    from i2f.paper.sweep import Settings

    given = os.environ.get
    devices.use(given("I2F_DEVICE", ""))
    store = None
    if published is not None:
        chunks = Path((given("I2F_CHUNKS") or str(RUNS / "rows")).replace("{key}", key))
        store = Store(published, chunks, given("I2F_MISSING") != "refuse")
    return Settings(
        jobs=int(given("I2F_JOBS") or 0) or None,
        store=store,
        device=given("I2F_DEVICE", ""),
        scheduler=given("I2F_SCHEDULER", ""),
        progress=given("I2F_PROGRESS") or "auto",
    )


def save(out: str | Path, run: Run, verdicts: Any, drawn: dict[str, Any]) -> None:
    """Write what a run found into the folder `out`: the tables that it read or solved, claims.json, and its figures by
    file name, which name the tables they were drawn from. An empty `out` writes nothing: the notebook is only read."""
    from matplotlib import pyplot

    from i2f.paper import claims, figures, tables

    if not out:
        for figure in drawn.values():
            pyplot.close(figure)  # or the notebook would show it under this cell
        return
    folder = Path(out)
    digest = tables.save(folder, run.settings.store.asked)
    claims.save(verdicts, folder / "claims.json")
    for name, figure in drawn.items():
        figures.save(figure, folder / name, digest)


def source() -> None:
    """runs/source/NOTEBOOK.ipynb: every notebook without outputs, so that a stage can depend on that alone."""
    (RUNS / "source").mkdir(parents=True, exist_ok=True)
    for notebook in {entry["notebook"] for entry in runs().values()}:
        nbformat.write(books.bare(books.NOTEBOOKS / f"{notebook}.ipynb"), RUNS / "source" / f"{notebook}.ipynb")


def run(key: str, out: Path | None = None) -> None:
    """Execute the notebook of a run, its figures, claims and tables going to `out` (runs/executed/KEY), and the
    executed notebook too, when every cell has run, cleaned of all that differs between runs."""
    import papermill  # loads slowly, and no other command needs it

    entry = _known("run", key, runs())
    notebook = books.NOTEBOOKS / f"{entry['notebook']}.ipynb"
    parameters = entry.get("parameters") or {}
    for name in parameters:
        _known(f"parameter of {notebook.name}", name, books.parameters(notebook))  # papermill only warns
    out = out or RUNS / "executed" / key
    out.mkdir(parents=True, exist_ok=True)
    books.prepare(progress=os.environ.get("I2F_PROGRESS", "text"))  # streamed to this terminal, not stored
    logging.getLogger("papermill").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        bare, executed = Path(scratch) / "bare.ipynb", Path(scratch) / notebook.name
        nbformat.write(books.bare(notebook), bare)
        papermill.execute_notebook(
            str(bare),
            str(executed),
            {**parameters, "out": os.path.relpath(out.resolve(), books.NOTEBOOKS)},
            cwd=str(books.NOTEBOOKS),
            stderr_file=sys.stderr,
            progress_bar=False,
        )
        nbformat.write(books.cleaned(nbformat.read(executed, as_version=4)), out / notebook.name)


def solve(key: str) -> None:
    """Solve what a run is missing, for publication, and what its notebook shows of others: finished chunks go to
    results/KEY/pending, from where the next call goes on."""
    _known("run", key, runs())
    os.environ["I2F_CHUNKS"] = PENDING
    run(key, RUNS / "solved" / key)


def runs() -> dict[str, dict[str, Any]]:
    """The runs by key, in the order of params.yaml."""
    found: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["runs"]
    return found


def _known(what: str, name: str, table: dict[str, Any]) -> Any:
    if name not in table:
        from i2f.core import checks  # which brings PyTorch

        checks.one_of(what, name, table)
    return table[name]
