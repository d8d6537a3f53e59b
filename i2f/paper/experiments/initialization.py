"""Does the draw of the weights decide what a gradient gives away? One prediction, several attackers, many draws."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from i2f.core import spectrum
from i2f.paper import claims, sweep
from i2f.paper.experiments import problems as shared
from i2f.paper.sweep import Problem, Row

ATTACKERS: dict[str, dict[str, Any]] = {  # name in the tables -> the attack, see `problems.attack`
    "gauss-newton": {"method": "gauss-newton"},
    "gauss-newton, box": {"method": "gauss-newton", "box": True},
    "dgl": {"method": "dgl"},
}
NETWORK = ("dataset", "init", "weight_seed")


def problems(
    dataset: str,
    inits: Sequence[str],
    unattacked: Sequence[str],
    weight_seeds: int,
    images: int,
    variances: Sequence[float],
    noise_seeds: int,
    steps: dict[str, int],
    box_seeds: int = 0,
) -> list[Problem]:
    """Gaussian noise of every variance on every network's gradients, for every attacker that has `steps`.

    Weight seeds are 1, …, `weight_seeds`. unattacked: initialisations for which only the prediction is wanted (attacker
    "none"). box_seeds: the bounded attacker, slower, sees the first so many weight seeds and the first variance.
    """
    found = []
    for init, weight_seed in ((i, s) for i in (*inits, *unattacked) for s in range(1, weight_seeds + 1)):
        for attacker in ["none"] if init in unattacked else steps:
            bounded = attacker == "gauss-newton, box"
            if bounded and weight_seed > box_seeds:
                continue
            found += sweep.grid(
                dataset=dataset, init=init, weight_seed=weight_seed, attacker=attacker, image=range(images),
                noise="gaussian", size=list(variances)[: 1 if bounded else None], noise_seed=range(noise_seeds),
                **({"steps": steps[attacker], **ATTACKERS[attacker]} if attacker != "none" else {}),
            )  # fmt: skip
    return found


def attack(problem_list: list[Problem], jobs: int | None = None) -> pd.DataFrame:
    """A row a problem: `problems.predict`'s columns, mean_inverse_sigma, and `problems.attack`'s.

    expected_mse = E[I²]/d_x = σ² mean(1/λ_i), per pixel. mean_inverse_sigma = mean(1/√λ_i): what the released code
    averages in its place (1/σ_i of J instead of 1/σ_i²); pixels per unit of gradient.
    """
    table = sweep.run(
        _solve, problem_list, together=NETWORK, at_most=len(problem_list), jobs=jobs, description="networks"
    )
    return table.drop(columns=["box", "noise"], errors="ignore")


def _solve(chunk: list[Problem]) -> list[Row]:
    """All problems of one network: what is known of its J is computed once an image."""
    predicted: dict[tuple, Row] = {}
    for p in sorted(chunk, key=lambda p: p["image"]):
        key = (p["image"], p["size"], p["noise_seed"])
        if key not in predicted:
            values = spectrum.decompose(shared.jacobian(p)).values
            predicted[key] = {**shared.predict([p])[0], "mean_inverse_sigma": float(values.rsqrt().mean())}
    attacked = [p for p in chunk if p["attacker"] != "none"]
    found = iter(shared.attack(attacked))
    return [
        {**predicted[p["image"], p["size"], p["noise_seed"]], **(next(found) if p["attacker"] != "none" else {})}
        for p in chunk
    ]


def medians(table: pd.DataFrame) -> pd.DataFrame:
    """Medians over draws: E[I²]/d_x, then every attacker's MSE per pixel, raw and clamped, by variance and draw."""
    by = ["size", "init"]
    attacked = table[table.attacker != "none"]
    errors = attacked.groupby([*by, "attacker"], sort=False)[["mse", "mse_clamped"]].median().unstack("attacker")
    errors.columns = [f"{attacker}, {'clamped' if 'clamped' in kind else 'raw'}" for kind, attacker in errors.columns]
    errors.insert(0, "E[I²]/dₓ", attacked.groupby(by, sort=False).expected_mse.median())
    return errors


def spectra(table: pd.DataFrame) -> pd.DataFrame:
    """Medians over draws of what J alone says of every initialisation: mean 1/λ, mean 1/√λ, λ_max, λ_min."""
    networks = table.assign(mean_inverse=table.expected_mse / table["size"])
    columns = {
        "mean_inverse": "mean 1/λ", "mean_inverse_sigma": "mean 1/√λ", "lambda_max": "λ_max", "lambda_min": "λ_min",
    }  # fmt: skip
    return networks.groupby("init", sort=False)[list(columns)].median().rename(columns=columns)


