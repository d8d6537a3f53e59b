"""What a defence costs to training: accuracy against privacy, when every image's gradient is defended by itself.

LeNet on the bundled digits; each step takes the mean of a batch's defended gradients (see `trainings.Method`). The
second table of the experiment on designed noise.
"""

import math
from functools import partial

import numpy as np
import pandas as pd
import torch

from i2f.attacks.prior import TAU
from i2f.audit import audit, clamped_square
from i2f.core import streams
from i2f.paper import sweep, trainings
from i2f.paper.claims import LEARNT, Claim, Judge, Thresholds
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.rows import declare
from i2f.paper.sweep import Problem, Row, Settings
from i2f.paper.trainings import FIELDS, Method, Training

OWN = (*FIELDS, "reference")  # of a problem, and no columns of the table
FIRST = 50  # digits whose median gradient norm is clipped to


def problems(config: Config) -> list[Problem]:
    """One training for every seed, method and value.

    config: dataset, init; seeds: how many, of which each draws its own weights, order of the digits and noise; methods:
    name -> values, of "dp" as multiples of the clipping norm, which is the median gradient norm at the start;
    reference: of how many digits an audit gives the privacy; and the fields of `trainings.Training`.
    """
    own = {name: config[name] for name in OWN}
    return [
        {**setting(config), "weight_seed": seed, "method": method, "value": float(value), "seed": seed, **own}
        for seed in range(1, config["seeds"] + 1)
        for method, values in config["methods"].items()
        for value in values
    ]


def setting(config: Config) -> Problem:
    """LeNet on pixels, which `trainings.start` builds."""
    return {**shared.setting(config), "model": "lenet", "normalize": False}


def run(problems: list[Problem], settings: Settings = sweep.DEFAULT) -> Results:
    """One row per training: accuracy on digits that were not trained on, and privacy (see `privacy`)."""
    table = sweep.run(solve, problems, settings, whole=True, description="trainings")
    return Results({"frontier": table.drop(columns=[*OWN])})


@declare("frontier", kinds={"accuracy": "unfinished"})  # a training spends its epochs, and rounding grows along the way
def solve(chunk: list[Problem]) -> list[Row]:
    return [{"privacy": privacy(p), "accuracy": accuracy(p)} for p in chunk]


def accuracy(problem: Problem) -> float:
    """Accuracy on held-out digits after one defended training."""
    training = Training.of(problem)
    model, x, y = trainings.start(problem, training.digits + training.held_out)
    noise = streams.generator("training noise", problem["seed"])
    method = Method(problem["method"], problem["value"], trainings.median_norm(model, x[:FIRST], y[:FIRST]))

    def gradients(_: int, chosen: torch.Tensor) -> list[torch.Tensor]:
        return trainings.defended(model, x[chosen], y[chosen], method, noise)

    return trainings.train(model, x, y, training, problem["seed"], gradients)


def privacy(problem: Problem) -> float:
    """The mean judged RMSE of audits of the first `reference` digits before any training; for designed noise, whose
    errors are all √c, in closed form."""
    model, x, y = trainings.start(problem, FIRST)
    clip, value = trainings.median_norm(model, x, y), problem["value"]
    x, y = x[: problem["reference"]], y[: problem["reference"]]
    if problem["method"] == "designed":
        deviation = torch.full((x[0].numel(),), value, dtype=torch.float64, device=x.device)
        boxed = [float(clamped_square(one.double().reshape(-1), deviation).mean()) ** 0.5 for one in x]
        prior = value * TAU / math.hypot(value, TAU)
        return float(np.mean([min(one, prior) for one in boxed]))
    defense = {
        "none": "none",
        "isotropic": f"gaussian:{value**2}",
        # to first order an attacker cannot use what lies outside the row space: noise in it leaves the same errors
        "row-space": f"gaussian:{value**2}",
        "dp": f"dp:{clip}:{value}",
        "prune": f"prune:{value}",
    }[problem["method"]]
    return float(np.mean([sample.judged for sample in audit(model.double(), x, y, defense, tau=TAU)]))


def judge(tables: Tables, thresholds: Thresholds, dataset: str, name: str = "designed") -> list[Claim]:
    """The claim about accuracy at equal privacy, its id beginning with `name`; none where one of the two noises was not
    trained with. It has no verdict where isotropic noise costs less than the `margin` that is to be gained."""
    table = tables["frontier"]
    if not {"isotropic", "designed"} <= set(table.method):
        return []
    plain = float(table[table.method == "none"].accuracy.mean())  # NaN where it was not trained
    cost = plain - float(_middle(table[table.method == "isotropic"]).accuracy)
    note = f"accuracy {plain:.3f} undefended, of which isotropic noise costs {cost:.3f} at this privacy"
    if plain < LEARNT:
        note = "the undefended network has learnt too little to compare"
    elif cost < thresholds["margin"]:
        note += ": there is less to gain than the threshold asks for"
    unknown = plain < LEARNT or cost < thresholds["margin"]
    gained = partial(advantage, ours="designed", other="isotropic")
    judged = Judge.of("frontier", f"{name}-{dataset}", thresholds)
    return [judged("utility", table, (lambda t: math.nan) if unknown else gained, note=note)]


def advantage(frontier: pd.DataFrame, ours: str, other: str) -> float:
    """The accuracy of `ours` minus that of `other`, at the privacy of other's middle value, by interpolation."""
    at, own = _middle(frontier[frontier.method == other]), _curve(frontier[frontier.method == ours])
    there = np.interp(at.privacy, own.privacy, own.accuracy, left=np.nan, right=np.nan)
    return float(there - at.accuracy)


def _curve(rows: pd.DataFrame) -> pd.DataFrame:
    """Privacy and accuracy, means over seeds, one row per value."""
    return rows.groupby("value")[["privacy", "accuracy"]].mean().sort_values("privacy")


def _middle(rows: pd.DataFrame) -> pd.Series:
    curve = _curve(rows)
    return curve.iloc[len(curve) // 2]
