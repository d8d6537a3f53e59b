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
from i2f.paper.statistics import worst
from i2f.paper.sweep import Problem, Row, Settings

ESTIMATES = ("I_lb", "I²F")
ATTACKS = tuple(name for name in METHODS if name != "idlg")  # once its label is read, idlg is dgl
DEEP = ("I_lb", "gauss-newton", "dgl")  # what is asked of a network whose J is too large to form
ENDLESS = 1e-9  # the inverse of the ratio that an attack which never arrives might have


def problems(config: Config) -> list[Problem]:
    """Every estimate and every attack on every image of every network; of the `deep` ones `DEEP` alone.

    config: dataset, images; networks, deep: "lenet uniform", "resnet20 default gelu" (model, initialisation, activation
    where it is not the network's own), deep those whose J is too large to form; variance of the noise that the
    estimates are for; steps, deep_steps: method -> budget; goal: the MSE at which an attack has arrived.
    """
    found = []
    for network in (*config["deep"], *config["networks"]):
        deep = network in config["deep"]
        methods, steps = (DEEP, config["deep_steps"]) if deep else ((*ESTIMATES, *ATTACKS), config["steps"])
        axes = {"dataset": config["dataset"], "network": network, "image": range(config["images"]), "method": methods}
        for problem in sweep.grid(**axes, size=config["variance"], goal=config["goal"]):
            found.append({**problem, "steps": steps.get(problem["method"])})
    return found


def run(problems: list[Problem], settings: Settings = sweep.DEFAULT) -> Results:
    """One row per problem. evaluations: the cost of the estimate, or of an attack (no noise) until its best iterate by
    its own objective is within an MSE of `goal`. reached: False where it never was (the budget ended first, or the
    attack failed), so that the cost is a lower limit."""
    table = sweep.run(_solve, problems, settings, ("dataset", "network", "image"), at_most=4, description="costs")
    return Results({"problems": table.drop(columns=["goal", "steps", "reason"])})


def _solve(chunk: list[Problem]) -> list[Row]:
    return [_estimate(p) if p["method"] in ESTIMATES else _attack(p) for p in chunk]


def _jacobian(problem: Problem) -> GradientJacobian:
    model, init, *activation = problem["network"].split()
    setting = {"dataset": problem["dataset"], "image": problem["image"], "model": model, "init": init}
    if activation:
        setting |= {"activation": activation[0], "normalize": True}
    return shared.jacobian(setting)


def _estimate(problem: Problem) -> Row:
    known = _jacobian(problem)
    # an operator of its own, with nothing formed yet: every product is counted
    J = GradientJacobian(known.map.model, known.x, known.map.y)
    delta = shared.perturbation(J, {"noise": "gaussian", "size": problem["size"]})
    found = lower_bound(J, delta) if problem["method"] == "I_lb" else influence(J, delta)
    return {"evaluations": found.products, "reached": True, "d_x": J.shape[0], "d_theta": J.shape[1]}


def _attack(problem: Problem) -> Row:
    J, method = _jacobian(problem), problem["method"]
    best, first = math.inf, 0

    def follow(at: Iterate) -> None:
        nonlocal best, first
        if at.loss <= best:
            best = at.loss
            if not first and float(metrics.mse(at.x, J.x)) <= problem["goal"]:
                first = at.evaluations

    y = None if method == "dlg" else J.map.y
    found = invert(J.map.model, J.gradient, y, J.x.shape, method=method, steps=problem["steps"], callback=follow)
    return {
        "evaluations": first or found.evaluations,
        "reached": first > 0,
        "d_x": J.shape[0],
        "d_theta": J.shape[1],
        "failed": found.failed,
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
