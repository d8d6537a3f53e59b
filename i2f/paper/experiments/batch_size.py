"""Several images behind one gradient: does a batch hide its members, and if so, by averaging or by mixing?

The gradient of a batch is a mean, so that J is the images' own Jacobians, stacked and divided by B. For Gaussian noise
the expected squared error of one image i is σ² tr[(J Jᵀ)⁻¹]_ii, its block of the inverse. Two things make it grow:

    averaging   an image's share of the gradient shrinks as 1/B: the RMSE grows by B, under noise of fixed size
    mixing      the images' Jacobians are not orthogonal: [G⁻¹]_ii ≥ (G_ii)⁻¹, the rest, at least 1

Noise of variance σ²/B², as if the sum were sent and not the mean, takes the averaging out and leaves the mixing.
"""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from i2f.attacks import Reconstruction, invert_many
from i2f.core import metrics, spectrum
from i2f.core.influence import influence
from i2f.core.jacobian import GradientJacobian
from i2f.paper import claims, sweep
from i2f.paper.experiments import problems as shared
from i2f.paper.sweep import Problem, Row

NONE, FIXED, SCALED = "no noise", "fixed", "over B²"  # a problem's `part`: what is added to the gradient
LEVELS = 40  # eigenvalues that a table keeps of a spectrum, evenly spread over its ranks
EACH = ("image", "expected_rmse", "predicted_rmse", "mse", "rmse")  # columns with a value for each image of the batch


def problems(
    sizes: Sequence[int], looked: Sequence[int], attacked: Sequence[int], variance: float, group: int
) -> list[Problem]:
    """For each batch size, the batches that the first `looked` images make, those of the first `attacked` under attack.

    `variance`: σ² at B = 1. `group`: so many neighbours are a set, the unit where batch sizes are compared; every batch
    has a noise draw of its own. The largest batches first, so that they do not come last in a queue.
    """
    found = []
    for batch, seen, hit in sorted(zip(sizes, looked, attacked, strict=True), reverse=True):
        for image in range(0, seen - batch + 1, batch):
            under_attack = image + batch <= hit
            for part, size in ((NONE, 0.0), (FIXED, variance), (SCALED, variance / batch**2)):
                if (part == NONE and not under_attack) or (part == SCALED and batch == 1):
                    continue  # nothing to see; the same as FIXED
                found.append(
                    {"part": part, "batch": batch, "image": image, "set": image // group, "attacked": under_attack,
                     "noise": "none" if part == NONE else "gaussian", "size": size, "noise_seed": image}
                )  # fmt: skip
    return found


class Look(NamedTuple):
    """What a spectrum says. inverse: tr[(J Jᵀ)⁻¹]_ii of each image, (B,), NaN if singular. values: λ, descending."""

    inverse: np.ndarray
    values: np.ndarray
    rank: int


@lru_cache(maxsize=1)
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


