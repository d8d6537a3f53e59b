"""Does the draw of the weights decide what a gradient gives away? One prediction, several attackers, many draws."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd

from i2f.core import spectrum
from i2f.paper import attackers, sweep
from i2f.paper.attackers import ATTACKERS
from i2f.paper.claims import Claim, Judge
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.rows import declare
from i2f.paper.statistics import convergence, spearman, worst
from i2f.paper.sweep import Problem, Row, Settings

DROPPED = ("dataset", "split", "noise", "noise_seed", "box", "budget", "start_seed", "reconstruction")
ATTACK = ("method", "box", "budget", "start_seed")  # what is not of the noisy gradient
NONE = "none"  # the attacker of a gradient that is only looked at


def problems(config: Config) -> list[Problem]:
    """Gaussian noise of every variance on the gradients of every network, for every attacker.

    config: digits of MNIST's train split from first_digit on, under each of weight_seeds (1, 2, …); inits, and
    unattacked, of which only the prediction is wanted (attacker "none"); variances; gauss_newton_steps, adam_steps: the
    attackers' budgets.
    """
    pairs = shared.rotated(config["first_digit"], config["digits"], config["weight_seeds"], crossed=True)
    budgets = {"gauss-newton": config["gauss_newton_steps"], "dgl": config["adam_steps"]}
    meets = [(attacker, init) for attacker in budgets for init in config["inits"]]
    meets += [(NONE, init) for init in config["unattacked"]]
    found = []
    for (attacker, init), (image, weight_seed), size in itertools.product(meets, pairs, config["variances"]):
        problem = {"dataset": "mnist", "split": "train", "init": init, "weight_seed": weight_seed, "image": image}
        # the noise is scaled from variance to variance, so that the variance alone differs
        problem |= {"noise": "gaussian", "size": size, "noise_seed": 1000 * weight_seed + image, "attacker": attacker}
        if attacker != NONE:
            problem |= {**ATTACKERS[attacker].options, "budget": budgets[attacker], "start_seed": image}
        found.append(problem)
    return found


def run(problems: list[Problem], settings: Settings = sweep.DEFAULT) -> Results:
    """One row per problem: `problems.predict`'s columns, and `problems.attack`'s where there is an attacker."""
    gradients = [{name: p[name] for name in p if name not in (*ATTACK, "attacker")} for p in problems]
    network = ("init", "weight_seed", "image")
    table = sweep.run(shared.predict, gradients, settings, network, at_most=4, description="predictions")
    table = table.assign(attacker=[p["attacker"] for p in problems]).drop(columns=["failed", "reason"], errors="ignore")
    found = []
    for attacker, together, at_most in (
        ("gauss-newton", network, 2),
        ("dgl", ("init", "weight_seed"), 10),  # of one network
    ):
        some = [k for k, p in enumerate(problems) if p["attacker"] == attacker]
        if some:
            attacks = sweep.run(
                shared.attack, [problems[k] for k in some], settings, together, at_most, description=attacker
            )
            found.append(attacks.set_index(pd.Index(some)))
    own = pd.concat(found)
    own = own[[name for name in own if name not in table]]
    return Results({"problems": table.join(own).drop(columns=list(DROPPED), errors="ignore")})


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
        "mean_inverse": "mean 1/λ",
        "mean_inverse_sigma": "mean 1/√λ",
        "lambda_max": "λ_max",
        "lambda_min": "λ_min",
    }
    return networks.groupby("init", sort=False)[list(columns)].median().rename(columns=columns)


def wide(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """One row per weight seed: the median over images and noises of `column`, one column per initialisation.

    A small table of numbers, so that resampling weight seeds thousands of times is quick.
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
    return float(spearman(expected.ravel(), measured.ravel()))


class View(NamedTuple):
    """A value that orders initialisations. name: in ids. measured: the value in words. attacker: the rows that hold it.
    column: of the table. knows: what the attacker of the claim knows."""

    name: str
    measured: str
    attacker: str
    column: str
    knows: str


EXPECTED = View("expected", "E[I²]", "gauss-newton", "expected_mse", "none: a prediction")
RELEASED = View("released", "mean 1/√λ", "gauss-newton", "mean_inverse_sigma", "none: the released code's average")
MEASURED = [
    View(f"{name}{suffix}", f"{clamped}MSE", name, column, attackers.knows(name) + after)
    for name in ("gauss-newton", "dgl")
    for suffix, clamped, column, after in (
        ("", "", "mse", ""),
        ("-clamped", "clamped ", "mse_clamped", "; clamped afterwards"),
    )
]
COMPARISONS: list[tuple[str, Callable[[pd.DataFrame], float], list[View]]] = [
    ("riskiest", leader_share, [EXPECTED, *MEASURED]),
    ("normal", ratio, [EXPECTED, RELEASED]),
    ("anomaly", ratio, MEASURED),
    ("order", order, MEASURED),
]


def judge(tables: Tables, thresholds: Config, dataset: str) -> list[Claim]:
    """The claims, at the first of `variances`, the paper's, and once more at the last.

    Bootstrap unit: weight seeds, each with all its initialisations.
    """
    sizes = {"paper": thresholds["variances"][0], "small": thresholds["variances"][-1]}
    table = tables["problems"]
    table = shared.lost(table[table.attacker != "none"])
    judged = Judge.of("initialization", f"initialization-{dataset}", {**thresholds, **sizes})
    found = []
    for name, measure, views in COMPARISONS:
        for view in views:
            rows = table[table.attacker == view.attacker]
            columns = ["expected_mse", view.column] if name == "order" else [view.column]
            paper, small = (_at(rows, size, columns) for size in sizes.values())
            found.append(
                judged(
                    name,
                    paper,
                    measure,
                    small,
                    suffix=f"-{view.name}",
                    attacker=view.knows,
                    measured=view.measured,
                    converged=f"; {convergence(rows)} at all variances" if view in MEASURED else "",
                )
            )
    perfect = table[table.attacker == "gauss-newton"]
    perfect = perfect.assign(error=shared.relative_error(perfect))
    linear = perfect[perfect.expected_mse <= thresholds["cut"] ** 2]
    by_noise = partial(worst, by=["init", "size"], column="error")
    used = ["weight_seed", "init", "size", "expected_mse", "error"]
    converged = convergence(perfect)
    return [*found, judged("prediction", perfect[used], by_noise, linear[used], converged=converged)]


def _at(rows: pd.DataFrame, size: float, columns: list[str]) -> pd.DataFrame:
    """`wide` of the columns, side by side, for the noise of variance `size`."""
    rows = rows[np.isclose(rows["size"], size, rtol=1e-6, atol=0)]
    first, *others = (wide(rows, column) for column in columns)
    for other in others:
        first = first.merge(other, on="weight_seed")
    return first
