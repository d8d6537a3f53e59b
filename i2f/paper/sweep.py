"""A grid of problems becomes one tidy table: what is known is read, what is missing is solved, in parallel or on a
cluster, resumably."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from i2f.core.progress import bar
from i2f.paper import devices, rows
from i2f.paper.cells import plain, plain_row
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
    one per core. store: the rows that are known, and where new ones go (`rows.Store`); None: everything is solved, and
    nothing kept. device: of the tensors, a name of `devices`; "": the one in use. scheduler: the address of a Dask
    scheduler (pip install 'i2f[cluster]'), or a `distributed.Client`, whose workers then solve the chunks. Workers need
    this package, the data, and one thread each. progress: "auto" (a bar for terminal or notebook), "text" (lines that a
    log can hold) or "off".
    """

    jobs: int | None = None
    store: rows.Store | None = None
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
    """The rows of every problem, its values in front, in their order: read where they are known, solved where not.

    Args:
        solve: takes a chunk, a list of problems, and returns for each its row, or a list of rows; a function of a
            module, since it is sent to other processes, and with a store a declared one (`rows.declare`). It must
            depend on nothing but its chunk.
        together: missing problems that agree in these columns may share a chunk, `at_most` of them; the rest stay
            apart.
        whole: a table with holes is of no use.
        description: of the progress bar.

    A chunk that raises is not the end of the others: its rows say `failed` and why, and are not kept. Raises:
    RuntimeError where every single one did, since that is no finding but a mistake, or where any did of a `whole`
    table, after all are done; LookupError for missing rows where the store is not to solve any; ConnectionError where a
    scheduler does not answer or has no worker; ValueError for workers of several threads.
    """
    problems = [{name: plain(value, name) for name, value in problem.items()} for problem in problems]
    if not problems:
        raise ValueError("problems is empty: a sweep needs at least one (did an axis of the grid have no values?)")
    store = settings.store
    declared = rows.declaration(solve) if store is not None else None
    found: dict[str, list[Row]] = {}
    todo: dict[str, Problem] = {}  # equal problems are solved once
    keys = [declared.key(problem) if declared else rows.digest(problem) for problem in problems]
    for key, problem in zip(keys, problems, strict=True):
        known = store.find(declared, key) if store is not None and declared is not None else None
        if known is None:
            todo[key] = problem
        else:
            found[key] = known
    if todo and store is not None and declared is not None and not store.solve:
        raise LookupError(
            f"{len(todo):,} of {len(problems):,} problems of the table {declared.table!r} have no published row; the "
            f"first: {next(iter(todo.values()))}. Solve them (make solve RUN=...) and publish them (make publish)"
        )
    words = f"{description}: {len(found):,} known, {len(todo):,} to solve" if found else description
    for chunk, solved in _solved(solve, todo, settings, _chunks(todo, list(together), at_most), words):
        found |= zip(chunk, solved, strict=True)
        if store is not None and declared is not None and not any(_raised(row) for row in itertools.chain(*solved)):
            store.add(declared, [todo[key] for key in chunk], solved)
    if store is not None and declared is not None:
        store.ask(declared, keys)
    table = pd.DataFrame(
        [{**problem, **row} for key, problem in zip(keys, problems, strict=True) for row in found[key]]
    )
    raised = [row for key in keys for row in found[key] if _raised(row)]
    if raised and (whole or len(raised) == len(table)):
        raise RuntimeError(f"{len(raised)} of {len(table)} problems failed; the first: {raised[0]['reason']}")
    return table


def _solved(
    solve: Solve, todo: dict[str, Problem], settings: Settings, chunks: list[list[str]], description: str
) -> Iterator[tuple[list[str], list[list[Row]]]]:
    """Each chunk of keys with the rows of its problems, as they come, under a bar."""
    tasks = [("|".join(chunk), [todo[key] for key in chunk], solve) for chunk in chunks]
    shown = bar(total=len(todo), description=description, shown=settings.progress if todo else "off")
    with cluster(settings.scheduler if todo else "") as client, shown as progress:
        device = settings.device or devices.chosen()
        for name, solved in on_cluster(client, device, tasks) if client else in_processes(settings.jobs, device, tasks):
            progress.update(len(solved))
            yield name.split("|"), [[plain_row(row) for row in each] for each in solved]


def _raised(row: Row) -> bool:
    return bool(row["failed"]) and str(row["reason"]).startswith(RAISED)


def _chunks(todo: dict[str, Problem], together: list[str], at_most: int) -> list[list[str]]:
    """The keys of the problems in chunks; a chunk's place is that of its first problem."""
    if at_most < 1:
        raise ValueError(f"at_most={at_most} is out of range: a chunk holds at least 1 problem")
    groups: dict[str, list[str]] = {}
    for key, problem in todo.items():
        alike = json.dumps([problem.get(name) for name in together]) if together else key
        groups.setdefault(alike, []).append(key)
    place = {key: number for number, key in enumerate(todo)}
    chunks = [group[k : k + at_most] for group in groups.values() for k in range(0, len(group), at_most)]
    return sorted(chunks, key=lambda chunk: place[chunk[0]])
