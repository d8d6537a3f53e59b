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

from i2f.core.influence import expected_square, influence
from i2f.paper import claims, sweep
from i2f.paper.experiments import problems as shared
from i2f.paper.sweep import Problem, Row

CAUSES = {  # what might explain an image's error -> columns of the table
    "class": ["label"],
    "E[I²], before any noise is drawn": ["expected_mse"],
    "I²F, for the noise drawn": ["predicted_mse"],
    "I²F and class": ["predicted_mse", "label"],
}


def problems(
    labels: Sequence[int], variance: float, strong_images: int, strong_variance: float, equal_images: int, target: float
) -> list[Problem]:
    """same: one small variance for all images, whose `labels` are given. strong: a larger one, for the first few.
    equal: for the first few again, each image's own variance, so that all have the expected MSE `target`."""
    parts = (("same", len(labels), "variance", variance), ("strong", strong_images, "variance", strong_variance),
             ("equal", equal_images, "target", target))  # fmt: skip
    return [
        {"part": part, "image": image, "label": labels[image], name: value}
        for part, images, name, value in parts
        for image in range(images)
    ]


def attack(
    problems: list[Problem], setting: dict[str, Any], steps: int, jobs: int | None = None
) -> tuple[pd.DataFrame, np.ndarray]:
    """Gauss–Newton on every problem. `setting`: data set and network, as in `experiments.problems`.

    Returns the table, a row an attack (`problems.attack`'s columns) with the image's `label`, whether the network
    `answered` with it, the `variance` of its noise, `expected_mse` = E[I²]/d_x, Eq. 4 for the noise drawn
    (`predicted_rmse`, `predicted_mse`), `lambda_min`; and the recovered images in its order, (rows, C, H, W), in [0,
    1]; NaN where an attack raised.
    """
    solve = partial(_solve, setting, steps)
    # attacks on images of one class start from the same Gram matrix
    table = sweep.run(solve, problems, together=("part", "label"), at_most=5, jobs=jobs, description="attacks")
    found = table.pop("picture")
    blank = np.full_like(found.dropna().iloc[0], np.nan)
    return table, np.stack([(picture if isinstance(picture, np.ndarray) else blank)[0] for picture in found])


def _solve(setting: dict[str, Any], steps: int, chunk: list[Problem]) -> list[Row]:
    rows, attacks = [], []
    for p in chunk:
        # every image has its own draw, the same in all parts, so that parts differ by its size alone
        own = {**setting, "image": p["image"], "noise": "gaussian", "noise_seed": p["image"], "steps": steps}
        J = shared.jacobian(own)
        unit = expected_square(J, 1.0) / J.shape[0]
        own["size"] = p["target"] / unit if "target" in p else p["variance"]
        predicted = influence(J, shared.perturbation(J, own)).rmse
        with torch.no_grad():
            answered = bool(J.map.model(J.x).argmax(1) == J.map.y)
        row = {
            "answered": answered,
            "variance": own["size"],
            "expected_mse": unit * own["size"],
            "predicted_mse": predicted**2,
            "predicted_rmse": predicted,
            "lambda_min": float(J.spectrum.values[-1]),
        }
        rows.append(row)
        attacks.append(own)
    return [row | found for row, found in zip(rows, shared.attack(attacks, keep=True), strict=True)]


