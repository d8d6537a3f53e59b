"""Several images behind one gradient: does a batch hide its members, and if so, by averaging or by mixing?

The gradient of a batch is a mean, so that J is the images' own Jacobians, stacked and divided by B. For Gaussian noise
the expected squared error of one image i is σ² tr[(J Jᵀ)⁻¹]_ii, its block of the inverse. Two things make it grow:

    averaging   an image's share of the gradient shrinks as 1/B: the RMSE grows by B, under noise of fixed size
    mixing      the images' Jacobians are not orthogonal: [G⁻¹]_ii ≥ (G_ii)⁻¹, the rest, at least 1

A sender who shares the sum instead of the mean loses the averaging and keeps the mixing.
"""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from i2f.attacks import invert
from i2f.core import metrics, spectrum
from i2f.core.influence import influence
from i2f.core.jacobian import GradientJacobian
from i2f.paper import estimates, sweep
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.rows import declare
from i2f.paper.statistics import convergence
from i2f.paper.sweep import Problem, Row, Settings

NONE, FIXED = PARTS = ("no noise", "fixed")  # a problem's `part`: what is added to the gradient
LEVELS = 40  # eigenvalues that a table keeps of a spectrum, evenly spread over its ranks
ENDED = ("evaluations", "relative_residual", "steps", "converged", "matched", "failed", "reason")  # how an attack ended


def problems(config: Config) -> list[Problem]:
    """For each batch size, the first `looked` batches of it, those of the first `attacked` under attack.

    The largest batches first, so that they do not come last in a queue. The same images under the same weights make
    batches of every size: the weight seed of a largest batch is 1 + its number % weight_seeds, and smaller batches have
    that of the largest batch in which they lie.

    config: dataset, init; first_digit, of MNIST's train split; sizes; looked, attacked: how many batches of each size;
    weight_seeds; variance: σ² of the noise; gauss_newton_steps: the attack's budget.
    """
    counts = zip(config["sizes"], config["looked"], config["attacked"], strict=True)
    common = {**shared.setting(config), "split": "train", "budget": config["gauss_newton_steps"]}
    found = []
    for batch, looked, attacked in sorted(counts, reverse=True):
        for number in range(looked):
            image = config["first_digit"] + batch * number
            weight_seed = 1 + batch * number // max(config["sizes"]) % config["weight_seeds"]
            unit = {"weight_seed": weight_seed, "batch": batch, "image": image, "start_seed": image}
            unit |= {"attacked": number < attacked, "noise_seed": 1000 * weight_seed + image}
            for part, noise, size in ((NONE, "none", 0.0), (FIXED, "gaussian", config["variance"])):
                if unit["attacked"] or part == FIXED:  # without noise there is nothing to predict
                    found.append({**common, **unit, "part": part, "noise": noise, "size": size})
    return found


def run(problems: list[Problem], settings: Settings = sweep.DEFAULT) -> Results:
    """Spectrum, prediction and, where `attacked`, Gauss–Newton with the labels known.

    problems: one row per image of a batch and `part`. first: the batch's first image. d_x, rank, lambda_max,
    lambda_min, and what the attack says of itself are the batch's. The image's, per pixel: expected_rmse =
    √(E[I²]/pixels), NaN where J Jᵀ is singular; predicted_rmse, Eq. 4 for this noise; mse and rmse of the attack under
    the best assignment. spectra: (batch, image, share, eigenvalue), image: the first of the batch.
    """
    table = sweep.run(solve, problems, settings, shared.SETTING, at_most=len(PARTS), whole=True, description="batches")
    spectra = table.loc[table.spectrum.notna(), ["batch", "image", "spectrum"]].explode("spectrum", ignore_index=True)
    spectra["share"], spectra["eigenvalue"] = zip(*spectra.pop("spectrum"), strict=True)
    table = table.assign(first=table.image, image=table.image + table.member)
    return Results({"problems": table.drop(columns=["member", "spectrum"]), "spectra": spectra})


@declare("problems", defaults=shared.DEFAULTS)
def solve(chunk: list[Problem]) -> list[list[Row]]:
    """The rows of a chunk, whose problems are about one batch under one network: the costly part is done once."""
    J = shared.jacobian(chunk[0])
    seen = look(J)
    return [_rows(J, seen, problem) for problem in chunk]


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


