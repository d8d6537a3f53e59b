"""Measures of risk that need no attack, side by side: the same problems, the same attacker, what each costs.

Each is written as the RMSE that it predicts, larger is safer, for noise of standard deviation σ:

    gradient norm       σ√d_θ/‖g‖
    sensitivity         σ·h‖ξ‖/‖g(x + hξ) − g(x)‖, one random direction ξ: no Jacobian
    Fisher information  σ/‖J‖₂ (Hannun, Guo, van der Maaten 2021). LAVP is an identity with it: at the truth the
                        matching Hessian is 2 J Jᵀ (Wang et al. 2023), and its largest eigenvalue 2‖J‖₂²
    trace               σ√(d_x/tr(J Jᵀ))
    I_lb                ‖Jδ‖/(λ_max √d_x)
    Bayes               √(σ² Σ 1/(λ + σ²/τ²)/d_x)
    E[I²]               √(σ² Σ 1/λ / d_x). The Cramér–Rao bound of Gaussian noise is this, an identity
    I²F                 ‖(J Jᵀ)⁻¹Jδ‖/√d_x, for the noise that was drawn
"""

import math
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch

from i2f.attacks.prior import TAU
from i2f.core import perturb, spectrum, streams
from i2f.core.influence import influence
from i2f.core.jacobian import GradientJacobian
from i2f.paper import sweep
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.rows import declare
from i2f.paper.statistics import convergence, spearman
from i2f.paper.sweep import Problem, Row, Settings

MEASURES = {  # by column
    "gradient_norm": "gradient norm",
    "sensitivity": "sensitivity",
    "fisher": "Fisher information, ‖J‖₂ (LAVP)",
    "trace": "tr(J Jᵀ)",
    "bound": "I_lb",
    "bayes": "Bayes error",
    "expected": "E[I²] (Cramér–Rao)",
    "influence": "I²F",
}
STEP = 1e-4  # h of the sensitivity: h‖ξ‖ per pixel
DROPPED = ("noise", "noise_seed", "budget", "start_seed")  # of a problem, and no columns of the table


def problems(config: Config) -> list[Problem]:
    """Attacks on noisy gradients of several networks.

    config: networks: "mnist lenet uniform [activation]" -> variance of the noise, the same for all images, so that
    their order is not that of a hidden scale; digits: of MNIST's train split from first_digit on, each under one of
    weight_seeds, in rotation; garments: how many images of another data set's test split, under all; gauss_newton_steps:
    the attacker's budget.
    """
    first, seeds = config["first_digit"], config["weight_seeds"]
    found = []
    for name, variance in config["networks"].items():
        dataset, model, init, *more = name.split()
        digits = dataset == "mnist"
        pairs = shared.rotated(first, config["digits"], seeds)
        found += [
            {
                "network": name,
                "dataset": dataset,
                "split": "train" if digits else "test",
                "image": image,
                "model": model,
                "init": init,
                "weight_seed": weight_seed,
                "activation": more[0] if more else None,
                "noise": "gaussian",
                "size": variance,
                "noise_seed": 1000 * weight_seed + image,
                "budget": config["gauss_newton_steps"],
                "start_seed": image,
            }
            for image, weight_seed in (pairs if digits else shared.rotated(0, config["garments"], seeds, crossed=True))
        ]
    return found


def run(problems: list[Problem], settings: Settings = sweep.DEFAULT) -> Results:
    """One row per problem: every measure's error and its cost in gradient evaluations (`… cost`), the attack's rmse."""
    table = sweep.run(solve, problems, settings, ("network", "weight_seed"), at_most=4, description="attacks")
    return Results({"problems": table.drop(columns=[*DROPPED]).rename(columns={"size": "variance"})})


@declare("problems", defaults=shared.DEFAULTS)
def solve(chunk: list[Problem]) -> list[Row]:
    return [_row(problem) for problem in chunk]


def _row(problem: Problem) -> Row:
    (attack,) = shared.attack([problem])
    kept = ("rmse", "mse_clamped", "converged", "matched", "failed", "reason", "evaluations")
    measures = _measures(shared.jacobian(problem), problem["size"], problem["noise_seed"])
    return {**measures, **{name: attack[name] for name in kept}}


