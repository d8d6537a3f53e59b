"""Depth and smoothness: one family of plain convolutional networks, its spectra, and whether they are inverted.

Weights are drawn by Kaiming's rule with gain 1, the same for every activation, so that signals fall off with depth, by
about √2 a layer with ReLU and fourfold or more with sigmoid: what depth does is what it does to networks so drawn. The
noise is in proportion to the gradient, so that a network does not count as safe because its gradient is small.
"""

import math
from typing import Any

import numpy as np
import pandas as pd

from i2f.core import spectrum
from i2f.paper import estimates, sweep
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.rows import declare
from i2f.paper.statistics import convergence
from i2f.paper.sweep import Problem, Row, Settings

KINKED = "relu"
ATTACK = ("rmse", "mse", "relative_residual", "steps", "evaluations", "converged", "matched", "failed", "reason")


def problems(config: Config) -> list[Problem]:
    """Every image under every network of the family, each with one of `weight_seeds`, in rotation; the deepest first,
    so that the longest do not come last.

    config: dataset, init; depths, width, activations; attacked: the depths at which the gradient is attacked too;
    images of MNIST's train split, from first_digit on; weight_seeds; relative: the expected norm of the noise over the
    gradient's; gauss_newton_steps: the attack's budget.
    """
    setting = {**shared.setting(config), "split": "train", "normalize": True, "width": config["width"]}
    more = {"relative": config["relative"], "budget": config["gauss_newton_steps"]}
    return [
        {
            **setting,
            "model": f"cnn{depth}x{config['width']}",
            "depth": depth,
            "activation": activation,
            "image": image,
            "weight_seed": weight_seed,
            "start_seed": image,
            "attacked": depth in config["attacked"],
            **more,
        }
        for depth in sorted(config["depths"], reverse=True)
        for activation in config["activations"]
        for image, weight_seed in shared.rotated(config["first_digit"], config["images"], config["weight_seeds"])
    ]


def run(problems: list[Problem], settings: Settings = sweep.DEFAULT) -> Results:
    """One row per problem: what J says, and, where `attacked`, what Gauss–Newton finds without noise.

    rank, lambda_max, lambda_median, lambda_min: of J Jᵀ. condition: λ_max/λ_min. gradient_norm: ‖g‖.
    expected_rmse: √(σ² tr((J Jᵀ)⁻¹)/d_x), per pixel, for noise of expected norm `relative`·‖g‖; this and the condition
    are infinite where the rank is below d_x. Further columns as in `problems.attack`.
    """
    return Results({"problems": sweep.run(solve, problems, settings, description="networks")})


@declare("problems", defaults=shared.DEFAULTS)
def solve(chunk: list[Problem]) -> list[Row]:
    return [_row(problem) for problem in chunk]


def _row(problem: Problem) -> Row:
    J = shared.jacobian(problem)
    values, rank, norm = spectrum.decompose(J).values, spectrum.rank(J), float(J.gradient.norm())
    variance = (problem["relative"] * norm) ** 2 / J.shape[1]
    expected = condition = math.inf
    if rank == J.shape[0]:
        expected = float((variance * values.reciprocal().sum() / J.shape[0]).sqrt())
        condition = float(values[0] / values[-1])
    found = dict.fromkeys(ATTACK, math.nan) | {"converged": False, "matched": False, "failed": False, "reason": ""}
    if problem["attacked"]:
        (found,) = shared.attack([problem])
    return {
        "d_theta": J.shape[1],
        "gradient_norm": norm,
        "rank": rank,
        "lambda_max": float(values[0]),
        "lambda_median": float(values[len(values) // 2]),
        "lambda_min": float(values[-1]),
        "condition": condition,
        "expected_rmse": expected,
        **{name: found[name] for name in ATTACK},
    }


def summary(table: pd.DataFrame, exact: float) -> pd.DataFrame:
    """One row per network: shares of images recovered and of J with full rank, medians of the rest."""
    table = shared.lost(table)
    medians = {
        "rmse": "RMSE, attack",
        "relative_residual": "relative residual",
        "steps": "steps",
        "condition": "condition",
        "expected_rmse": "expected RMSE under noise",
    }
    recovered = (table.mse <= exact).astype(float).where(table.attacked)
    rmse = table.rmse.where(table.attacked)
    table = table.assign(recovered=recovered, rmse=rmse, full=np.isfinite(table.expected_rmse))
    groups = table.groupby(["depth", "activation"], sort=False)
    shares = groups[["recovered", "full"]].mean().rename(columns={"full": "full rank"})
    return shares.join(groups[list(medians)].median().rename(columns=medians)).sort_index(
        level="depth", sort_remaining=False, kind="stable"
    )


def slopes(table: pd.DataFrame) -> pd.DataFrame:
    """The slope of log₂ of the expected RMSE on log₂ of the depth, per image (rows) and activation (columns), of those
    activations whose J has full rank on every image at every depth. 1: twice the depth, twice the error."""
    whole = table[np.isfinite(table.expected_rmse).groupby(table.activation).transform("all")]
    if whole.empty:
        return pd.DataFrame()
    wide = whole.pivot(index=["image", "activation"], columns="depth", values="expected_rmse")
    slope = np.polyfit(np.log2(wide.columns.to_numpy(dtype=float)), np.log2(wide.to_numpy()).T, 1)[0]
    return pd.Series(slope, wide.index).unstack("activation")


def judge(tables: Tables, thresholds: Thresholds) -> list[Claim]:
    """The experiment's claims. An image counts as recovered if it is at every depth that is attacked."""
    table = shared.lost(tables["problems"])
    judged, found = Judge.of("smoothness", "smoothness", thresholds), []
    for activation, rows in table[table.attacked].groupby("activation", sort=False):
        every = (rows.mse <= thresholds["exact"]).groupby(rows.image).all()
        depths = " and ".join(map(str, sorted(rows.depth.unique())))
        stalled = rows.reason.astype(str).str.startswith("stalled")
        about: dict[str, Any] = {"depths": depths, "converged": convergence(rows), "stalled": int(stalled.sum())}
        ended = rows.converged.eq(True)
        if activation == KINKED:  # at a kink no step may decrease the objective: such an attack has ended too
            found.append(judged("kinks", estimates.share(every), float((ended | stalled).mean()), **about))
        else:
            about |= {"suffix": f"-{activation}", "activation": activation}
            found.append(judged("smooth", estimates.share(every), float(ended.mean()), **about))
    if table.depth.nunique() > 1 and len(slope := slopes(table)):
        found.append(judged("depth", estimates.mean(slope.mean(axis=1)), activations=", ".join(slope.columns)))
    return found
