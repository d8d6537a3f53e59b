"""What I_lb costs: gradient evaluations, against those of an attack that spends the published budget.

One ∇_θ L and one product with J or Jᵀ count one each, so that cost is the same on every machine. I_lb needs a Lanczos
run (two products a step) and one Jδ, whatever δ. A step of Adam needs the gradient and its derivative by the image,
which is one product with J: two evaluations. Exact I²F forms J, d_x products.
"""

import copy
import math
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pandas as pd
import torch
from torch import nn

from i2f.attacks import Iterate, invert
from i2f.core import metrics, perturb
from i2f.core.influence import influence, lower_bound
from i2f.core.jacobian import GradientJacobian
from i2f.paper import data, devices, estimates, sweep
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.rows import declare
from i2f.paper.sweep import Problem, Row, Settings
from i2f.text import corpus, language
from i2f.text.names import PACKAGE

BOUND, EXACT, ATTACK = "I_lb", "I²F", "gauss-newton"
TEXTS = "entailment"  # the data set of networks of texts
TOGETHER = ("dataset", "network", "weight_seed", "method")  # problems that share a network
A_STEP = 2  # evaluations of a step of Adam
NOTES = {"cifar10": "these images were looked at before"}
TABLE = ["dataset", "network", "image", "weight_seed", "method", "evaluations", "reached", "converged", "failed"]
TABLE += ["d_x", "d_theta"]


def problems(config: Config) -> list[Problem]:
    """I_lb on `images` images or texts of every network; exact I²F and Gauss–Newton on the first `followed` images of
    the first network. Each is under one of `weight_seeds`, in rotation.

    config: networks: "mnist lenet uniform", "entailment bert-base": data set, model, initialisation, the test split;
    goal: the MSE at which an attack has arrived; gauss_newton_steps: its budget.
    """
    found: list[Problem] = []
    for number, network in enumerate(config["networks"]):
        own = _network_of(network)
        for image, weight_seed in shared.rotated(0, config["images"], config["weight_seeds"]):
            problem = {**own, "network": network, "image": image, "weight_seed": weight_seed}
            found.append({**problem, "method": BOUND})
            if number == 0 and image < config["followed"]:
                attack = {"goal": config["goal"], "budget": config["gauss_newton_steps"], "start_seed": image}
                found += [{**problem, "method": EXACT}, {**problem, "method": ATTACK, **attack}]
    return found


def _network_of(name: str) -> Problem:
    """LeNet without normalisation and in float64, as everywhere; others in float32, as such networks run."""
    dataset, model, *init = name.split()
    if dataset == TEXTS:
        words = {"corpus": corpus.CHECKSUM[:16], "weights_version": _installed()}
        return {"dataset": dataset, "model": model, "init": "default", "dtype": "float32", **words}
    deep = model != "lenet"
    own = {"init": init[0], "normalize": deep, "dtype": "float32" if deep else "float64"}
    return {"dataset": dataset, "model": model, **own}


