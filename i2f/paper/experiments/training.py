"""Does training change the risk? One network at several epochs: spectra, what I²F predicts, what an attack finds."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from i2f.attacks import Reconstruction, invert_many
from i2f.core import checks, perturb, spectrum, streams
from i2f.core.influence import expected_square, influence, lower_bound
from i2f.core.jacobian import GradientJacobian
from i2f.paper import claims, data, devices, models, sweep
from i2f.paper.experiments import problems as shared
from i2f.paper.sweep import Problem, Row

Weights = dict[str, Tensor]
OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": partial(torch.optim.SGD, momentum=0.9)}
NETWORK = ("dataset", "init", "weight_seed")
NEAR = 0.01  # the control's start: so far from the truth, RMSE per pixel


def train(
    setting: dict[str, Any], epochs: Sequence[int], digits: int, held_out: int, optimizer: str = "adam",
    lr: float = 0.003, batch: int = 50, seed: int = 0,
) -> tuple[dict[int, Weights], pd.DataFrame]:  # fmt: skip
    """The network's weights at `epochs` of training on the first `digits` of the train split, in float32.

    setting: dataset, init, weight_seed, and root (None: the bundle). seed: of the batches' order. One thread, so that
    sums are taken in the same order at every run. Returns the weights, and a row an epoch of `epochs`: accuracy (share)
    and mean loss on the train digits and on the first `held_out` of the test split.
    """
    checks.one_of("optimizer", optimizer, OPTIMIZERS)
    root, dataset = setting.get("root"), setting["dataset"]
    sets = {
        "train": data.load(dataset, digits, split="train", root=root),
        "test": data.load(dataset, held_out, root=root),
    }
    x, y = sets["train"]
    model = _network(setting)
    steps = OPTIMIZERS[optimizer](model.parameters(), lr=lr)
    order = streams.generator("order", seed)
    kept, rows, threads = {}, [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for epoch in range(max(epochs) + 1):
            if epoch in epochs:
                kept[epoch] = {name: value.clone() for name, value in model.state_dict().items()}
                rows.append({"epoch": epoch, **_progress(model, sets)})
            for chosen in torch.randperm(len(x), generator=order).split(batch) if epoch < max(epochs) else ():
                steps.zero_grad()
                F.cross_entropy(model(x[chosen]), y[chosen]).backward()
                steps.step()
    finally:
        torch.set_num_threads(threads)
    return kept, pd.DataFrame(rows)


def _network(setting: dict[str, Any]) -> torch.nn.Module:
    dataset, init, seed = (setting[name] for name in NETWORK)
    return models.build("lenet", dataset, init=init, seed=seed, normalize=False)


@torch.no_grad()
def _progress(model: torch.nn.Module, sets: dict[str, tuple[Tensor, Tensor]]) -> Row:
    row = {}
    for name, (x, y) in sets.items():
        logits = model(x)
        row[f"{name}_accuracy"] = float((logits.argmax(1) == y).double().mean())
        row[f"{name}_loss"] = float(F.cross_entropy(logits, y))
    return row


def problems(
    epochs: Sequence[int], images: int, fixed: Sequence[float], relative: Sequence[float],
    starts: Sequence[str] = ("random", "near"),
) -> list[Problem]:  # fmt: skip
    """Every checkpoint and test image: no noise, noise of fixed variances, and noise in proportion to the gradient.

    Gaussian noise throughout. `size` of "fixed": its variance σ²; of "relative": the expected ‖δ‖ over ‖g‖ (in the mean
    square). An image meets the same draw, up to its size, at every checkpoint.

    starts: "random" is an attacker's; "near", the truth moved by `NEAR`, is none: a control that tells an image which
    the gradient does not hold from one that the search does not find.
    """
    noises = [("none", 0.0), *(("fixed", v) for v in fixed), *(("relative", r) for r in relative)]
    return [
        {"epoch": epoch, "image": image, "noise": noise, "size": size, "start": start}
        for epoch in epochs for image in range(images) for noise, size in noises for start in starts
    ]  # fmt: skip


def attack(
    weights: dict[int, Weights], tasks: list[Problem], setting: dict[str, Any], steps: int, seed: int = 0,
    jobs: int | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Gauss–Newton on every problem; a row each: `problems.score`'s columns, `_facts`' and what I²F says.

    variance: σ² as it was drawn. predicted_rmse: Eq. 4 for the draw; expected_rmse: √(σ² tr((J Jᵀ)⁻¹)/d_x), the root
    of its mean square over draws; bound_rmse: Eq. 5. RMSE in pixels, per pixel; NaN without noise.
    """
    solve = partial(_solve, weights, setting, steps, seed)
    return sweep.run(solve, tasks, together=("epoch", "image"), at_most=12, jobs=jobs, description="attacks")


