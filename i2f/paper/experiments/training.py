"""Does training change the risk? Networks at several epochs: spectra, what I²F predicts, what an attack finds."""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from i2f.attacks import invert_many
from i2f.core import checks, perturb, spectrum
from i2f.core.influence import expected_square, influence, lower_bound
from i2f.core.jacobian import GradientJacobian
from i2f.paper import data, devices, estimates, models, sweep, trainings
from i2f.paper.claims import LEARNT, Claim, Judge, Thresholds
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.rows import declare
from i2f.paper.sweep import Problem, Row, Settings

Weights = dict[str, Tensor]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}
# how the network is trained: the same in every problem of a weight seed, see `problems`
TRAINING = ("dataset", "root", "init", "weight_seed", "digits", "held_out", "optimizer", "learning_rate", "batch")
FACTS = ("loss", "gradient_norm", "lambda_max", "lambda_median", "lambda_min", "condition")
PREDICTED = ("variance", "noise_norm", "predicted_rmse", "expected_rmse", "bound_rmse")
SCORES = tuple(f"{part}_{what}" for part in ("train", "test") for what in ("accuracy", "loss"))
KINDS = ("relative", "fixed")  # of noise, Gaussian


def problems(config: Config) -> list[Problem]:
    """Every weight seed's training, checkpoint and image under both kinds of noise; few of them are attacked.

    `size` of "fixed": the noise's variance σ²; of "relative": the expected ‖δ‖ over ‖g‖ (in the mean square). An image
    meets the same draw, up to its size, at every checkpoint. `budget`: the attack's; None: only what I²F predicts.

    config: dataset, root (None: the bundle), init; weight_seeds: how many, each with its own order of the batches;
    digits of the train split to train on, held_out digits of the test split to measure on; optimizer, learning_rate,
    batch; epochs: the checkpoints; images: of the test split, which no training sees; fixed, relative: the noise's
    sizes; attacked: how many images meet Gauss–Newton, of gauss_newton_steps, under weight seed 1 at the first and the
    last checkpoint.
    """
    epochs = config["epochs"]
    return [
        {
            **{name: weight_seed if name == "weight_seed" else config[name] for name in TRAINING},
            "epoch": epoch,
            "image": image,
            "noise": noise,
            "size": config[noise],
            "noise_seed": 1000 * weight_seed + image,
            "start_seed": image,
            "budget": config["gauss_newton_steps"]
            if weight_seed == 1 and epoch in (epochs[0], epochs[-1]) and image < config["attacked"]
            else None,
        }
        for weight_seed in range(1, config["weight_seeds"] + 1)
        for epoch in epochs
        for image in range(config["images"])
        for noise in KINDS
    ]


def run(problems: list[Problem], settings: Settings = sweep.DEFAULT) -> Results:
    """Both kinds of noise at every checkpoint that the trainings arrive at.

    problems: one row each: `_facts`' columns and what I²F predicts. variance: σ² as it was drawn. predicted_rmse: Eq. 4
    for the draw; expected_rmse: √(σ² tr((J Jᵀ)⁻¹)/d_x), the root of its mean square over draws; bound_rmse: Eq. 5. RMSE
    in pixels, per pixel. Where it was attacked, `problems.score`'s columns. progress: `progress`'s table.
    """
    epochs = sorted({p["epoch"] for p in problems})
    trainings = {p["weight_seed"]: {name: p[name] for name in TRAINING} | {"epochs": epochs} for p in problems}
    learnt = sweep.run(progress, [*trainings.values()], settings, whole=True, description="trainings")
    together = (*TRAINING, "epoch", "image", "budget")
    table = sweep.run(solve, problems, settings, together, at_most=len(KINDS), description="checkpoints")
    dropped = [name for name in TRAINING if name not in ("dataset", "weight_seed")]
    return Results(
        {
            "problems": table.drop(columns=[*dropped, "noise_seed", "start_seed"]),
            "progress": learnt.drop(columns=[*dropped, "dataset", "epochs", "failed", "reason"]),
        }
    )


def weights(training: Problem, epoch: int) -> Weights:
    """The network's weights after so many epochs of the training that a problem describes; each is computed once."""
    kept, course = _course(*(training[name] for name in TRAINING))
    while len(kept) <= epoch:
        kept.append(next(course))
    return kept[epoch]


@lru_cache(maxsize=1)
def _course(*recipe: Any) -> tuple[list[Weights], Iterator[Weights]]:
    return [], _epochs(dict(zip(TRAINING, recipe, strict=True)))


def _epochs(training: Problem) -> Iterator[Weights]:
    """The weights before the training and after each of its epochs, without end, in float32 on the CPU."""
    optimizer = OPTIMIZERS[checks.one_of("optimizer", training["optimizer"], OPTIMIZERS)]
    x, y = data.load(training["dataset"], training["digits"], split="train", root=training["root"])
    model = _network(training)
    steps = optimizer(model.parameters(), lr=training["learning_rate"])

    def gradients(_: int, chosen: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(model(x[chosen]), y[chosen]), list(model.parameters()))

    course = trainings.epochs(model, steps, len(x), training["batch"], training["weight_seed"], gradients)
    while True:
        yield {name: value.clone() for name, value in model.state_dict().items()}
        next(course)


@declare("progress", kinds=dict.fromkeys(SCORES, "head"))
def progress(chunk: list[Problem]) -> list[list[Row]]:
    """How well the network does: one row per epoch of the training's `epochs`: accuracy (share) and mean loss on the
    digits that it was trained on, and on held-out ones."""
    return [[{"epoch": epoch, **_progress(problem, epoch)} for epoch in problem["epochs"]] for problem in chunk]


