"""What git keeps of the runs: rounded tables, claims, figures drawn from the tables, and the README's claims."""

import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import joblib
import pandas as pd

from i2f.paper import claims, figures, ledger
from i2f.paper.books import ROOT

OPEN, CLOSE = "<!-- results/claims.json -->", "<!-- end of claims -->"  # in the README
DIGITS = "%.3g"  # what a published table keeps: the same from run to run, and nearly so from machine to machine

Runs = dict[str, dict[str, Any]]


def publish(profile: Path, runs: Runs, finished: bool = False) -> None:
    """results/: what git keeps of every run, its tables and claims rounded, its figures drawn anew from the tables;
    and results/claims.json, the claims of all, in the order of params.yaml.

    finished: only of the runs that are there. Raises: FileNotFoundError for a run that is not.
    """
    target, source = profile / "results", profile / "runs" / "executed"
    target.mkdir(exist_ok=True)
    runs = {key: entry for key, entry in runs.items() if not finished or _has_run(entry, source / key)}
    for key in runs:
        if not (source / key).exists():
            raise FileNotFoundError(
                f"{source / key} is not there: nothing to publish. Run it first: dvc repro run@{key}"
            )
    each = (joblib.delayed(_publish)(entry, source / key, target / key) for key, entry in runs.items())
    joblib.Parallel(n_jobs=max(1, min(len(runs), joblib.cpu_count(only_physical_cores=True))))(each)
    for stale in {folder for folder in target.iterdir() if folder.is_dir()} - {target / key for key in runs}:
        shutil.rmtree(stale)
    files = [source / key / "claims.json" for key in runs]
    claims.save([claim for file in files if file.exists() for claim in claims.load(file)], target / "claims.json")


def _has_run(entry: dict[str, Any], folder: Path) -> bool:
    return (folder / f"{entry['notebook']}.ipynb").exists()


def _publish(entry: dict[str, Any], source: Path, target: Path) -> None:
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
    path = ROOT / "README.md"
    before, rest = path.read_text(encoding="utf-8").split(OPEN)
    after = rest.split(CLOSE, 1)[1]
    path.write_text(f"{before}{OPEN}\n\n{ledger.markdown()}\n\n{CLOSE}{after}", encoding="utf-8")
