"""Noise that is spent where it protects: the same energy, five covariances, and what each costs to training.

All but the isotropic noise lie in the row space of J = U Λ^½ Vᵀ: δ = V (√s ∘ z), Σ s_i = E. There the attacker has as
many equations as unknowns, so that knowing the covariance changes nothing to first order: the error along u_i is
s_i/λ_i.

    isotropic   E/d_θ in every coordinate: (E/d_θ)/λ_i, and nearly all of it lies outside the row space
    row-space   s_i = E/d_x
    linear      s_i = E λ_i/tr(J Jᵀ): the same error in every direction, drawn as √c Jᵀz
    designed    the same to first order, as the gradient of the input with noise on it; `noise.designed`
    averaged    the largest mean error for an attacker with a prior; `noise.averaged`
"""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from i2f.attacks import LowRank, Reconstruction, invert, invert_many
from i2f.attacks.prior import TAU
from i2f.audit.defense import Defense
from i2f.core import spectrum
from i2f.core.jacobian import GradientJacobian
from i2f.paper import estimates, sweep
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.estimates import Estimate
from i2f.paper.experiments import frontier
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.rows import declare
from i2f.paper.statistics import convergence
from i2f.paper.sweep import Problem, Row, Settings

KINDS = ("isotropic", "row-space", "linear", "designed", "averaged")
TOLD = ("linear", "designed")  # whose covariance an attacker may know
SHARPEST = 10  # directions, the least protected ones by isotropic noise
FLOOR = 1e-6  # of the isotropic variance: what the attacker who knows the covariance allows for outside the row space
ATTACK = ("steps", "start_seed")  # of a problem, and no columns of the table
TOGETHER = (*shared.NETWORK, "image", *ATTACK)  # missing problems that agree in these share J and an attack's settings


def problems(config: Config) -> dict[str, list[Problem]]:
    """By table: attacks on every digit under every kind of noise, and the trainings of `frontier.problems`.

    config: dataset, init; images: how many digits of the train split, from number first_image on, each under one of
    weight_seeds, in rotation; level: ‖δ‖ over ‖g‖; gauss_newton_steps: the attackers' budget; and what
    `frontier.problems` takes. Of the kinds `TOLD`, an attacker who knows the covariance follows the one who does not.
    """
    setting = frontier.setting(config)
    return {
        "problems": [
            {
                **setting,
                "split": "train",
                "weight_seed": weight_seed,
                "image": image,
                "level": config["level"],
                "kind": kind,
                "noise_seed": 1000 * weight_seed + image,
                "told": told,
                "steps": config["gauss_newton_steps"],
                "start_seed": image,
            }
            for image, weight_seed in shared.rotated(config["first_image"], config["images"], config["weight_seeds"])
            for told, kinds in ((False, KINDS), (True, TOLD))
            for kind in kinds
        ],
        "frontier": frontier.problems(config),
    }


def run(problems: dict[str, list[Problem]], settings: Settings = sweep.DEFAULT) -> Results:
    """The table of attacks, one row each, and that of `frontier.run`.

    predicted_mse, predicted_sharpest: the expected squared error per pixel, and along the `SHARPEST` eigenvectors of
    largest λ; mse, sharpest: the attack's; worst_predicted: the smallest error of any direction; bayes: the
    mean error of an attacker who has a prior and knows the covariance; energy: E; evaluations: of the attack, and where
    the covariance is known, also of the attack that it starts from.
    """
    table = sweep.run(solve, problems["problems"], settings, TOGETHER, at_most=32, description="attacks")
    trained = frontier.run(problems["frontier"], settings).tables
    return Results({"problems": table.drop(columns=[*ATTACK]), **trained})


