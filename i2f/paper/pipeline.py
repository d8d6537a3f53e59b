"""Notebooks as pipeline stages: `python -m i2f.paper.pipeline code | keys | run | publish | readme | store`.

A profile is a folder with a params.yaml: the project's own (the default), or one of `profiles/`. Its runs are executed
into its runs/, what git keeps of them goes into its results/.
"""

import argparse
import ast
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import nbformat
import yaml

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
OPEN, CLOSE = "<!-- results/claims.json -->", "<!-- end of claims -->"  # in the README
DIGITS = "%.3g"  # what a published table keeps: the same from run to run, and nearly so from machine to machine


def settings() -> Any:
    """How this process's sweeps run, as the environment says (`sweep.Settings`): a notebook passes it to `run`.

    I2F_JOBS, I2F_STORE, I2F_DEVICE, I2F_SCHEDULER, I2F_PROGRESS: the fields of `sweep.Settings`. The device is taken
    for the whole process (`devices.use`).
    """
    from i2f.paper import devices  # which brings PyTorch, seconds that most commands need not spend
    from i2f.paper.sweep import Settings

    given = os.environ.get
    devices.use(given("I2F_DEVICE", ""))
    return Settings(
        jobs=int(given("I2F_JOBS", "0")) or None,
        store=given("I2F_STORE") or None,
        device=given("I2F_DEVICE", ""),
        scheduler=given("I2F_SCHEDULER", ""),
        progress=given("I2F_PROGRESS", "auto"),
    )


def code(profile: Path) -> None:
    """runs/code/KEY.py: the code of each run's notebook, so that a stage can depend on that alone; see `_cut`."""
    target = profile / "runs" / "code"
    target.mkdir(parents=True, exist_ok=True)
    for key, entry in _runs(profile).items():
        book = _cut(nbformat.read(_notebook(entry), as_version=4), _parameters(entry))
        text = "\n\n# %%\n".join(cell.source for cell in book.cells) + "\n"
        (target / f"{key}.py").write_text(text, encoding="utf-8")


def _cut(book: nbformat.NotebookNode, parameters: dict[str, Any]) -> nbformat.NotebookNode:
    """What a run depends on: code cells, bare, without the notebook's own values of parameters that the run sets. So
    prose, tags, stored outputs and the notebook's own small scale can change, and no table is made anew."""
    book.cells = [cell for cell in book.cells if cell.cell_type == "code"]
    for cell in book.cells:
        tags = cell.metadata.get("tags", [])
        if "parameters" in tags:
            lines = cell.source.splitlines()
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.Assign) and {getattr(t, "id", None) for t in node.targets} <= set(parameters):
                    lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
            cell.source = "\n".join(line for line in lines if line is not None)
        cell.outputs, cell.execution_count = [], None
        cell.metadata = {"tags": ["parameters"]} if "parameters" in tags else {}
    return book


def run(key: str, profile: Path, device: str = "") -> None:
    """Execute the notebook of the run `key` of a profile's params.yaml, its results going to runs/executed/KEY.

    device: where its tensors live (`i2f.devices`); "": what the environment variable I2F_DEVICE says, or the profile's
    own `device`. It is no parameter of the run: a table depends on it by rounding alone.

    The executed code cells appear there only when every cell has run, cleaned of all that differs between runs. What
    the notebook's sweeps have finished is kept in runs/partial until then, so that a run that is cut off goes on; it
    is kept apart for every state of the code and of the parameters.
    """
    import papermill

    entry = _entry(key, profile)
    notebook, parameters = _notebook(entry), _parameters(entry)
    out, partial = profile / "runs" / "executed" / key, profile / "runs" / "partial" / key
    out.mkdir(parents=True, exist_ok=True)
    _prepare(progress="text")  # streamed to this terminal, not stored
    os.environ["I2F_DEVICE"] = device or os.environ.get("I2F_DEVICE") or _profile(profile).get("device", "cpu")
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it misses the parameters that `_cut` took out
    book = _cut(nbformat.read(notebook, as_version=4), parameters)
    os.environ["I2F_STORE"] = str((partial / _state(book, parameters)).resolve())
    with tempfile.TemporaryDirectory() as scratch:
        source, executed = Path(scratch) / "source.ipynb", Path(scratch) / notebook.name
        nbformat.write(book, source)
        papermill.execute_notebook(
            str(source), str(executed), {**parameters, "out": os.path.relpath(out.resolve(), NOTEBOOKS)},
            cwd=str(NOTEBOOKS), stderr_file=sys.stderr, progress_bar=False,
        )  # fmt: skip
        book = nbformat.read(executed, as_version=4)
        for cell in book.cells:
            cell.metadata = {}
        nbformat.write(_cleaned(book), out / notebook.name)
    shutil.rmtree(partial, ignore_errors=True)


def _profile(profile: Path) -> dict[str, Any]:
    return yaml.safe_load((profile / "params.yaml").read_text(encoding="utf-8"))


def keys(profile: Path) -> None:
    """The keys of a profile's runs, a line each, in the order of params.yaml."""
    print(*_runs(profile), sep="\n")


def _runs(profile: Path) -> dict[str, dict[str, Any]]:
    return _profile(profile)["runs"]


def _entry(key: str, profile: Path) -> dict[str, Any]:
    return _known("run", key, _runs(profile))


def _notebook(entry: dict[str, Any]) -> Path:
    return NOTEBOOKS / f"{entry['notebook']}.ipynb"


