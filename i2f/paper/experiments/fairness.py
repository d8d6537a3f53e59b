"""Whom the same noise protects: digits under one noise variance for all, and under one of their own.

Before any draw of δ ~ N(0, σ²I), an image's expected squared error per pixel is E[I²]/d_x = σ² tr((J Jᵀ)⁻¹)/d_x: the
eigenvalues alone. So its own variance σ_i² = target · d_x / tr((J Jᵀ)⁻¹) gives every image the same expected error.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from i2f.core.influence import expected_square
from i2f.paper import data, estimates, sweep
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.rows import declare
from i2f.paper.statistics import convergence, log_correlation
from i2f.paper.sweep import Problem, Row, Settings

PAIR = ["image", "weight_seed"]
UNPUBLISHED = ("dataset", "split", "root", "init", "noise", "noise_seed", "start_seed", "budget", "size", "target")


def problems(config: Config) -> list[Problem]:
    """same, strong: every digit under every weight seed, one noise variance for all. equal: some digits, under one
    weight seed each, in rotation, and each with the variance that makes `target` its expected MSE.

    config: digits of MNIST's train split from first_digit on, init, weight_seeds (1, 2, …); variance, strong_variance;
    equal_digits, target; gauss_newton_steps: the attack's budget. Of weight seed 1 the recovered images are kept
    (`pictured`).
    """
    first, seeds = config["first_digit"], config["weight_seeds"]
    every = shared.rotated(first, config["digits"], seeds, crossed=True)
    parts: list[tuple[str, list[tuple[int, int]], Problem]] = [
        ("same", every, {"size": config["variance"]}),
        ("strong", every, {"size": config["strong_variance"]}),
        ("equal", shared.rotated(first, config["equal_digits"], seeds), {"target": config["target"]}),
    ]
    return [
        {
            "dataset": "mnist",
            "split": "train",
            "init": config["init"],
            "weight_seed": weight_seed,
            "image": image,
            "noise": "gaussian",
            **size,
            "noise_seed": 1000 * weight_seed + image,  # scaled from part to part, so that the variance alone differs
            "budget": config["gauss_newton_steps"],
            "start_seed": image,
            "part": part,
            "pictured": weight_seed == 1 and part != "equal",
        }
        for part, pairs, size in parts
        for image, weight_seed in pairs
    ]


def run(problems: list[Problem], settings: Settings = sweep.DEFAULT) -> Results:
    """Gauss–Newton on every problem.

    One row per attack: `problems.predict`'s and `problems.attack`'s columns, the image's `label`, whether the network
    `answered` with it, and the `variance` of its noise.
    truth, pictures: the private images and the recovered ones of the rows that are `pictured`, in the table's order,
    (rows, C, H, W), in [0, 1]; a recovered image is black where its attack raised.
    """
    table = sweep.run(solve, problems, settings, ("weight_seed", "image"), at_most=3, description="attacks")
    kept = table[table.pictured]
    truth = data.load("mnist", int(table.image.max()) + 1, split="train")[0].numpy()[kept.image]
    blank = np.zeros_like(truth[0])
    found = [one if isinstance(one, np.ndarray) else blank for one in kept.picture]
    arrays = {"truth": truth, "pictures": (np.stack(found) / 255).astype(np.float32)}
    return Results({"problems": table.drop(columns=["picture", *UNPUBLISHED], errors="ignore")}, arrays)


@declare("problems", defaults={**shared.DEFAULTS, "pictured": False}, kinds={"picture": "diagnostic"})
def solve(chunk: list[Problem]) -> list[Row]:
    rows, attacks = [], []
    for p in chunk:
        J = shared.jacobian(p)
        own = {**p, "size": p["target"] * J.shape[0] / expected_square(J, 1.0)} if "target" in p else p
        with torch.no_grad():
            answered = bool(J.map.model(J.x).argmax(1) == J.map.y)
        rows.append({"label": int(J.map.y), "answered": answered, "variance": own["size"], **shared.predict([own])[0]})
        attacks.append(own)
    found = shared.attack(attacks, keep=True)
    for p, one in zip(chunk, found, strict=True):
        picture = one.pop("picture")
        if p["pictured"]:  # what the errors say is compared, and not every pixel
            one["picture"] = np.nan_to_num(255 * picture[0]).round().astype(np.uint8)
    return [row | one for row, one in zip(rows, found, strict=True)]


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Percentiles of the MSE over all attacks of a part that did not fail, by whether the network answers with the
    image's class, and how its logarithm correlates with that of E[I²]."""
    rows = {}
    for (part, answered), mine in shared.scored(table).groupby(["part", "answered"], sort=False):
        low, middle, high = np.percentile(mine.mse, [10, 50, 90])
        rows[part, "predicted class" if answered else "misclassified"] = {
            "attacks": len(mine),
            "converged": mine.converged.mean(),
            "MSE, 10%": low,
            "50%": middle,
            "90%": high,
            "E[I²]/dₓ, 50%": mine.expected_mse.median(),
            # nothing to correlate with where the expected error is the same for all
            "log–log with E[I²]": np.nan if part == "equal" else log_correlation(mine, "expected_mse", "mse"),
        }
    return pd.DataFrame(rows).T.astype({"attacks": int})


