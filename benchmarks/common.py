"""What the benchmarks share: the problem they all start from, and the machine that their seconds belong to."""

import json
import os
import platform
from pathlib import Path

import pandas as pd
import torch

import i2f

HERE = Path(__file__).parent
OPEN, CLOSE = "<!-- benchmarks/attacks.csv -->", "<!-- end -->"  # in docs/costs.md


def problem(
    dataset: str, image: int, init: str = "uniform", seed: int = 1, dtype: torch.dtype = torch.float64
) -> i2f.GradientJacobian:
    """The released LeNet and one test image, in pixels."""
    x, y = i2f.data.load(dataset, n=1, offset=image)
    model = i2f.models.build("lenet", dataset, init=init, seed=seed, normalize=False)
    return i2f.GradientJacobian(model.to(dtype), x, y)


def machine(threads: int) -> str:
    """What the seconds were taken on; use them as ratios."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    return (
        f"{processor}, {os.cpu_count()} cores; {platform.system()}, Python {platform.python_version()}, "
        f"PyTorch {torch.__version__}, threads a process: {threads}\n"
    )


def _lines(path: str | Path) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def speed_table(table: pd.DataFrame) -> str:
    """The speed table as docs/costs.md shows it: seconds to each MSE (evaluations in brackets), and the best MSE."""

    def cell(row: pd.Series, goal: str) -> str:
        seconds, evaluations = row[f"seconds to {goal}"], row[f"evaluations to {goal}"]
        return "never" if pd.isna(seconds) else f"{float(f'{seconds:.2g}'):g} s ({evaluations:,.0f})"

    goals = [name.removeprefix("seconds to ") for name in table.columns if name.startswith("seconds to ")]
    goals.sort(key=float, reverse=True)
    lines = ["| images | attack | " + " | ".join(f"MSE {goal}" for goal in goals) + " | best MSE | whole budget |"]
    lines.append("|---" * (4 + len(goals)) + "|")
    for _, row in table.iterrows():
        cells = [cell(row, goal) for goal in goals]
        budget = f"{float(f'{row.seconds:.2g}'):g} s ({row.evaluations:,.0f})"
        lines.append(f"| {row.dataset} | `{row.method}` | {' | '.join(cells)} | {row.best_mse:.0e} | {budget} |")
    return "\n".join(lines)


def rivals_table(others: pd.DataFrame, ratios: pd.DataFrame) -> str:
    """How many times less time Gauss–Newton takes to a better MSE than a rival's, as docs/costs.md shows it."""
    lines = ["| rival | its steps | its MSE | `gauss-newton` is faster |", "|---|---|---|---|"]
    for (name, steps, method), rows in others.groupby(["implementation", "steps", "method"], sort=False):
        times = rows["gauss-newton ratio"]
        span = f"{times.min():.0f}" + (f" to {times.max():.0f}" if len(rows) > 1 else "")
        lines.append(f"| {name}, `{method}` | {steps:,} | {rows.mse.median():.0e} | {span} times |")
    for row in ratios.itertuples(index=False):
        dataset, mse, best, budget, way = row
        for steps, error, times in (("24,000", mse, budget), ("until twice its best MSE", best, way)):
            lines.append(f"| ours, `dgl`, {dataset} | {steps} | {error:.0e} | {float(f'{times:.2g}'):,g} times |")
    return "\n".join(lines)


def show() -> None:
    """Put the speed and the rivals' tables, as they are committed, between the markers of docs/costs.md."""
    attacks, others, ratios = (pd.read_csv(HERE / f"{name}.csv") for name in ("attacks", "others", "ratios"))
    table = f"{speed_table(attacks)}\n\n{rivals_table(others, ratios)}"
    page = HERE.parent / "docs" / "costs.md"
    before, rest = page.read_text(encoding="utf-8").split(OPEN)
    after = rest.split(CLOSE, 1)[1]
    page.write_text(f"{before}{OPEN}\n\n{table}\n\n{CLOSE}{after}", encoding="utf-8")


class Partial:
    """What a long part has found so far, a line a task, so that `--resume` goes on where a run was cut off."""

    def __init__(self, part: str, resume: bool):
        self.path = HERE / f"{part}.partial.jsonl"
        if not resume:
            self.path.unlink(missing_ok=True)
        self.found = {tuple(task): answer for task, answer in map(json.loads, _lines(self.path))}

    def keep(self, task: tuple, answer: dict | list) -> None:
        self.found[task] = answer
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps([task, answer])}\n")
