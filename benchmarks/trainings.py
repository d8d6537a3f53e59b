"""What defences and penalties cost to trainings that are long enough to learn.

    python benchmarks/trainings.py [--only frontier joint row-space] [--resume]

One table per part, next to this file:

    frontier    trainings_frontier.csv            accuracy against privacy, every image's gradient defended by itself
    joint       trainings_joint.csv               accuracy against the error of an attack, penalties at every step
    row-space   trainings_frontier-row-space.csv  the frontier's row-space noise, which needs J of every image at every
                                                  step: hours per training on a CPU, so only on request

LeNet on the bundled digits, 800 to learn and 200 held out. `--device cuda` is for row-space; the other trainings are
sequences of short steps, faster on one core each.
"""

import argparse
from collections.abc import Callable

import joblib
import pandas as pd
import torch
from common import HERE, Partial, machine

from i2f import devices
from i2f.core.progress import bar
from i2f.paper.experiments import frontier as defences
from i2f.paper.experiments import joint

SETTING = {"dataset": "mnist", "model": "lenet", "init": "uniform", "weight_seed": 1, "normalize": False}
TRAINING = {"digits": 800, "held_out": 200, "epochs": 20, "batch_size": 20, "lr": 0.003}
PENALTY = {"penalised": 1, "every": 1, "damping": 0.01}
ATTACKS = {"images": 8, "attacked": 8, "variance": 1e-6, "steps": 12}  # after a penalised training
SEEDS = 3
REFERENCE = 8  # digits audited for the privacy of a training
DEFENCES = {
    "none": [0],
    "isotropic": [0.001, 0.003, 0.01, 0.03],
    "designed": [0.03, 0.1, 0.2, 0.4],
    "dp": [0.0003, 0.001, 0.003, 0.01],
    "prune": [0.7, 0.9, 0.99],
}
PENALTIES = {
    "bayes": [0.01, 0.03, 0.1, 0.3],
    "bound": [0.03, 0.1, 0.3, 1],
    "dp": [0.0003, 0.001, 0.003],
    "plain": [0],
}
ROW_SPACE = {"row-space": [0.003, 0.01, 0.03]}
PARTS = {"frontier": DEFENCES, "joint": PENALTIES, "row-space": ROW_SPACE}


def frontier(method: str, value: float, seed: int) -> list[dict]:
    """Seed −1: the audit, the same for every training."""
    task = {**SETTING, **TRAINING, "method": method, "value": value, "seed": seed, "reference": REFERENCE}
    if seed < 0:
        return [{"privacy": defences.privacy(task)}]
    return [{"accuracy": defences.accuracy(task)}]


def penalised(method: str, weight: float, seed: int) -> list[dict]:
    task = {**SETTING, **TRAINING, **PENALTY, **ATTACKS, "method": method, "weight": weight, "seed": seed}
    return joint.solve([task])[0]


def _alone(work: Callable[..., list[dict]], device: str, task: tuple) -> tuple[tuple, list[dict]]:
    torch.set_num_threads(1)
    devices.use(device)
    return task, work(*task)


def run(part: str, processes: int, resume: bool, device: str = "cpu") -> pd.DataFrame:
    work, name, first = (penalised, "weight", 0) if part == "joint" else (frontier, "value", -1)
    file = {"row-space": "trainings_frontier-row-space"}.get(part, f"trainings_{part}")
    partial = Partial(file, resume)
    tasks = [
        (method, float(value), seed)
        for method, values in PARTS[part].items()
        for value in values
        for seed in range(first, SEEDS)
    ]
    calls = [joblib.delayed(_alone)(work, device, task) for task in tasks if task not in partial.found]
    with joblib.parallel_config("loky", n_jobs=processes, inner_max_num_threads=1):
        found = joblib.Parallel(return_as="generator_unordered", batch_size=1)(calls)
        for task, rows in bar(found, total=len(calls), description=part):
            partial.keep(task, rows)
    rows = [
        {"method": method, name: value, "seed": seed, **row}
        for method, value, seed in tasks
        if seed >= 0
        for row in partial.found[method, value, seed]
    ]
    if first < 0:
        rows = [{**row, "privacy": partial.found[row["method"], row["value"], first][0]["privacy"]} for row in rows]
    table = pd.DataFrame(rows)
    table.to_csv(HERE / f"{file}.csv", index=False, float_format="%.6g")
    (HERE / f"{file}_machine.txt").write_text(("" if device == "cpu" else f"{device}; ") + machine(1))
    partial.path.unlink(missing_ok=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=["frontier", "joint"])
    parser.add_argument("--device", choices=devices.NAMES, default="cpu")
    parser.add_argument("--processes", type=int, default=joblib.cpu_count(only_physical_cores=True))
    parser.add_argument("--resume", action="store_true", help="go on with what was cut off")
    arguments = parser.parse_args()
    for part in arguments.only:
        print(run(part, arguments.processes, arguments.resume, arguments.device).to_string())


if __name__ == "__main__":
    main()
