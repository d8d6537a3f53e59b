"""How many texts come back whole from their gradient, without noise: `python benchmarks/texts.py [--resume]`.

texts.csv: one row per network and attacker, over the first texts of the bundle.
"""

import argparse
import math
import time

import joblib
import pandas as pd
import torch
from common import HERE, Partial, machine

from i2f.core.progress import bar
from i2f.paper import texts
from i2f.paper.experiments import language

SEED, SEARCHING_STEPS, TAG_STEPS = 1, 40, 800
STARTS, MATCHED = 5, 1e-6  # at most so many random starts, until the relative residual is this small
PARTS = [  # network and task, attacker, texts
    ("bert-tiny", texts.READING, 50),
    ("bert-tiny", texts.SEARCH, 50),
    ("bert-tiny", texts.TAG, 5),
    ("gpt2-tiny", texts.READING, 50),
    ("gpt2-tiny", texts.SEARCH, 50),
    ("gpt2-tiny", texts.TAG, 5),
    ("gpt2-tiny causal", texts.READING, 50),
    ("minilm", texts.READING, 20),
]


def attack(network: str, attacker: str, text: int) -> dict:
    """One text's row, and the seconds of one thread. Gauss–Newton starts again where the gradient is not matched, which
    an attacker can see; steps and evaluations are those of all starts."""
    budget = {texts.SEARCH: SEARCHING_STEPS, texts.TAG: TAG_STEPS}.get(attacker)
    task = language.problem(network, text, attacker, SEED, budget, relative=0.0)
    began, best, taken, evaluations = time.perf_counter(), {"relative_residual": math.inf}, 0, 0
    for start in range(STARTS if attacker == texts.SEARCH else 1):
        (row,) = texts.solve([task | {"start_seed": text + 1000 * start}])
        taken, evaluations = taken + (row.get("steps") or 0), evaluations + (row.get("evaluations") or 0)
        if row.get("relative_residual", 0.0) < best["relative_residual"]:
            best = {"relative_residual": 0.0} | row
        if best["relative_residual"] <= MATCHED:
            break
    seconds = time.perf_counter() - began
    counts = {"steps": taken, "evaluations": evaluations} if evaluations else {}
    row = best | counts | {"seconds": seconds, "starts": start + 1}
    return {
        name: row.get(name)
        for name in ("accuracy", "rougeL", "all_found", "rmse", "starts", "steps", "evaluations", "seconds")
    }


def _one(task: tuple[str, str, int]) -> tuple[tuple[str, str, int], dict]:
    torch.set_num_threads(1)
    return task, attack(*task)


def run(processes: int, resume: bool, parts: list[tuple[str, str, int]] = PARTS) -> pd.DataFrame:
    partial = Partial("texts", resume)
    tasks = [(network, attacker, text) for network, attacker, count in parts for text in range(count)]
    calls = [joblib.delayed(_one)(task) for task in tasks if task not in partial.found]
    with joblib.parallel_config("loky", n_jobs=processes, inner_max_num_threads=1):
        found = joblib.Parallel(return_as="generator_unordered", batch_size=1)(calls)
        for task, row in bar(found, total=len(calls), description="texts"):
            partial.keep(task, row)
    rows = pd.DataFrame([{"network": n, "attacker": a, "text": t, **partial.found[n, a, t]} for n, a, t in tasks])
    groups = rows.groupby(["network", "attacker"], sort=False)
    table = groups.agg(
        **{
            "texts": ("text", "size"),
            "found whole": ("all_found", "sum"),
            "tokens": ("accuracy", "mean"),
            "least of a text": ("accuracy", "min"),
            "ROUGE-L": ("rougeL", "mean"),
            "starts": ("starts", "max"),
            "steps": ("steps", "median"),
            "evaluations": ("evaluations", "median"),
            "seconds": ("seconds", "median"),
        }
    ).reset_index()
    table.to_csv(HERE / "texts.csv", index=False, float_format="%.4g")
    (HERE / "texts_machine.txt").write_text(machine(1))
    partial.path.unlink(missing_ok=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=joblib.cpu_count(only_physical_cores=True))
    parser.add_argument("--resume", action="store_true", help="go on with what was cut off")
    arguments = parser.parse_args()
    print(run(arguments.processes, arguments.resume).to_string())


if __name__ == "__main__":
    main()
