"""`publish`: finished rows become the published ones, and every number, figure and sentence follows them."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import joblib
import nbformat

from i2f.paper import books, cells, claims, ledger, pipeline, tables
from i2f.paper.books import ROOT
from i2f.paper.pipeline import RESULTS, RUNS

OPEN, CLOSE = "<!-- findings -->", "<!-- end of findings -->"  # in the README


def publish(keys: Sequence[str] = ()) -> None:
    """Publish runs (default: all), one after the other, each atomically: its tables, claims and figures replace those
    of results/KEY once its notebook has run on published and pending rows alone. Then what follows from them: the
    notebooks' outputs, results/claims.json, the index, the ledger, the README, PAPER.md.

    Raises: LookupError for a run that is missing rows, OSError where the disk is full; the run keeps what it had.
    """
    known = pipeline.runs()
    keys = list(keys) or list(known)
    for key in keys:
        restore(RESULTS / key)
    jobs = max(1, min(len(keys), joblib.cpu_count(only_physical_cores=True)))
    joblib.Parallel(n_jobs=jobs)(joblib.delayed(_stage)(key) for key in keys)
    for key in keys:
        promote(RUNS / "staged" / key, RESULTS / key)
        print(f"published {key}", flush=True)
    for name, key in {known[key]["notebook"]: key for key in reversed(known) if key in keys}.items():
        executed = nbformat.read(RUNS / "staged" / key / f"{name}.ipynb", as_version=4)
        books.store(books.NOTEBOOKS / f"{name}.ipynb", executed)
    files = [RESULTS / key / "claims.json" for key in known]
    claims.save([claim for file in files if file.exists() for claim in claims.load(file)], RESULTS / "claims.json")
    for stale in {folder for folder in RESULTS.iterdir() if folder.is_dir()} - {RESULTS / key for key in known}:
        shutil.rmtree(stale)
    pages()
    for notebook in sorted(books.NOTEBOOKS.glob("*.ipynb"), reverse=True):  # the index last: it quotes the others
        if notebook.stem not in {entry["notebook"] for entry in known.values()}:
            books.execute(notebook)


def _stage(key: str) -> None:
    """runs/staged/KEY: the run on the rows that are published or pending, none other."""
    shutil.rmtree(RUNS / "staged" / key, ignore_errors=True)
    os.environ |= {"I2F_CHUNKS": pipeline.PENDING, "I2F_MISSING": "refuse"}
    pipeline.run(key, RUNS / "staged" / key)


def promote(staged: Path, target: Path) -> None:
    """Make the staged run the published one: whole, or not at all. Its pending rows are gone with that, since those
    that were used are in its tables."""
    new, old = (target.with_name(f".{target.name}.{word}") for word in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    try:
        shutil.copytree(staged, new, ignore=shutil.ignore_patterns("*.ipynb"))
        _verified(new)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise OSError(f"{target.name} could not be published ({error}): results/ keeps what it had") from error
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def restore(target: Path) -> None:
    """Bring back what a publication that was killed between its two renames had set aside."""
    old = target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        old.rename(target)
    for rest in (old, target.with_name(f".{target.name}.new")):
        shutil.rmtree(rest, ignore_errors=True)


def _verified(folder: Path) -> None:
    """Into the provenance of each table, what share of it `verify` has solved anew, and how much of that agreed."""
    path, known = folder / tables.PROVENANCE, RUNS / "verified.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    tried = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {}
    before = tables.provenance(RESULTS / folder.name.strip(".").removesuffix(".new"))
    for table, about in found["tables"].items():
        same = before.get(table, {}).get("sha256") == about["sha256"]
        about["verified"] = tried.get(about["sha256"]) or (before[table].get("verified") if same else None)
    cells.write(path, (json.dumps(found, indent=1) + "\n").encode())


def pages() -> None:
    """The pages that follow from the claims: the README's findings, docs/report.md and
    PAPER.md."""
    path = ROOT / "README.md"
    before, rest = path.read_text(encoding="utf-8").split(OPEN)
    after = rest.split(CLOSE, 1)[1]
    cells.write(path, f"{before}{OPEN}\n\n{ledger.findings()}\n\n{CLOSE}{after}".encode())
    for name, text in ledger.pages().items():
        cells.write(ROOT / name, text.encode())
