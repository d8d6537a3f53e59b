"""What one gradient gives away: five attackers on it, what each knows, and how near each is at what cost."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from i2f.attacks import GENERAL, METHODS, Iterate, Reconstruction, invert
from i2f.core import metrics
from i2f.paper import estimates, sweep
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.rows import declare
from i2f.paper.sweep import Problem, Row, Settings

GOALS = (1e-2, 1e-4, 1e-6, 1e-10)  # MSE per pixel
DENSITY = 1.05  # steps from one recorded iterate to the next, at least: unlike evaluations, no rounding changes them
PATH = ["method", "evaluations", "mse", "loss"]
ENDS = ["method", "label_given", "label_found", "mse", "ssim", "relative_residual", "steps", "evaluations", "converged"]
KINDS = {"mse": "path", "loss": "path", "ssim": "path", "relative_residual": "path", "pictures": "picture"}


class Trajectory:
    """A callback that scores, on the way, what the attacker would hand in: its best iterate by its own objective.

    `truth` is the scorer's and not the attack's. rows: {evaluations, mse, loss}, at steps evenly spaced in their
    logarithm. pictures: that iterate once so many evaluations were spent, one for each of `costs`.
    """

    def __init__(self, truth: Tensor, costs: Sequence[int]):
        self.truth, self.costs = truth, costs
        self.rows: list[Row] = []
        self.pictures: list[NDArray[np.float32]] = []
        self.best, self.step = (math.inf, torch.full_like(truth, math.nan)), 0

    def __call__(self, at: Iterate) -> None:
        while len(self.pictures) < len(self.costs) and at.evaluations > self.costs[len(self.pictures)]:
            self.snapshot()  # what was the best when this cost had been spent
        if at.loss < self.best[0] or not self.rows:
            self.best = (at.loss, at.x)
        if not self.rows or at.step >= DENSITY * self.step:
            self.step = at.step
            self.record(at.evaluations)

    def finish(self, found: Reconstruction) -> None:
        self.best = (found.loss, found.x)
        while len(self.pictures) < len(self.costs):
            self.snapshot()
        if self.rows[-1]["evaluations"] == found.evaluations:
            self.rows.pop()
        self.record(found.evaluations)

    def record(self, evaluations: int) -> None:
        mse = max(float(metrics.mse(self.best[1], self.truth).mean()), shared.FLOOR)
        self.rows.append({"evaluations": evaluations, "mse": mse, "loss": self.best[0]})

    def snapshot(self) -> None:
        self.pictures.append(self.best[1][0].clamp(0, 1).cpu().numpy().astype(np.float32))


def problems(config: Config) -> dict[str, list[Problem]]:
    """ "attackers": every method of `attacks.GENERAL` on the gradient of one image, no noise. "survey": Gauss–Newton
    on many images, without their labels.

    config: dataset, init, weight_seed, start_seed; image; digits of MNIST's train split from first_digit on, each under
    one of weight_seeds, in rotation, and photographs of CIFAR-10's test split, each under all; gauss_newton_steps,
    adam_steps, lbfgs_steps: budgets; costs, in gradient evaluations, at which to look at what each attacker holds.
    """
    setting = shared.setting(config) | {"start_seed": config["start_seed"]}
    steps = {"gauss-newton": config["gauss_newton_steps"], "dlg": config["lbfgs_steps"]}
    longest_first = sorted(GENERAL, key=lambda method: -METHODS[method].steps)  # none should start when others end
    own = [{"method": method, "budget": steps.get(method, config["adam_steps"])} for method in longest_first]
    places = [
        ("mnist", "train", shared.rotated(config["first_digit"], config["digits"], config["weight_seeds"])),
        ("cifar10", "test", shared.rotated(0, config["photographs"], config["weight_seeds"], crossed=True)),
    ]
    survey = [
        {**setting, "dataset": name, "split": split, "image": image, "weight_seed": weight_seed}
        for name, split, pairs in places
        for image, weight_seed in pairs
    ]
    return {"attackers": [{**setting, **method, "costs": list(config["costs"])} for method in own], "survey": survey}


def run(problems: Mapping[str, list[Problem]], settings: Settings = sweep.DEFAULT) -> Results:
    """summary: one row per attacker: final error, the label found, and the evaluations until each of `GOALS`. paths:
    (method, evaluations, mse, loss), for the iterate that the attacker holds best. survey: (dataset, image,
    weight_seed, mse, label_found, evaluations, converged, failed).

    truth: (C, H, W). images: (attackers, costs, C, H, W), that iterate when so many evaluations were spent, clamped.
    dlg and idlg do not know the label.
    """
    tasks, order = problems["attackers"], list(GENERAL)
    table = sweep.run(follow, tasks, settings, whole=True, description="attackers")
    table = table.sort_values("method", key=lambda names: names.map(order.index), kind="stable", ignore_index=True)
    each = table.groupby("method", sort=False)
    ends = each.tail(1)
    goals = {f"evaluations to {goal:g}": [_first(path, goal) for _, path in each] for goal in GOALS}
    summary = ends[[*ENDS, "failed"]].reset_index(drop=True).assign(**goals)
    survey_table = sweep.run(survey, problems["survey"], settings, description="images")
    truth = shared.jacobian(tasks[0]).x[0].cpu().numpy().astype(np.float32)
    tables = {"summary": summary, "paths": table[PATH], "survey": survey_table}
    return Results(tables, {"truth": truth, "images": np.stack(list(ends.pictures))})


@declare("problems", defaults=shared.DEFAULTS, kinds=KINDS)
def follow(chunk: list[Problem]) -> list[list[Row]]:
    """One row per point of the attack's path; the last one has its end and its pictures, (costs, C, H, W), too."""
    return [_path(problem) for problem in chunk]


