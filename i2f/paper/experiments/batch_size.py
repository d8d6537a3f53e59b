"""Several images behind one gradient: does a batch hide its members, and if so, by averaging or by mixing?

The gradient of a batch is a mean, so that J is the images' own Jacobians, stacked and divided by B. For Gaussian noise
the expected squared error of one image i is σ² tr[(J Jᵀ)⁻¹]_ii, its block of the inverse. Two things make it grow:

    averaging   an image's share of the gradient shrinks as 1/B: the RMSE grows by B, under noise of fixed size
    mixing      the images' Jacobians are not orthogonal: [G⁻¹]_ii ≥ (G_ii)⁻¹, the rest, at least 1

Noise of variance σ²/B², as if the sum were sent and not the mean, takes the averaging out and leaves the mixing.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from i2f.attacks import Reconstruction, invert_many
from i2f.core import metrics, spectrum
from i2f.core.influence import influence
from i2f.core.jacobian import GradientJacobian
from i2f.paper import sweep
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.statistics import convergence, median, share
from i2f.paper.sweep import Problem, Row, Settings

NONE, FIXED, SCALED = PARTS = ("no noise", "fixed", "over B²")  # a problem's `part`: what is added to the gradient
LEVELS = 40  # eigenvalues that a table keeps of a spectrum, evenly spread over its ranks
EACH = ("image", "expected_rmse", "predicted_rmse", "mse", "rmse")  # columns with a value for each image of the batch
UNPUBLISHED = ("split", "root", "init", "weight_seed", "steps", "start_seed", "noise", "noise_seed")


def problems(config: Config) -> list[Problem]:
    """For each batch size, the batches that the first `looked` images make, those of the first `attacked` under attack.

    The largest batches first, so that they do not come last in a queue. Every batch has a noise draw of its own.

    config: dataset, split, init, weight_seed; sizes, looked, attacked: a number for each batch size; variance: σ² at
    B = 1; group: so many neighbours are a set, the unit where batch sizes are compared; steps, start_seed: of attacks.
    """
    common = {**shared.setting(config), "steps": config["steps"], "start_seed": config["start_seed"]}
    variance, counts = config["variance"], zip(config["sizes"], config["looked"], config["attacked"], strict=True)
    found = []
    for batch, looked, attacked in sorted(counts, reverse=True):
        for image in range(0, looked - batch + 1, batch):
            under_attack = image + batch <= attacked
            for part, size in ((NONE, 0.0), (FIXED, variance), (SCALED, variance / batch**2)):
                if (part == NONE and not under_attack) or (part == SCALED and batch == 1):
                    continue  # nothing to see; the same as FIXED
                noise = {"noise": "none" if part == NONE else "gaussian", "size": size, "noise_seed": image}
                place = {"part": part, "batch": batch, "image": image, "set": image // config["group"]}
                found.append({**common, **place, "attacked": under_attack, **noise})
    return found


def run(problems: list[Problem], settings: Settings = sweep.DEFAULT) -> Results:
    """Spectrum, prediction and, where `attacked`, Gauss–Newton with the labels known.

    problems: one row per image of a batch and `part`. d_x, rank, lambda_max, lambda_min, and converged and failed are
    the batch's. The image's, per pixel: expected_rmse = √(E[I²]/pixels); predicted_rmse, Eq. 4 for this noise; mse and
    rmse of the attack under the best assignment. spectra: (batch, image, share, eigenvalue).
    """
    together = ["batch", "image"]  # they share J
    table = sweep.run(_solve, problems, settings, together, at_most=3, whole=True, description="batches")
    batches = table.drop_duplicates(together)
    spectra = batches[["batch", "image", "spectrum"]].explode("spectrum", ignore_index=True)
    spectra["share"], spectra["eigenvalue"] = zip(*spectra.pop("spectrum"), strict=True)
    table = table.drop(columns=["spectrum", "reason", *UNPUBLISHED], errors="ignore").rename(
        columns={"size": "variance"}
    )
    table = table.explode(["member", *EACH[1:]], ignore_index=True)
    table["image"] += table.pop("member").astype(int)
    return Results({"problems": table.astype(dict.fromkeys(EACH[1:], float)), "spectra": spectra})


def _solve(chunk: list[Problem]) -> list[Row]:
    """A chunk has one batch of images, attacked in all its problems or in none."""
    first = chunk[0]
    J = shared.jacobian(first)
    seen = look(J)
    rows = [_unattacked(J, seen, p["size"]) for p in chunk]
    if not first["attacked"]:
        return rows
    deltas = torch.stack([shared.perturbation(J, p) for p in chunk])
    labels, options = J.map.y.expand(len(chunk), -1), {"steps": first["steps"], "seed": first["start_seed"]}
    attacks = invert_many(J.map.model, J.gradient + deltas, labels, J.x.shape, **options)
    return [row | _attacked(J, delta, found) for row, delta, found in zip(rows, deltas, attacks, strict=True)]


class Look(NamedTuple):
    """What a spectrum says. inverse: tr[(J Jᵀ)⁻¹]_ii of each image, (B,), NaN if singular. values: λ, descending."""

    inverse: NDArray[np.float64]
    values: NDArray[np.float64]
    rank: int


def look(J: GradientJacobian) -> Look:
    """By Cholesky and without eigenvectors: a fraction of the cost of `spectrum.decompose`."""
    gram = J.gram()
    values = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    rank = int((values > spectrum.zero_level(J) * values[0]).sum())
    factor, broken = torch.linalg.cholesky_ex(gram)
    inverse = torch.full((len(J.x),), torch.nan, dtype=gram.dtype)
    if not int(broken) and rank == len(gram):
        inverse = torch.cholesky_inverse(factor).diagonal().view(len(J.x), -1).sum(1)
    return Look(inverse.cpu().numpy(), values.cpu().numpy(), rank)


def _unattacked(J: GradientJacobian, seen: Look, variance: float) -> Row:
    batch, nothing = len(J.x), np.full(len(J.x), np.nan)
    ranks = np.linspace(0, J.shape[0] - 1, LEVELS).round().astype(int)
    return {
        "d_x": J.shape[0],
        "rank": seen.rank,
        "lambda_max": seen.values[0],
        "lambda_min": seen.values[-1],
        "spectrum": [((k + 1) / J.shape[0], seen.values[k]) for k in ranks],
        "member": np.arange(batch),
        "expected_rmse": np.sqrt(variance * seen.inverse * batch / J.shape[0]),
        **dict.fromkeys(("predicted_rmse", "mse", "rmse"), nothing),
        "converged": False,
        "failed": False,
    }


def _attacked(J: GradientJacobian, delta: Tensor, found: Reconstruction) -> Row:
    moved = influence(J, delta).displacement.view_as(J.x)
    row = {"predicted_rmse": metrics.rmse(J.x + moved, J.x).cpu().numpy(), "converged": found.converged}
    if found.failed or not found.x.isfinite().all():
        return row | {"failed": True}
    mse = metrics.mse(metrics.assign(found.x, J.x), J.x).clamp_min(shared.FLOOR).cpu().numpy()
    return row | {"mse": mse, "rmse": np.sqrt(mse)}


def ratios(table: pd.DataFrame, batch: int) -> pd.DataFrame:
    """Expected RMSE of an image in a batch of B over that of the same image alone, and what of it is averaging.

    Columns: set, image; total = averaging · mixing, averaging = B; share = log B / log total. Where the batch's J Jᵀ is
    singular, the expected error is infinite, and averaging has no share in that.
    """
    fixed = table[table.part == FIXED]
    singular = fixed["rank"] < fixed.d_x
    fixed = fixed.assign(expected_rmse=fixed.expected_rmse.mask(singular, np.inf))
    wide = fixed.pivot_table(index=["set", "image"], columns="batch", values="expected_rmse").dropna(subset=[1, batch])
    total = wide[batch] / wide[1]
    return pd.DataFrame({"total": total, "mixing": total / batch, "share": np.log(batch) / np.log(total)}).reset_index()


def summary(table: pd.DataFrame, exact: float) -> pd.DataFrame:
    """One column per batch size: medians over images, in pixels; a dash where nothing was attacked."""
    columns = {}
    for batch, mine in table.groupby("batch"):
        # one image alone has no part of its own for noise of variance over B²
        parts = {part: mine[mine.part == (FIXED if batch == 1 and part == SCALED else part)] for part in PARTS}
        fixed = parts[FIXED]
        spread = fixed.groupby(fixed.image // batch).expected_rmse.agg(lambda e: e.max() / e.min())
        columns[batch] = {
            "images": fixed.image.nunique(),
            "rank of J / d_x": (mine["rank"] / mine.d_x).min(),
            "smallest λ": mine.lambda_min.min(),
            "recovered without noise": (parts[NONE].mse <= exact).mean() if len(parts[NONE]) else np.nan,
        }
        for part in (FIXED, SCALED):
            columns[batch][f"RMSE expected, {part}"] = parts[part].expected_rmse.median()
            columns[batch][f"RMSE attack, {part}"] = parts[part].rmse.median()
        columns[batch]["largest / smallest in a batch"] = spread.median()
    return pd.DataFrame(columns).rename_axis(columns="batch size").map(lambda v: "–" if np.isnan(v) else f"{v:.2g}")


def judge(tables: Tables, thresholds: Thresholds, dataset: str) -> list[Claim]:
    """The experiment's claims. Of the thresholds, `batch` is the batch size that is compared with B = 1."""
    table = tables["problems"]
    compared = ratios(table, int(thresholds["batch"]))
    attacked = table[table.attacked]
    attacked = attacked.assign(attack=attacked.image // attacked.batch)  # one per batch: the unit of its claims
    noisy = attacked[attacked.part != NONE]
    noisy = noisy.assign(miss=shared.relative_error(noisy))
    judged = Judge.of("batch_size", f"batch_size-{dataset}", thresholds)
    recovered = partial(share, column="mse", at_most=thresholds["exact"])
    found = []
    for size, rows in attacked[attacked.part == NONE].groupby("batch"):
        gives = f"{size} images gives them all away" if size > 1 else "one image gives it away"
        found.append(judged("recovered", rows, recovered, suffix=f"-{size}", gives=gives))
    found += [
        judged("rank", table, lambda t: float((t["rank"] / t.d_x).min()), largest=table.batch.max()),
        judged("hides", compared, partial(median, column="total")),
        judged("averaging", compared, partial(median, column="share")),
    ]
    for size, rows in noisy[noisy.batch > 1].groupby("batch"):
        linear = rows[rows.predicted_rmse <= thresholds["cut"]]
        converged = convergence(rows[rows.image % size == 0])  # one attack per batch
        found.append(
            judged(
                "prediction",
                rows,
                partial(median, column="miss"),
                linear,
                suffix=f"-{size}",
                size=size,
                converged=converged,
            )
        )
    return found
