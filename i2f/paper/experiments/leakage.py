"""What one gradient gives away: five attackers on it, what each knows, and how near each is at what cost."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from i2f.attacks import METHODS, Iterate, Reconstruction, invert
from i2f.core import metrics
from i2f.core.jacobian import GradientJacobian
from i2f.paper import claims, sweep
from i2f.paper.experiments import problems as shared
from i2f.paper.sweep import Problem, Row

GOALS = (1e-2, 1e-4, 1e-6, 1e-10)  # MSE per pixel
DENSITY = 1.05  # evaluations from one recorded iterate to the next, at least


class Trajectory:
    """A callback that scores, on the way, what the attacker would hand in: its best iterate by its own objective.

    `truth` is the scorer's and not the attack's. rows: (evaluations, mse, loss), thinned to even steps of log cost.
    pictures: that iterate once so many evaluations were spent, an entry for each of `costs`.
    """

    def __init__(self, truth: Tensor, costs: Sequence[int]):
        self.truth, self.costs = truth, costs
        self.rows: list[tuple[int, float, float]] = []
        self.pictures: list[np.ndarray] = []
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


def attack(
    J: GradientJacobian, steps: dict[str, int], costs: Sequence[int], seed: int, jobs: int | None = None
) -> tuple[pd.DataFrame, pd.DataFrame, np.ndarray]:
    """Every attacker of `attacks.METHODS` on the gradient at J's input, no noise. `steps`: the budget of each.

    dlg and idlg are not told the label. Returns
        summary: a row an attacker: final and best error, the label found, and the evaluations until each of `GOALS`;
        paths: (method, evaluations, mse, loss), for the iterate that the attacker holds best;
        pictures: (attackers, costs, C, H, W), that iterate when so many evaluations were spent, clamped.
    """
    solve = partial(_follow, J, steps, costs, seed)
    longest_first = sorted(METHODS, key=lambda method: -METHODS[method].steps)  # none should start when others end
    table = sweep.run(solve, sweep.grid(method=longest_first), jobs=jobs, whole=True, description="attackers")
    table = table.set_index("method").loc[list(METHODS)].reset_index()
    paths = pd.concat(list(table.pop("path")), ignore_index=True)
    pictures = np.stack(list(table.pop("pictures")))
    return table.drop(columns="reason"), paths, pictures


def _follow(
    J: GradientJacobian, steps: dict[str, int], costs: Sequence[int], seed: int, chunk: list[Problem]
) -> list[Row]:
    method = chunk[0]["method"]
    y = None if method in ("dlg", "idlg") else J.map.y
    trajectory = Trajectory(J.x, costs)
    found = invert(
        J.map.model, J.gradient, y, J.x.shape, method=method, loss=J.map.loss, callback=trajectory, seed=seed,
        steps=steps[method],
    )  # fmt: skip
    trajectory.finish(found)
    path = pd.DataFrame(trajectory.rows, columns=["evaluations", "mse", "loss"])
    path.insert(0, "method", method)
    scores = metrics.compare(found.x, J.x)
    row = {
        "label_given": y is not None,
        "label_found": bool(torch.equal(found.y, J.map.y)),
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


def _first(path: pd.DataFrame, goal: float) -> float:
    reached = path[path.mse <= goal]
    return float(reached.evaluations.iloc[0]) if len(reached) else math.nan


def readable(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary as a reader wants it: an attacker a column, errors to two digits, counts whole."""

    def text(value: Any) -> str:
        if isinstance(value, (bool, np.bool_)):
            return "yes" if value else "no"
        if math.isnan(value):
            return "–"
        return f"{value:.2g}" if value < 1 else f"{value:,.0f}"

    shown = summary.set_index("method").drop(columns=["converged", "failed"]).map(text).T
    return shown.rename(index=lambda name: name.replace("_", " "))


def survey(jacobians: Sequence[GradientJacobian], seed: int) -> pd.DataFrame:
    """Gauss–Newton on several images, not told the labels: (image, mse, label_found, converged, failed)."""

    table = sweep.run(partial(_survey, jacobians, seed), sweep.grid(image=range(len(jacobians))), description="images")
    return table.drop(columns="reason")


def _survey(jacobians: Sequence[GradientJacobian], seed: int, chunk: list[Problem]) -> list[Row]:
    J = jacobians[chunk[0]["image"]]
    found = invert(J.map.model, J.gradient, None, J.x.shape, loss=J.map.loss, seed=seed)
    return [
        {
            "mse": max(float(metrics.mse(found.x, J.x)), shared.FLOOR),
            "label_found": bool(torch.equal(found.y, J.map.y)),
            "converged": found.converged,
            "failed": found.failed,
        }
    ]


def judge(table: pd.DataFrame, dataset: str, exact: float, share: float) -> list[claims.Claim]:
    """The experiment's claims, from `survey`'s table. The thresholds are the notebook's parameters."""
    common = {"source": "section 3, the assumption G_r(∇L(x)) ≡ x", "attacker": "gauss-newton: knows the model alone"}
    return [
        claims.judge(
            table, lambda t: float((t.mse <= exact).mean()), "image", at_least=share, **common,
            id=f"leakage-{dataset}-image",
            statement="The gradient of one image gives the image away.",
            statistic=f"share of images recovered to an MSE of {exact:g}",
            note="no noise, one image a gradient, random start",
        ),
        claims.judge(
            table, lambda t: float(t.label_found.eq(True).mean()), "image", at_least=share, **common,
            id=f"leakage-{dataset}-label",
            statement="The gradient of one image gives its label away.",
            statistic="share of labels read from the last layer's gradient",
        ),
    ]  # fmt: skip
