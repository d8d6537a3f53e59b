"""Notebooks as pipeline stages: `python -m i2f.paper.pipeline code | keys | run | publish | readme | store`.

A profile is a folder with a params.yaml: the project's own (the default), or one of `profiles/`. Its runs are executed
into its runs/, what git keeps of them goes into its results/. This module and the command line alone read the
environment.
"""

import argparse
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import yaml

from i2f.paper import books
from i2f.paper.books import ROOT


def settings(device: str = "") -> Any:
    """How this process's sweeps run, as the environment says (`sweep.Settings`): a notebook passes it to `run`.

    I2F_JOBS, I2F_STORE, I2F_DEVICE, I2F_SCHEDULER, I2F_PROGRESS: the fields of `sweep.Settings`. `device` takes
    precedence over I2F_DEVICE, and is taken for the whole process (`devices.use`).
    """
    from i2f.paper import devices  # which brings PyTorch, seconds that most commands need not spend
    from i2f.paper.sweep import Settings

    given = os.environ.get
    device = device or given("I2F_DEVICE", "")
    devices.use(device)
    return Settings(
        jobs=int(given("I2F_JOBS") or 0) or None,
        store=given("I2F_STORE") or None,
        device=device,
        scheduler=given("I2F_SCHEDULER", ""),
        progress=given("I2F_PROGRESS") or "auto",
    )


def code(profile: Path) -> None:
    """runs/code/KEY.py: the code of each run's notebook, so that a stage can depend on that alone."""
    target = profile / "runs" / "code"
    target.mkdir(parents=True, exist_ok=True)
    for key, entry in runs(profile).items():
        book = books.code_of(_notebook(entry), _parameters(entry))
        text = "\n\n# %%\n".join(cell.source for cell in book.cells) + "\n"
        (target / f"{key}.py").write_text(text, encoding="utf-8")


def run(key: str, profile: Path, device: str = "") -> None:
    """Execute the notebook of the run `key` of a profile's params.yaml, its results going to runs/executed/KEY.

    device: where its tensors live (`i2f.devices`); "": what the environment variable I2F_DEVICE says, or the profile's
    own `device`. It is no parameter of the run: a table depends on it by rounding alone.

    The executed code cells appear there only when every cell has run, cleaned of all that differs between runs. What
    the notebook's sweeps have finished is kept in runs/partial until then, so that a run that is cut off goes on; it
    is kept apart for every state of the code and of the parameters.
    """
    import papermill  # loads slowly, and no other command needs it

    entry = _known("run", key, runs(profile))
    notebook, parameters = _notebook(entry), _parameters(entry)
    out, partial = profile / "runs" / "executed" / key, profile / "runs" / "partial" / key
    out.mkdir(parents=True, exist_ok=True)
    books.prepare(progress="text")  # streamed to this terminal, not stored
    os.environ["I2F_DEVICE"] = device or os.environ.get("I2F_DEVICE") or _profile(profile).get("device", "cpu")
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it misses the parameters that `code_of` took out
    book = books.code_of(notebook, parameters)
    os.environ["I2F_STORE"] = str((partial / _state(book, parameters)).resolve())
    with tempfile.TemporaryDirectory() as scratch:
        source, executed = Path(scratch) / "source.ipynb", Path(scratch) / notebook.name
        nbformat.write(book, source)
        papermill.execute_notebook(
            str(source),
            str(executed),
            {**parameters, "out": os.path.relpath(out.resolve(), books.NOTEBOOKS)},
            cwd=str(books.NOTEBOOKS),
            stderr_file=sys.stderr,
            progress_bar=False,
        )
        book = nbformat.read(executed, as_version=4)
        for cell in book.cells:
            cell.metadata = {}
        nbformat.write(books.cleaned(book), out / notebook.name)
    shutil.rmtree(partial, ignore_errors=True)


def _profile(profile: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((profile / "params.yaml").read_text(encoding="utf-8"))
    return found


def runs(profile: Path) -> dict[str, dict[str, Any]]:
    """A profile's runs by key, in the order of params.yaml."""
    found: dict[str, dict[str, Any]] = _profile(profile)["runs"]
    return found


def _notebook(entry: dict[str, Any]) -> Path:
    return books.NOTEBOOKS / f"{entry['notebook']}.ipynb"


def _parameters(entry: dict[str, Any]) -> dict[str, Any]:
    """The run's parameters, all of them the notebook's: papermill only warns of others."""
    defined = dict.fromkeys(books.parameters_of(_notebook(entry)))
    parameters = entry.get("parameters") or {}
    for name in parameters:
        _known(f"parameter of {entry['notebook']}.ipynb", name, defined)
    return parameters


def _known(what: str, name: str, table: dict[str, Any]) -> Any:
    if name not in table:
        from i2f.core import checks  # which brings PyTorch

        checks.one_of(what, name, table)
    return table[name]


def _state(book: nbformat.NotebookNode, parameters: dict[str, Any]) -> str:
    """A short digest of everything that the run's rows depend on."""
    digest = hashlib.sha256(json.dumps([parameters, os.environ.get("I2F_DEVICE")], sort_keys=True).encode())
    for file in sorted(path for path in (ROOT / "i2f").rglob("*") if path.suffix in (".py", ".toml")):
        digest.update(file.read_bytes())
    for cell in book.cells:
        digest.update(cell.source.encode())
    return digest.hexdigest()[:16]


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m i2f.paper.pipeline", description=__doc__)
    commands = found.add_subparsers(dest="command", required=True)
    profile = argparse.ArgumentParser(add_help=False)
    profile.add_argument("--profile", type=Path, default=ROOT, help="folder of params.yaml, runs/ and results/")
    commands.add_parser("code", parents=[profile], help="write the code of every run's notebook, a stage's dependency")
    commands.add_parser("keys", parents=[profile], help="list the runs")
    command = commands.add_parser("run", parents=[profile], help="execute a run's notebook")
    command.add_argument("key", help="of the run, in params.yaml")
    command.add_argument("--device", default="", help="auto, cpu, cuda or mps; default: I2F_DEVICE, or the profile's")
    command = commands.add_parser("publish", parents=[profile], help="write tables, claims and figures of every run")
    command.add_argument("--finished", action="store_true", help="of the runs that are there, not of all")
    commands.add_parser("readme", help="put the claims into the README")
    command = commands.add_parser("store", help="rerun notebooks at their own scale and store the outputs in them")
    command.add_argument("notebooks", type=Path, nargs="*")
    return found


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.command == "code":
        code(arguments.profile)
    elif arguments.command == "keys":
        print(*runs(arguments.profile), sep="\n")
    elif arguments.command == "run":
        run(arguments.key, arguments.profile, arguments.device)
    elif arguments.command == "store":
        for notebook in arguments.notebooks or sorted(books.NOTEBOOKS.glob("*.ipynb")):
            print(notebook.name, flush=True)
            books.store(notebook)
    else:
        from i2f.paper import publishing  # which brings PyTorch and the figures

        if arguments.command == "publish":
            publishing.publish(arguments.profile, runs(arguments.profile), arguments.finished)
        else:
            publishing.readme()
    return 0


if __name__ == "__main__":
    sys.exit(main())
