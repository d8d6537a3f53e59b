"""Training for privacy and the task together: a penalty on how sharply gradients show inputs, and what it achieves.

Each step minimises the batch's cross-entropy plus `weight` times a term of `i2f.paper.penalty`, the mean over a few of
the batch's images; where the term is taken at every k-th step alone, it counts k times (lazy regularisation, Karras et
al. 2020). Afterwards every network is attacked under noise of one variance, and compared with DP-SGD.
"""

from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2f.attacks import invert
from i2f.attacks.prior import TAU
from i2f.core import perturb, spectrum, streams
from i2f.core.influence import expected_square
from i2f.core.jacobian import GradientJacobian
from i2f.paper import data, devices, estimates, penalty, sweep, trainings
from i2f.paper.claims import LEARNT, Claim, Judge, Thresholds
from i2f.paper.estimates import Estimate
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.rows import declare
from i2f.paper.sweep import Problem, Row, Settings
from i2f.paper.trainings import FIELDS, Method, Training

PLAIN, BOUND, BAYES, DP = "plain", "bound", "bayes", "dp"
PENALTIES = {BOUND: "on λ_max, the bound's", BAYES: "on the Bayes error, one draw per step"}
FIRST = 50  # digits whose median gradient norm "dp" clips to
# what float32 leaves of a training
TRAINED = ("accuracy", "gradient_norm", "lambda_max", "expected_rmse", "bayes_rmse")
OWN = (*FIELDS, "penalised", "every", "damping", "images", "attacked", "variance", "steps")  # no columns of the table


def problems(config: Config) -> list[Problem]:
    """One network for every seed, method and weight.

    config: dataset, init; seeds: how many, of which each draws its own weights and order of the digits; methods:
    "plain": [0], "bound" and "bayes": weights, "dp": noise over clipping norm, on each image's gradient (local
    differential privacy); the fields of `trainings.Training`; penalised: images of a batch that the penalty is taken
    over, at every `every`-th step, with ε = `damping` for "bayes"; images: of the held-out digits, how many have their
    gradients analysed under noise of `variance`, of which the first `attacked` are attacked with gauss_newton_steps.
    """
    own = {name: config[name] for name in OWN if name != "steps"} | {"steps": config["gauss_newton_steps"]}
    return [
        {**shared.setting(config), "weight_seed": seed, "method": method, "weight": float(weight), "seed": seed, **own}
        for seed in range(1, config["seeds"] + 1)
        for method, weights in config["methods"].items()
        for weight in weights
    ]


def run(problems: list[Problem], settings: Settings = sweep.DEFAULT) -> Results:
    """One row per network and image. accuracy: on held-out digits. gradient_norm, lambda_max; expected_rmse,
    bayes_rmse: of an attacker without and with a prior under Gaussian noise of `variance`; of the first `attacked`
    images, Gauss–Newton's rmse and mse_clamped."""
    table = sweep.run(solve, problems, settings, whole=True, description="networks")
    return Results({"problems": table.drop(columns=[*OWN])})


@declare("problems", kinds=dict.fromkeys(TRAINED, "trained"))
def solve(chunk: list[Problem]) -> list[list[Row]]:
    """Train each network, and analyse its gradients: one row per test image."""
    found = []
    for problem in chunk:
        model, accuracy = train(problem)
        found.append([{"accuracy": accuracy, **row} for row in _attacks(model, problem)])
    return found


def train(p: Problem) -> tuple[nn.Module, float]:
    """The trained network, and its accuracy on held-out digits."""
    training = Training.of(p)
    model, x, y = trainings.start(p, training.digits + training.held_out)
    noise, probe = (streams.generator(name, p["seed"]) for name in ("training noise", "penalty"))
    method = Method(DP, p["weight"], trainings.median_norm(model, x[:FIRST], y[:FIRST]) if p["method"] == DP else 0.0)

    def gradients(number: int, chosen: Tensor) -> list[Tensor]:
        if p["method"] == DP:
            return trainings.defended(model, x[chosen], y[chosen], method, noise)
        loss = F.cross_entropy(model(x[chosen]), y[chosen])
        if p["method"] != PLAIN and number % p["every"] == 0:
            few = chosen[: p["penalised"]].tolist()
            terms = [_term(p, model, x[i : i + 1], y[i : i + 1], probe) for i in few]
            loss = loss + p["every"] * p["weight"] * torch.stack(terms).mean()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    return model, trainings.train(model, x, y, training, p["seed"], gradients)


