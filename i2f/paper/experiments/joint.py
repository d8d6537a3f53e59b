"""Training for privacy and the task together: a penalty on how sharply gradients show inputs, and what it buys.

Each step minimises the batch's cross-entropy plus `weight` times a term of `i2f.penalty`, the mean over a few of the
batch's images; where the term is taken at every k-th step alone, it counts k times (lazy regularisation, Karras et al.
2020). Afterwards every network is attacked under noise of one variance, and compared with DP-SGD.
"""

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from i2f.attacks import invert
from i2f.core import perturb, spectrum, streams
from i2f.core.influence import expected_square
from i2f.core.jacobian import GradientJacobian
from i2f.paper import claims, data, models, penalty, sweep
from i2f.paper.experiments.designed_noise import defended, median_norm
from i2f.paper.sweep import Problem, Row

PLAIN, BOUND, BAYES, DP = "plain", "bound", "bayes", "dp"


def problems(setting: dict[str, Any], methods: dict[str, list[float]], seeds: int) -> list[Problem]:
    """methods: "plain": [0], "bound" and "bayes": weights, "dp": noise over clipping norm, on each image's
    gradient (local differential privacy)."""
    return [{**setting, "method": method, "weight": float(weight), "seed": seed}
            for seed in range(seeds) for method, weights in methods.items() for weight in weights]  # fmt: skip


def run(
    tasks: list[Problem], digits: int, held_out: int, epochs: int, batch: int, lr: float, penalised: int, every: int,
    damping: float, images: int, attacked: int, variance: float, steps: int, jobs: int | None = None,
) -> pd.DataFrame:  # fmt: skip
    """A row a network and image. accuracy: on held-out digits. gradient_norm, lambda_max; expected_rmse: of an image
    under Gaussian noise of `variance`; of the first `attacked`, rmse and mse_clamped: what Gauss–Newton left."""
    solve = partial(
        _solve, digits, held_out, epochs, batch, lr, penalised, every, damping, images, attacked, variance, steps
    )
    table = sweep.run(solve, tasks, jobs=jobs, whole=True, description="networks")
    table = table.explode("attacks", ignore_index=True)
    attacks = pd.DataFrame(table.pop("attacks").tolist())
    return pd.concat([table.drop(columns=["failed", "reason"]), attacks], axis=1)  # an attack's, not the training's


def _solve(
    digits: int, held_out: int, epochs: int, batch: int, lr: float, penalised: int, every: int, damping: float,
    images: int, attacked: int, variance: float, steps: int, chunk: list[Problem],
) -> list[Row]:  # fmt: skip
    rows = []
    for p in chunk:
        model, accuracy = _train(p, digits, held_out, epochs, batch, lr, penalised, every, damping)
        rows.append({"accuracy": accuracy, "attacks": _attacks(model, p, images, attacked, variance, steps)})
    return rows


def _train(
    p: Problem, digits: int, held_out: int, epochs: int, batch: int, lr: float, penalised: int, every: int,
    damping: float,
) -> tuple[torch.nn.Module, float]:  # fmt: skip
    x, y = data.load(p["dataset"], digits + held_out, split="train")
    model = models.build("lenet", p["dataset"], init=p["init"], seed=p["weight_seed"], normalize=False)
    order, noise, probe = (streams.generator(name, p["seed"]) for name in ("order", "training noise", "penalty"))
    clip = median_norm(model, x[:50], y[:50]) if p["method"] == DP else 0.0
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(epochs):
        for number, chosen in enumerate(torch.randperm(digits, generator=order).split(batch)):
            if p["method"] == DP:
                gradients = defended(model, x[chosen], y[chosen], DP, p["weight"], clip, noise)
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter.grad = gradient
            else:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x[chosen]), y[chosen])
                if p["method"] != PLAIN and number % every == 0:
                    terms = [_term(p["method"], model, x[i : i + 1], y[i : i + 1], damping, probe)
                             for i in chosen[:penalised].tolist()]  # fmt: skip
                    loss = loss + every * p["weight"] * torch.stack(terms).mean()
                loss.backward()
            optimizer.step()
    with torch.no_grad():
        right = (model(x[digits:]).argmax(1) == y[digits:]).double().mean()
    return model, float(right)


def _term(
    method: str, model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, damping: float, generator: torch.Generator
) -> torch.Tensor:  # fmt: skip
    if method == BOUND:
        return penalty.bound(model, x, y, generator=generator)
    return penalty.bayes(model, x, y, damping, generator=generator)


