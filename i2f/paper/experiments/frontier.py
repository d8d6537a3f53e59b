"""What a defence costs to training: accuracy against privacy, when every image's gradient is defended by itself.

LeNet on the bundled digits; each step takes the mean of a batch's defended gradients (see `trainings.Method`). The
second table of the experiment on designed noise.
"""

import math
from typing import Any

import numpy as np
import pandas as pd
import torch

from i2f.attacks.prior import TAU
from i2f.audit import audit, clamped_square
from i2f.core import streams
from i2f.paper import estimates, sweep, trainings
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


def judge(tables: Tables, thresholds: Thresholds) -> list[Claim]:
    """The claim about accuracy at equal privacy, of which at least `margin` is to be gained; none where one of the two
    noises, or the undefended network, was not trained."""
    table = tables["frontier"]
    if not {"none", "isotropic", "designed"} <= set(table.method):
        return []
    seeds = compared(table)
    words: dict[str, Any] = {
        "value": f"{_middle(table):g}",
        "plain": f"{seeds.plain.mean():.3f}",
        "cost": f"{(seeds.plain - seeds.isotropic).mean():.3f}",
        "learnt": f"{seeds.comparable.sum()} of {len(seeds)}",
    }
    judged, gained = Judge.of("frontier", "designed", thresholds), estimates.mean(seeds.designed - seeds.isotropic)
    return [judged("utility", gained, seeds.comparable.mean(), **words)]


def compared(frontier: pd.DataFrame) -> pd.DataFrame:
    """One row per seed: privacy of the middle isotropic noise; the accuracy with it (isotropic), without a defence
    (plain), and with designed noise at that privacy, between its values by interpolation (designed). comparable: the
    undefended network learnt, and designed noise was trained with values on either side."""
    isotropic = frontier[(frontier.method == "isotropic") & (frontier.value == _middle(frontier))]
    rows = []
    for _, at in isotropic.iterrows():
        mine = frontier[frontier.seed == at.seed]
        own = mine[mine.method == "designed"].sort_values("privacy")
        plain = float(mine.accuracy[mine.method == "none"].mean())
        rows.append(
            {
                "seed": at.seed,
                "privacy": at.privacy,
                "plain": plain,
                "isotropic": at.accuracy,
                "designed": float(np.interp(at.privacy, own.privacy, own.accuracy)),
                "comparable": plain >= LEARNT and own.privacy.min() <= at.privacy <= own.privacy.max(),
            }
        )
    return pd.DataFrame(rows)


def _middle(frontier: pd.DataFrame) -> float:
    """The middle one of isotropic noise's values."""
    values = np.sort(frontier.value[frontier.method == "isotropic"].unique())
    return float(values[len(values) // 2])