def _measures(J: GradientJacobian, variance: float, seed: int) -> Row:
    sigma, (d_x, d_theta) = math.sqrt(variance), J.shape
    values, rank, top = spectrum.decompose(J).values, spectrum.rank(J), spectrum.lambda_max(J)
    nonzero = values[:rank]
    probe = streams.generator("sensitivity", seed)
    direction = torch.randn(J.x.shape, generator=probe, dtype=torch.float64).to(J.x)
    moved = float((J.map(J.x + STEP * direction) - J.gradient).norm())
    delta = perturb.gaussian(J.gradient, variance, seed)
    found = {
        "gradient_norm": (sigma * d_theta**0.5 / float(J.gradient.norm()), 1),
        "sensitivity": (sigma * STEP * float(direction.norm()) / moved, 2),
        "fisher": (sigma / float(nonzero[0].sqrt()), top.products),
        "trace": (sigma * (d_x / float(nonzero.sum())) ** 0.5, d_x),
        "bound": (float(J.matvec(delta).norm() / nonzero[0]) / d_x**0.5, top.products + 1),
        "bayes": ((variance * float((1 / (values + variance / TAU**2)).sum()) / d_x) ** 0.5, d_x),
        "expected": ((variance * float((1 / nonzero).sum()) / d_x) ** 0.5 if rank == d_x else math.inf, d_x),
        "influence": (influence(J, delta).rmse, d_x + 1),
    }
    errors = {name: value for name, (value, _) in found.items()}
    return errors | {f"{name} cost": cost for name, (_, cost) in found.items()}


def comparison(table: pd.DataFrame) -> pd.DataFrame:
    """One row per network and measure: Spearman with the measured RMSE over images, mean over levels; the median ratio
    of the measured error to it, the spread of that ratio (90th over 10th percentile), and its cost."""
    rows = []
    for network, its in shared.scored(table).groupby("network", sort=False):
        for name, measure in MEASURES.items():
            low, middle, high = np.percentile(its.rmse / its[name], [10, 50, 90])
            rows.append(
                {
                    "network": network,
                    "measure": measure,
                    "Spearman": _within_levels(its, name),
                    "measured / predicted": middle,
                    "90% / 10%": high / low,
                    "gradient evaluations": float(its[f"{name} cost"].median()),
                }
            )
    return pd.DataFrame(rows)


def judge(tables: Tables, thresholds: Thresholds, dataset: str = "") -> list[Claim]:
    """The experiment's claims, each about one network, whose name says its data set. Of the thresholds, `order` is a
    rank correlation, and `calibration` a factor between measured and expected error."""
    table = tables["problems"]
    predicted = table[table[list(MEASURES)].notna().all(axis=1)]  # an image without predictions has no rank
    found = []
    for network, its in shared.lost(predicted).groupby("network", sort=False):
        judged = Judge.of("rivals", f"rivals-{network.replace(' ', '-')}", thresholds)
        words = {"network": network, "converged": convergence(its), "levels": its.level.nunique()}
        for name, measure in MEASURES.items():
            columns, order = its[["image", "level", name, "rmse"]], partial(_within_levels, name=name)
            found.append(judged(name.replace("_", "-"), columns, order, risk=measure, **words))
        found.append(judged("calibration", its, _miscalibration, **words))
    return found


def _within_levels(table: pd.DataFrame, name: str) -> float:
    """The mean over levels, since any measure that knows σ ranks these."""
    level, predicted, measured = (table[column].to_numpy() for column in ("level", name, "rmse"))
    groups = [level == one for one in np.unique(level)]
    return float(np.mean([spearman(predicted[group], measured[group]) for group in groups]))


def _miscalibration(table: pd.DataFrame) -> float:
    """The factor, above or below, between the measured error and √(E[I²]/d_x): its 90th percentile."""
    factor = np.exp(np.abs(np.log(table.rmse / table.expected))).to_numpy()
    high = np.percentile(factor, 90, method="higher")  # infinite where an attack failed: nothing lies between
    return float(np.percentile(factor, 90)) if np.isfinite(high) else float(high)
