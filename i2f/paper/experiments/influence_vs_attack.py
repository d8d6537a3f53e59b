"""I²F against what attackers recover: Gaussian noise of growing variance, bounded and unbounded attackers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from i2f.paper import sweep
from i2f.paper.attackers import ATTACKERS, knows
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.statistics import Statistic, convergence, log_correlation, rank_correlation, worst
from i2f.paper.sweep import Problem, Settings

WHO = ("gauss-newton", "gauss-newton, box", "dgl", "gs")
ERRORS = {"rmse": "RMSE", "rmse_clamped": "PSNR", "dissimilarity": "1 − SSIM", "feature_mse": "feature MSE"}
ATTACK = ("attacker", "method", "box", "budget", "start_seed", "dampings")  # what is not of the noisy gradient
JUDGED = ["image", "variance", "predicted_rmse", "rmse", "relative_error", "bound_rmse"]  # few: fast to resample


def problems(config: Config) -> dict[str, list[Problem]]:
    """The attacks, by table: "problems", and "deep" where a deep network is asked for.

    config: dataset, split, root, init, weight_seed, start_seed; model and its images, linear_images of one linear
    layer, variances, level, level_images (see `noisy`); attackers, the first of whom meets every model, the others the
    first one alone; gauss_newton_steps, adam_steps: their budgets; dampings: ε of damped I²F. deep_network: "model init
    activation", attacked by Gauss–Newton alone, with deep_steps, on deep_images under deep_variances.
    """
    setting = shared.setting(config) | {"root": config.get("root") or None}
    own = {"start_seed": config["start_seed"], "dampings": list(config["dampings"])}
    steps = {"gauss-newton": config["gauss_newton_steps"], "dgl": config["adam_steps"], "gs": config["adam_steps"]}
    models = {config["model"]: config["images"]}
    models |= {"linear": config["linear_images"]} if config["linear_images"] else {}
    gradients = noisy(setting, models, config["variances"], config["level"], config["level_images"])
    found = {"problems": _confront(gradients, config["attackers"], steps, own)}
    if config["deep_images"]:
        model, init, activation = config["deep_network"].split()
        setting |= {"init": init, "activation": activation, "normalize": True}
        gradients = noisy(setting, {model: config["deep_images"]}, config["deep_variances"])
        found["deep"] = _confront(gradients, ["gauss-newton"], {"gauss-newton": config["deep_steps"]}, own)
    return found


def noisy(
    setting: Problem,
    models: Mapping[str, int],
    variances: Sequence[float],
    level: float | None = None,
    level_images: int = 0,
) -> list[Problem]:
    """Noisy gradients: every variance for the first images, `level` alone for the further ones of the first model.

    setting: data set and network, as in `experiments.problems`. models: name -> how many images get every variance.
    The noise of an image is its own draw, scaled: what differs between its levels is the variance alone.
    """
    if level is not None and level not in variances:
        raise ValueError(f"level={level:g} is not among the variances {variances}: choose one of them")
    found = []
    for number, (model, images) in enumerate(models.items()):
        for image in range(max(images, 0 if number else level_images)):
            sizes = list(variances) if image < images else [level]
            own = {"model": model, "image": image, "noise": "gaussian", "noise_seed": image, "size": sizes}
            found += sweep.grid(**{**setting, **own})
    return found


def _confront(
    gradients: list[Problem], attackers: Sequence[str], steps: Mapping[str, int], own: Problem
) -> list[Problem]:
    """Images with a single noise level meet only attackers without a box, whose steps are cheaper."""
    levels = Counter((p["model"], p["image"]) for p in gradients)
    found = []
    for name in attackers:
        options = ATTACKERS[name].options
        for p in gradients:
            whole = levels[p["model"], p["image"]] == max(levels.values())
            if (p["model"] == gradients[0]["model"] or name == attackers[0]) and (whole or not options["box"]):
                found.append({**p, "attacker": name, **options, "budget": steps[options["method"]], **own})
    return found


def run(problems: Mapping[str, list[Problem]], settings: Settings = sweep.DEFAULT) -> Results:
    """Per table, one row per attack: what I²F predicts (`problems.predict`), what was recovered (`problems.attack`).

    Further columns: variance σ²; relative_error = |RMSE − predicted|/predicted; rmse_clamped (that of PSNR);
    dissimilarity = 1 − SSIM.
    """
    return Results({name: _attack(tasks, settings) for name, tasks in problems.items()})


def _attack(tasks: list[Problem], settings: Settings) -> pd.DataFrame:
    columns = [name for name in tasks[0] if name not in ATTACK]
    gradients = [dict(p) for p in dict.fromkeys(tuple((name, p[name]) for name in columns) for p in tasks)]
    gradients = [{**p, "dampings": tasks[0]["dampings"]} for p in gradients]
    tasks = [{name: p[name] for name in p if name != "dampings"} for p in tasks]
    predicted = sweep.run(
        shared.predict, gradients, settings, ("model", "image"), at_most=len(gradients), description="predictions"
    )
    found = []
    for words, first_order, together, at_most in (
        ("gauss-newton", False, ("model", "image", "attacker"), 4),
        ("first order", True, ("model", "attacker"), 32),
    ):
        some = [p for p in tasks if (p["method"] != "gauss-newton") == first_order]
        if some:
            found.append(sweep.run(shared.attack, some, settings, together, at_most, description=words))
    predicted = predicted.drop(columns=["failed", "reason", "dampings"])
    table = pd.concat(found, ignore_index=True).merge(predicted, on=columns, validate="many_to_one")
    table = table.rename(columns={"size": "variance"}).drop(columns=["root", "reconstruction"], errors="ignore")
    return table.assign(
        relative_error=shared.relative_error(table),
        rmse_clamped=10 ** (-table.psnr / 20),
        dissimilarity=1 - table.ssim,
    )


def predictors(table: pd.DataFrame) -> dict[str, str]:
    """Column -> its name: I²F exact and damped, the lower bound, and the variance alone, which all must beat."""
    damped = [c for c in table.columns if c.startswith("predicted_rmse, ε")]
    names = {c: "I²F" + c.removeprefix("predicted_rmse") for c in damped}
    return {"predicted_rmse": "I²F", **names, "bound_rmse": "I_lb", "variance": "σ² alone"}


def correlations(table: pd.DataFrame, model: str = "lenet") -> pd.DataFrame:
    """Spearman of every predictor with every error, per attacker, and I²F's log–log Pearson; 1: ranks perfectly.

    Over the images that met every noise level, the same for all attackers. All four measures count as errors here: PSNR
    as the clamped RMSE whose logarithm it is, SSIM as 1 − SSIM.
    """
    rows = []
    known = shared.scored(table[(table.model == model) & at_every_level(table)])
    for attacker, mine in known.groupby("attacker", sort=False):
        for error, measure in ERRORS.items():
            orders = {name: rank_correlation(mine, column, error) for column, name in predictors(table).items()}
            power = log_correlation(mine[mine[error] > 0], "predicted_rmse", error)
            rows.append({"attacker": attacker, "error": measure, **orders, "I²F, log–log": power})
    return pd.DataFrame(rows).set_index(["attacker", "error"])


def agreement(table: pd.DataFrame) -> pd.DataFrame:
    """One row per data set, network and attacker: how many attacks, how many of them converged, medians of the rest."""
    ratios = {
        "measured / predicted": table.rmse / table.predicted_rmse,
        "I_lb / predicted": table.bound_rmse / table.predicted_rmse,
    }
    groups = table.assign(**ratios).groupby(["dataset", "model", "attacker"], sort=False)
    medians = {"predicted_rmse": "predicted RMSE", "rmse": "RMSE", "relative_error": "relative error"}
    found = groups[[*medians, *ratios]].median().rename(columns=medians)
    found.insert(0, "attacks", groups.size())
    found.insert(1, "converged", groups.converged.sum())
    return found


def at_every_level(table: pd.DataFrame) -> pd.Series:
    """Whether a row's image met every noise level."""
    return table.groupby(["model", "image"]).variance.transform("nunique") == table.variance.nunique()