def _installed() -> str | None:
    """The version of the package with the networks' words; None where it is missing: no row is known."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None


def run(problems: list[Problem], settings: Settings = sweep.DEFAULT) -> Results:
    """One row per problem. evaluations: the cost of the estimate, or of an attack (no noise) until its best iterate by
    its own objective is within an MSE of `goal`. reached: False where it never was."""
    table = sweep.run(solve, problems, settings, TOGETHER, at_most=4, description="costs")
    return Results({"problems": table.assign(reached=table.arrived.notna())[TABLE]})


@declare("problems", defaults=shared.DEFAULTS, kinds={"arrived": "cost", "evaluations": "cost"})
def solve(chunk: list[Problem]) -> list[Row]:
    """arrived: the evaluations that it took, None where an attack never arrived."""
    return [_attack(p) if p["method"] == ATTACK else _estimate(p) for p in chunk]


def _estimate(problem: Problem) -> Row:
    J = _jacobian(problem)
    delta = perturb.gaussian(J.gradient, 1.0, seed=1000 * problem["weight_seed"] + problem["image"])
    found = lower_bound(J, delta) if problem["method"] == BOUND else influence(J, delta)
    return {
        "evaluations": found.products,
        "arrived": found.products,
        "converged": found.converged,
        "d_x": J.shape[0],
        "d_theta": J.shape[1],
    }


def _jacobian(problem: Problem) -> GradientJacobian:
    """J with nothing formed yet, so that every product is counted."""
    device, dtype = devices.current(), getattr(torch, problem["dtype"])
    model = _model(device, dtype, *(shared.value(problem, name) for name in shared.NETWORK))
    if isinstance(model, language.LanguageModel):
        pairs, y = corpus.load(n=1, offset=problem["image"])
        x = model.embed(language.encode(problem["model"], pairs)[0].to(device))
        return GradientJacobian(model, x, y.to(device), model.loss)
    x, y = data.load(problem["dataset"], n=1, offset=problem["image"])
    return GradientJacobian(model, x.to(device, dtype), y.to(device))


@lru_cache(maxsize=1)
def _model(device: torch.device, dtype: torch.dtype, *network: Any) -> nn.Module:
    named = dict(zip(shared.NETWORK, network, strict=True))
    if named["dataset"] == TEXTS:
        return language.build(named["model"], seed=named["weight_seed"]).to(device, dtype)
    return copy.deepcopy(shared.network(named)).to(dtype)  # the cached one stays as it is


def _attack(problem: Problem) -> Row:
    J, best, first = _jacobian(problem), math.inf, 0

    def follow(at: Iterate) -> None:
        nonlocal best, first
        if at.loss <= best:
            best = at.loss
            if not first and float(metrics.mse(at.x, J.x)) <= problem["goal"]:
                first = at.evaluations

    own = {"method": ATTACK, "steps": problem["budget"], "seed": problem["start_seed"], "callback": follow}
    found = invert(J.map.model, J.gradient, J.map.y, J.x.shape, **own)
    return {
        "evaluations": first or found.evaluations,
        "arrived": first or None,
        "converged": found.converged,
        "d_x": J.shape[0],
        "d_theta": J.shape[1],
        "failed": found.failed,
        "reason": found.reason,
    }


def attack_cost(steps: int) -> int:
    """Evaluations of a first-order attack of so many steps, which evaluates its objective at its last image too."""
    return A_STEP * steps + 1


def summary(table: pd.DataFrame, steps: int) -> pd.DataFrame:
    """One row per network: its size, the evaluations of I_lb, and the share that they are of an attack of so many
    steps."""
    networks = table[table.method == BOUND].groupby("network", sort=False)
    counts = networks.evaluations
    return pd.DataFrame(
        {
            "d_x": networks.d_x.first(),
            "d_θ": networks.d_theta.first(),
            "images or texts": networks.size(),
            "I_lb, median": counts.median(),
            "least": counts.min(),
            "most": counts.max(),
            "share of an attack": counts.median() / attack_cost(steps),
        }
    )


def judge(tables: Tables, thresholds: Thresholds) -> list[Claim]:
    """One claim per network. Of the thresholds, `cheaper` is the share of an attack's cost that I_lb may have."""
    judged, table = Judge.of("efficiency", "efficiency", thresholds), tables["problems"]
    found = []
    for network, rows in table[table.method == BOUND].groupby("network", sort=False):
        done = rows[rows.converged.eq(True)]
        ratios = estimates.geometric_mean(done.evaluations / attack_cost(thresholds["adam_steps"]))
        dataset, suffix = str(network).split()[0], f"-{network}".replace(" ", "-")
        about = {"network": network, "unit": "text" if dataset == TEXTS else "image", "note": NOTES.get(dataset, "")}
        found.append(judged("bound", ratios, len(done) / len(rows), suffix=suffix, **about))
    return found