def _path(problem: Problem) -> list[Row]:
    J, method = shared.jacobian(problem), problem["method"]
    y = None if method in ("dlg", "idlg") else J.map.y
    trajectory = Trajectory(J.x, problem["costs"])
    own = {"method": method, "steps": problem["budget"], "seed": problem["start_seed"], "callback": trajectory}
    found = invert(J.map.model, J.gradient, y, J.x.shape, **own)
    trajectory.finish(found)
    end = {
        "label_given": y is not None,
        "label_found": _read(found, J.map.y),
        "ssim": metrics.compare(found.x, J.x)["ssim"],
        "relative_residual": max(found.relative_residual, shared.FLOOR**0.5),
        "steps": found.steps,
        "converged": found.converged,
        "failed": found.failed,
        "reason": found.reason,
        "pictures": np.stack(trajectory.pictures),
    }
    return [*trajectory.rows[:-1], trajectory.rows[-1] | end]


@declare("survey", defaults=shared.DEFAULTS)
def survey(chunk: list[Problem]) -> list[Row]:
    """What Gauss–Newton finds without the label."""
    return [_unlabelled(problem) for problem in chunk]


def _unlabelled(problem: Problem) -> Row:
    J = shared.jacobian(problem)
    found = invert(J.map.model, J.gradient, None, J.x.shape, seed=problem["start_seed"])
    return {
        "mse": max(float(metrics.mse(found.x, J.x)), shared.FLOOR),
        "label_found": _read(found, J.map.y),
        "evaluations": found.evaluations,
        "converged": found.converged,
        "failed": found.failed,
        "reason": found.reason,
    }


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


def judge(tables: Tables, thresholds: Thresholds) -> list[Claim]:
    """One claim per data set of the survey: `exact` is an MSE that counts as recovered, `share` that of images."""
    judged, found = Judge.of("leakage", "leakage", thresholds), []
    for name, rows in tables["survey"].groupby("dataset", sort=False):
        images = (
            rows.assign(recovered=rows.mse <= thresholds["exact"]).groupby("image")[["recovered", "label_found"]].all()
        )
        about: dict[str, Any] = {"labels": int(images.label_found.sum()), "images": len(images)}
        found.append(judged(str(name), estimates.share(images.recovered), **about))
    return found
