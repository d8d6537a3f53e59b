"""Depth, width and smoothness: one family of plain convolutional networks, its spectra, and whether they are inverted.

Weights are drawn by Kaiming's rule with gain 1, the same for every activation, so that signals fall off with depth, by
about √2 a layer with ReLU and fourfold or more with sigmoid: what depth does is what it does to networks so drawn. The
noise is in proportion to the gradient, so that a network does not count as safe because its gradient is small.
"""

import math
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from i2f.core import spectrum
from i2f.paper import claims, models, sweep
from i2f.paper.experiments import problems as shared
from i2f.paper.sweep import Problem, Row

FAMILY = ["depth", "width", "activation"]
KINKED = "relu"


def problems(
    setting: dict[str, Any], depths: list[int], widths: list[int], activations: list[str], images: int
) -> list[Problem]:
    """Every image under every network of the family, the deepest first, so that the longest do not come last."""
    return [
        {**setting, "depth": depth, "width": width, "activation": activation, "image": image,
         "model": f"cnn{depth}x{width}"}
        for depth in sorted(depths, reverse=True)
        for width in sorted(widths, reverse=True)
        for activation in activations
        for image in range(images)
    ]  # fmt: skip


def run(tasks: list[Problem], relative: float, steps: int, seed: int, jobs: int | None = None) -> pd.DataFrame:
    """A row each: what J says, and what Gauss–Newton finds without noise.

    rank, lambda_max, lambda_median, lambda_min: of J Jᵀ. condition: λ_max/λ_min. gradient_norm: ‖g‖.
    expected_rmse: √(σ² tr((J Jᵀ)⁻¹)/d_x), per pixel, for noise of expected norm `relative`·‖g‖; this and the condition
    are infinite where the rank is below d_x. Further columns as in
    `problems.attack`.
    """
    return sweep.run(partial(_solve, relative, steps, seed), tasks, jobs=jobs, description="networks")


def _solve(relative: float, steps: int, seed: int, chunk: list[Problem]) -> list[Row]:
    return [_row(problem, relative, steps, seed) for problem in chunk]


def _row(problem: Problem, relative: float, steps: int, seed: int) -> Row:
    J = shared.jacobian(problem)
    values, rank, norm = spectrum.decompose(J).values, spectrum.rank(J), float(J.gradient.norm())
    variance = (relative * norm) ** 2 / J.shape[1]
    expected = math.inf
    if rank == J.shape[0]:
        expected = float((variance * values.reciprocal().sum() / J.shape[0]).sqrt())
    (found,) = shared.attack([{**problem, "steps": steps, "start_seed": seed}])
    kept = ("rmse", "mse", "relative_residual", "steps", "evaluations", "converged", "matched", "failed", "reason")
    return {
        "d_theta": J.shape[1], "gradient_norm": norm, "rank": rank, "lambda_max": float(values[0]),
        "lambda_median": float(values[len(values) // 2]), "lambda_min": float(values[-1]),
        "condition": float(values[0] / values[-1]) if rank == J.shape[0] else math.inf,
        "expected_rmse": expected,
        **{name: found[name] for name in kept},
    }  # fmt: skip


def summary(table: pd.DataFrame, exact: float) -> pd.DataFrame:
    """A row a network: the share of images recovered, medians of the rest."""
    table = shared.lost(table)
    groups = table.assign(recovered=table.mse <= exact).groupby(FAMILY, sort=True)
    found = groups.agg(
        **{
            "recovered": ("recovered", "mean"), "RMSE, attack": ("rmse", "median"),
            "relative residual": ("relative_residual", "median"), "steps": ("steps", "median"),
            "condition": ("condition", "median"), "expected RMSE under noise": ("expected_rmse", "median"),
        }
    )  # fmt: skip
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


def judge(table: pd.DataFrame, dataset: str, exact: float, share: float, safer: float) -> list[claims.Claim]:
    """The experiment's claims. The thresholds are the notebook's parameters."""
    table = shared.lost(table)
    wide, pixels = table.width.max(), math.prod(models.SPECS[dataset].shape)
    attacker = {"attacker": shared.PERFECT}
    common: dict[str, Any] = {"source": "ours; the paper's deep networks have ReLU"}
    recovered = f"share of images recovered to an MSE of {exact:g}"
    found = []

    def claim(rows: pd.DataFrame, name: str, statement: str, statistic: str, measure: Any, **more: Any) -> None:
        if len(rows):
            words = {"id": f"smoothness-{dataset}-{name}", "statement": statement, "statistic": statistic}
            found.append(claims.judge(rows, measure, "image", **(common | words | more)))

    def recovers(rows: pd.DataFrame) -> float:
        return float((rows.mse <= exact).mean())

    for activation, rows in table[table.width == wide].groupby("activation", sort=False):
        worst = rows.assign(missed=(rows.mse > exact).astype(float))
        depths = ", ".join(map(str, sorted(rows.depth.unique())))
        note = f"{depths} layers of {wide} channels; {claims.settled(rows)}"
        if activation == KINKED:
            claim(rows, "kinks", "A network with kinks (ReLU) gives its image away too, without noise.", recovered,
                  recovers, at_least=share, note=note, **attacker)  # fmt: skip
        else:
            statement = f"Smooth networks ({activation}) give their image away at every depth."
            claim(worst, f"smooth-{activation}", statement, f"{recovered}, at the worst depth",
                  lambda t: 1 - _worst_mean(t, "depth", "missed"), at_least=share, note=note, **attacker)  # fmt: skip
    determined = f"To first order the gradient determines every pixel, kinks or not ({wide} channels)."
    claim(table[table.width == wide], "rank", determined, "share of images and networks with rank d_x",
          lambda t: float((t["rank"] == pixels).mean()), at_least=share, attacker="none: ranks of J Jᵀ")  # fmt: skip
    narrow = table[(table.width == table.width.min()) & (table.activation != KINKED)]
    if table.width.nunique() > 1:
        claim(narrow, "narrow", f"Smooth networks give it away also where they are narrow ({table.width.min()} "
              "channels).", recovered, recovers, at_least=share, note=claims.settled(narrow), **attacker)  # fmt: skip
    if table.depth.nunique() > 1:
        whole = table[table.groupby(["activation", "width"]).expected_rmse.transform(np.max) < np.inf]
        claim(whole, "depth", "Depth protects: on average, a doubling raises what relative noise hides.",
              "factor of the expected RMSE for twice the depth, median over networks", depth_slope, at_least=safer,
              attacker="none: expectations of I²F over the noise",
              note="noise in proportion to the gradient; networks whose J has full rank on every image; Kaiming's "
              "initialisation with gain 1")  # fmt: skip
    return found


def _worst_mean(table: pd.DataFrame, by: str, column: str) -> float:
    return float(table.groupby(by)[column].mean().max())
