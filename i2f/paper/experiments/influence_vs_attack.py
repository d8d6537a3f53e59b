"""I²F against what attackers recover: Gaussian noise of growing variance, bounded and unbounded attackers."""

from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from i2f.paper import claims, sweep
from i2f.paper.experiments import problems as shared
from i2f.paper.sweep import Problem

ATTACKERS: dict[str, dict[str, Any]] = {  # name in tables -> what chooses the attack in `problems.attack`
    "gauss-newton": {"method": "gauss-newton", "box": False},
    "gauss-newton, box": {"method": "gauss-newton", "box": True},
    "dgl": {"method": "dgl", "box": False},
    "gs": {"method": "gs", "box": True},
}
KNOWS = {
    "gauss-newton": shared.PERFECT,
    "gauss-newton, box": "gauss-newton with box: knows model, label and pixel range, random start",
    "dgl": "dgl: Adam, knows model and label, no prior, random start",
    "gs": "gs: Adam on the cosine, knows model, label and pixel range, random start",
}
ERRORS = {"rmse": "RMSE", "rmse_clamped": "PSNR", "dissimilarity": "1 − SSIM", "feature_mse": "feature MSE"}


def noisy(
    setting: dict[str, Any], models: dict[str, int], variances: list[float], level: float, level_images: int
) -> list[Problem]:
    """Noise problems: every variance for the first images, `level` alone for the further ones of the first model.

    setting: data set and network, as in `experiments.problems`. models: name -> how many images get every variance.
    The noise of an image is its own draw, scaled: what differs between its levels is the variance alone.
    """
    if level not in variances:
        raise ValueError(f"level={level:g} is not among the variances {variances}: choose one of them")
    found = []
    for number, (model, images) in enumerate(models.items()):
        for image in range(max(images, 0 if number else level_images)):
            found += sweep.grid(
                **setting, model=model, image=image, noise="gaussian", noise_seed=image,
                size=variances if image < images else [level],
            )  # fmt: skip
    return found


def confront(problems: list[Problem], attackers: list[str], steps: dict[str, int], seed: int) -> list[Problem]:
    """The attacks: the first model's problems meet every attacker, the others' the first attacker alone. Images with a
    single noise level meet only those without a box, whose steps are cheaper. steps: method -> budget."""
    levels = Counter((p["model"], p["image"]) for p in problems)
    return [
        {**p, "attacker": name, **ATTACKERS[name], "steps": steps[ATTACKERS[name]["method"]], "start_seed": seed}
        for name in attackers
        for p in problems
        if (p["model"] == problems[0]["model"] or name == attackers[0])
        and (levels[p["model"], p["image"]] == max(levels.values()) or not ATTACKERS[name]["box"])
    ]


def deep(setting: dict[str, Any], network: str, images: int, variances: list[float]) -> list[Problem]:
    """Noise problems of a deep network, "model init activation", with the data's moments in front; see `noisy`."""
    model, init, activation = network.split()
    own = setting | {"init": init, "activation": activation, "normalize": True}
    return noisy(own, {model: images}, variances, variances[0], 0)


def attack(
    problems: list[Problem], attackers: list[str], steps: dict[str, int], dampings: list[float], seed: int,
    jobs: int | None = None,
) -> pd.DataFrame:  # fmt: skip
    """A row an attack (`confront`): what I²F predicts (`problems.predict`), what was recovered (`problems.attack`).

    Further columns: variance σ²; relative_error = |RMSE − predicted|/predicted; rmse_clamped (that of PSNR);
    dissimilarity = 1 − SSIM.
    """
    predict = partial(shared.predict, dampings=tuple(dampings))
    predicted = sweep.run(predict, problems, ("model", "image"), len(problems), jobs, description="predictions")
    tasks = confront(problems, attackers, steps, seed)
    second = [t for t in tasks if t["method"] == "gauss-newton"]
    adam = [t for t in tasks if t["method"] != "gauss-newton"]
    found = []
    if second:
        found.append(
            sweep.run(shared.attack, second, ("model", "image", "attacker"), 4, jobs, description="gauss-newton")
        )
    if adam:
        found.append(sweep.run(shared.attack, adam, ("model", "attacker"), 32, jobs, description="first order"))
    shown = predicted.drop(columns=["failed", "reason"])
    table = pd.concat(found, ignore_index=True).merge(shown, on=list(problems[0]), validate="many_to_one")
    table = table.rename(columns={"size": "variance"})
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
    foretold = predictors(table)
    known = shared.scored(table[(table.model == model) & at_every_level(table)])
    for attacker, mine in known.groupby("attacker", sort=False):
        for error, measure in ERRORS.items():
            orders = {name: claims.rank_correlation(mine, column, error) for column, name in foretold.items()}
            power = claims.log_correlation(mine[mine[error] > 0], "predicted_rmse", error)
            rows.append({"attacker": attacker, "error": measure, **orders, "I²F, log–log": power})
    return pd.DataFrame(rows).set_index(["attacker", "error"])


def at_every_level(table: pd.DataFrame) -> pd.Series:
    """Whether a row's image met every noise level."""
    return table.groupby(["model", "image"]).variance.transform("nunique") == table.variance.nunique()