def end_of_law(table: pd.DataFrame, tolerance: float) -> tuple[float, bool]:
    """The predicted RMSE at which the median relative error passes `tolerance`, between noise levels by log–log lines,
    and whether it does at all.

    0 where it is above `tolerance` at the lowest level already: the law holds nowhere that was tried. Where it never
    is, the largest median prediction that was tried: the law ends beyond it.
    """
    levels = table.groupby("variance")[["predicted_rmse", "relative_error"]].median()
    x, y = np.log(levels.clip(lower=1e-16).to_numpy()).T  # an error of zero has no logarithm
    beyond = np.flatnonzero(~(y <= np.log(tolerance)))  # an unknown error too
    if not len(beyond):
        return float(np.exp(x.max())), False
    k = beyond[0]
    if k == 0:
        return 0.0, True
    if not np.isfinite(y[k]):
        return float(np.exp(x[k - 1])), True
    share = (np.log(tolerance) - y[k - 1]) / (y[k] - y[k - 1])
    return float(np.exp(x[k - 1] + share * (x[k] - x[k - 1]))), True


def reached(table: pd.DataFrame, tolerance: float, cut: float) -> float:
    """`end_of_law`, to be compared with `cut`; NaN where the law holds at every level and none goes as far."""
    end, ended = end_of_law(table, tolerance)
    return end if ended or end >= cut else np.nan


