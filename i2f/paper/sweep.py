"""A grid of problems becomes one tidy table: in parallel processes or on a cluster, one row per problem, resumable."""

import hashlib
import itertools
import json
import os
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import pandas as pd

from i2f.core.progress import bar
from i2f.paper import devices
from i2f.paper.workers import RAISED, Problem, Row, Solve, cluster, in_processes, on_cluster

__all__ = ["DEFAULT", "Problem", "Row", "Settings", "Solve", "grid", "run"]


def grid(**axes: Any) -> list[Problem]:
    """Every combination of the axes' values, the last axis fastest; a single value is the same for all."""
    lists = [v if isinstance(v, (list, tuple, range)) else [v] for v in axes.values()]
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*lists)]


@dataclass(frozen=True)
class Settings:
    """How and where sweeps run. No number depends on it, beyond rounding.

    jobs: processes, one thread in each, so that cores are not oversubscribed; with 1 there is no other process. None:
    one per core. store: a folder that keeps every finished chunk, so that a run that was cut off goes on from there.
    device: of the tensors, a name of `devices`; "": the one in use. scheduler: the address of a Dask scheduler (pip
    install 'i2f[cluster]'), or a `distributed.Client`, whose workers then solve the chunks. Workers need this package,
    the data, and one thread each. progress: "auto" (a bar for terminal or notebook), "text" (lines that a log can hold)
    or "off".
    """

    jobs: int | None = None
    store: Path | str | None = None
    device: str = ""
    scheduler: Any = ""
    progress: str = "auto"


DEFAULT = Settings()


def run(
    solve: Solve,
    problems: Sequence[Problem],
    settings: Settings = DEFAULT,
    together: Iterable[str] = (),
    at_most: int = 1,
    whole: bool = False,
    description: str = "problems",
) -> pd.DataFrame:
    """`solve` applied to every problem, in parallel: one row each, the problem's values in front, in their order.

    Args:
        solve: takes a chunk, a list of problems, and returns a row for each; a function of a module (or a `partial` of
            one), since it is sent to other processes. It must depend on nothing but its chunk.
        together: problems that agree in these columns may share a chunk, `at_most` of them; the rest stay apart.
            Chunks follow from the problems alone, so that a table does not depend on `settings`.
        whole: a table with holes is of no use.
        description: of the progress bar.

    A chunk that raises is not the end of the others: its rows say `failed` and why. Raises: RuntimeError where every
    single one did, since that is no finding but a mistake, or where any did of a `whole` table, after all are done;
    ConnectionError where a scheduler does not answer or has no worker; ValueError for workers of several threads.
    """
    problems = list(problems)
    if not problems:
        raise ValueError("problems is empty: a sweep needs at least one (did an axis of the grid have no values?)")
    chunks = _chunks(problems, list(together), at_most)
    kept = _Kept(settings.store, solve)
    rows: dict[int, Row] = {}
    left: dict[str, list[list[int]]] = {}  # chunks of equal problems are solved once
    for chunk in chunks:
        chosen = [problems[i] for i in chunk]
        found = kept.load(chosen)
        if found is None:
            left.setdefault(_key(chosen), []).append(chunk)
        else:
            rows.update(zip(chunk, found, strict=True))
    todo = {key: [problems[i] for i in alike[0]] for key, alike in left.items()}
    shown = bar(total=len(problems), initial=len(rows), description=description, shown=settings.progress)
    with cluster(settings.scheduler) as client, shown as progress:
        device = settings.device or devices.chosen()
        solved = on_cluster(client, device, solve, todo) if client else in_processes(settings.jobs, device, solve, todo)
        for key, found in solved:
            if not any(row["failed"] and row["reason"].startswith(RAISED) for row in found):
                kept.save(todo[key], found)
            for chunk in left[key]:
                rows.update(zip(chunk, found, strict=True))
                progress.update(len(chunk))
    table = pd.DataFrame([{**problem, **rows[i]} for i, problem in enumerate(problems)])
    raised = table.reason.astype(str).str.startswith(RAISED) if "reason" in table else pd.Series(False)
    if len(raised) == len(table) and (raised.all() or (whole and raised.any())):
        raise RuntimeError(f"{raised.sum()} of {len(table)} problems failed; the first: {table.reason[raised].iloc[0]}")
    return table


def _chunks(problems: list[Problem], together: list[str], at_most: int) -> list[list[int]]:
    """Positions of the problems, in chunks; a chunk's place is that of its first problem."""
    if at_most < 1:
        raise ValueError(f"at_most={at_most} is out of range: a chunk holds at least 1 problem")
    if not together:
        return [[i] for i in range(len(problems))]
    groups: dict[str, list[int]] = {}
    for i, problem in enumerate(problems):
        groups.setdefault(_key([{name: problem.get(name) for name in together}]), []).append(i)
    return sorted(group[k : k + at_most] for group in groups.values() for k in range(0, len(group), at_most))


def _key(chunk: list[Problem]) -> str:
    return hashlib.sha256(json.dumps(chunk, sort_keys=True, default=repr).encode()).hexdigest()[:24]


class _Kept:
    """Finished chunks on disk: a file each, complete or absent."""

    def __init__(self, folder: Path | str | None, solve: Solve):
        named, fixed = getattr(solve, "func", solve), (getattr(solve, "args", ()), getattr(solve, "keywords", {}))
        name = f"{named.__module__}.{named.__qualname__}-{joblib.hash(fixed)[:12]}"
        self.folder = Path(folder) / name if folder else None

    def load(self, chunk: list[Problem]) -> list[Row] | None:
        path = self.folder and self.folder / f"{_key(chunk)}.pickle"
        return pickle.loads(path.read_bytes()) if path and path.exists() else None

    def save(self, chunk: list[Problem], rows: list[Row]) -> None:
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{_key(chunk)}.pickle"
            scratch = path.with_suffix(f".{os.getpid()}")
            scratch.write_bytes(pickle.dumps(rows))
            scratch.replace(path)  # a kill in the middle leaves no half file under the chunk's name
