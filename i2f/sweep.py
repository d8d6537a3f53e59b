"""A grid of problems becomes one tidy table: side by side in processes, a row a problem, resumable."""

import hashlib
import itertools
import json
import os
import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import joblib
import pandas as pd
import torch

from i2f.progress import bar

Problem = dict[str, Any]  # plain values: a problem is the left half of its row
Row = dict[str, Any]
Solve = Callable[[list[Problem]], list[Row]]


def grid(**axes: Any) -> list[Problem]:
    """Every combination of the axes' values, the last axis fastest; a single value is the same for all."""
    lists = [v if isinstance(v, (list, tuple, range)) else [v] for v in axes.values()]
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*lists)]


def run(
    solve: Solve,
    problems: Sequence[Problem],
    together: Iterable[str] = (),
    at_most: int = 1,
    jobs: int | None = None,
    store: Path | str | None = None,
    whole: bool = False,
    description: str = "problems",
) -> pd.DataFrame:
    """`solve` applied to every problem, in parallel: one row each, the problem's values in front, in their order.

    Args:
        solve: takes a chunk, a list of problems, and returns a row for each; a function of a module (or a `partial` of
            one), since it is sent to other processes. It must depend on nothing but its chunk.
        together: problems that agree in these columns may share a chunk, `at_most` of them; the rest stay apart.
            Chunks follow from the problems alone, so that a table does not depend on `jobs`.
        jobs: processes, one thread in each, so that cores are not oversubscribed; None: one a core.
        store: a folder that keeps every finished chunk; a run that was cut off, however hard, goes on from there.
            None: the environment variable I2F_STORE, which the pipeline sets; without it nothing is kept.
        whole: a table with holes is of no use.

    A chunk that raises is not the end of the others: its rows say `failed` and why. Raises: RuntimeError where every
    single one did, since that is no finding but a mistake, or where any did of a `whole` table, after all are done.
    """
    problems = list(problems)
    if not problems:
        raise ValueError("problems is empty: a sweep needs at least one (did an axis of the grid have no values?)")
    chunks = _chunks(problems, list(together), at_most)
    kept = _Kept(store or os.environ.get("I2F_STORE"), solve)
    rows: dict[int, Row] = {}
    left: dict[str, list[list[int]]] = {}  # chunks of equal problems are solved once
    for chunk in chunks:
        chosen = [problems[i] for i in chunk]
        found = kept.load(chosen)
        if found is None:
            left.setdefault(_key(chosen), []).append(chunk)
        else:
            rows.update(zip(chunk, found, strict=True))
    calls = [joblib.delayed(_solve)(solve, [problems[i] for i in alike[0]]) for alike in left.values()]
    jobs = max(1, min(jobs or joblib.cpu_count(only_physical_cores=True), len(calls)))
    with (
        joblib.parallel_config("loky", n_jobs=jobs, inner_max_num_threads=1),
        bar(total=len(problems), initial=len(rows), description=description) as progress,
    ):
        solved = joblib.Parallel(return_as="generator_unordered", batch_size=1)(calls) if calls else []
        for key, found in solved:
            if not any(row["failed"] and row["reason"].startswith(RAISED) for row in found):
                kept.save([problems[i] for i in left[key][0]], found)
            for chunk in left[key]:
                rows.update(zip(chunk, found, strict=True))
                progress.update(len(chunk))
    table = pd.DataFrame([{**problem, **rows[i]} for i, problem in enumerate(problems)])
    raised = table.reason.astype(str).str.startswith(RAISED) if "reason" in table else pd.Series(False)
    if len(raised) == len(table) and (raised.all() or (whole and raised.any())):
        raise RuntimeError(f"{raised.sum()} of {len(table)} problems failed; the first: {table.reason[raised].iloc[0]}")
    return table


RAISED = "raised "


def _solve(solve: Solve, chunk: list[Problem]) -> tuple[str, list[Row]]:
    torch.set_num_threads(1)
    try:
        rows = solve(chunk)
        if len(rows) != len(chunk):
            raise RuntimeError(f"{len(rows)} rows for {len(chunk)} problems")
        rows = [{"failed": False, "reason": "", **row} for row in rows]
    except Exception as error:
        rows = [{"failed": True, "reason": f"{RAISED}{type(error).__name__}: {error}"} for _ in chunk]
    return _key(chunk), rows


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
