"""Are the published rows true? A sample of them is solved anew and compared, column by column.

Which rows follows from a hash of code, parameters and tables, so that every commit tries others; at least two of every
table, and as many as a budget allows. Nothing outside runs/ is written.
"""

import argparse
import hashlib
import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd

from i2f.core import checks
from i2f.core.progress import bar
from i2f.paper import cells, claims, pipeline, reproduction, rows, tables, workers
from i2f.paper.books import ROOT
from i2f.paper.cells import plain_row
from i2f.paper.pipeline import RESULTS, RUNS, Run
from i2f.paper.reproduction import Case, Report, words
from i2f.paper.tolerances import Deviation, deviations
from i2f.paper.workers import Row, Solve

COSTS = ROOT / "benchmarks" / "rows.csv"
LEAST = 2  # rows of every table that a sample has
CORES = 2  # that a budget's minutes are of
UNKNOWN = 10.0  # seconds for a row of a table without a measured cost


def cases(keys: Sequence[str] = ()) -> list[Case]:
    """Every published problem of these runs (default: all), in the order of the tables."""
    seconds = pd.read_csv(COSTS).set_index(["run", "table"]).seconds.to_dict() if COSTS.exists() else {}
    found = []
    for key in keys:
        checks.one_of("run", key, pipeline.runs())
    for key in keys or pipeline.runs():
        for table, about in tables.provenance(RESULTS / key).items():
            solve = _solver(about["solver"])
            unit = seconds.get((key, table), UNKNOWN)
            for problem, known in tables.read(RESULTS / key / f"{table}.csv", about):
                found.append(Case(key, table, solve, problem, known, unit * effort(known)))
    return found


def effort(known: Sequence[Row]) -> float:
    """What a problem's rows cost, up to a factor that a table has: the gradient evaluations that they took, or the
    steps, times the network's size, as far as they say so."""
    spent = [
        _number(row, "evaluations" if "evaluations" in row else "steps") * _number(row, "d_theta") for row in known
    ]
    return max(spent, default=1.0) or 1.0


def _number(row: Row, name: str) -> float:
    value = row.get(name)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 1.0


def sample(known: Sequence[Case], seed: str, budget: float = math.inf, share: float | None = None) -> list[Case]:
    """The cases to try: the `LEAST` cheapest of every table, then any, in an order drawn from `seed`, as long as the
    budget (seconds of one core) lasts; or a share of every table, at least `LEAST`.

    Raises: ValueError for a share outside [0, 1], or a budget that is too small for the least.
    """
    order = list(known)
    random.Random(seed).shuffle(order)
    by_table: dict[str, list[Case]] = {}
    for case in order:
        by_table.setdefault(case.name, []).append(case)
    if share is not None:
        if not 0 <= share <= 1:
            raise ValueError(f"share={share:g} is out of range: choose one from 0 (the least) to 1 (every row)")
        return [case for mine in by_table.values() for case in mine[: max(LEAST, math.ceil(share * len(mine)))]]
    chosen = [case for mine in by_table.values() for case in sorted(mine, key=lambda case: case.cost)[:LEAST]]
    left = budget - sum(case.cost for case in chosen)
    if left < 0:
        raise ValueError(
            f"the budget is too small: {LEAST} rows of each of {len(by_table)} tables take about "
            f"{(budget - left) / 60 / CORES:.1f} minutes of {CORES} cores; give BUDGET= at least that"
        )
    taken = {id(case) for case in chosen}
    for case in order:
        if id(case) not in taken and case.cost <= left:
            chosen.append(case)
            left -= case.cost
    return chosen


def check(case: Case, again: Sequence[Row], brief: bool) -> list[Deviation]:
    """The published rows of a case against those solved anew; of a brief solve, what is stored of its early end and
    what follows from the stored arrays."""
    own, how = case.declared.kinds, case.declared.brief
    if len(again) != len(case.rows):
        return [Deviation("rows", "exact", len(case.rows), len(again), math.inf, math.inf)]
    if brief and how is not None:
        (known,), (row,) = case.rows, again
        stored = {name: known.get(name) for name in how.again(case.problem, known)}
        pairs = [
            ({how.column: known[how.column]}, {how.column: row.get(how.column)}),
            (stored, how.again(case.problem, known)),
        ]
    else:
        pairs = list(zip(case.rows, again, strict=True))
    return [one for known, row in pairs for one in deviations(known, row, own)]