@declare("problems", defaults=shared.SETTING, kinds={"sharpest": "converged"})
def solve(chunk: list[Problem]) -> list[Row]:
    """A chunk agrees in `TOGETHER`. The attacker who knows the covariance starts where the attack without it ended."""
    J = shared.jacobian(chunk[0])
    steps, seed = chunk[0]["steps"], chunk[0]["start_seed"]
    values, vectors = spectrum.decompose(J)
    sent = list(dict.fromkeys(map(_sent, chunk)))
    gradients = [J.gradient + noise(kind, level).delta(J, draw) for kind, level, draw in sent]
    labels = J.map.y.expand(len(sent), -1)
    attacks = invert_many(J.map.model, torch.stack(gradients), labels, J.x.shape, seed=seed, steps=steps)
    rows = []
    for p in chunk:
        shares = noise(p["kind"], p["level"]).variances(J)
        energy = (p["level"] * float(J.gradient.norm())) ** 2
        at = sent.index(_sent(p))
        found, spent = attacks[at], attacks[at].evaluations
        if p["told"]:
            found = knowing_covariance(J, gradients[at], shares, FLOOR * energy / J.shape[1], found.x, steps)
            spent += found.evaluations
        along = (vectors.T @ (found.x - J.x).reshape(-1).double()).square()
        errors = shares / values
        rows.append(
            {
                "energy": energy,
                "predicted_mse": float(errors.mean()),
                "mse": float(along.mean()),
                "predicted_sharpest": float(errors[:SHARPEST].mean()),
                "sharpest": float(along[:SHARPEST].mean()),
                "worst_predicted": float(errors.min()),
                "bayes": float((errors * TAU**2 / (errors + TAU**2)).mean()),
                "rmse": float(along.mean()) ** 0.5,
                "predicted_rmse": float(errors.mean()) ** 0.5,
                "evaluations": spent,
                "converged": found.converged,
                "matched": found.matched,
                "failed": found.failed,
                "reason": found.reason,
            }
        )
    return rows


def _sent(p: Problem) -> tuple[str, float, int]:
    """What a gradient depends on, of one image: kind, level and draw of its noise."""
    return p["kind"], p["level"], p["noise_seed"]


def noise(kind: str, level: float) -> Defense:
    """The noise of this kind, its norm over the gradient's being `level`."""
    return Defense("relative" if kind == "isotropic" else kind, (level,))


def knowing_covariance(
    J: GradientJacobian, gradient: Tensor, variances: Tensor, floor: float, start: Tensor, steps: int
) -> Reconstruction:
    """What is found by an attacker who knows the covariance Σ = V diag(s) Vᵀ + floor·I and continues from `start`.

    To first order nothing is gained. But outside the row space of J the gradient came without noise, and its curvature
    there reveals what the row space hides.
    """
    values, vectors = spectrum.decompose(J)
    rows = (J.dense().T @ (vectors / values.sqrt())).T  # Vᵀ, (d_x, d_θ)
    known = LowRank(rows, variances, floor)
    return invert(J.map.model, gradient, J.map.y, J.x.shape, covariance=known, start=start, steps=steps)


def judge(tables: Tables, thresholds: Thresholds) -> list[Claim]:
    """The experiment's claims. Of the thresholds, `gain` is a ratio of squared errors, `cut` the predicted RMSE that
    bounds the linear regime, `known` and `unknown` are ratios of RMSEs, and `margin` is an accuracy (see
    `frontier.judge`)."""
    table = tables["problems"]
    judged = Judge.of("designed_noise", "designed", thresholds)
    told = table.told.astype(bool)
    usual, knowing = table[~told], table[told]

    def of(rows: pd.DataFrame, kind: str) -> pd.DataFrame:
        return rows[rows.kind == kind]

    pair = of(usual, "designed"), of(usual, "row-space")
    about = _about(pd.concat(pair)) | {"sharpest": SHARPEST}
    isotropic = over(of(usual, "designed"), of(usual, "isotropic"), "sharpest")[0].value
    found = [judged("gain", *over(*pair, "sharpest"), isotropic=isotropic, **about)]
    linear = usual[usual.predicted_rmse <= thresholds["cut"]]
    if len(linear):
        done = linear[linear.converged.eq(True)]
        off = np.log(done.mse / done.predicted_mse).groupby(done.image).mean()
        share = len(done) / len(linear)
        found.append(judged("prediction", estimates.geometric_mean(np.exp(off)), share, **_about(linear)))
    for kind in TOLD:
        pair = of(knowing, kind), of(usual, kind)
        found.append(judged(f"told-{kind}", *over(*pair, "rmse"), **_about(pd.concat(pair))))
    return found + frontier.judge(tables, thresholds)


def over(ours: pd.DataFrame, other: pd.DataFrame, column: str) -> tuple[Estimate, float]:
    """The geometric mean over images of a column in one table over that in another, of pairs of attacks that both
    converged, and the share of these."""
    pairs = ours.merge(other, on="image", suffixes=("", "_other"))
    done = pairs[pairs.converged.eq(True) & pairs.converged_other.eq(True)]
    return estimates.geometric_mean(done[column] / done[f"{column}_other"]), len(done) / len(pairs)


def _about(rows: pd.DataFrame) -> dict[str, Any]:
    return {"converged": convergence(rows)}
