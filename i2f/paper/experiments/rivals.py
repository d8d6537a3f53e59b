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
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from i2f.attacks.prior import TAU
from i2f.core import perturb, spectrum, streams
from i2f.core.influence import influence
from i2f.core.jacobian import GradientJacobian
from i2f.paper import estimates, sweep
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.estimates import Estimate
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.rows import declare
from i2f.paper.statistics import convergence
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
JUDGED = "mnist lenet uniform"  # the network that the claims are about
STEP = 1e-4  # h of the sensitivity: h‖ξ‖ per pixel
DROPPED = ("noise", "noise_seed", "budget", "start_seed")  # of a problem, and no columns of the table


def problems(config: Config) -> list[Problem]:
    """Attacks on noisy gradients of several networks.

    config: networks: "mnist lenet uniform [activation]" -> variance of the noise, the same for all images, so that
    their order is not that of a hidden scale; digits: how many of MNIST's train split, from first_digit on, each under
    one of weight_seeds, in rotation; garments: how many images of another data set's test split, each under all of
    them; gauss_newton_steps: the attacker's budget.
    """
    first, seeds, steps = config["first_digit"], config["weight_seeds"], config["gauss_newton_steps"]
    digits = shared.rotated(first, config["digits"], seeds)
    garments = shared.rotated(0, config["garments"], seeds, crossed=True)
    return [
        shared.under_noise(network, variance, image, weight_seed, 1000 * weight_seed + image, steps)
        for network, variance in config["networks"].items()
        for image, weight_seed in (digits if network.startswith("mnist") else garments)
    ]


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
    """One row per network and measure, over the attacks that converged: the rank correlation with the measured RMSE
    (see `order`) with the interval of Fisher's z, and `pooled`; the geometric mean of measured over predicted, the
    factor between them that nine of ten images do not exceed, and the cost."""
    rows = []
    for network, its in table[table.converged.eq(True)].groupby("network", sort=False):
        for name, measure in MEASURES.items():
            ranked, ratio = order(its, name), its.rmse / its[name]
            low, high = ranked.interval
            rows.append(
                {
                    "network": network,
                    "measure": measure,
                    "Spearman": ranked.value,
                    "Fisher z": f"[{low:.2f}, {high:.2f}]",
                    "pooled": float(_pooled(_units(its, name)[None])[0]),
                    "measured / predicted": float(np.exp(np.log(ratio).mean())),
                    "90% within": float(np.percentile(np.exp(np.abs(np.log(ratio))), 90)),
                    "gradient evaluations": float(its[f"{name} cost"].median()),
                }
            )
    return pd.DataFrame(rows)


def order(its: pd.DataFrame, name: str) -> Estimate:
    """Spearman of a measure with the measured RMSE within a weight seed, mean over seeds."""
    groups = [(rows[name], rows.rmse) for _, rows in its.groupby("weight_seed")]
    return estimates.rank_correlation(groups, repeated=_repeated(its))


def resampled(its: pd.DataFrame, name: str, draws: int = estimates.DRAWS) -> Estimate:
    """The same by a bootstrap of whole images. Where each has its own weight seed, all are ranked together, since few
    would be left within a seed."""
    return estimates.resampled(_pooled, _units(its, name), draws)


def _units(its: pd.DataFrame, name: str) -> NDArray[Any]:
    """(images, measure and error, weight seeds): one of the last where each image has its own."""
    index = its.weight_seed if _repeated(its) else 0
    pairs = its.assign(group=index).pivot(index="image", columns="group", values=[name, "rmse"]).dropna()
    units: NDArray[Any] = pairs.to_numpy().reshape(len(pairs), 2, -1)
    return units


def _pooled(samples: NDArray[Any]) -> NDArray[Any]:
    found: NDArray[Any] = np.mean([estimates.ordered(samples[..., k]) for k in range(samples.shape[-1])], axis=0)
    return found


def _repeated(its: pd.DataFrame) -> bool:
    """Whether an image stands under several weight seeds."""
    return bool(its.image.duplicated().any())


def judge(tables: Tables, thresholds: Thresholds) -> list[Claim]:
    """The experiment's claims, about the network `JUDGED`. Of the thresholds, `order` is a rank correlation, and
    same_low and same_high bound what counts as calibrated."""
    table = tables["problems"]
    its = table[table.network == JUDGED]
    if not len(its):
        return []
    judged, scored = Judge.of("rivals", "rivals", thresholds), shared.scored(its)
    finished = float(its.converged.eq(True).mean())
    found = []
    for name in ("expected", "fisher"):
        low, high = resampled(scored, name).interval
        words: dict[str, Any] = {"bca": f"[{low:.2f}, {high:.2f}]", "converged": convergence(its)}
        found.append(judged(name, order(scored, name), finished, **words))
    done = its[its.converged.eq(True)]
    ratio = estimates.geometric_mean(done.rmse / done.expected)
    return [*found, judged("calibration", ratio, finished, converged=convergence(its))]