class _Case(NamedTuple):
    """One claim: its name in the TOML file, its rows and measure; see `Judge`."""

    name: str
    rows: pd.DataFrame
    measure: Statistic
    suffix: str = ""
    words: Mapping[str, Any] = {}
    regime: bool = False  # judged a second time within the linear regime


def judge(tables: Tables, thresholds: Thresholds, dataset: str) -> list[Claim]:
    """The experiment's claims, as far as there are attacks for them.

    Of the thresholds, `level` is the noise variance at which images are compared, `cut` on the predicted RMSE bounds
    the linear regime, and `tolerance` is the relative error at which the linear law counts as ended.
    """
    judgeable = [name for name in tables if name in ("problems", "deep")]
    known = {n: shared.lost(tables[n]).assign(relative_error=shared.relative_error) for n in judgeable}
    judged = Judge.of("influence_vs_attack", f"influence_vs_attack-{dataset}", thresholds)
    claims = []
    for case in _cases(known, thresholds):
        if not len(case.rows):
            continue
        rows = case.rows[JUDGED]
        within = rows[rows.predicted_rmse <= thresholds["cut"]] if case.regime else None
        about = {
            "attacker": "; ".join(knows(name) for name in case.rows.attacker.unique()),
            "model": case.rows.model.iloc[0],
            "converged": convergence(case.rows),
        }
        claims.append(judged(case.name, rows, case.measure, within, case.suffix, **about, **case.words))
    return claims


def _cases(known: Tables, thresholds: Thresholds) -> list[_Case]:
    table = known["problems"]
    whole, by_variance = at_every_level(table), partial(worst, by="variance", column="relative_error")
    main = table[table.model == table.model.iloc[0]]
    linear = table[(table.model == "linear") & (table.attacker == "gauss-newton") & whole]
    free, boxed = (main[(main.attacker == name) & whole[main.index]] for name in ("gauss-newton", "gauss-newton, box"))
    subjects = [
        (free, "", "an attacker without a prior"),
        (linear, "-linear", "the same attacker on the linear model"),
        (boxed, "-box", "an attacker who knows the pixel range"),
        (known.get("deep", main[:0]), "-deep", "an attacker without a prior on a deep network"),
    ]
    found = [_Case("accuracy", rows, by_variance, tag, {"subject": who}, regime=True) for rows, tag, who in subjects]
    end = partial(reached, tolerance=thresholds["tolerance"], cut=thresholds["cut"])
    found.append(_Case("end", free, end))
    order = partial(rank_correlation, x="predicted_rmse", y="rmse")
    for attacker in WHO:
        mine, tag = main[main.attacker == attacker], "-" + attacker.replace(", ", "-")
        levels = mine[whole[mine.index]]
        alone = rank_correlation(levels, "variance", "rmse") if len(levels) else np.nan
        found += [
            _Case("order", levels, order, tag, {"alone": alone}),
            _Case("power", levels, _power, tag),
            _Case("images", mine[mine.variance == thresholds["level"]], order, tag),
        ]
    for name, bounded in (("unbounded", False), ("bounded", True)):
        rows = main[main.box.astype(bool) == bounded]
        found.append(_Case("bound", rows, lambda t: float((t.rmse / t.bound_rmse).min()), f"-{name}", {"who": name}))
    return found


def _power(table: pd.DataFrame) -> float:
    return log_correlation(table[np.isfinite(table.rmse)], "predicted_rmse", "rmse")
