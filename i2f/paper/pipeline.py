"""Notebooks as pipeline stages: `python -m i2f.paper.pipeline source | keys | run | solve | verify | publish`.

params.yaml lists the runs: a notebook and its parameters each. A run reads its rows from results/KEY, solves what is
missing, and writes the executed notebook, its figures, claims and tables into runs/executed/KEY. Only `publish` writes
to results/. This module and the command line alone read the environment.
"""

import argparse
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
RUNS = ROOT / "runs"


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
    return [Run(key, config, settings(folders)) for key, config in found.items()]


def settings(published: list[Path] | None = None) -> Any:
    """How this process's sweeps run, as the environment says (`sweep.Settings`).

    I2F_JOBS, I2F_DEVICE, I2F_SCHEDULER, I2F_PROGRESS: the fields of `sweep.Settings`. I2F_CHUNKS: the folder of
    finished chunks (runs/rows by default); I2F_MISSING=refuse: a row that is not published is an error. published:
    folders of published tables; None: nothing is known, and nothing kept.
    """
    from i2f.paper import devices  # which brings PyTorch, seconds that most commands need not spend
    from i2f.paper.rows import Store
    from i2f.paper.sweep import Settings

    given = os.environ.get
    devices.use(given("I2F_DEVICE", ""))
    store = None
    if published is not None:
        store = Store(published, Path(given("I2F_CHUNKS") or RUNS / "rows"), given("I2F_MISSING") != "refuse")
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
    if not out:
        return
    from i2f.paper import claims, figures, rows

    folder = Path(out)
    digest = rows.save(folder, run.settings.store.asked)
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
    """Solve what a run is missing, for publication: finished chunks go to results/KEY/pending, from where the next
    call goes on."""
    _known("run", key, runs())
    os.environ["I2F_CHUNKS"] = str(RESULTS / key / "pending")
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


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m i2f.paper.pipeline", description=__doc__)
    commands = found.add_subparsers(dest="command", required=True)
    commands.add_parser("source", help="write every notebook without its outputs, a stage's dependency")
    commands.add_parser("keys", help="list the runs")
    for name, words in (("run", "execute a run's notebook"), ("solve", "solve what a run is missing, to publish it")):
        commands.add_parser(name, help=words).add_argument("key", help="of the run, in params.yaml")
    command = commands.add_parser("publish", help="make finished runs the published ones; every number follows them")
    command.add_argument("keys", nargs="*", help="of the runs; default: all")
    command = commands.add_parser("verify", help="solve a sample of the published rows anew and compare")
    command.add_argument("--budget", type=float, default=8.0, help="minutes of two cores (default: 8)")
    command.add_argument("--share", type=float, default=None, help="this share of every table instead; 1: every row")
    command.add_argument("--seed", default="", help="of the sample; default: what code and tables give")
    command.add_argument("--runs", nargs="*", default=[], metavar="KEY", help="only of these runs; default: all")
    return found


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.command == "source":
        source()
    elif arguments.command == "keys":
        print(*runs(), sep="\n")
    elif arguments.command == "run":
        run(arguments.key)
    elif arguments.command == "solve":
        solve(arguments.key)
    elif arguments.command == "publish":
        from i2f.paper import publishing  # which brings PyTorch and the figures

        publishing.publish(arguments.keys)
    else:
        from i2f.paper import verify

        return verify.command(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
