"""What an answer costs: gradient evaluations of I_lb, of exact I²F and of each attack.

One ∇_θ L and one product with J or Jᵀ count one each, so that cost is the same on every machine: I_lb needs a Lanczos
run (two products a step) and one Jδ; exact I²F forms J, d_x products; an attack spends what
`Reconstruction.evaluations` says. Where J is too large to form, exact I²F is not asked for, and two attacks stand for
all.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd

from i2f.attacks import METHODS, Iterate, invert
from i2f.core import metrics
from i2f.core.influence import influence, lower_bound
from i2f.core.jacobian import GradientJacobian
from i2f.paper import claims, sweep
from i2f.paper.experiments import problems as shared
from i2f.paper.sweep import Problem, Row

ESTIMATES = ("I_lb", "I²F")
ATTACKS = tuple(name for name in METHODS if name != "idlg")  # once its label is read, idlg is dgl

DEEP = ("I_lb", "gauss-newton", "dgl")  # what is asked of a network whose J is too large to form
ENDLESS = 1e-9  # the inverse of the ratio that an attack which never arrives might have


def problems(
    dataset: str, images: int, networks: list[str], variance: float, deep: Sequence[str] = ()
) -> list[Problem]:
    """Every estimate and every attack on every image of every network ("lenet uniform", "resnet20 default gelu": model,
    initialisation, activation where it is not the network's own); of the `deep` ones `DEEP` alone."""
    return [
        {"dataset": dataset, "network": network, "image": image, "method": method, "size": variance}
        for network in (*deep, *networks)
        for image in range(images)
        for method in (DEEP if network in deep else (*ESTIMATES, *ATTACKS))
    ]


def measure(
    tasks: list[Problem], steps: dict[str, int], goal: float, deep_steps: dict[str, int] | None = None, seed: int = 0,
    jobs: int | None = None,
) -> pd.DataFrame:  # fmt: skip
    """A row each: `evaluations`, the cost of the estimate, or of an attack (no noise) until its best iterate by its own
    objective is within an MSE of `goal`; `reached`: False where it never was (the budget `steps` ended first, or the
    attack failed), so that the cost is a lower limit. `deep_steps`: the budget where J is too large to form."""
    solve = partial(_solve, steps, deep_steps or steps, goal, seed)
    table = sweep.run(solve, tasks, together=("dataset", "network", "image"), at_most=4, jobs=jobs, description="costs")
    return table.drop(columns="reason")


def _solve(
    steps: dict[str, int], deep_steps: dict[str, int], goal: float, seed: int, chunk: list[Problem]
) -> list[Row]:
    return [_cost(p, steps, deep_steps, goal, seed) for p in chunk]


def _cost(problem: Problem, steps: dict[str, int], deep_steps: dict[str, int], goal: float, seed: int) -> Row:
    model, init, *activation = problem["network"].split()
    setting = {"dataset": problem["dataset"], "image": problem["image"], "model": model, "init": init}
    if activation:
        setting |= {"activation": activation[0], "normalize": True}
    known = shared.jacobian(setting)
    method = problem["method"]
    if method in ESTIMATES:
        # an operator of its own, with nothing formed yet: every product is counted
        J = GradientJacobian(known.map.model, known.x, known.map.y)
        delta = shared.perturbation(J, {"noise": "gaussian", "size": problem["size"]})
        found = lower_bound(J, delta) if method == "I_lb" else influence(J, delta)
        return {"evaluations": found.products, "reached": True, "d_x": J.shape[0], "d_theta": J.shape[1]}
    best, first = [math.inf], [0]

    def follow(at: Iterate) -> None:
        if at.loss <= best[0]:
            best[0] = at.loss
            if not first[0] and float(metrics.mse(at.x, known.x)) <= goal:
                first[0] = at.evaluations

    y = None if method == "dlg" else known.map.y
    budget = steps if known.is_dense else deep_steps
    found = invert(
        known.map.model, known.gradient, y, known.x.shape, method=method, steps=budget[method], seed=seed,
        callback=follow,
    )  # fmt: skip
    return {
        "evaluations": first[0] or found.evaluations,
        "reached": first[0] > 0,
        "d_x": known.shape[0],
        "d_theta": known.shape[1],
        "failed": found.failed,
    }


def compare(table: pd.DataFrame) -> pd.DataFrame:
    """(network, image, method) with `ratio`: an attack's evaluations over those of I_lb on the same problem."""
    key = ["dataset", "network", "image"]
    bound = table[table.method == "I_lb"].set_index(key).evaluations
    exact = table[table.method == "I²F"].set_index(key).evaluations
    attacks = table[~table.method.isin(ESTIMATES)].copy()
    where = pd.MultiIndex.from_frame(attacks[key])
    return attacks.assign(
        over_bound=attacks.evaluations / bound.reindex(where).to_numpy(),
        over_exact=attacks.evaluations / exact.reindex(where).to_numpy(),
    )


def _least(table: pd.DataFrame) -> float:
    """The smallest of the networks' median ratios, from their inverses."""
    return 1 / claims.worst(table, "network", "inverse")


def judge(table: pd.DataFrame, dataset: str, cheaper: float, products: float) -> list[claims.Claim]:
    """The experiment's claims; `cheaper`: how many times, `products`: at most how many for I_lb."""
    ratios = compare(table)
    common: dict[str, Any] = {"source": "the abstract and the efficiency experiment", "unit": "image"}
    found = [
        claims.judge(
            table[table.method == "I_lb"], lambda t: float(t.evaluations.to_numpy().max()), at_most=products, **common,
            id=f"efficiency-{dataset}-products",
            statement="I_lb needs only a few dozen products with the Jacobian.",
            attacker="none: an estimate",
            statistic="most products on any network and image",
        )
    ]  # fmt: skip
    for method, rows in ratios.groupby("method", sort=False):
        knows = "reads no label, optimises it" if method == "dlg" else "knows the label"
        for name, column, least, statement, over in (
            ("bound", "over_bound", cheaper, f"I_lb costs at most 1/{cheaper:g} of the attack: {method}.", "I_lb"),
            ("exact", "over_exact", 1.0, f"Exact I²F costs less than the attack: {method}.", "exact I²F"),
        ):
            inverse = rows.assign(inverse=1 / rows[column])[["image", "network", "inverse", "reached"]].dropna()
            if not len(inverse):
                continue  # exact I²F was asked of no network
            arrived = inverse.groupby("network", sort=False).reached.mean()
            note = "arrived: " + ", ".join(f"{name} {share:.0%}" for name, share in arrived.items())
            measured = partial(
                claims.judge, measure=_least, at_least=least, **common,
                id=f"efficiency-{dataset}-{name}-{method}", statement=statement,
                attacker=f"{method}: {knows}, no noise", note=note,
                statistic=f"median ratio of gradient evaluations, attack over {over}, at the worst network; where "
                "an attack does not arrive its budget counts, a lower limit",
            )  # fmt: skip
            claim = measured(inverse)
            endless = inverse.assign(inverse=inverse.inverse.where(inverse.reached, ENDLESS))
            if claim.verdict == "fails" and measured(endless).verdict != "fails":
                claim = replace(claim, verdict="inconclusive", note=f"{note}; a larger budget might do")
            found.append(claim)
    return found
