"""What a published row costs to solve anew: seconds of one core per gradient evaluation and parameter, as far as
a table counts them; `verify` fills its budget with it.

python benchmarks/rows.py [RUN ...]  # writes rows.csv, or the rows of these runs in it; the two cheapest rows of every
                                     # table, and one drawn at random
"""

import random
import statistics
import sys
import time

import pandas as pd
from common import HERE, machine

from i2f.paper import verify, workers

ROWS = 3


def cost(cases: list[verify.Case]) -> float:
    """The median of seconds over `verify.effort`, after a first row that loads what all need."""
    found = []
    for case in cases[:1] + cases:
        brief = case.declared.brief
        problem = (brief.head(case.problem) if brief else None) or case.problem
        start = time.perf_counter()
        _, (rows,) = workers.solve_alone("", [problem], case.solve, "cpu")
        found.append((time.perf_counter() - start) / verify.effort(rows))
    return statistics.median(found[1:])


def main() -> None:
    tables: dict[tuple[str, str], list[verify.Case]] = {}
    for case in verify.cases(sys.argv[1:]):
        tables.setdefault((case.run, case.table), []).append(case)
    rows = []
    for (run, table), mine in tables.items():
        some = sorted(mine, key=lambda case: verify.effort(case.rows))[: ROWS - 1]
        some.append(random.Random(0).choice(mine))
        rows.append({"run": run, "table": table, "seconds": float(f"{cost(some):.2g}")})
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    if sys.argv[1:]:
        known = pd.read_csv(HERE / "rows.csv")
        table = pd.concat([known[~known.run.isin(sys.argv[1:])], table])
    table.to_csv(HERE / "rows.csv", index=False)
    (HERE / "rows_machine.txt").write_text(machine(1))


if __name__ == "__main__":
    main()
