"""What one gradient gives away: five attackers on it, what each knows, and how near each is at what cost."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from i2f.attacks import METHODS, Iterate, Reconstruction, invert
from i2f.core import metrics
from i2f.paper import sweep
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.sweep import Problem, Row, Settings

GOALS = (1e-2, 1e-4, 1e-6, 1e-10)  # MSE per pixel
DENSITY = 1.05  # evaluations from one recorded iterate to the next, at least


class Trajectory:
    """A callback that scores, on the way, what the attacker would hand in: its best iterate by its own objective.

    `truth` is the scorer's and not the attack's. rows: (evaluations, mse, loss), thinned to even steps of log cost.
    pictures: that iterate once so many evaluations were spent, one for each of `costs`.
    """

    def __init__(self, truth: Tensor, costs: Sequence[int]):
        self.truth, self.costs = truth, costs
        self.rows: list[tuple[int, float, float]] = []
        self.pictures: list[NDArray[np.float32]] = []
        self.best = (math.inf, torch.full_like(truth, math.nan))

    def __call__(self, at: Iterate) -> None:
        while len(self.pictures) < len(self.costs) and at.evaluations > self.costs[len(self.pictures)]:
            self.snapshot()  # what was the best when this cost had been spent
        if at.loss < self.best[0] or not self.rows:
            self.best = (at.loss, at.x)
        if not self.rows or at.evaluations >= DENSITY * self.rows[-1][0]:
            self.record(at.evaluations)

    def finish(self, found: Reconstruction) -> None:
        self.best = (found.loss, found.x)
        while len(self.pictures) < len(self.costs):
            self.snapshot()
        if self.rows[-1][0] == found.evaluations:
            self.rows.pop()
        self.record(found.evaluations)

    def record(self, evaluations: int) -> None:
        mse = max(float(metrics.mse(self.best[1], self.truth).mean()), shared.FLOOR)
        self.rows.append((evaluations, mse, self.best[0]))

    def snapshot(self) -> None:
        self.pictures.append(self.best[1][0].clamp(0, 1).cpu().numpy().astype(np.float32))


def problems(config: Config) -> dict[str, list[Problem]]:
    """ "summary": every attacker of `attacks.METHODS` on the gradient of one image, no noise. "survey": Gauss–Newton on
    the first images, which is not told the labels.

    config: dataset, init, weight_seed, start_seed; image, survey_images; steps: method -> budget; costs, in gradient
    evaluations, at which to look at what each attacker holds.
    """
    setting = shared.setting(config) | {"start_seed": config["start_seed"]}
    longest_first = sorted(METHODS, key=lambda method: -METHODS[method].steps)  # none should start when others end
    own = [{"method": method, "budget": config["steps"][method]} for method in longest_first]
    survey = sweep.grid(**setting | {"image": range(config["survey_images"])})
    return {"summary": [{**setting, **method, "costs": list(config["costs"])} for method in own], "survey": survey}


def run(problems: Mapping[str, list[Problem]], settings: Settings = sweep.DEFAULT) -> Results:
    """summary: one row per attacker: final and best error, the label found, and the evaluations until each of `GOALS`.
    paths: (method, evaluations, mse, loss), for the iterate that the attacker holds best. survey: (image, mse,
    label_found, converged, failed).

    pictures: truth, (C, H, W); costs; images, (attackers, costs, C, H, W): that iterate when so many evaluations were
    spent, clamped. dlg and idlg are not told the label.
    """
    tasks = problems["summary"]
    table = sweep.run(_follow, tasks, settings, whole=True, description="attackers")
    table = table.drop(columns=["reason", *(name for name in tasks[0] if name != "method")])
    table = table.set_index("method").loc[list(METHODS)].reset_index()
    paths = pd.concat(list(table.pop("path")), ignore_index=True)
    pictures = {
        "truth": shared.jacobian(tasks[0]).x[0].cpu().numpy().astype(np.float32),
        "images": np.stack(list(table.pop("pictures"))),
        "costs": np.array(tasks[0]["costs"]),
    }
    survey = sweep.run(_survey, problems["survey"], settings, description="images")
    tables = {"summary": table, "paths": paths, "survey": survey}
    return Results(tables, {"pictures": pictures})


def _follow(chunk: list[Problem]) -> list[Row]:
    (problem,) = chunk
    J, method = shared.jacobian(problem), problem["method"]
    y = None if method in ("dlg", "idlg") else J.map.y
    trajectory = Trajectory(J.x, problem["costs"])
    own = {"method": method, "steps": problem["budget"], "seed": problem["start_seed"], "callback": trajectory}
    found = invert(J.map.model, J.gradient, y, J.x.shape, **own)
    trajectory.finish(found)
    path = pd.DataFrame(trajectory.rows, columns=["evaluations", "mse", "loss"])
    path.insert(0, "method", method)
    scores = metrics.compare(found.x, J.x)
    row = {
        "label_given": y is not None,
        "label_found": _read(found, J.map.y),
        "mse": max(scores["mse"], shared.FLOOR),
        "ssim": scores["ssim"],
        "relative_residual": max(found.relative_residual, shared.FLOOR**0.5),
        "steps": found.steps,
        "evaluations": found.evaluations,
        **{f"evaluations to {goal:g}": _first(path, goal) for goal in GOALS},
        "converged": found.converged,
        "failed": found.failed,
        "path": path,
        "pictures": np.stack(trajectory.pictures),
    }
    return [row]


def _read(found: Reconstruction, y: Tensor) -> bool:
    """Whether the attack ends with the true label."""
    return found.y is not None and bool(torch.equal(found.y, y))


def _first(path: pd.DataFrame, goal: float) -> float:
    reached = path[path.mse <= goal]
    return float(reached.evaluations.iloc[0]) if len(reached) else math.nan


def readable(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary as a reader wants it: one attacker per column, errors to two digits, counts whole."""

    def text(value: bool | float) -> str:
        if isinstance(value, (bool, np.bool_)):
            return "yes" if value else "no"
        if math.isnan(value):
            return "–"
        return f"{value:.2g}" if value < 1 else f"{value:,.0f}"

    shown = summary.set_index("method").drop(columns=["converged", "failed"]).map(text).T
    return shown.rename(index=lambda name: name.replace("_", " "))


def _survey(chunk: list[Problem]) -> list[Row]:
    (problem,) = chunk
    J = shared.jacobian(problem)
    found = invert(J.map.model, J.gradient, None, J.x.shape, seed=problem["start_seed"])
    return [
        {
            "mse": max(float(metrics.mse(found.x, J.x)), shared.FLOOR),
            "label_found": _read(found, J.map.y),
            "converged": found.converged,
            "failed": found.failed,
        }
    ]


def judge(tables: Tables, thresholds: Thresholds, dataset: str) -> list[Claim]:
    """The experiment's claims, from the survey: `exact` is an MSE that counts as recovered, `share` that of images."""
    judged = Judge.of("leakage", f"leakage-{dataset}", thresholds)
    return [
        judged("image", tables["survey"], lambda t: float((t.mse <= thresholds["exact"]).mean())),
        judged("label", tables["survey"], lambda t: float(t.label_found.eq(True).mean())),
    ]