def _parameters(entry: dict[str, Any]) -> dict[str, Any]:
    """The run's parameters, all of them the notebook's: papermill only warns of others."""
    cells = nbformat.read(_notebook(entry), as_version=4).cells
    source = "\n".join(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    defined = {name.id: None for name in ast.walk(ast.parse(source)) if isinstance(name, ast.Name)}
    parameters = entry.get("parameters") or {}
    for name in parameters:
        _known(f"parameter of {entry['notebook']}.ipynb", name, defined)
    return parameters


def _known(what: str, name: str, table: dict[str, Any]) -> Any:
    if name not in table:
        from i2f import checks  # which brings PyTorch, seconds that most commands need not spend

        checks.one_of(what, name, table)
    return table[name]


def _state(book: nbformat.NotebookNode, parameters: dict[str, Any]) -> str:
    """A short digest of everything that the run's rows depend on."""
    digest = hashlib.sha256(json.dumps([parameters, os.environ.get("I2F_DEVICE")], sort_keys=True).encode())
    for file in sorted((ROOT / "i2f").rglob("*.py")):
        digest.update(file.read_bytes())
    for cell in book.cells:
        digest.update(cell.source.encode())
    return digest.hexdigest()[:16]


def store(notebook: Path) -> None:
    """Execute a notebook at its own small scale and keep the outputs in it: what a reader sees, what nbval compares."""
    from nbclient import NotebookClient

    _prepare(progress="off")
    book = nbformat.read(notebook, as_version=4)
    NotebookClient(book, timeout=1200, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    nbformat.write(_cleaned(book), notebook)


def _prepare(progress: str) -> None:
    """What the kernel inherits: its kind of progress bar, and one thread a process (see sweep.run), so that
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


def publish(profile: Path, finished: bool = False) -> None:
    """results/: what git keeps of every run, its tables and claims rounded, its figures drawn anew from the tables;
    and results/claims.json, the claims of all, in the order of params.yaml. `finished`: of the runs that are there."""
    import joblib

    from i2f.paper import claims

    target, source = profile / "results", profile / "runs" / "executed"
    target.mkdir(exist_ok=True)
    runs = {key: entry for key, entry in _runs(profile).items() if not finished or _has_run(entry, source / key)}
    for key in runs:
        if not (source / key).exists():
            raise FileNotFoundError(
                f"{source / key} is not there: nothing to publish. Run it first: dvc repro run@{key}"
            )
    each = (joblib.delayed(_publish)(entry, source / key, target / key) for key, entry in runs.items())
    joblib.Parallel(n_jobs=joblib.cpu_count(only_physical_cores=True))(each)
    for stale in {folder for folder in target.iterdir() if folder.is_dir()} - {target / key for key in runs}:
        shutil.rmtree(stale)
    files = [source / key / "claims.json" for key in runs]
    claims.save([claim for file in files if file.exists() for claim in claims.load(file)], target / "claims.json")


def _has_run(entry: dict[str, Any], folder: Path) -> bool:
    return (folder / f"{entry['notebook']}.ipynb").exists()


def _publish(entry: dict[str, Any], source: Path, target: Path) -> None:
    import pandas as pd

    from i2f.paper import claims, figures

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in sorted(source.glob("*.csv")):
        pd.read_csv(file).to_csv(target / file.name, index=False, float_format=DIGITS)
    if (source / "claims.json").exists():
        claims.save(claims.load(source / "claims.json"), target / "claims.json")
    drawing = import_module(f"i2f.paper.figures.{entry['experiment']}")
    for name, figure in drawing.published(source).items():
        figures.save(figure, target / name)


def readme() -> None:
    """Put the claims, as `ledger.markdown` words them, between the README's markers."""
    from i2f.paper import ledger

    path = ROOT / "README.md"
    before, rest = path.read_text(encoding="utf-8").split(OPEN)
    after = rest.split(CLOSE, 1)[1]
    path.write_text(f"{before}{OPEN}\n\n{ledger.markdown()}\n\n{CLOSE}{after}", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m i2f.paper.pipeline", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in (
        ("code", "write the code of every run's notebook, what its stage depends on"),
        ("keys", "list the runs"),
        ("run", "execute a run's notebook"),
        ("publish", "write what git keeps of every run: tables, claims, figures"),
    ):
        command = commands.add_parser(name, help=words)
        if name == "run":
            command.add_argument("key", help="of the run, in params.yaml")
            command.add_argument("--device", default="", help="auto, cpu, cuda or mps; default: I2F_DEVICE, or the "
                                 "profile's own")  # fmt: skip
        if name == "publish":
            command.add_argument("--finished", action="store_true", help="of the runs that are there, not of all")
        command.add_argument("--profile", type=Path, default=ROOT, help="folder of params.yaml, runs/ and results/")
    commands.add_parser("readme", help="put the claims into the README")
    command = commands.add_parser("store", help="rerun notebooks at their own scale and store the outputs in them")
    command.add_argument("notebooks", type=Path, nargs="*")
    arguments = parser.parse_args(argv)
    if arguments.command == "code":
        code(arguments.profile)
    elif arguments.command == "run":
        run(arguments.key, arguments.profile, arguments.device)
    elif arguments.command == "keys":
        keys(arguments.profile)
    elif arguments.command == "publish":
        publish(arguments.profile, arguments.finished)
    elif arguments.command == "readme":
        readme()
    else:
        for notebook in arguments.notebooks or sorted(NOTEBOOKS.glob("*.ipynb")):
            print(notebook.name, flush=True)
            store(notebook)
    return 0


if __name__ == "__main__":
    sys.exit(main())