def _solve(
    weights: dict[int, Weights], setting: dict[str, Any], steps: int, seed: int, chunk: list[Problem]
) -> list[Row]:
    epoch, image = chunk[0]["epoch"], chunk[0]["image"]
    model = _network(setting)
    model.load_state_dict(weights[epoch])
    device = devices.current()
    x, y = (t.to(device) for t in data.load(setting["dataset"], 1, offset=image, root=setting.get("root")))
    model = model.double().to(device).eval()
    J = GradientJacobian(model, x, y)
    facts = _facts(J)
    relative = facts["gradient_norm"] ** 2 / J.shape[1]
    variances = [p["size"] ** 2 * relative if p["noise"] == "relative" else p["size"] for p in chunk]
    deltas = torch.stack([perturb.gaussian(J.gradient, v, seed=1000 * seed + image) for v in variances])
    beside = torch.randn(J.x.shape, generator=streams.generator("near", seed), dtype=torch.float64).to(J.x)
    starts = {"random": None, "near": J.x + NEAR * beside}
    found: dict[int, Reconstruction] = {}
    for name, start in starts.items():
        mine = [i for i, p in enumerate(chunk) if p["start"] == name]
        if mine:
            attacks = invert_many(
                model, J.gradient + deltas[mine], y.expand(len(mine), -1), J.x.shape, steps=steps, seed=seed,
                start=start,
            )  # fmt: skip
            found |= zip(mine, attacks, strict=True)
    return [
        {**facts, **_foretold(J, delta, variance), **shared.score(J, delta, found[i])}
        for i, (delta, variance) in enumerate(zip(deltas, variances, strict=True))
    ]


def _foretold(J: GradientJacobian, delta: Tensor, variance: float) -> Row:
    noisy = variance > 0
    return {
        "variance": variance,
        "noise_norm": float(delta.norm()),
        "predicted_rmse": influence(J, delta).rmse if noisy else np.nan,
        "expected_rmse": (expected_square(J, variance) / J.shape[0]) ** 0.5 if noisy else np.nan,
        "bound_rmse": lower_bound(J, delta).rmse if noisy else np.nan,
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


def trend(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """One row per image: Spearman's correlation of `column` with the epoch over its checkpoints (`claims.orders`)."""
    return claims.orders(table, "image", "epoch", column)


def judge(
    table: pd.DataFrame, dataset: str, growth: float, exact: float, share: float, accuracy: float, tracking: float,
    cut: float,
) -> list[claims.Claim]:  # fmt: skip
    """The experiment's claims. The thresholds are the notebook's parameters."""
    noisy = table[table.noise != "none"].assign(miss=shared.relative_error)
    small = noisy[noisy["size"] == noisy.groupby("noise")["size"].transform("min")]
    random = small[small.start == "random"]
    fixed, relative = random[random.noise == "fixed"], random[random.noise == "relative"]
    attackers = {
        "random": shared.PERFECT,
        "near": f"none, a control: gauss-newton from {NEAR:g} beside the truth",
    }
    common = {"source": "the experiment on training stages", "attacker": attackers["random"]}
    nobody = common | {"attacker": "none: predicted by I²F"}
    mean = {"measure": claims.mean_order, "unit": "image", "at_least": growth}
    order = "Spearman correlation of {} with the epoch, mean over images"
    found = [
        claims.judge(
            trend(fixed, "expected_rmse"), **mean, **nobody, id=f"training-{dataset}-fixed",
            statement="Training lowers the risk: noise of one fixed size hides an image better and better.",
            statistic=order.format("the expected RMSE"),
        ),
        claims.judge(
            trend(relative, "expected_rmse"), **mean, **nobody, id=f"training-{dataset}-relative",
            statement="Training lowers the risk also where the noise is in proportion to the gradient.",
            statistic=order.format("the expected RMSE"),
        ),
        claims.judge(
            fixed, lambda t: claims.rank_correlation(t, "bound_rmse", "predicted_rmse"), "image", at_least=tracking,
            **nobody, id=f"training-{dataset}-bound",
            statement="The lower bound I_lb tracks I²F through training, under noise of one fixed size.",
            statistic="Spearman correlation of I_lb with the predicted RMSE, over images and checkpoints",
        ),
    ]  # fmt: skip
    for start in table.start.unique():
        rows = table[table.start == start]
        used = ["image", "epoch", "noise", "miss", "predicted_rmse", "converged", "failed"]
        mine = noisy.loc[noisy.start == start, used]
        end, where = ("", "") if start == "random" else ("-near", ", from a start near it")
        common["attacker"] = attackers[start]
        found += [
            claims.judge(
                rows[rows.noise == "none"], lambda t: float((t.mse <= exact).mean()), "image", at_least=share,
                **common, id=f"training-{dataset}-without-noise{end}",
                statement=f"Without noise the attack recovers the image at every stage of training{where}.",
                statistic=f"share of attacks with MSE ≤ {exact:g}", note=claims.settled(rows[rows.noise == "none"]),
            ),
            claims.judge(
                mine, lambda t: claims.worst(t, ["epoch", "noise"], "miss"), "image", at_most=accuracy,
                note=claims.settled(mine),
                only=(f"the predicted RMSE is at most {cut:g}", mine[mine.predicted_rmse <= cut]),
                **common, id=f"training-{dataset}-prediction{end}",
                statement=f"I²F predicts the error of the attack at every stage of training{where}.",
                statistic="median relative error of the predicted RMSE, at the worst checkpoint and kind of noise",
            ),
        ]  # fmt: skip
    return found


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The notebook's table: a row a checkpoint and noise, medians over images."""
    groups = table.groupby(["epoch", "noise", "size", "start"], sort=False)
    medians = groups[["loss", "gradient_norm", "predicted_rmse", "rmse", "bound_rmse"]].median().map("{:.2g}".format)
    counts = groups.agg(
        attacks=("mse", "size"),
        not_converged=("converged", lambda c: int((~c.astype(bool)).sum())),
        failed=("failed", lambda f: int(f.astype(bool).sum())),
    )
    return medians.join(counts).reset_index()