def equalised(table: pd.DataFrame) -> pd.DataFrame:
    """The MSE of the pairs of image and weight seed that met both one variance for all ("same") and their own
    ("equal"), one row each."""
    rows = shared.scored(table[table.part != "strong"])
    return rows.pivot(index=PAIR, columns="part", values="mse").dropna()[["same", "equal"]]


def by_image(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """log MSE, one row per image and one column per weight seed, each column without its mean; and the labels. NaN
    where an attack did not converge, or has no row."""
    logs = np.log(rows[_converged(rows)].pivot(index="image", columns="weight_seed", values="mse"))
    return logs - logs.mean(), rows.groupby("image").label.first()[logs.index]


def tail(units: NDArray[Any], high: float = 90, low: float = 50) -> NDArray[Any]:
    """One percentile over images over another, the geometric mean over weight seeds: (samples, images, seeds) ->
    (samples,), a statistic for `estimates.resampled`."""
    top, bottom = percentiles(units, (high, low))
    found: NDArray[Any] = np.exp(np.log(top / bottom).mean(-1))
    return found


def percentiles(values: NDArray[Any], shares: tuple[float, ...]) -> list[NDArray[Any]]:
    """(samples, n, …) -> (samples, …) each: `numpy.nanpercentile`, which takes columns one by one, in one sort."""
    ordered = np.sort(values, axis=1)  # NaN last
    last = np.maximum((~np.isnan(ordered)).sum(1, keepdims=True) - 1, 0)
    found = []
    for share in shares:
        place = last * share / 100
        below, above = (np.take_along_axis(ordered, k.astype(int), 1) for k in (np.floor(place), np.ceil(place)))
        found.append((below + (place % 1) * (above - below))[:, 0])
    return found


def judge(tables: Tables, thresholds: Thresholds) -> list[Claim]:
    """The experiment's claims: `ratio` of percentiles, `effect` (η²) and `p_value` of classes.

    An untrained network gives one answer to almost everything, and the images of that class have tiny gradients: noise
    hides them so well that they alone could decide. So the claim on samples leaves them out, and those on classes say
    what they are without them. All leave out attacks that did not converge, whose larger errors would support them.
    """
    table = tables["problems"]
    judged = Judge.of("fairness", "fairness", thresholds)
    same = table[table.part == "same"]
    others = same[~_answered(same)]
    units, everyone = (_errors(rows[_converged(rows)]) for rows in (others, same))
    found = [
        judged(
            "samples",
            estimates.resampled(tail, units),
            float(_converged(others).mean()),
            everyone=f"{tail(everyone[None])[0]:.3g}",
            below=f"{tail(units[None], 50, 10)[0]:.3g}",
            converged=convergence(others),
        )
    ]
    for name, part in (("classes", "same"), ("classes-strong", "strong")):
        rows = table[table.part == part]
        (centred, labels), (left, theirs) = by_image(rows), by_image(rows[~_answered(rows)])
        found.append(
            judged(
                name,
                estimates.effect(centred.mean(axis=1), labels),
                float(_converged(rows).mean()),
                p=estimates.permutation(centred.fillna(0.0), labels),  # else it speaks for no class
                others=f"{estimates.explained(left.mean(axis=1), theirs):.2g}",
                converged=convergence(rows),
            )
        )
    return found


def _errors(rows: pd.DataFrame) -> NDArray[Any]:
    """MSE, (images, seeds), NaN where there is none."""
    found: NDArray[Any] = rows.pivot(index="image", columns="weight_seed", values="mse").to_numpy(dtype=float)
    return found


def _answered(rows: pd.DataFrame) -> pd.Series:
    return rows.answered.eq(True)


def _converged(rows: pd.DataFrame) -> pd.Series:
    """False too where an attack raised, and says nothing of it."""
    return rows.converged.eq(True)
