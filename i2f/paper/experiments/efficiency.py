"""What an answer costs: gradient evaluations of I_lb, of exact I²F and of each attack.

One ∇_θ L and one product with J or Jᵀ count one each, so that cost is the same on every machine: I_lb needs a Lanczos
run (two products a step) and one Jδ; exact I²F forms J, d_x products; an attack spends what
`Reconstruction.evaluations` says. Where J is too large to form, exact I²F is not asked for, and two attacks stand for
all.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pandas as pd

from i2f.attacks import METHODS, Iterate, invert
from i2f.core import metrics
from i2f.core.influence import influence, lower_bound
from i2f.core.jacobian import GradientJacobian
from i2f.paper import sweep
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.rows import declare
from i2f.paper.statistics import worst
from i2f.paper.sweep import Problem, Row, Settings

ESTIMATES = ("I_lb", "I²F")
ATTACKS = tuple(name for name in METHODS if name != "idlg")  # once its label is read, idlg is dgl
DEEP = ("I_lb", "gauss-newton", "dgl")  # what is asked of a network whose J is too large to form
BUDGETS = {"gauss-newton": "gauss_newton_steps", "dlg": "lbfgs_steps", "dgl": "adam_steps", "gs": "adam_steps"}
TABLE = ["dataset", "network", "image", "method", "size", "failed", "evaluations", "reached", "d_x", "d_theta"]
ENDLESS = 1e-9  # the inverse of the ratio that an attack which never arrives might have


def problems(config: Config) -> list[Problem]:
    """Every estimate and every attack on every image of every network; of the `deep` ones `DEEP` alone.

    config: dataset, images; networks, deep: "lenet uniform", "resnet20 default gelu" (model, initialisation, activation
    where it is not the network's own), deep those whose J is too large to form; variance of the noise that the
    estimates are for; gauss_newton_steps, adam_steps, lbfgs_steps, deep_gauss_newton_steps, deep_adam_steps: budgets;
    goal: the MSE at which an attack has arrived.
    """
    found = []
    for network in (*config["deep"], *config["networks"]):
        deep = network in config["deep"]
        prefix, methods = ("deep_", DEEP) if deep else ("", (*ESTIMATES, *ATTACKS))
        axes = {"dataset": config["dataset"], "network": network, **_words(network)}
        for problem in sweep.grid(**axes, image=range(config["images"]), method=methods):
            if problem["method"] in ESTIMATES:
                own = {"noise": "gaussian", "size": config["variance"]}
            else:
                own = {"goal": config["goal"], "budget": config[prefix + BUDGETS[problem["method"]]]}
            found.append(problem | own)
    return found


def _words(network: str) -> Problem:
    model, init, *activation = network.split()
    own = {"activation": activation[0], "normalize": True} if activation else {}
    return {"model": model, "init": init, **own}


def run(problems: list[Problem], settings: Settings = sweep.DEFAULT) -> Results:
    """One row per problem. evaluations: the cost of the estimate, or of an attack (no noise) until its best iterate by
    its own objective is within an MSE of `goal`. reached: False where it never was (the budget ended first, or the
    attack failed), so that the cost is a lower limit."""
    table = sweep.run(solve, problems, settings, ("dataset", "network", "image"), at_most=4, description="costs")
    return Results({"problems": table.assign(reached=table.arrived.notna())[TABLE]})


@declare("problems", defaults=shared.DEFAULTS, kinds={"arrived": "cost", "evaluations": "diagnostic"})
def solve(chunk: list[Problem]) -> list[Row]:
    """arrived: the evaluations that it took, None where an attack never arrived; then `evaluations`, what it spent, is
    left to rounding: L-BFGS ends between 400 and 800 on one problem."""
    return [_estimate(p) if p["method"] in ESTIMATES else _attack(p) for p in chunk]


def _estimate(problem: Problem) -> Row:
    known = shared.jacobian(problem)
    # an operator of its own, with nothing formed yet: every product is counted
    J = GradientJacobian(known.map.model, known.x, known.map.y)
    delta = shared.perturbation(J, problem)
    found = lower_bound(J, delta) if problem["method"] == "I_lb" else influence(J, delta)
    return {
        "evaluations": found.products,
        "arrived": found.products,
        "d_x": J.shape[0],
        "d_theta": J.shape[1],
    }


def _attack(problem: Problem) -> Row:
    J, method = shared.jacobian(problem), problem["method"]
    best, first = math.inf, 0

    def follow(at: Iterate) -> None:
        nonlocal best, first
        if at.loss <= best:
            best = at.loss
            if not first and float(metrics.mse(at.x, J.x)) <= problem["goal"]:
                first = at.evaluations

    y = None if method == "dlg" else J.map.y
    found = invert(J.map.model, J.gradient, y, J.x.shape, method=method, steps=problem["budget"], callback=follow)
    return {
        "evaluations": first or found.evaluations,
        "arrived": first or None,
        "d_x": J.shape[0],
        "d_theta": J.shape[1],
        "failed": found.failed,
        "reason": found.reason,
    }


def compare(table: pd.DataFrame) -> pd.DataFrame:
    """The attacks' rows, with over_bound and over_exact: evaluations over those of I_lb and I²F on the same problem."""
    key = ["dataset", "network", "image"]
    bound = table[table.method == "I_lb"].set_index(key).evaluations
    exact = table[table.method == "I²F"].set_index(key).evaluations
    attacks = table[~table.method.isin(ESTIMATES)].copy()
    where = pd.MultiIndex.from_frame(attacks[key])
    return attacks.assign(
        over_bound=attacks.evaluations / bound.reindex(where).to_numpy(),
        over_exact=attacks.evaluations / exact.reindex(where).to_numpy(),
    )


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Median gradient evaluations, one row per method and one column per network; "≥" where an attack did not arrive on
    every image, "–" where a method was not tried."""
    groups = table.groupby(["method", "network"])
    text = groups.evaluations.median().map("{:,.0f}".format)
    text = text.where(groups.reached.min().astype(bool), "≥ " + text).unstack()
    order = [method for method in (*ESTIMATES, *ATTACKS) if method in text.index]
    return text.loc[order, table.network.unique()].fillna("–")


def judge(tables: Tables, thresholds: Thresholds, dataset: str) -> list[Claim]:
    """The experiment's claims. Of the thresholds, `cheaper` is how many times as cheap as an attack I_lb is, `products`
    how many it needs at most."""
    table = tables["problems"]
    judged = Judge.of("efficiency", f"efficiency-{dataset}", thresholds)
    bound = table[table.method == "I_lb"]
    found = [judged("products", bound, lambda t: float(t.evaluations.to_numpy().max()))]
    for method, rows in compare(table).groupby("method", sort=False):
        found += _comparisons(judged, method, rows)
    return found


def _comparisons(judged: Judge, method: str, rows: pd.DataFrame) -> Iterator[Claim]:
    """One attack over I_lb, and over exact I²F where that was asked for."""
    told = "reads no label, optimises it" if method == "dlg" else "knows the label"
    for name in ("bound", "exact"):
        inverse = rows.assign(inverse=1 / rows[f"over_{name}"])[["image", "network", "inverse", "reached"]].dropna()
        if not len(inverse):
            continue
        arrived = inverse.groupby("network", sort=False).reached.mean()
        shares = ", ".join(f"{network} {share:.0%}" for network, share in arrived.items())
        claim_on = partial(judged, name, measure=_least, suffix=f"-{method}", method=method, told=told, arrived=shares)
        claim = claim_on(inverse)
        endless = inverse.assign(inverse=inverse.inverse.where(inverse.reached, ENDLESS))
        if claim.verdict == "fails" and claim_on(endless).verdict != "fails":
            claim = replace(claim, verdict="inconclusive", note=f"{claim.note}; a larger budget might do")
        yield claim


def _least(table: pd.DataFrame) -> float:
    """The smallest of the networks' median ratios, from their inverses."""
    return 1 / worst(table, "network", "inverse")
