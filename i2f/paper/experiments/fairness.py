"""Whom the same noise protects: one variance for every image, what I²F says of each, and what an attack finds.

δ ~ N(0, σ²I), drawn anew for each image. Before any draw, an image's expected squared error per pixel is
E[I²]/d_x = σ² tr((J Jᵀ)⁻¹)/d_x: the eigenvalues alone. So its own variance σ_i² = target · d_x / tr((J Jᵀ)⁻¹) gives
every image the same expected error.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import kruskal

from i2f.core import spectrum
from i2f.core.influence import expected_square, influence
from i2f.paper import data, sweep
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.rows import declare
from i2f.paper.statistics import convergence
from i2f.paper.sweep import Problem, Row, Settings

CAUSES = {  # what might explain an image's error -> columns of the table
    "class": ["label"],
    "E[I²], before any noise is drawn": ["expected_mse"],
    "I²F, for the noise drawn": ["predicted_mse"],
    "I²F and class": ["predicted_mse", "label"],
}
UNPUBLISHED = ("dataset", "split", "root", "init", "noise", "noise_seed", "start_seed", "budget", "size", "target")


def problems(config: Config) -> list[Problem]:
    """same, strong: every digit under every weight seed, one noise variance for all. equal: some digits, under one weight
    seed each, in rotation, and each with the variance that makes `target` its expected MSE.

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
    """How unequal: mean and percentiles of the measured, the predicted and the expected MSE in each part."""

    def row(rows: pd.DataFrame, name: str) -> dict[str, float]:
        low, middle, high = np.nanpercentile(rows[name], [10, 50, 90])
        return {
            "images": len(rows),
            "mean": rows[name].mean(),
            "least": rows[name].min(),
            "10%": low,
            "50%": middle,
            "90%": high,
            "largest": rows[name].max(),
            "90% / 10%": high / low,
            "converged": rows.converged.mean() if name == "mse" else math.nan,
        }

    names = {"measured": "mse", "predicted, I²F": "predicted_mse", "expected, E[I²]": "expected_mse"}
    parts = table.groupby("part", sort=False)
    rows = {(part, words): row(rows, name) for part, rows in parts for words, name in names.items()}
    return pd.DataFrame(rows).T.astype({"images": int})


def spread(table: pd.DataFrame, name: str = "mse") -> float:
    """The 90th over the 10th percentile of a column."""
    low, high = np.nanpercentile(table[name], [10, 90])
    return float(high / low)


def class_effect(table: pd.DataFrame, name: str = "mse") -> tuple[float, float]:
    """Kruskal and Wallis' H and p: are the ranks of `name` the same in every class? (NaN, 1) for a single class."""
    if table.label.nunique() < 2:
        return math.nan, 1.0
    found = kruskal(*(rows[name] for _, rows in table.groupby("label")))
    return float(found.statistic), float(found.pvalue)


def explained(table: pd.DataFrame, causes: Sequence[str]) -> float:
    """Adjusted R² of log MSE on the causes: `label` as a class, any other column as its logarithm.

    NaN where there are no more different images than coefficients, as among copies of a few.
    """
    columns = [
        pd.get_dummies(table.label, drop_first=True).to_numpy(float)
        if cause == "label"
        else np.log(table[cause].to_numpy())
        for cause in causes
    ]
    A = np.column_stack([np.ones(len(table)), *columns])
    n, k = A.shape
    y = np.log(table.mse.to_numpy())
    if len(np.unique(y)) <= k:
        return math.nan
    left = y - A @ np.linalg.lstsq(A, y, rcond=None)[0]
    return float(1 - float(left @ left) / (n - k) / float(y.var(ddof=1)))


def cost(table: pd.DataFrame) -> pd.Series:
    """Σ σ_i² of noise equalised by E[I²], over that of one variance for all images with the same protection.

    With t_i = E[I²]/d_x at variance 1, equalised noise for a target T takes T · mean(1/t_i). One variance gives image i
    the error σ² t_i, so that a statistic of the errors is T where σ² = T / statistic(t_i).
    """
    t = (table.expected_mse / table.variance)[table.part == "same"]
    same = {"mean": t.mean(), "median": t.median(), "10th percentile": t.quantile(0.1), "smallest": t.min()}
    return pd.Series({f"the {name} error": value * (1 / t).mean() for name, value in same.items()})


def judge(tables: Tables, thresholds: Thresholds, dataset: str) -> list[Claim]:
    """The experiment's claims.

    Claims about images are judged a second time on those that the network does not answer with their own class:
    an untrained network gives one answer to everything, and the images of that class, whose gradients are tiny, are so
    well protected that they alone could decide. (That condition was chosen after a look.)
    """
    table = tables["problems"]
    same, strong, equal = (shared.scored(table[table.part == part]) for part in ("same", "strong", "equal"))
    both = table[table.image.isin(table.image[table.part == "equal"]) & (table.part != "strong")]
    compared = shared.scored(both)
    compared = compared[compared.image.isin(same.image) & compared.image.isin(equal.image)]
    judged = Judge.of("fairness", f"fairness-{dataset}", thresholds)

    def words(rows: pd.DataFrame, attacks: pd.DataFrame) -> dict[str, Any]:
        return {"variance": rows.variance.iloc[0], "converged": convergence(attacks)}

    def explains(name: str, rows: pd.DataFrame, cause: str) -> Claim:
        others, by_class = _others(rows), explained(rows, ["label"])
        return judged(
            name,
            rows,
            partial(explained, causes=[cause]),
            others if others.image.nunique() > 2 else None,
            by_class=f"; the class alone explains {by_class:.2f}" if math.isfinite(by_class) else "",
            **words(rows, table[table.part == rows.part.iloc[0]]),
        )

    return [
        judged("samples", same, spread, _others(same), **words(same, table[table.part == "same"])),
        judged("classes", same, _class_p, interval=False, **_classes(same)),
        judged("classes-others", _others(same), _class_p, interval=False, **_classes(_others(same))),
        explains("explained", same, "predicted_mse"),
        explains("foretold", same, "expected_mse"),
        explains("explained-strong", strong, "predicted_mse"),
        judged("equalised", compared, narrowed, _others(compared), **words(same, both)),
    ]


def _others(rows: pd.DataFrame) -> pd.DataFrame:
    """The images that the network gets wrong, so that their gradients are large."""
    return rows[~rows.answered.astype(bool)]


def narrowed(table: pd.DataFrame) -> float:
    """The standard deviation of log MSE in part "equal" over that in "same", for the images of the table."""
    deviation = np.log(table.mse).groupby(table.part).std()
    return float(deviation["equal"] / deviation["same"]) if deviation.get("same", 0) > 0 else math.nan


def _class_p(table: pd.DataFrame) -> float:
    return class_effect(table)[1]


def _classes(table: pd.DataFrame) -> dict[str, Any]:
    """For the note of a claim about classes: H of the test, its degrees of freedom, the sizes of the classes."""
    sizes = table.groupby("label").size()
    return {"H": class_effect(table)[0], "freedom": len(sizes) - 1, "fewest": sizes.min(), "most": sizes.max()}