def extremes(table: pd.DataFrame, part: str, count: int) -> pd.DataFrame:
    """The rows of the `count` least protected images (lowest measured MSE) and of the `count` best protected."""
    rows = table[(table.part == part) & ~table.failed].sort_values("mse")
    count = min(count, len(rows) // 2)
    return pd.concat([rows.iloc[:count], rows.iloc[len(rows) - count :]])


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """How unequal: mean and percentiles of the measured and of the predicted MSE in each part."""

    def row(rows: pd.DataFrame, name: str) -> dict[str, float]:
        percentiles = {f"{q}%": np.nanpercentile(rows[name], q) for q in (10, 50, 90)}
        return {
            "images": len(rows), "mean": rows[name].mean(), "least": rows[name].min(), **percentiles,
            "largest": rows[name].max(), "90% / 10%": spread(rows, name),
            "converged": rows.converged.mean() if name == "mse" else math.nan,
        }  # fmt: skip

    names = {"measured": "mse", "predicted, I²F": "predicted_mse", "expected, E[I²]": "expected_mse"}
    rows = {(part, words): row(rows, name) for part, rows in table.groupby("part", sort=False)
            for words, name in names.items()}  # fmt: skip
    return pd.DataFrame(rows).T.astype({"images": int})


def spread(table: pd.DataFrame, name: str = "mse") -> float:
    """The 90th over the 10th percentile of a column."""
    low, high = np.nanpercentile(table[name], [10, 90])
    return float(high / low)


def class_effect(table: pd.DataFrame, name: str = "mse") -> tuple[float, float]:
    """Kruskal and Wallis' H and p: are the ranks of `name` the same in every class?"""
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
    return 1 - float(left @ left) / (n - k) / float(y.var(ddof=1))


def cost(table: pd.DataFrame) -> pd.Series:
    """Σ σ_i² of noise equalised by E[I²], over that of one variance for all images with the same protection.

    With t_i = E[I²]/d_x at variance 1, equalised noise for a target T takes T · mean(1/t_i). One variance gives image i
    the error σ² t_i, so that a statistic of the errors is T where σ² = T / statistic(t_i).
    """
    t = (table.expected_mse / table.variance)[table.part == "same"]
    same = {"mean": t.mean(), "median": t.median(), "10th percentile": t.quantile(0.1), "smallest": t.min()}
    return pd.Series({f"the {name} error": value * (1 / t).mean() for name, value in same.items()})


def judge(
    table: pd.DataFrame, dataset: str, ratio: float, p_value: float, share: float, narrowing: float
) -> list[claims.Claim]:
    """The experiment's claims. The thresholds are the notebook's parameters.

    Claims about images are judged a second time on those that the network does not answer with their own class:
    an untrained network gives one answer to everything, and the images of that class, whose gradients are tiny, are so
    well protected that they alone could decide. (That condition was chosen after a look.)
    """
    same, strong, equal = (shared.scored(table[table.part == part]) for part in ("same", "strong", "equal"))
    both = table[table.image.isin(table.image[table.part == "equal"]) & (table.part != "strong")]
    compared = shared.scored(both)
    compared = compared[compared.image.isin(same.image) & compared.image.isin(equal.image)]
    common = {"source": "the unfairness experiment", "attacker": shared.PERFECT}

    def note(rows: pd.DataFrame) -> str:
        return f"variance {rows.variance.iloc[0]:g}; {claims.settled(table[table.part == rows.part.iloc[0]])}"

    def explains(rows: pd.DataFrame, cause: str, name: str, statement: str) -> claims.Claim:
        by_class, (condition, others) = explained(rows, ["label"]), _others(rows)
        return claims.judge(
            rows, lambda t: explained(t, [cause]), "image", at_least=share, **common,
            only=(condition, others) if others.image.nunique() > 2 else None,
            id=f"fairness-{dataset}-{name}", statement=statement,
            statistic="share of the variance of log MSE explained (adjusted R²)",
            note=note(rows) + (f"; the class alone explains {by_class:.2f}" if math.isfinite(by_class) else ""),
        )  # fmt: skip

    return [
        claims.judge(
            same, spread, "image", at_least=ratio, only=_others(same), **common, id=f"fairness-{dataset}-samples",
            statement=f"The same noise protects some images {ratio:g} times better than others.",
            statistic="90th over 10th percentile of the measured MSE", note=note(same),
        ),
        _classes(same, p_value, **common, id=f"fairness-{dataset}-classes",
                 statement="The same noise protects classes unequally."),
        _classes(_others(same)[1], p_value, **common, id=f"fairness-{dataset}-classes-others",
                 statement="The same noise protects classes unequally, also those that the network does not answer."),
        explains(same, "predicted_mse", "explained", "I²F explains whom small noise protects."),
        explains(same, "expected_mse", "foretold", "E[I²] tells whom small noise protects before any is drawn."),
        explains(strong, "predicted_mse", "explained-strong", "I²F explains whom the paper's noise protects."),
        claims.judge(
            compared, narrowed, "image", at_most=narrowing, only=_others(compared),
            **common, id=f"fairness-{dataset}-equalised",
            statement="Noise sized by E[I²] protects images more equally.",
            statistic="standard deviation of log MSE, each image's own variance over one variance for all",
            note=f"one variance: {same.variance.iloc[0]:g}; {claims.settled(both)}",
        ),
    ]  # fmt: skip


def _others(rows: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """Images that the network gets wrong, and so has much of a gradient for: a condition, and its rows."""
    return "the network does not answer with the image's class already", rows[~rows.answered.astype(bool)]


def narrowed(table: pd.DataFrame) -> float:
    """The standard deviation of log MSE in part "equal" over that in "same", for the images of the table."""
    deviation = np.log(table.mse).groupby(table.part).std()
    return float(deviation["equal"] / deviation["same"]) if deviation.get("same", 0) > 0 else math.nan


def _classes(same: pd.DataFrame, p_value: float, **words: str) -> claims.Claim:
    """Judged by the test itself: a p-value has no bootstrap interval, and a large one proves no equality."""
    H, p = class_effect(same) if same.label.nunique() > 1 else (math.nan, 1.0)
    sizes = same.groupby("label").size()
    return claims.Claim(
        statistic="p of Kruskal and Wallis' test of the measured MSE over classes",
        value=p, low=-math.inf, high=math.inf, n=same.image.nunique(), unit="image",
        holds_when=f"≤ {p_value:g}", verdict="holds" if p <= p_value else "inconclusive",
        note=f"H = {H:.3g} with {len(sizes) - 1} degrees of freedom, {sizes.min()} to {sizes.max()} images a class",
        **words,
    )  # fmt: skip
