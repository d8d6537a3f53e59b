"""Measures of risk that need no attack, side by side: the same problems, the same attacker, what each costs.

Each is written as the error that it foretells, larger is safer, for noise of deviation σ:

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

from i2f.core import perturb, spectrum, streams
from i2f.core.influence import influence
from i2f.paper import claims, sweep
from i2f.paper.experiments import problems as shared
from i2f.paper.sweep import Problem, Row

MEASURES = {  # column -> its name, and whether it must know the noise that was drawn
    "gradient_norm": ("gradient norm", False),
    "sensitivity": ("sensitivity", False),
    "fisher": ("Fisher information, ‖J‖₂ (LAVP)", False),
    "trace": ("tr(J Jᵀ)", False),
    "bound": ("I_lb", True),
    "bayes": ("Bayes error", False),
    "expected": ("E[I²] (Cramér–Rao)", False),
    "influence": ("I²F", True),
}
STEP, SPREAD = 1e-4, 0.25  # h‖ξ‖ per pixel; τ


def problems(networks: dict[str, int], levels: list[float], weight_seed: int) -> list[Problem]:
    """networks: "mnist lenet uniform [activation]" -> images. levels: σ√d_θ, over the mean gradient's norm of that
    network, so that all images of it meet the same variance."""
    found = []
    for name, images in networks.items():
        dataset, model, init, *more = name.split()
        found += sweep.grid(network=name, dataset=dataset, model=model, init=init, weight_seed=weight_seed,
                            activation=more[0] if more else None, images=images,
                            image=range(images), level=levels)  # fmt: skip
    return found


def run(tasks: list[Problem], steps: int, seed: int, jobs: int | None = None) -> pd.DataFrame:
    """A row a problem: every measure's error and its cost in gradient evaluations (`… cost`), and the attack's rmse."""
    solve = partial(_solve, steps, seed)
    return sweep.run(solve, tasks, together=("network", "image"), at_most=8, jobs=jobs, description="attacks")


def _solve(steps: int, seed: int, chunk: list[Problem]) -> list[Row]:
    """A chunk has one image of one network."""
    first = chunk[0]
    J = shared.jacobian(first)
    typical = _typical_norm(first)
    rows, tasks = [], []
    for p in chunk:
        variance = (p["level"] * typical) ** 2 / J.shape[1]
        task = {**p, "noise": "gaussian", "size": variance, "noise_seed": p["image"], "steps": steps,
                "start_seed": seed}  # fmt: skip
        rows.append({"variance": variance, **_measures(J, variance, p["image"])})
        tasks.append(task)
    kept = ("rmse", "mse_clamped", "converged", "matched", "failed", "reason", "evaluations")
    return [
        row | {name: found[name] for name in kept}
        for row, found in zip(rows, shared.attack(tasks), strict=True)
    ]  # fmt: skip


def _typical_norm(problem: Problem) -> float:
    """The mean norm of the gradient over the network's images, which sets the scale of the noise."""
    found = []
    for image in range(problem["images"]):
        J = shared.jacobian({**problem, "image": image})
        found.append(float(J.gradient.norm()))
    return float(np.mean(found))


