"""Pruned gradients: an attacker who matches the zeros as if they were true, and one who takes them for the mask.

The ρ·d_θ smallest entries of g₀ are set to zero before it is sent. To whoever matches the whole of it, that is a
perturbation δ = −g₀ on the pruned entries, with I(δ) of Eq. 4. But zeros show. With K the entries kept, matching those
alone has δ = 0 and J_K in J's place, the kept columns: the image follows as long as J_K J_Kᵀ has full rank, and else
all but its null space, in which the attack keeps the values that it started from.
"""

from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from i2f.core import spectrum
from i2f.core.jacobian import GradientJacobian
from i2f.paper import sweep
from i2f.paper.attackers import ATTACKERS
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.rows import declare
from i2f.paper.statistics import convergence, mean_order, orders, rank_correlation, worst
from i2f.paper.sweep import Problem, Row, Settings

WHO = ("ignores", "reads")
TOGETHER = ("image", "weight_seed")  # problems that share J
GRAY = 0.5  # the mean of the images that Gauss–Newton starts from


def problems(config: Config) -> list[Problem]:
    """Attacks on pruned gradients; the share pruned is `size`. Each image is under one of `weight_seeds`, in rotation.

    config: init, weight_seeds; digits of MNIST's train split from first_digit on meet the reader of the mask at the
    ratio half, the first law_digits both attackers at all ratios; gauss_newton_steps: budget of the attacks.
    """
    pairs = shared.rotated(config["first_digit"], config["digits"], config["weight_seeds"])
    law, ratios = config["first_digit"] + config["law_digits"], sorted({config["half"], *config["ratios"]})
    return [
        {
            **{"dataset": "mnist", "split": "train", "init": config["init"]},
            **{"image": image, "weight_seed": weight_seed, "noise": "prune", "size": ratio, "attacker": attacker},
            **ATTACKERS[attacker].options,
            **{"budget": config["gauss_newton_steps"], "start_seed": image, "drawn": image == config["first_digit"]},
        }
        for image, weight_seed in pairs
        for attacker in WHO
        for ratio in ratios
        if image < law or (attacker == "reads" and ratio == config["half"])
    ]


def run(problems: list[Problem], settings: Settings = sweep.DEFAULT) -> Results:
    """One row per problem: what was predicted, what was recovered (see `problems.attack`), and for the reader of the
    mask `kept`'s columns. pictures: the `drawn` image's, the truth in front, in the table's order."""
    table = sweep.run(solve, problems, settings, TOGETHER, at_most=6, description="attacks")
    pictures, (first, *_) = table.pop("picture").dropna(), (p for p in problems if p["drawn"])
    truth = shared.jacobian(first).x[0].cpu().numpy()
    return Results({"problems": table}, {"pictures": np.stack([truth, *pictures])})


@declare("problems", defaults=shared.DEFAULTS, kinds={"picture": "diagnostic"})
def solve(chunk: list[Problem]) -> list[Row]:
    attacked = shared.attack([{**problem, "steps": problem["budget"]} for problem in chunk], keep=True)
    rows = []
    for problem, found in zip(chunk, attacked, strict=True):
        J = shared.jacobian(problem)
        row = kept(J, shared.perturbation(J, problem)) if problem["mask"] == "zeros" else _whole(problem)
        row |= found | {"mse": max(found["mse"], shared.FLOOR), "rmse": max(found["rmse"], shared.FLOOR**0.5)}
        picture = row.pop("picture")[0]
        if problem["drawn"]:
            row["picture"] = picture
        rows.append(row)
    return rows


def _whole(problem: Problem) -> Row:
    """Eq. 4 and Eq. 5 for δ = −(pruned part); predicted_rmse and bound_rmse per pixel."""
    (row,) = shared.predict([problem])
    return {name: row[name] for name in ("predicted_rmse", "bound_rmse", "rank", "lambda_min", "noise_norm")}


def kept(J: GradientJacobian, delta: Tensor) -> Row:
    """What the kept columns of J know of the image: rank and smallest eigenvalue of J_K J_Kᵀ, (d_x, d_x).

    predicted_rmse: ‖P(x̄ − x₀)‖/√d_x per pixel, P the projection on the null space of J_K J_Kᵀ and x̄ the gray image,
    since on the row space I²F is zero and the null space keeps the start; 0 where the rank is full. last_layer: the
    share of the kept entries that belong to the last layer.
    """
    mask = J.gradient + delta != 0
    columns = J.dense().double()[:, mask]
    values, vectors = torch.linalg.eigh(columns @ columns.T)
    unseen = vectors[:, values <= spectrum.zero_level(J) * values[-1]]
    missed = unseen.T @ (GRAY - J.x.double().reshape(-1))
    last = sum(p.numel() for p in list(J.map.model.parameters())[-2:])
    return {
        "predicted_rmse": float(missed.norm()) / J.shape[0] ** 0.5,
        "rank": J.shape[0] - unseen.shape[1],
        "lambda_min": max(float(values[0]), 0.0),
        "noise_norm": float(delta.norm()),
        "last_layer": float(mask[-last:].sum() / mask.sum()),
    }