def _network(training: Problem) -> torch.nn.Module:
    dataset, init, seed = (training[name] for name in ("dataset", "init", "weight_seed"))
    return models.build("lenet", dataset, init=init, seed=seed, normalize=False)


def _progress(training: Problem, epoch: int) -> Row:
    dataset, root = training["dataset"], training["root"]
    sets = {
        "train": data.load(dataset, training["digits"], split="train", root=root),
        "test": data.load(dataset, training["held_out"], root=root),
    }
    model = _network(training)
    model.load_state_dict(weights(training, epoch))
    row = {}
    for name, (x, y) in sets.items():
        with torch.no_grad():
            logits = model(x)
        row[f"{name}_accuracy"] = float((logits.argmax(1) == y).double().mean())
        row[f"{name}_loss"] = float(F.cross_entropy(logits, y))
    return row


@declare("problems", kinds=dict.fromkeys((*FACTS, *PREDICTED), "head"))  # of weights trained in float32
def solve(chunk: list[Problem]) -> list[Row]:
    """A chunk has one training, checkpoint and image, and so one J, and one budget."""
    first = chunk[0]
    model = _network(first)
    model.load_state_dict(weights(first, first["epoch"]))
    device = devices.current()
    x, y = (t.to(device) for t in data.load(first["dataset"], 1, offset=first["image"], root=first["root"]))
    model = model.double().to(device).eval()
    J = GradientJacobian(model, x, y)
    facts = _facts(J)
    relative = facts["gradient_norm"] ** 2 / J.shape[1]
    variances = [p["size"] ** 2 * relative if p["noise"] == "relative" else p["size"] for p in chunk]
    seeds = [p["noise_seed"] for p in chunk]
    deltas = [perturb.gaussian(J.gradient, v, seed=seed) for v, seed in zip(variances, seeds, strict=True)]
    rows = [{**facts, **_predicted(J, delta, v)} for delta, v in zip(deltas, variances, strict=True)]
    if first["budget"] is not None:
        gradients, labels = J.gradient + torch.stack(deltas), y.expand(len(chunk), -1)
        own = {"steps": first["budget"], "seed": [p["start_seed"] for p in chunk]}
        found = invert_many(model, gradients, labels, J.x.shape, **own)
        rows = [row | shared.score(J, delta, one) for row, delta, one in zip(rows, deltas, found, strict=True)]
    return rows


def _predicted(J: GradientJacobian, delta: Tensor, variance: float) -> Row:
    return {
        "variance": variance,
        "noise_norm": float(delta.norm()),
        "predicted_rmse": influence(J, delta).rmse,
        "expected_rmse": (expected_square(J, variance) / J.shape[0]) ** 0.5,
        "bound_rmse": lower_bound(J, delta).rmse,
    }


def _facts(J: GradientJacobian) -> Row:
    """What holds of an image at a checkpoint whatever the noise: its loss, ‖g‖, and the spectrum of J Jᵀ."""
    values = spectrum.decompose(J).values
    with torch.no_grad():
        logits = J.map.model(J.x)
    return {
        "label": int(J.map.y),
        "correct": bool(logits.argmax(1) == J.map.y),
        "loss": float(F.cross_entropy(logits, J.map.y)),
        "gradient_norm": float(J.gradient.norm()),
        "lambda_max": float(values[0]),
        "lambda_median": float(values.median()),
        "lambda_min": float(values[-1]),
        "condition": float(values[0] / values[-1]),
        "rank": spectrum.rank(J),
    }


def slopes(rows: pd.DataFrame) -> pd.Series:
    """By weight seed and image: the slope of log expected_rmse on the epoch, by least squares."""
    logarithms = np.log(rows.pivot(index=["weight_seed", "image"], columns="epoch", values="expected_rmse"))
    away = logarithms.columns.to_numpy(dtype=float) - logarithms.columns.to_numpy(dtype=float).mean()
    return logarithms @ (away / np.square(away).sum())


def judge(tables: Tables, thresholds: Thresholds) -> list[Claim]:
    """One claim per kind of noise, over weight seeds; trainings that did not learn are left out."""
    table, progress = tables["problems"], tables["progress"]
    after = progress[progress.epoch == progress.epoch.max()].set_index("weight_seed").train_accuracy
    learnt = after.index[after >= LEARNT]
    judged = Judge.of("training", "training", thresholds)
    found = []
    for kind in KINDS:
        rows = table[(table.noise == kind) & table.weight_seed.isin(learnt)]
        seeds = slopes(rows).unstack("image").mean(axis=1, skipna=False)  # what is unknown decides nothing
        about = {
            "learnt": f"{len(learnt)} of {len(after)}",
            "factor": float(np.exp(seeds.mean() * (table.epoch.max() - table.epoch.min()))),
            "images": rows.image.nunique(),
        }
        found.append(judged(kind, estimates.mean(seeds), **about))
    return found


def checked(table: pd.DataFrame) -> pd.DataFrame:
    """The attacks by checkpoint and noise: medians over the attacks that converged of the predicted and the measured
    RMSE and of their ratio, and how many converged."""
    attacks = shared.lost(table[table.budget.notna()]).assign(ratio=lambda t: t.rmse / t.predicted_rmse)
    groups = attacks.groupby(["epoch", "noise"])
    names = {"predicted_rmse": "predicted RMSE", "rmse": "measured RMSE", "ratio": "measured / predicted"}
    medians = attacks[attacks.converged.eq(True)].groupby(["epoch", "noise"])[[*names]].median().rename(columns=names)
    return medians.assign(attacks=groups.size(), converged=groups.converged.sum())