def run(
    tasks: Sequence[Problem], setting: dict[str, Any], steps: int, seed: int, jobs: int | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Spectrum, prediction and, where `attacked`, Gauss–Newton with the labels known. `setting`: data and network.

    Returns (table, spectra). table: a row an image of a batch and a `part`. d_x, rank, lambda_max, lambda_min, and
    converged and failed are the batch's. The image's, per pixel: expected_rmse = √(E[I²]/pixels); predicted_rmse, Eq. 4
    for this noise; mse and rmse of the attack under the best assignment. spectra: (batch, image, share, eigenvalue).
    """
    together = ("batch", "image")  # they share J
    solve = partial(_solve, setting, steps, seed)
    table = sweep.run(solve, tasks, together, at_most=3, jobs=jobs, whole=True, description="batches")
    batches = table.drop_duplicates(list(together))
    spectra = batches[["batch", "image", "spectrum"]].explode("spectrum", ignore_index=True)
    spectra["share"], spectra["eigenvalue"] = zip(*spectra.pop("spectrum"), strict=True)
    table = table.drop(columns=["spectrum", "noise", "noise_seed", "reason"]).rename(columns={"size": "variance"})
    table = table.explode(["member", *EACH[1:]], ignore_index=True)
    table["image"] += table.pop("member").astype(int)
    return table.astype(dict.fromkeys(EACH[1:], float)), spectra


def _solve(setting: dict[str, Any], steps: int, seed: int, chunk: list[Problem]) -> list[Row]:
    """A chunk has one batch of images, attacked in all its problems or in none."""
    J = shared.jacobian({**setting, **chunk[0]})
    rows = [_seen(J, p["size"]) for p in chunk]
    if not chunk[0]["attacked"]:
        return rows
    deltas = torch.stack([shared.perturbation(J, p) for p in chunk])
    labels = J.map.y.expand(len(chunk), -1)
    attacks = invert_many(J.map.model, J.gradient + deltas, labels, J.x.shape, steps=steps, seed=seed)
    return [row | _attacked(J, delta, found) for row, delta, found in zip(rows, deltas, attacks, strict=True)]


def _seen(J: GradientJacobian, variance: float) -> Row:
    seen, batch = look(J), len(J.x)
    nothing = np.full(batch, np.nan)
    ranks = np.linspace(0, J.shape[0] - 1, LEVELS).round().astype(int)
    return {
        "d_x": J.shape[0], "rank": seen.rank, "lambda_max": seen.values[0], "lambda_min": seen.values[-1],
        "spectrum": [((k + 1) / J.shape[0], seen.values[k]) for k in ranks],
        "member": np.arange(batch), "expected_rmse": np.sqrt(variance * seen.inverse * batch / J.shape[0]),
        "predicted_rmse": nothing, "mse": nothing, "rmse": nothing, "converged": False, "failed": False,
    }  # fmt: skip


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
    """A row a batch size: medians over images, in pixels; a dash where nothing was attacked."""
    rows = {}
    for batch, mine in table.groupby("batch"):
        parts = {part: mine[mine.part == (FIXED if batch == 1 and part == SCALED else part)] for part in PARTS}
        fixed = parts[FIXED]
        spread = fixed.groupby(fixed.image // batch).expected_rmse.agg(lambda e: e.max() / e.min())
        rows[batch] = {
            "images": fixed.image.nunique(), "rank of J / d_x": (mine["rank"] / mine.d_x).min(),
            "smallest λ": mine.lambda_min.min(),
            "recovered without noise": (parts[NONE].mse <= exact).mean() if len(parts[NONE]) else np.nan,
            **{f"RMSE {kind}, {part}": parts[part][f"{kind}_rmse" if kind == "expected" else "rmse"].median()
               for part in (FIXED, SCALED) for kind in ("expected", "attack")},
            "largest / smallest in a batch": spread.median(),
        }  # fmt: skip
    return pd.DataFrame(rows).rename_axis(columns="batch size").map(lambda v: "–" if np.isnan(v) else f"{v:.2g}")


PARTS = (NONE, FIXED, SCALED)


def judge(
    table: pd.DataFrame, dataset: str, exact: float, share: float, batch: int, hidden: float, averaging: float,
    accuracy: float, cut: float,
) -> list[claims.Claim]:  # fmt: skip
    """The experiment's claims. The thresholds are the notebook's parameters; `batch` is the one set beside B = 1."""
    attacker = {"attacker": "gauss-newton: knows model and labels, no prior, random start"}
    nobody = {"attacker": "none: expectations of I²F over the noise"}
    compared = ratios(table, batch)
    attacked = table[table.attacked].assign(attack=lambda t: t.image // t.batch)  # one a batch: the unit of its claims
    noisy = attacked[attacked.part != NONE].assign(miss=shared.relative_error)
    found = [
        claims.judge(
            rows, lambda t: float((t.mse <= exact).mean()), "attack", at_least=share, **attacker,
            id=f"batch_size-{dataset}-recovered-{size}",
            statement=f"Without noise, the gradient of {size} images gives them all away." if size > 1
            else "Without noise, the gradient of one image gives it away.",
            source="section 3, the assumption G_r(∇L(x)) ≡ x", statistic=f"share of images with an MSE ≤ {exact:g}",
        )
        for size, rows in attacked[attacked.part == NONE].groupby("batch")
    ]  # fmt: skip
    return [
        *found,
        claims.judge(
            table, lambda t: float((t["rank"] / t.d_x).min()), "set", at_least=1.0, **nobody,
            id=f"batch_size-{dataset}-rank", statement="To first order the gradient of a batch determines every pixel.",
            source="section 3, where J Jᵀ is inverted", statistic="smallest rank / d_x",
            note=f"batches of up to {table.batch.max()}",
        ),
        claims.judge(
            compared, lambda t: float(t.total.median()), "set", at_least=hidden, **nobody,
            id=f"batch_size-{dataset}-hides", statement="Under noise of fixed size, a batch hides its members.",
            source="Eq. 4", statistic=f"expected RMSE in a batch of {batch} / alone, median over images",
            note=f"cannot be below {batch}: averaging alone",
        ),
        claims.judge(
            compared, lambda t: float(t.share.median()), "set", at_least=averaging, **nobody,
            id=f"batch_size-{dataset}-averaging", statement="A batch hides by averaging more than by mixing.",
            source="Eq. 4", statistic=f"log {batch} / log of the ratio, median over images",
            note="what noise of variance σ²/B² leaves is mixing",
        ),
        *(
            claims.judge(
                rows, lambda t: float(t.miss.median()), "attack", at_most=accuracy,
                only=(f"the predicted RMSE is at most {cut:g}", rows[rows.predicted_rmse <= cut]), **attacker,
                id=f"batch_size-{dataset}-prediction-{size}",
                statement=f"I²F predicts the error of each image behind a gradient of {size}.", source="Eq. 4",
                statistic="median relative error of the predicted RMSE",
                note=claims.settled(rows[rows.image % size == 0]),  # one attack a batch
            )
            for size, rows in noisy[noisy.batch > 1].groupby("batch")
        ),
    ]  # fmt: skip