def predicted(table: pd.DataFrame) -> pd.DataFrame:
    """By ratio, before any attack, medians over images: the RMSE that I²F predicts for both Gauss–Newton attackers,
    the rank of the kept columns over that of J, and the last layer's share of them."""
    whole, mask = (table[table.attacker == name].groupby("size") for name in ("ignores", "reads"))
    return pd.DataFrame(
        {
            "predicted RMSE, mask ignored": whole.predicted_rmse.median(),
            "predicted RMSE, mask read": mask.predicted_rmse.median(),
            "rank kept": mask["rank"].median() / whole["rank"].median(),
            "last layer": mask.last_layer.median(),
        }
    ).rename_axis(index="ratio")


def knowledge(table: pd.DataFrame) -> pd.DataFrame:
    """By ratio, medians over images: both Gauss–Newton attackers' MSE, clamped to [0, 1], and the share of the first
    that is gone once the mask is read: how much of the protection is ignorance."""
    medians = table.pivot_table("mse_clamped", "size", "attacker", aggfunc="median")
    shown = medians[["ignores", "reads"]].clip(lower=shared.FLOOR)
    return shown.assign(ignorance=1 - shown.reads / shown.ignores).rename_axis(index="ratio", columns=None)


def reach(table: pd.DataFrame, exact: float) -> pd.Series:
    """By image, the largest ratio up to which the image is recovered to an MSE of `exact`; 0: at none."""
    recovered = (table.pivot(index="image", columns="size", values="mse").sort_index(axis=1) <= exact).cummin(axis=1)
    return (recovered * recovered.columns.to_numpy()).max(axis=1)


def judge(tables: Tables, thresholds: Thresholds, dataset: str) -> list[Claim]:
    """The experiment's claims. Of the thresholds, `cut` on the predicted RMSE bounds the linear regime, `exact` is an
    MSE that counts as recovered, and `far` the ratio up to which the image should be."""
    table = shared.lost(tables["problems"])
    table = table.assign(miss=shared.relative_error(table))
    ignores, adam, reads = (table[table.attacker == name] for name in ATTACKERS)
    exact = thresholds["exact"]
    far = max(reads["size"][reads["size"] <= thresholds["far"] + 1e-9], default=thresholds["far"])
    judged = Judge.of("pruning", f"pruning-{dataset}", {**thresholds, "far": far})
    limits = {"low": table["size"].min(), "high": table["size"].max()}
    found = [
        judged(
            "protects",
            orders(rows, "image", "size", "rmse"),
            mean_order,
            suffix=suffix,
            attacker=rows.attacker.iloc[0],
            more=more,
            converged=convergence(rows),
            **limits,
        )
        for rows, suffix, more in ((ignores, "", ""), (adam, "-adam", " (Adam)"))
    ]
    regime = ignores[ignores.predicted_rmse <= thresholds["cut"]]
    by_size = partial(worst, by="size", column="miss")
    found += [
        judged("prediction", ignores, by_size, regime, converged=convergence(ignores), **limits),
        judged("bound", ignores, partial(rank_correlation, x="bound_rmse", y="rmse"), **limits),
    ]
    for ratio in (HALF, MOST):
        rows = reads[np.isclose(reads["size"], ratio)]
        found.append(
            judged("mask", rows, lambda t: float((t.mse <= exact).mean()), suffix=f"-{round(100 * ratio)}", ratio=ratio)
        )
    depth = reach(reads, exact).rename("reach").reset_index()
    return [
        *found,
        judged("reach", depth, lambda t: float(t.reach.median()), **limits),
        judged("rank", reads, lambda t: _agreement(t, exact), **limits),
    ]


def _agreement(table: pd.DataFrame, exact: float) -> float:
    """Share of problems recovered where the rank is full, or not where it is not; none of them where it is unknown."""
    recovered, full = table.mse <= exact, table.predicted_rmse == 0
    return float(((recovered == full) & table.predicted_rmse.notna()).mean())