def end_of_law(table: pd.DataFrame, tolerance: float) -> float:
    """The predicted RMSE at which the median relative error passes `tolerance`, between noise levels by log–log lines.

    0 where it is above `tolerance` at the lowest level already: the law holds nowhere that was tried. Where it never
    is, the largest median prediction that was tried: the law ends beyond it.
    """
    return _end(table, tolerance)[0]


def reached(table: pd.DataFrame, tolerance: float, cut: float) -> float:
    """`end_of_law`, to be compared with `cut`; NaN where the law holds at every level and none goes as far."""
    end, ended = _end(table, tolerance)
    return end if ended or end >= cut else np.nan


def _end(table: pd.DataFrame, tolerance: float) -> tuple[float, bool]:
    """`end_of_law`, and whether the law ended among the levels at all."""
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


def judge(
    table: pd.DataFrame, dataset: str, level: float,
    cut: float, accuracy: float, tolerance: float, order: float, power: float, images_order: float,
    further: pd.DataFrame | None = None,
) -> list[claims.Claim]:  # fmt: skip
    """The experiment's claims. The thresholds are the notebook's parameters; `cut` bounds the linear regime;
    `further`: the attacks on a deep network."""
    table = shared.lost(table).assign(relative_error=shared.relative_error)
    first, whole = table.model.iloc[0], at_every_level(table)
    regime = f"the predicted RMSE is at most {cut:g}"
    found: list[claims.Claim] = []

    def claim(
        rows: pd.DataFrame, name: str, statement: str, statistic: str, measure, within=None, note="", **more
    ) -> None:  # fmt: skip
        if len(rows):
            attackers = "; ".join(KNOWS[a] for a in rows.attacker.unique())
            words = f"{rows.model.iloc[0]}; {claims.settled(rows)}{note}"
            used = ["image", "variance", "predicted_rmse", "rmse", "relative_error", "bound_rmse"]  # fast to resample
            within = None if within is None else within[used]
            found.append(
                claims.judge(
                    rows[used], measure, "image", only=(regime, within) if within is not None else None, **more,
                    id=f"influence_vs_attack-{dataset}-{name}", statement=statement, statistic=statistic,
                    source="section 4, I²F against recovery", attacker=attackers, note=words,
                )
            )  # fmt: skip

    for model, attacker, name, subject in (
        (first, "gauss-newton", "accuracy", "an attacker without a prior"),
        ("linear", "gauss-newton", "accuracy-linear", "the same attacker on the linear model"),
        (first, "gauss-newton, box", "accuracy-box", "an attacker who knows the pixel range"),
    ):
        rows = table[(table.model == model) & (table.attacker == attacker) & whole]
        claim(rows, name, f"I²F predicts the error of {subject}.",
              "median relative error of the predicted RMSE, at the worst noise level",
              lambda t: claims.worst(t, "variance", "relative_error"), rows[rows.predicted_rmse <= cut],
              at_most=accuracy)  # fmt: skip
    if further is not None:
        rows = shared.lost(further).assign(relative_error=shared.relative_error)
        claim(rows, "accuracy-deep", "I²F predicts the error of an attacker without a prior on a deep network.",
              "median relative error of the predicted RMSE, at the worst noise level",
              lambda t: claims.worst(t, "variance", "relative_error"), rows[rows.predicted_rmse <= cut],
              at_most=accuracy)  # fmt: skip
    ours = table[(table.model == first) & (table.attacker == "gauss-newton") & whole]
    claim(ours, "end", f"The linear law reaches at least to a predicted RMSE of {cut:g}.",
          f"predicted RMSE at which the median relative error passes {tolerance:g}; 0 where it holds nowhere",
          lambda t: reached(t, tolerance, cut), at_least=cut)  # fmt: skip
    for attacker in KNOWS:
        mine = table[(table.model == first) & (table.attacker == attacker)]
        tag = attacker.replace(", ", "-")
        levels = mine[whole[mine.index]]
        alone = claims.rank_correlation(levels, "variance", "rmse") if len(levels) else np.nan
        claim(levels, f"order-{tag}", "I²F ranks recovery over noise levels and images.",
              "Spearman of RMSE with I²F", lambda t: claims.rank_correlation(t, "predicted_rmse", "rmse"),
              at_least=order, note=f"; the variance alone reaches {alone:.3f}")  # fmt: skip
        claim(levels, f"power-{tag}", "Recovery follows a power law in I²F.",
              "log–log Pearson of RMSE with I²F",
              lambda t: claims.log_correlation(t[np.isfinite(t.rmse)], "predicted_rmse", "rmse"),
              at_least=power)  # fmt: skip
        alike = mine[mine.variance == level]
        claim(alike, f"images-{tag}", "I²F ranks images at one noise level.",
              f"Spearman of RMSE with I²F across images, variance {level:g}",
              lambda t: claims.rank_correlation(t, "predicted_rmse", "rmse"), at_least=images_order,
              least=claims.LEAST_RANKED)  # fmt: skip
    for name, bounded in (("unbounded", False), ("bounded", True)):
        rows = table[(table.model == first) & (table.box.astype(bool) == bounded)]
        claim(rows, f"bound-{name}", f"I_lb is never above the error of {name} attackers.",
              "smallest RMSE / I_lb", lambda t: float((t.rmse / t.bound_rmse).min()), at_least=1.0)  # fmt: skip
    return found