def _measures(J: Any, variance: float, seed: int) -> Row:
    sigma, d_x = math.sqrt(variance), J.shape[0]
    values = spectrum.decompose(J).values
    rank = spectrum.rank(J)
    lit = values[:rank]
    probe = streams.generator("sensitivity", seed)
    direction = torch.randn(J.x.shape, generator=probe, dtype=torch.float64).to(J.x)
    moved = float((J.map(J.x + STEP * direction) - J.gradient).norm())
    delta = perturb.gaussian(J.gradient, variance, seed)
    top = spectrum.lambda_max(J)
    found = {
        "gradient_norm": (sigma * J.shape[1] ** 0.5 / float(J.gradient.norm()), 1),
        "sensitivity": (sigma * STEP * float(direction.norm()) / moved, 2),
        "fisher": (sigma / float(lit[0].sqrt()), top.products),
        "trace": (sigma * (d_x / float(lit.sum())) ** 0.5, d_x),
        "bound": (float(J.matvec(delta).norm() / lit[0]) / d_x**0.5, top.products + 1),
        "bayes": ((variance * float((1 / (values + variance / SPREAD**2)).sum()) / d_x) ** 0.5, d_x),
        "expected": ((variance * float((1 / lit).sum()) / d_x) ** 0.5 if rank == d_x else math.inf, d_x),
        "influence": (influence(J, delta).rmse, d_x + 1),
    }  # fmt: skip
    return {name: value for name, (value, _) in found.items()} | {
        f"{name} cost": cost for name, (_, cost) in found.items()
    }


def comparison(table: pd.DataFrame) -> pd.DataFrame:
    """A row a network and measure: Spearman with the measured RMSE over images and levels, the median ratio of the
    measured error to it, the spread of that ratio (90th over 10th percentile), and its cost."""
    table = shared.scored(table)
    rows = []
    for network, its in table.groupby("network", sort=False):
        for name, (words, _) in MEASURES.items():
            ratio = its.rmse / its[name]
            low, middle, high = np.percentile(ratio, [10, 50, 90])
            rows.append({"network": network, "measure": words, "Spearman": claims.rank_correlation(its, name, "rmse"),
                         "measured / foretold": middle, "90% / 10%": high / low,
                         "gradient evaluations": float(its[f"{name} cost"].median())})  # fmt: skip
    return pd.DataFrame(rows)


def judge(table: pd.DataFrame, order: float, calibration: float) -> list[claims.Claim]:
    """The experiment's claims. The thresholds are the notebook's parameters."""
    found = []
    foretold = table[table[list(MEASURES)].notna().all(axis=1)]  # where nothing was, nothing can be ranked
    for network, its in shared.lost(foretold).groupby("network", sort=False):
        tag = network.replace(" ", "-")
        common: dict[str, Any] = {"attacker": shared.PERFECT, "note": claims.settled(its)}
        for name, (words, _) in MEASURES.items():
            source = "the paper" if name in ("influence", "bound") else "rivals in the literature"
            within = [rows for _, rows in its.groupby("level")]
            found.append(claims.judge(
                its[["image", "level", name, "rmse"]], lambda t, name=name: _within_levels(t, name), "image",
                at_least=order, source=source, least=claims.LEAST_RANKED, id=f"rivals-{tag}-{name.replace('_', '-')}",
                statement=f"{network}: {words} ranks images by their measured error.",
                statistic=f"Spearman over images, mean over {len(within)} levels of noise", **common,
            ))  # fmt: skip
        found.append(claims.judge(
            its, _miscalibration, "image",
            at_most=calibration, source="ours", id=f"rivals-{tag}-calibration",
            statement=f"{network}: E[I²] is the measured error, up to one draw of the noise.",
            statistic="factor between measured and foretold, 90th percentile", **common,
        ))  # fmt: skip
    return found


def _within_levels(table: pd.DataFrame, name: str) -> float:
    """Levels apart, since any measure that knows σ ranks these."""
    level, foretold, measured = (table[column].to_numpy() for column in ("level", name, "rmse"))
    groups = [level == one for one in np.unique(level)]
    return float(np.mean([claims.spearman(foretold[group], measured[group]) for group in groups]))


def _miscalibration(table: pd.DataFrame) -> float:
    """The factor, above or below, between the measured error and √(E[I²]/d_x): its 90th percentile."""
    factor = np.exp(np.abs(np.log(table.rmse / table.expected))).to_numpy()
    high = np.percentile(factor, 90, method="higher")  # infinite where an attack failed: nothing lies between
    return float(np.percentile(factor, 90)) if np.isfinite(high) else float(high)
