"""I²F against what attackers recover: Gaussian noise, attackers with and without knowledge of the pixel range."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from i2f.paper import estimates, sweep
from i2f.paper.attackers import ATTACKERS, knows
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.estimates import Estimate
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.statistics import convergence, log_correlation, rank_correlation
from i2f.paper.sweep import Problem, Settings

WHO = ("gauss-newton", "gauss-newton, box", "dgl", "gs")
ERRORS = {"rmse": "RMSE", "rmse_clamped": "PSNR", "dissimilarity": "1 − SSIM", "feature_mse": "feature MSE"}
PREDICTORS = {"predicted_rmse": "I²F", "bound_rmse": "I_lb", "variance": "σ² alone"}
ATTACK = ("attacker", "method", "box", "budget", "start_seed")  # what is not of the noisy gradient
DROPPED = ("root", "noise", "noise_seed", "normalize", "start_seed", "budget", "reconstruction")
DIGITS, DEEP, PHOTOGRAPHS = "digits", "digits, deep", "photographs"  # the table's subjects


def problems(config: Config) -> list[Problem]:
    """Attacks on noisy gradients, each image under one of `weight_seeds`, in rotation, photographs under all.

    config: init, weight_seeds. digits of MNIST's train split from first_digit on meet Gauss–Newton at the noise
    variance `level`; the first first_order_digits DGL and GS as well, if any; the first law_digits all `variances`; the
    first box_digits Gauss–Newton with the box at box_variance. deep_digits: under deep_variance, on deep_network
    ("model init activation"). photographs: of CIFAR-10's test split, under photograph_variance. gauss_newton_steps,
    adam_steps: the attackers' budgets.
    """
    first, seeds = config["first_digit"], config["weight_seeds"]
    digits = {"dataset": "mnist", "split": "train", "model": "lenet", "init": config["init"]}
    model, init, activation = config["deep_network"].split()
    deep = {**digits, "model": model, "init": init, "activation": activation, "normalize": True}
    photographs = {**digits, "dataset": "cifar10", "split": "test"}
    others = [variance for variance in config["variances"] if variance != config["level"]]
    parts: list[tuple[str, Problem, list[tuple[int, int]], Sequence[float]]] = [
        ("gauss-newton", digits, shared.rotated(first, config["digits"], seeds), [config["level"]]),
        ("gauss-newton", digits, shared.rotated(first, config["law_digits"], seeds), others),
        ("gauss-newton, box", digits, shared.rotated(first, config["box_digits"], seeds), [config["box_variance"]]),
        ("dgl", digits, shared.rotated(first, config["first_order_digits"], seeds), [config["level"]]),
        ("gs", digits, shared.rotated(first, config["first_order_digits"], seeds), [config["level"]]),
        ("gauss-newton", deep, shared.rotated(first, config["deep_digits"], seeds), [config["deep_variance"]]),
        (
            "gauss-newton",
            photographs,
            shared.rotated(0, config["photographs"], seeds, crossed=True),
            [config["photograph_variance"]],
        ),
    ]
    return [
        {
            **subject,
            "weight_seed": weight_seed,
            "image": image,
            "noise": "gaussian",
            "size": size,
            "noise_seed": 1000 * weight_seed + image,  # scaled from level to level, so that the variance alone differs
            "attacker": attacker,
            **ATTACKERS[attacker].options,
            "budget": config["adam_steps" if attacker in ("dgl", "gs") else "gauss_newton_steps"],
            "start_seed": image,
        }
        for attacker, subject, pairs, sizes in parts
        for (image, weight_seed), size in itertools.product(pairs, sizes)
    ]


def run(problems: list[Problem], settings: Settings = sweep.DEFAULT) -> Results:
    """One row per attack: what I²F predicts (`problems.predict`), what was recovered (`problems.attack`).

    Further columns: subject, "digits", "digits, deep" or "photographs"; variance σ²; relative_error =
    |RMSE − predicted|/predicted; rmse_clamped (that of PSNR); dissimilarity = 1 − SSIM.
    """
    gradients = [{name: p[name] for name in p if name not in ATTACK} for p in problems]
    network = ("dataset", "model", "weight_seed", "image")
    predicted = sweep.run(shared.predict, gradients, settings, network, at_most=9, description="predictions")
    found = []
    for words, first_order, together, at_most in (
        ("Gauss–Newton", False, (*network, "attacker"), 4),
        ("first order", True, ("dataset", "weight_seed", "attacker"), 20),
    ):
        some = [k for k, p in enumerate(problems) if (p["method"] != "gauss-newton") == first_order]
        if some:
            tasks = [problems[k] for k in some]
            table = sweep.run(shared.attack, tasks, settings, together, at_most, description=words)
            found.append(table.set_index(pd.Index(some)))
    columns = [name for name in predicted if name not in {*itertools.chain(*gradients), "failed", "reason"}]
    table = pd.concat(found).sort_index().join(predicted[columns]).rename(columns={"size": "variance"})
    deep = table.model != "lenet"
    subject = np.where(table.dataset == "cifar10", PHOTOGRAPHS, np.where(deep, DEEP, DIGITS))
    table = table.assign(
        subject=subject,
        relative_error=shared.relative_error(table),
        rmse_clamped=10 ** (-table.psnr / 20),
        dissimilarity=1 - table.ssim,
    )
    return Results({"problems": table.drop(columns=list(DROPPED), errors="ignore")})


def correlations(table: pd.DataFrame) -> pd.DataFrame:
    """Spearman of every predictor with every error over all digits and noise levels, per attacker, and I²F's log–log
    Pearson; 1: ranks perfectly.

    An attacker who met a single noise level has no correlation with the variance.
    """
    table = shared.lost(table[table.subject == DIGITS])
    rows = {}
    for attacker, mine in table.groupby("attacker", sort=False):
        for error, name in ERRORS.items():
            found = {words: rank_correlation(mine, column, error) for column, words in PREDICTORS.items()}
            finite = mine[np.isfinite(mine[error])]
            rows[attacker, name] = found | {"log–log": log_correlation(finite, "predicted_rmse", error)}
    return pd.DataFrame(rows).T.rename_axis(["attacker", "error"])


def agreement(table: pd.DataFrame, cut: float) -> pd.DataFrame:
    """Medians of the measured error over the predicted one, of the relative error and of the bound, per subject and
    attacker, where the predicted RMSE is at most `cut`."""
    table = shared.lost(table[table.predicted_rmse <= cut])
    ratios = table.assign(ratio=table.rmse / table.predicted_rmse, bound=table.predicted_rmse / table.bound_rmse)
    by = ratios.groupby(["subject", "attacker"], sort=False)
    medians = by[["ratio", "relative_error", "bound"]].median()
    names = {"ratio": "measured / predicted", "relative_error": "relative error", "bound": "I²F / I_lb"}
    return medians.rename(columns=names).assign(attacks=by.size(), converged=by.converged.mean())


def ends(table: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """One row per image: `end`, the predicted RMSE at which its relative error first passes `tolerance`, between noise
    levels by log–log lines; 0: at the lowest level already. An image that never passes it is censored at its highest
    level; one with an attack that did not converge before that, at the last level that it met, and not `decided`."""
    found = {}
    for image, rows in table.groupby("image"):
        rows = rows.sort_values("variance")
        ended = rows.converged.astype(bool).to_numpy()
        last = int(np.argmin([*ended, False]))  # levels before the first attack that did not converge
        x = np.log(rows.predicted_rmse.to_numpy())[:last]
        y = np.log(np.maximum(rows.relative_error.to_numpy()[:last], 1e-16))  # an error of zero has no logarithm
        edge = np.log(tolerance)
        beyond = np.flatnonzero(~(y <= edge))
        if not len(beyond):
            found[image] = float(np.exp(x[-1])) if last else 0.0, last == len(rows)
        elif (k := beyond[0]) == 0:
            found[image] = 0.0, True
        else:
            share = (edge - y[k - 1]) / (y[k] - y[k - 1]) if np.isfinite(y[k]) else 0.0
            found[image] = float(np.exp(x[k - 1] + share * (x[k] - x[k - 1]))), True
    return pd.DataFrame(found, index=["end", "decided"]).T


def judge(tables: Tables, thresholds: Thresholds) -> list[Claim]:
    """The experiment's claims. Of the thresholds, `cut` on the predicted RMSE bounds the linear regime, `level` is the
    noise variance at which images are compared, and `tolerance` is the relative error at which the law counts as ended.
    """
    table = tables["problems"]
    judged = Judge.of("influence_vs_attack", "influence_vs_attack", thresholds)
    free = table[table.attacker == "gauss-newton"]
    found = []
    for name, subject in (("accuracy", DIGITS), ("accuracy-photographs", PHOTOGRAPHS), ("accuracy-deep", DEEP)):
        mine = free[free.subject == subject]
        rows = mine[mine.predicted_rmse <= thresholds["cut"]]
        if len(rows):
            found.append(judged(name, *_ratio(rows), kept=len(rows), all=len(mine), **_about(rows)))
    found.append(judged("accuracy-resnet18", None))
    digits = table[table.subject == DIGITS]
    law = free[(free.subject == DIGITS) & free.image.isin(_every(free, thresholds["variances"]))]
    if len(law):
        found_ends = ends(law, thresholds["tolerance"])
        about = {"censored": int((found_ends.end >= law.groupby("image").predicted_rmse.max()).sum()), **_about(law)}
        about["decided"] = f"{found_ends.decided.mean():.0%}"
        found.append(judged("end", estimates.median(found_ends.end), float(found_ends.decided.mean()), **about))
    boxed = digits[digits.attacker == "gauss-newton, box"]
    if len(boxed):
        found.append(judged("box", *_ratio(boxed), **_about(boxed)))
    compared = digits[digits.variance == thresholds["level"]]
    for number, attacker in enumerate(("gauss-newton", "dgl", "gs"), 9):
        mine = compared[compared.attacker == attacker]
        # Gauss–Newton is judged where it ended; a first-order attack at its published budget, however it ended
        rows = mine[mine.converged.astype(bool)] if attacker == "gauss-newton" else shared.lost(mine)
        about = {"number": number, "attacker": attacker, "suffix": f"-{attacker}"}
        if not len(rows):
            found.append(judged("order", None, **about))
        else:
            groups = [(one.predicted_rmse, one.rmse) for _, one in rows.groupby("weight_seed")]
            low, high = estimates.resampled(estimates.ordered, rows[["predicted_rmse", "rmse"]]).interval
            about |= {"bca": f"[{low:.2f}, {high:.2f}]", **_about(mine)}
            finished = mine.converged.mean() if attacker == "gauss-newton" else 1 - mine.failed.astype(bool).mean()
            found.append(judged("order", estimates.rank_correlation(groups), finished, **about))
    below = shared.lost(compared).assign(below=lambda t: t.rmse < t.bound_rmse).groupby("image").below.any()
    met = ", ".join(f"{attacker} {len(rows)}" for attacker, rows in compared.groupby("attacker", sort=False))
    exact = compared[compared.attacker == "gauss-newton"]
    attackers = "; ".join(map(knows, compared.attacker.unique()))
    found.append(judged("bound", estimates.share(below), exact.converged.mean(), attacker=attackers, met=met))
    return found


def _ratio(rows: pd.DataFrame) -> tuple[Estimate, float]:
    """The geometric mean over images of the measured error over the predicted one, of the attacks that converged, and
    their share."""
    done = rows[rows.converged.astype(bool)]
    logarithm = np.log(done.rmse / done.predicted_rmse)
    return estimates.geometric_mean(np.exp(logarithm.groupby(done.image).mean())), len(done) / len(rows)


def _about(rows: pd.DataFrame) -> dict[str, Any]:
    near = (rows.relative_error <= 0.05).groupby(rows.image).all()
    return {"converged": convergence(rows), "near": f"{near.mean():.0%}"}


def _every(table: pd.DataFrame, variances: Sequence[float]) -> list[int]:
    """The digits that met every noise level."""
    met = table[table.subject == DIGITS].groupby("image").variance.nunique()
    return list(met.index[met == len(variances)])
