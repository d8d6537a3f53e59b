"""Depth, width and smoothness: one family of plain convolutional networks, its spectra, and whether they are inverted.

Weights are drawn by Kaiming's rule with gain 1, the same for every activation, so that signals fall off with depth, by
about √2 a layer with ReLU and fourfold or more with sigmoid: what depth does is what it does to networks so drawn. The
noise is in proportion to the gradient, so that a network does not count as safe because its gradient is small.
"""

import math
from functools import partial

import numpy as np
import pandas as pd

from i2f.core import spectrum
from i2f.paper import models, sweep
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.rows import declare
from i2f.paper.statistics import convergence, share
from i2f.paper.sweep import Problem, Row, Settings

FAMILY = ["depth", "width", "activation"]
KINKED = "relu"
ATTACK = ("rmse", "mse", "relative_residual", "steps", "evaluations", "converged", "matched", "failed", "reason")
UNPUBLISHED = ["relative", "budget", "start_seed"]


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
    """One row per problem: what J says, and what Gauss–Newton finds without noise.

    rank, lambda_max, lambda_median, lambda_min: of J Jᵀ. condition: λ_max/λ_min. gradient_norm: ‖g‖.
    expected_rmse: √(σ² tr((J Jᵀ)⁻¹)/d_x), per pixel, for noise of expected norm `relative`·‖g‖; this and the condition
    are infinite where the rank is below d_x. Further columns as in `problems.attack`.
    """
    table = sweep.run(solve, problems, settings, description="networks")
    return Results({"problems": table.drop(columns=UNPUBLISHED)})


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
    """One row per network: the share of images recovered, medians of the rest."""
    table = shared.lost(table)
    medians = {
        "rmse": "RMSE, attack",
        "relative_residual": "relative residual",
        "steps": "steps",
        "condition": "condition",
        "expected_rmse": "expected RMSE under noise",
    }
    groups = table.assign(recovered=table.mse <= exact).groupby(FAMILY, sort=True)
    found = groups[list(medians)].median().rename(columns=medians)
    found.insert(0, "recovered", groups.recovered.mean())
    order = list(dict.fromkeys(table.activation))
    return found.sort_index(level="activation", key=lambda names: names.map(order.index), sort_remaining=True)


def depth_slope(table: pd.DataFrame) -> float:
    """The factor by which the expected RMSE grows when the depth doubles, the median over activations and widths; of
    those where it is finite throughout."""
    slopes = [
        np.polyfit(np.log2(rows.depth), np.log2(rows.expected_rmse), 1)[0]
        for _, rows in table.groupby(["activation", "width"], sort=False)
        if np.isfinite(rows.expected_rmse).all()
    ]
    return float(2 ** np.median(slopes))


def judge(tables: Tables, thresholds: Thresholds, dataset: str) -> list[Claim]:
    """The experiment's claims. Claims about a single width, or a single depth, are left out."""
    table = shared.lost(tables["problems"])
    widest, narrowest = table.width.max(), table.width.min()
    wide = table[table.width == widest]
    pixels = math.prod(models.SPECS[dataset].shape)
    recovered = partial(share, column="mse", at_most=thresholds["exact"])
    judged = Judge.of("smoothness", f"smoothness-{dataset}", thresholds)
    found = []
    for activation, rows in wide.groupby("activation", sort=False):
        depths = ", ".join(map(str, sorted(rows.depth.unique())))
        note = f"{depths} layers of {widest} channels; {convergence(rows)}"
        if activation == KINKED:
            found.append(judged("kinks", rows, recovered, note=note))
        else:
            rows = rows.assign(missed=(rows.mse > thresholds["exact"]).astype(float))
            found.append(
                judged("smooth", rows, _worst_depth, suffix=f"-{activation}", activation=activation, note=note)
            )
    found.append(judged("rank", wide, lambda t: float((t["rank"] == pixels).mean()), width=widest))
    narrow = table[(table.width == narrowest) & (table.activation != KINKED)]
    if table.width.nunique() > 1 and len(narrow):
        found.append(judged("narrow", narrow, recovered, width=narrowest, converged=convergence(narrow)))
    finite = table.groupby(["activation", "width"]).expected_rmse.transform("max") < np.inf
    if table.depth.nunique() > 1 and finite.any():
        found.append(judged("depth", table[finite], depth_slope))
    return found


def _worst_depth(table: pd.DataFrame) -> float:
    """The share of images recovered, at the depth where it is smallest."""
    return float(1 - float(table.groupby("depth").missed.mean().max()))
