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

from functools import partial
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
from i2f.paper import sweep
from i2f.paper.claims import Claim, Judge, Thresholds
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
CUT = 0.05  # predicted RMSE that bounds the linear regime
ATTACK = ("steps", "start_seed")  # of a problem, and no columns of the table
TOGETHER = (*shared.NETWORK, "image", *ATTACK)  # missing problems that agree in these share J and an attack's settings


def problems(config: Config) -> dict[str, list[Problem]]:
    """By table: attacks on every digit under every kind of noise, and the trainings of `frontier.problems`.

    config: dataset, init; images: digits of the train split from number first_image on, each under one of weight_seeds, in
    rotation; level: ‖δ‖ over ‖g‖; gauss_newton_steps: the attackers' budget; and what `frontier.problems` takes. Of the
    kinds `TOLD`, an attacker who knows the covariance of the noise follows the one who does not.
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

    predicted_mse, predicted_sharpest: the mean squared error per pixel, and along the `SHARPEST` eigenvectors of
    largest λ, over draws; mse, sharpest: the attack's; worst_predicted: the smallest error of any direction; bayes: the
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


def gains(table: pd.DataFrame) -> pd.DataFrame:
    """By image and level, means over draws of designed noise over another kind: of the measured error along the
    sharpest directions (sharpest, isotropic), and of the mean error; averaged: the Bayes error over row-space noise's.
    """
    rows = shared.scored(table[~table.told.astype(bool)])
    means = rows.groupby(["image", "level", "kind"])[["sharpest", "mse", "bayes"]].mean().unstack("kind")
    return pd.DataFrame(
        {
            "sharpest": means["sharpest", "designed"] / means["sharpest", "row-space"],
            "isotropic": means["sharpest", "designed"] / means["sharpest", "isotropic"],
            "mean": means["mse", "designed"] / means["mse", "row-space"],
            "averaged": means["bayes", "averaged"] / means["bayes", "row-space"],
        }
    ).reset_index()


def knowing(table: pd.DataFrame) -> pd.DataFrame:
    """The attacks that know the covariance, with `ratio`: their RMSE over that of the attack without, on the same
    gradient."""
    told, keys = table.told.astype(bool), ["image", "kind", "level", "noise_seed"]
    pairs = table[told].merge(table[~told], on=keys, suffixes=("", "_untold"))
    return pairs.assign(ratio=pairs.rmse / pairs.rmse_untold)


def judge(tables: Tables, thresholds: Thresholds, dataset: str) -> list[Claim]:
    """The experiment's claims. Of the thresholds, `gain` is a ratio of squared errors, `accuracy` a relative difference
    of an MSE, `margin` an accuracy (see `frontier.judge`)."""
    table = tables["problems"]
    usual = table[~table.told.astype(bool)]
    judged = Judge.of("designed_noise", f"designed-{dataset}", thresholds)
    gained = gains(table)
    words: dict[str, Any] = {"sharpest": SHARPEST, "converged": convergence(usual)}
    found = [
        judged("gain", gained, partial(_geometric_mean, column="sharpest"), **words),
        judged("gain-isotropic", gained, partial(_geometric_mean, column="isotropic"), **words),
        judged("averaged", gained, lambda t: float(t.averaged.mean())),
    ]
    linear = shared.lost(usual[usual.predicted_mse <= CUT**2])
    if len(linear):
        found.append(judged("prediction", linear, _off, cut=CUT, **words))
    for kind, pairs in knowing(table).groupby("kind", sort=False):
        words = {"converged": convergence(pairs)}
        found.append(judged(f"told-{kind}", pairs, lambda t: float(t.ratio.median()), **words))
    return found + (frontier.judge(tables, thresholds, dataset) if len(tables["frontier"]) else [])


def _geometric_mean(table: pd.DataFrame, column: str) -> float:
    return float(np.exp(np.log(table[column]).mean()))


def _off(table: pd.DataFrame) -> float:
    """How far the measured MSE, a mean over draws, is from the expected one: median over images, of the worst kind."""
    means = table.groupby(["image", "kind", "level"])[["mse", "predicted_mse"]].mean()
    off = (means.mse / means.predicted_mse - 1).abs()
    return float(off.groupby("kind").median().max())