def _rows(J: GradientJacobian, seen: Look, problem: Problem) -> list[Row]:
    """One row per image; the first one of a batch under noise of fixed size holds the spectrum, (share of d_x, λ)."""
    d_x, batch = J.shape[0], len(J.x)
    own: Row = {"d_x": d_x, "rank": seen.rank, "lambda_max": seen.values[0], "lambda_min": seen.values[-1]}
    each = {"expected_rmse": np.sqrt(problem["size"] * seen.inverse * batch / d_x)}
    each |= dict.fromkeys(("predicted_rmse", "mse", "rmse"), np.full(batch, np.nan))
    own |= {"converged": False}
    if problem["attacked"]:
        delta = shared.perturbation(J, problem)
        moved = influence(J, delta).displacement.view_as(J.x)
        each["predicted_rmse"] = metrics.rmse(J.x + moved, J.x).cpu().numpy()
        options = {"steps": problem["budget"], "seed": problem["start_seed"]}
        found = invert(J.map.model, J.gradient + delta, J.map.y, J.x.shape, **options)
        own |= {name: getattr(found, name) for name in ENDED}
        own["failed"] = found.failed or not bool(found.x.isfinite().all())
        if not own["failed"]:
            mse = metrics.mse(metrics.assign(found.x, J.x), J.x).clamp_min(shared.FLOOR).cpu().numpy()
            each |= {"mse": mse, "rmse": np.sqrt(mse)}
    rows: list[Row] = [
        {"member": member, **own, **{name: values[member] for name, values in each.items()}} for member in range(batch)
    ]
    if problem["part"] == FIXED:
        ranks = np.linspace(0, d_x - 1, LEVELS).round().astype(int)
        rows[0]["spectrum"] = [((k + 1) / d_x, seen.values[k]) for k in ranks]
    return rows


def ratios(table: pd.DataFrame, batch: int) -> pd.DataFrame:
    """Expected RMSE of an image in a batch of B over that of the same image alone, under the same weights, and what of
    it is averaging: one row per batch.

    Columns: total, the geometric mean over the batch's images; mixing = total / B; share = log B / log total. Where the
    batch's J Jᵀ is singular, the expected error is infinite, and averaging has no share in that.
    """
    fixed = table[table.part == FIXED].set_index(["image", "weight_seed"])
    logarithm = np.log(fixed.expected_rmse.where(fixed["rank"] == fixed.d_x, np.inf))
    together = fixed.batch == batch
    gain = logarithm[together] - logarithm[fixed.batch == 1].reindex(fixed.index[together])
    total = np.exp(gain.groupby(fixed["first"][together]).mean())
    return pd.DataFrame({"total": total, "mixing": total / batch, "share": np.log(batch) / np.log(total)})


def summary(table: pd.DataFrame, exact: float) -> pd.DataFrame:
    """One column per batch size: over batches, or medians over images; a dash where nothing was attacked."""
    columns = {}
    for batch, mine in table.groupby("batch"):
        none, fixed = (mine[mine.part == part] for part in PARTS)
        spread = fixed.groupby("first").expected_rmse.agg(lambda e: e.max() / e.min())
        columns[batch] = {
            "batches": fixed["first"].nunique(),
            "smallest rank of J / d_x": (mine["rank"] / mine.d_x).min(),
            "smallest λ": mine.lambda_min.min(),
            "recovered whole without noise": recovered(none, exact).mean(),
            "expected RMSE": fixed.expected_rmse.median(),
            "expected RMSE / alone": ratios(table, int(batch)).total.median(),
            "RMSE of the attack": fixed.rmse.median(),
            "largest / smallest in a batch": spread.median(),
        }
    return pd.DataFrame(columns).rename_axis(columns="batch size").map(lambda v: "–" if np.isnan(v) else f"{v:.3g}")


def recovered(table: pd.DataFrame, exact: float) -> pd.Series:
    """By batch, whether every image of it was found to an MSE of `exact`."""
    return (table.mse <= exact).groupby(table["first"]).all()


def judge(tables: Tables, thresholds: Thresholds) -> list[Claim]:
    """The experiment's claims; the units are batches. Of the thresholds, `compared` is the batch size that is compared
    with single images, and `cut` on the predicted RMSE bounds the linear regime."""
    table, judged, found = tables["problems"], Judge.of("batch_size", "batch_size", thresholds), []
    attacks = table[table.attacked]
    plain = attacks[(attacks.part == NONE) & (attacks.batch == 2)]
    if len(plain):
        found.append(judged("recovered", estimates.share(recovered(plain, thresholds["exact"])), **_ended(plain)))
    compared = ratios(table, int(thresholds["compared"]))
    ratio = estimates.geometric_mean(compared.total).value
    found.append(judged("averaging", estimates.mean(compared.share), ratio=ratio))
    pairs = attacks[(attacks.part == FIXED) & (attacks.batch == 2) & (attacks.predicted_rmse <= thresholds["cut"])]
    done = pairs[pairs.converged.eq(True)]
    if len(done):
        logarithm = np.log(done.rmse / done.predicted_rmse).groupby(done["first"]).mean()
        found.append(judged("prediction", estimates.geometric_mean(np.exp(logarithm)), **_ended(pairs)))
    return found


def _ended(rows: pd.DataFrame) -> dict[str, Any]:
    """How many of the attacks, one per batch, converged."""
    attacks = rows.drop_duplicates("first")
    return {"finished": float(attacks.converged.eq(True).mean()), "converged": convergence(attacks)}