def wide(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """A row a weight seed: the median over images and noises of `column`, an initialisation a column after weight_seed.

    Small and of numbers alone, so that resampling weight seeds thousands of times is quick.
    """
    return rows.pivot_table(index="weight_seed", columns="init", values=column, aggfunc="median").reset_index()


def leader_share(seeds: pd.DataFrame, init: str = "uniform") -> float:
    """Share of weight seeds in which `init` has a lower value than every other initialisation: a tie is no lead."""
    values, at = seeds.to_numpy()[:, 1:], list(seeds.columns[1:]).index(init)
    return float((values[:, at] < np.delete(values, at, axis=1).min(axis=1)).mean())


def ratio(seeds: pd.DataFrame, over: str = "normal", under: str = "uniform") -> float:
    """Median over weight seeds for one initialisation over that for another."""
    return float(np.median(seeds[over].to_numpy()) / np.median(seeds[under].to_numpy()))


def order(seeds: pd.DataFrame) -> float:
    """Spearman's correlation over weight seeds and initialisations of what is measured with `expected`'s columns."""
    expected, measured = np.hsplit(seeds.to_numpy()[:, 1:], 2)
    return float(np.corrcoef(rankdata(expected), rankdata(measured))[0, 1])  # spearmanr, ten times as fast


def judge(
    table: pd.DataFrame, dataset: str, paper: float, small: float, share: float, correlation: float, accuracy: float,
    cut: float,
) -> list[claims.Claim]:  # fmt: skip
    """The claims, at the variance `paper` and once more at `small`; thresholds are the notebook's parameters.

    Bootstrap unit: weight seeds, each with all its initialisations.
    """
    table = table[table.attacker.isin(ATTACKERS)]
    table = shared.lost(table)
    free, adam = "gauss-newton: knows model and label, no box", "dgl, Adam: knows model and label, no box"
    views = [  # id, what is measured, attacker's rows, column, what the attacker knows
        ("gauss-newton", "MSE", "gauss-newton", "mse", free),
        ("gauss-newton-clamped", "clamped MSE", "gauss-newton", "mse_clamped", f"{free}; clamped afterwards"),
        ("dgl", "MSE", "dgl", "mse", adam),
        ("dgl-clamped", "clamped MSE", "dgl", "mse_clamped", f"{adam}; clamped afterwards"),
    ]
    expected = ("expected", "E[I²]", "gauss-newton", "expected_mse", "none: a prediction")
    released = ("released", "mean 1/√λ", "gauss-newton", "mean_inverse_sigma", "none: the released code's average")
    found: list[claims.Claim] = []

    def add(view: tuple, name: str, measure: Callable, statement: str, statistic: str, **bounds: float) -> None:
        rows = table[table.attacker == view[2]]
        frames = []
        for size in (paper, small):
            some = rows[np.isclose(rows["size"], size, rtol=1e-6, atol=0)]
            if name == "order":
                frames.append(wide(some, "expected_mse").merge(wide(some, view[3]), on="weight_seed"))
            else:
                frames.append(wide(some, view[3]))
        found.append(
            claims.judge(
                frames[0], measure, "weight_seed", **bounds, only=(f"the noise has variance {small:g}", frames[1]),
                id=f"initialization-{dataset}-{name}-{view[0]}", statement=f"{statement}: {view[1]}.",
                statistic=statistic.format(view[1]), source="the initialisation experiment", attacker=view[4],
                note=f"Gaussian noise of variance {paper:g}"
                + (f"; {claims.settled(rows)} at all variances" if view[3].startswith("mse") else ""),
            )
        )  # fmt: skip

    for view in (expected, *views):
        add(view, "riskiest", leader_share, "Uniform weights leak most",
            "share of weight seeds in which uniform has the lowest {}", at_least=share)  # fmt: skip
    for view in (expected, released):
        add(view, "normal", ratio, "Normal weights are expected to leak more than uniform ones",
            "ratio of the medians of the {}, normal / uniform", at_most=1.0)  # fmt: skip
    for view in views:
        add(view, "anomaly", ratio, "Normal weights leak less than uniform ones",
            "ratio of the medians of the {}, normal / uniform", at_least=1.0)  # fmt: skip
    for view in views:
        add(view, "order", order, "E[I²] orders initialisations and draws as the attack does",
            "Spearman correlation of the {} with E[I²]", at_least=correlation)  # fmt: skip
    perfect = table[table.attacker == "gauss-newton"].assign(error=shared.relative_error)
    note = f"all variances; {claims.settled(perfect)}"
    perfect = perfect[["weight_seed", "init", "size", "expected_mse", "error"]]
    found.append(
        claims.judge(
            perfect, lambda t: claims.worst(t, ["init", "size"], "error"), "weight_seed", at_most=accuracy,
            only=(f"the expected RMSE is at most {cut:g}", perfect[perfect.expected_mse <= cut**2]),
            id=f"initialization-{dataset}-prediction", source="section 4", attacker=free,
            statement="I²F predicts the error of the attack, whatever the initialisation.",
            statistic="median relative error of the predicted RMSE, at the worst initialisation and variance",
            note=note,
        )
    )  # fmt: skip
    return found
