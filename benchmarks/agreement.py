"""How far rows that are solved anew lie from the published ones, under another number of threads, another order of
summation, and in other batches: what the tolerances of i2f/paper/tolerances.toml are set by.

python benchmarks/agreement.py [--budget MINUTES]        # of each variant; writes agreement.csv
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch
from common import HERE, machine

from i2f.core.progress import bar
from i2f.paper import verify, workers
from i2f.paper.cells import plain_row

VARIANTS = {  # name -> environment; rows were published with one thread, in the batches of their sweep
    "alone, one thread": {},
    "alone, two threads": {},
    "alone, other order of summation": {"MKL_CBWR": "SSE4_2"},
}


def measure(variant: str, budget: float) -> pd.DataFrame:
    """One row per table, column and kind: the largest deviation from the published rows."""
    if "two" in variant:
        limit = torch.set_num_threads
        torch.set_num_threads = lambda _: limit(2)
    chosen = verify.sample(verify.cases(), "agreement", budget * 60)
    rows = []
    with bar(chosen, description=variant, shown="text") as progress:
        for case in progress:
            brief = case.declared.brief
            head = brief.head(case.problem) if brief else None
            _, (again,) = workers.solve_alone("", [head or case.problem], case.solve, "cpu")
            for one in verify.check(case, [plain_row(row) for row in again], head is not None):
                rows.append({"variant": variant, "table": case.table, "column": one.column, "kind": one.kind})
                rows[-1] |= {"problems": 1, "relative": one.relative, "over tolerance": one.size}
    table = pd.DataFrame(rows)
    found = table.groupby(["variant", "kind", "column"]).agg(
        {"problems": "sum", "relative": ["max", lambda v: v.quantile(0.9)], "over tolerance": "max"}
    )
    found.columns = ["problems", "largest relative", "90% relative", "largest over tolerance"]
    return found[found["largest relative"] > 0].map(lambda value: float(f"{value:.2g}")).reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=4.0)
    parser.add_argument("--variant", default="", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE / "agreement.csv", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.variant:
        measure(given.variant, given.budget).to_csv(given.out, index=False)
        return
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for number, (name, environment) in enumerate(VARIANTS.items()):
            words = ["--variant", name, "--budget", str(given.budget), "--out", f"{folder}/{number}.csv"]
            command = [sys.executable, str(Path(__file__).resolve()), *words]
            running.append(subprocess.Popen(command, env=os.environ | environment))
        if any(process.wait() for process in running):
            sys.exit("a variant failed; see above")
        tables = [pd.read_csv(f"{folder}/{number}.csv") for number in range(len(VARIANTS))]
    pd.concat(tables).to_csv(given.out, index=False)
    (HERE / "agreement_machine.txt").write_text(machine(1))


if __name__ == "__main__":
    main()