def live(run: Run, count: int = 4, **where: Any) -> None:
    """Solve a few of the published rows that a notebook read, here and now, and print how many agree.

    where: which: values of their problems. Raises: LookupError where no published row is like that; AssertionError,
    with both values, where one disagrees.
    """
    asked = run.settings.store.asked.values() if run.settings.store else ()
    known = [
        Case(run.key, declared.table, _solver(declared.name), entry.problem, entry.rows, effort(entry.rows))
        for declared, entries in asked
        for entry in entries.values()
        if all(entry.problem.get(name) == value for name, value in where.items())
    ]
    if not known:
        raise LookupError(f"no row of this notebook has {where}: choose other values, or leave them out")
    chosen = sorted(known, key=lambda case: case.cost)[:: max(1, len(known) // count)][:count]
    report = Report(chosen, len(known))
    for case, again, brief in _solved(chosen, 1, run.settings.device, False, run.settings.progress):
        report.found.append((case, check(case, again, brief)))
    wrong = report.disagreements
    print(f"{len(chosen) - len({id(case) for case, _ in wrong})} of {len(chosen)} rows agree")
    assert not wrong, "\n".join(words(case, one) for case, one in wrong)


def command(arguments: argparse.Namespace) -> int:
    """`verify`: the report in the terminal and as runs/report.html; 0 if the published rows are reproduced."""
    known = cases(arguments.runs)
    if not known:
        raise ValueError(f"{RESULTS} holds no published rows: nothing to verify")
    seed = arguments.seed or state(arguments.runs)
    chosen = sample(known, seed, arguments.budget * 60 * CORES, arguments.share)
    report = Report(chosen, len(known), changed=changed(arguments.runs))
    settings = pipeline.settings()
    kept = rows.Store(chunks=RUNS / "verified" / state(arguments.runs)) if arguments.share == 1 else None
    print(f"verify: {len(chosen):,} of {len(known):,} published problems, sample {seed}", flush=True)
    for case, again, brief in _solved(
        chosen, settings.jobs, settings.device, arguments.share == 1, settings.progress, kept
    ):
        report.found.append((case, check(case, again, brief)))
    reproduction.write(report, RUNS / "report.html")
    record(report, RUNS / "verified.json")
    return 0 if report.reproduced else 1


def _solved(
    chosen: Sequence[Case], jobs: int | None, device: str, whole: bool, progress: str, kept: rows.Store | None = None
) -> Iterator[tuple[Case, list[Row], bool]]:
    """Each case with its rows solved anew, and whether that was brief; in parallel, those that cost most first."""
    tasks, waiting = [], {}
    for number, case in enumerate(sorted(chosen, key=lambda case: -case.cost)):
        how = case.declared.brief
        able = how is not None and not whole and how.column in case.rows[0]  # an attack that ended early is no long one
        head = how.head(case.problem) if how is not None and able else None
        problem = head or case.problem
        known = kept.find(case.declared, case.declared.key(problem)) if kept else None
        if known is not None:
            yield case, known, False
            continue
        waiting[str(number)] = case, problem, head is not None
        tasks.append((str(number), [problem], case.solve))
    shown = bar(total=len(tasks), description="verify", shown=progress)
    with shown as done:
        for name, (found,) in workers.in_processes(jobs, device, tasks) if tasks else ():
            case, problem, brief = waiting[name]
            again = [plain_row(row) for row in found]
            if kept and not any(str(row["reason"]).startswith(workers.RAISED) for row in again):
                kept.add(case.declared, [problem], [again])
            done.update()
            yield case, again, brief


def changed(keys: Iterable[str] = ()) -> list[tuple[str, str, str]]:
    """Claims whose verdict in runs/executed is not the published one: (id, published, now)."""
    found = []
    for key in keys or pipeline.runs():
        now, then = (folder / key / "claims.json" for folder in (RUNS / "executed", RESULTS))
        if now.exists() and then.exists():
            verdicts = {claim.id: claim.verdict for claim in claims.load(now)}
            found += [
                (c.id, c.verdict, verdicts.get(c.id, "gone"))
                for c in claims.load(then)
                if verdicts.get(c.id) != c.verdict
            ]
    return found


def state(keys: Iterable[str] = ()) -> str:
    """A short digest of code, parameters and published tables."""
    found = hashlib.sha256((ROOT / "params.yaml").read_bytes())
    for file in sorted(path for path in (ROOT / "i2f").rglob("*") if path.suffix in (".py", ".toml")):
        found.update(file.read_bytes())
    for key in sorted(keys or pipeline.runs()):
        found.update(tables.digest(RESULTS / key).encode())
    return found.hexdigest()[:12]


def record(report: Report, path: Path) -> None:
    """How much of each table was tried, by the table's checksum; `publish` puts it into the provenance."""
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    wrong = {id(case) for case, _ in report.disagreements}
    by_table: dict[str, list[Case]] = {}
    for case, _ in report.found:
        by_table.setdefault(case.name, []).append(case)
    for mine in by_table.values():
        about = tables.provenance(RESULTS / mine[0].run)[mine[0].table]
        problems = sum(origin["problems"] for origin in about["origins"])
        now = {
            "share": round(len(mine) / problems, 4),
            "agreed": sum(id(case) not in wrong for case in mine) / len(mine),
        }
        if now["share"] >= known.get(about["sha256"], now)["share"]:
            known[about["sha256"]] = now
    cells.write(path, (json.dumps(known, indent=1) + "\n").encode())


def _solver(name: str) -> Solve:
    module, _, function = name.partition(":")
    found: Solve = getattr(import_module(module), function)
    return found