def _term(p: Problem, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Tensor:
    if p["method"] == BOUND:
        return penalty.bound(model, x, y, generator=generator)
    return penalty.bayes(model, x, y, p["damping"], generator=generator)


def _attacks(model: nn.Module, p: Problem) -> list[Row]:
    """The first held-out digits, which the network was not trained on, under the same variance of noise."""
    rows = []
    model, variance = model.double(), p["variance"]
    for number in range(p["images"]):
        image = p["digits"] + number
        x, y = (t.to(devices.current()) for t in data.load(p["dataset"], 1, image, split="train"))
        J = GradientJacobian(model, x, y)
        values = spectrum.decompose(J).values.clamp(min=0)
        row: Row = {
            "image": image,
            "gradient_norm": float(J.gradient.norm()),
            "lambda_max": float(values[0]),
            "expected_rmse": (expected_square(J, variance) / J.shape[0]) ** 0.5,
            "bayes_rmse": float((variance / (values + variance / TAU**2)).mean()) ** 0.5,
        }
        if number < p["attacked"]:
            delta = perturb.gaussian(J.gradient, variance, 1000 * p["seed"] + image)
            found = invert(model, J.gradient + delta, y, x.shape, steps=p["steps"], seed=image)
            row |= {
                "rmse": float((found.x - J.x).square().mean().sqrt()),
                "mse_clamped": float((found.x.clamp(0, 1) - J.x).square().mean()),
                "evaluations": found.evaluations,
                "converged": found.converged,
                "matched": found.matched,
                "failed": found.failed,
                "reason": found.reason,
            }
        rows.append(row)
    return rows


def networks(table: pd.DataFrame) -> pd.DataFrame:
    """One row per network: accuracy, and means over images of the RMSE of an attacker with a prior under the fixed
    noise (bayes_rmse) and of √E[I²]·‖g‖ (relative), since smaller gradients alone are no protection from noise in
    proportion to them."""
    rows = table.assign(relative=table.expected_rmse * table.gradient_norm)
    means = rows.groupby(["method", "weight", "seed"], sort=False)[["accuracy", "bayes_rmse", "relative"]].mean()
    return means.reset_index()


def paired(table: pd.DataFrame, method: str) -> pd.DataFrame:
    """One row per seed: the network under the method's largest weight, and in columns with "_plain" that without."""
    means = networks(table)
    mine = means[means.method == method]
    plain = means[means.method == PLAIN]
    return mine[mine.weight == mine.weight.max()].merge(plain, on="seed", suffixes=("", "_plain"))


def learnt(pairs: pd.DataFrame) -> pd.DataFrame:
    """Those of `paired` of which both networks learnt: a network that did not answers nothing."""
    return pairs[(pairs.accuracy_plain >= LEARNT) & (pairs.accuracy >= LEARNT)]


def effects(table: pd.DataFrame) -> dict[str, dict[str, Estimate]]:
    """By penalty that was trained with, over seeds: by what factor it changes an attacker's error under the same noise
    (bayes_rmse) and under noise in proportion to the gradient (relative), both where both networks learnt, and what it
    adds to the accuracy, where the plain one learnt."""
    found = {}
    for method in PENALTIES:
        pairs = paired(table, method)
        if len(pairs):
            both, plain = learnt(pairs), pairs[pairs.accuracy_plain >= LEARNT]
            if len(both) < 2:  # no interval; `judge` decides nothing from networks of which hardly any learnt
                both, plain = pairs, plain if len(plain) > 1 else pairs
            ratios = {name: both[name] / both[f"{name}_plain"] for name in ("bayes_rmse", "relative")}
            found[method] = {name: estimates.geometric_mean(ratio) for name, ratio in ratios.items()}
            found[method]["accuracy"] = estimates.mean(plain.accuracy - plain.accuracy_plain)
    return found


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row per method and weight: mean accuracy, medians over images of gradient norm, λ_max and expected errors,
    and of the attacks that converged the median of measured over expected RMSE."""
    table = table.assign(ratio=(table.rmse / table.expected_rmse).where(table.converged.eq(True)))
    groups = table.groupby(["method", "weight"], sort=False)
    medians = groups[["gradient_norm", "lambda_max", "expected_rmse", "bayes_rmse", "ratio"]].median()
    names = {"ratio": "measured / expected", "expected_rmse": "√E[I²]", "bayes_rmse": "with a prior"}
    attacked = groups.converged.agg(lambda ended: f"{ended.eq(True).sum()} of {ended.notna().sum()}")
    return medians.rename(columns=names).assign(converged=attacked, accuracy=groups.accuracy.mean())


def judge(tables: Tables, thresholds: Thresholds) -> list[Claim]:
    """The experiment's claims, about the largest weight of each penalty. Of the thresholds, `gain` is a ratio of
    errors, and `kept` the accuracy that may be lost. Networks that did not learn decide nothing."""
    table = tables["problems"]
    judged = Judge.of("joint", "joint", {**thresholds, "least_change": -thresholds["kept"]})
    found = []
    for method, its in effects(table).items():
        pairs = paired(table, method)
        both, plain = len(learnt(pairs)), pairs.accuracy_plain >= LEARNT
        words: dict[str, Any] = {
            "penalty": PENALTIES[method],
            "weight": f"{pairs.weight.max():g}",
            "accuracy": f"{pairs.accuracy.mean():.3f}",
            "plain": f"{pairs.accuracy_plain.mean():.3f}",
            "learnt": f"{both} of {len(pairs)}",
            "suffix": f"-{method}",
        }
        found += [
            judged("harder", its["bayes_rmse"], both / len(pairs), **words),
            judged("cost", its["accuracy"], plain.mean(), **words),
        ]
    return sorted(found, key=lambda claim: claim.number)