def _attacks(
    model: torch.nn.Module, p: Problem, images: int, attacked: int, variance: float, steps: int
) -> list[Row]:  # fmt: skip
    """Test images, which the network was not trained on, under the same variance of noise."""
    rows = []
    model = model.double()
    for image in range(images):
        x, y = data.load(p["dataset"], 1, image)
        J = GradientJacobian(model, x, y)
        rows.append({
            "image": image, "gradient_norm": float(J.gradient.norm()),
            "lambda_max": float(spectrum.decompose(J).values[0]),
            "expected_rmse": (expected_square(J, variance) / J.shape[0]) ** 0.5,
        })  # fmt: skip
        if image < attacked:
            delta = perturb.gaussian(J.gradient, variance, image)
            found = invert(model, J.gradient + delta, y, x.shape, steps=steps, seed=image)
            rows[-1] |= {
                "rmse": float((found.x - J.x).square().mean().sqrt()),
                "mse_clamped": float((found.x.clamp(0, 1) - J.x).square().mean()),
                "converged": found.converged, "matched": found.matched, "failed": found.failed, "reason": found.reason,
            }  # fmt: skip
    return rows


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """A row a method and weight: accuracy, and the medians over images of what noise leaves."""
    found = table.groupby(["method", "weight"], sort=False).agg(
        accuracy=("accuracy", "mean"), gradient=("gradient_norm", "median"), lambda_max=("lambda_max", "median"),
        expected=("expected_rmse", "median"), measured=("rmse", "median"),
    )  # fmt: skip
    found["clamped"] = table.groupby(["method", "weight"], sort=False).mse_clamped.median() ** 0.5
    return found


def judge(table: pd.DataFrame, dataset: str, gain: float, kept: float, name: str = "joint") -> list[claims.Claim]:
    """The experiment's claims, about the largest weight of each penalty at which every network learnt. The thresholds
    are the notebook's parameters; the ids begin with `name`."""
    found = []
    plain = table[table.method == PLAIN]
    compared = float(plain.accuracy.min()) >= claims.LEARNT
    for method, words in ((BOUND, "λ_max, the bound's"), (BAYES, "the Bayes error, one draw a step")):
        rows = table[table.method == method]
        if not len(rows):
            continue
        least = rows.groupby("weight").accuracy.min()
        learnt = least[least >= claims.LEARNT]
        weight = float(learnt.index.max() if len(learnt) else least.index.min())
        strong = rows[rows.weight == weight]
        both = strong.merge(plain, on=["image", "seed"], suffixes=("", "_plain"))
        known = compared and len(learnt) > 0
        note = f"weight {weight:g}, accuracy {strong.accuracy.mean():.3f}, plain {plain.accuracy.mean():.3f}"
        if not known:
            note += f"; the {'penalised' if compared else 'plain'} network has learnt too little to compare"
        attacked = both[both.converged.notna()]
        settled = attacked[attacked.converged.astype(bool) & attacked.converged_plain.astype(bool)]
        enough = known and len(settled) >= len(attacked) / 2
        tried = f"{note}; of {len(attacked)} images attacked in both networks, {len(settled)} converged in both"
        found += [
            claims.judge(
                settled if enough else both, _harder if enough else _unknown, "seed", at_least=gain, least=3,
                id=f"{name}-{dataset}-{method}", source="the paper's outlook", note=tried,
                attacker="gauss-newton: knows model and label, no prior",
                statement=f"A penalty ({words}) makes a trained network's gradients harder to invert, under the same "
                "noise.", statistic="clamped RMSE of the attack, penalised over plain, geometric mean",
            ),
            claims.judge(
                both, _harder_relative if known else _unknown, "seed", at_least=gain, least=3,
                id=f"{name}-{dataset}-{method}-relative", source="the paper's outlook", note=note,
                attacker="none: spectra",
                statement=f"A penalty ({words}) makes a trained network's gradients harder to invert, also under small "
                "noise in proportion to the gradient.",
                statistic="√E[I²]·‖g‖, penalised over plain, geometric mean",
            ),
            claims.judge(
                both, _cost if compared else _unknown, "seed", at_least=-kept, note=note, least=3,
                id=f"{name}-{dataset}-{method}-accuracy", source="the paper's outlook", attacker="none",
                statement=f"A penalty ({words}) costs at most {kept:g} of accuracy.",
                statistic="accuracy, penalised minus plain",
            ),
        ]  # fmt: skip
    return found


def _unknown(table: pd.DataFrame) -> float:
    return np.nan


def _cost(table: pd.DataFrame) -> float:
    return float((table.accuracy - table.accuracy_plain).mean())


def _harder(table: pd.DataFrame) -> float:
    return float(np.exp(np.log(table.mse_clamped / table.mse_clamped_plain).mean() / 2))


def _harder_relative(table: pd.DataFrame) -> float:
    """A network whose gradients merely shrink is no better protected from noise that shrinks with them."""
    ours, plain = table.expected_rmse * table.gradient_norm, table.expected_rmse_plain * table.gradient_norm_plain
    return float(np.exp(np.log(ours / plain).mean()))
