"""Noise of one size along eigenvectors of J Jᵀ: δ = c·v_i, for which I²F predicts an MSE of c²/(d_x λ_i)."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from i2f.core import spectrum
from i2f.paper import data, estimates, sweep
from i2f.paper.attackers import ATTACKERS
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.rows import declaration, declare
from i2f.paper.statistics import convergence, log_slope
from i2f.paper.sweep import Problem, Row, Settings

PUBLISHED = ("dataset", "part", "image", "weight_seed", "index", "norm", "method")  # what the table says of a problem
DATASETS = {"mnist": "MNIST", "cifar10": "CIFAR-10"}
LOOKED = {
    "mnist": "the first images, up to number 3 and perhaps more, were looked at before",
    "cifar10": "these images were looked at before",
}
NAMES = {"gauss-newton": "gauss-newton", "dgl": "adam"}  # what ids call the attackers
PREDICTED = ("predicted_mse", "predicted_rmse", "lambda_max", "lambda_min")


def problems(config: Config) -> list[Problem]:
    """Gauss–Newton on every problem of the parts `law` and `paper`, for both data sets, and `end`, for MNIST; Adam on
    CIFAR-10's first direction of the part `paper`, for the first adam_images of them, if any.

    config: init; images of MNIST's test split and photographs of CIFAR-10's, from first_image on, each under one of
    `weight_seeds`, in rotation; levels, law_norm, cut (see `law`); paper_indices, paper_norm; end_images, end_norms;
    adam_images; gauss_newton_steps, adam_steps. What attacks on the first photograph (or digit, where there are none)
    recover in the part `paper` is `shown`.
    """
    first, found = config["first_image"], []
    shows = shown_of(config)
    for dataset, count in (("mnist", config["images"]), ("cifar10", config["photographs"])):
        d_x = data.load(dataset, 1)[0].numel()
        for image, weight_seed in shared.rotated(first, count, config["weight_seeds"]):
            setting = {"dataset": dataset, "init": config["init"], "weight_seed": weight_seed, "image": image}
            published = paper(config["paper_indices"], config["paper_norm"])
            parts = law(d_x, config["levels"], config["law_norm"], config["cut"]) + published
            if dataset == "mnist" and image < first + config["end_images"]:
                parts += end(d_x, config["end_norms"])
            attacks = [{**p, "method": "gauss-newton", "budget": config["gauss_newton_steps"]} for p in parts]
            if dataset == "cifar10" and image < first + config["adam_images"]:
                attacks.append({**published[0], "method": "dgl", "budget": config["adam_steps"]})
            for p in attacks:
                shown = {"shown": True} if (dataset, image, p["part"]) == (shows, first, "paper") else {}
                found.append({**setting, **p, **shown, "start_seed": image})
    return found


def shown_of(config: Config) -> str:
    """The data set whose first image is shown."""
    return "cifar10" if config["photographs"] else "mnist"


def law(d_x: int, levels: int, norm: float, cut: float) -> list[Problem]:
    """`levels` directions, spread evenly over log λ, whose predicted RMSE stays within `cut`.

    Which ones these are depends on the spectrum, and so `direction` finds them where the problem is solved: `share` of
    the way down from λ_max to the smallest eigenvalue that is at least `floor`.
    """
    floor, shares = norm * norm / (d_x * cut * cut), np.linspace(0, 1, levels).tolist()
    return sweep.grid(part="law", share=shares, floor=floor, norm=norm)


def direction(values: Tensor, share: float, floor: float) -> int:
    """The index of a "law" problem's eigenvalue among `values`, λ descending."""
    inside = values[values >= floor].log()
    if not len(inside):
        raise ValueError(
            f"no direction is within the cut: λ_max = {float(values[0]):.3g}, and noise of this norm needs {floor:.3g}"
        )
    return int((inside - torch.lerp(inside[0], inside[-1], share)).abs().argmin())


def paper(indices: list[int], norm: float) -> list[Problem]:
    """The paper's own: `norm` 5 along four of the first hundred directions; `index` of λ descending."""
    return sweep.grid(part="paper", index=list(indices), norm=norm)


def end(d_x: int, norms: list[float]) -> list[Problem]:
    """Growing noise along the first, the middle and the last direction."""
    return sweep.grid(part="end", index=[0, d_x // 2, d_x - 1], norm=list(norms))


def run(problems: list[Problem], settings: Settings = sweep.DEFAULT) -> Results:
    """One row per attack (see `problems.score`) with the direction's `index` and `eigenvalue`, λ_max, λ_min and what
    Eq. 4 predicts. pictures: the truth, and what the `shown` attacks recovered, in the table's order, in [0, 1]."""
    found = []
    for words, method, together, at_most in (
        ("Gauss–Newton", "gauss-newton", ("dataset", "image"), 9),
        ("Adam", "dgl", ("dataset", "weight_seed"), 8),
    ):
        tasks = [p for p in problems if p["method"] == method]
        if tasks:
            found.append(sweep.run(solve, tasks, settings, together, at_most, description=words))
    table = pd.concat(found, ignore_index=True)
    table["index"] = table.pop("direction")
    again = table.duplicated([*PUBLISHED]) & table["index"].notna()
    dropped = {name for p in problems for name in p} - {*PUBLISHED}
    table = table[~again].drop(columns=[*dropped, "reconstruction"], errors="ignore").reset_index(drop=True)
    pictures = table.pop("picture").dropna()
    truth = shared.jacobian(next(p for p in problems if p.get("shown"))).x[0].cpu().numpy()
    return Results({"problems": table}, {"pictures": np.stack([truth, *pictures])})


@declare("problems", defaults=shared.DEFAULTS, kinds={"picture": "diagnostic"}, brief=declaration(shared.attack).brief)
def solve(chunk: list[Problem]) -> list[Row]:
    tasks, rows = [], []
    for p in chunk:
        values = spectrum.decompose(shared.jacobian(p)).values
        index = direction(values, p["share"], p["floor"]) if p["part"] == "law" else p["index"]
        task = {**p, "index": index, "noise": "eigenvector"}
        (predicted,) = shared.predict([task])
        row = {"direction": index, "eigenvalue": float(values[index])}
        rows.append(row | {name: predicted[name] for name in PREDICTED})
        tasks.append(task)
    for p, row, found in zip(tasks, rows, shared.attack(tasks, keep=True), strict=True):
        picture = found.pop("picture")[0]
        row |= found | ({"picture": picture} if p.get("shown") else {})
    return rows


def rivals(table: pd.DataFrame) -> pd.DataFrame:
    """Medians over CIFAR-10's first direction at the paper's noise, of the images that every attacker met: the error
    over the predicted one, the objective over c²."""
    rows = table[(table.dataset == "cifar10") & (table.part == "paper") & (table["index"] == 0)]
    both = rows[rows.groupby("image").method.transform("nunique") == rows.method.nunique()]
    both = both.assign(excess=both.rmse / both.predicted_rmse)
    columns = {"excess": "RMSE / predicted", "objective_ratio": "objective / c²", "relative_residual": "residual"}
    medians = both.groupby("method")[list(columns)].median().rename(columns=columns)
    return medians.rename(index=lambda method: ATTACKERS[method].label).rename_axis(None)


def slopes(rows: pd.DataFrame) -> pd.Series:
    """One value per image: the slope of log MSE on log λ over the directions whose attack converged, three at least."""
    done = rows[rows.converged]
    found = {image: log_slope(own, "eigenvalue", "mse") for image, own in done.groupby("image") if len(own) > 2}
    return pd.Series(found, dtype=float)


def judge(tables: Tables, thresholds: Thresholds) -> list[Claim]:
    """The experiment's claims. Attacks that did not converge are left out and counted; Adam, which has no criterion of
    convergence, is judged at its published budget."""
    table = tables["problems"]
    table = table.assign(converged=table.converged.eq(True))  # what raised has no value there
    judged = Judge.of("eigenvectors", "eigenvectors", thresholds)
    ours = table[table.method == "gauss-newton"]
    found = []
    for name, part in (("slope", "law"), ("slope-paper", "paper")):
        for dataset, words in DATASETS.items():
            rows = ours[(ours.part == part) & (ours.dataset == dataset)]
            if not len(rows):
                found.append(judged(name, None, suffix=f"-{dataset}", dataset=words))
                continue
            slope, finished = estimates.mean(slopes(rows)), rows.converged.mean()
            found.append(judged(name, slope, finished, suffix=f"-{dataset}", **_about(rows)))
    photographs = table[(table.dataset == "cifar10") & (table.part == "paper")]
    rows = photographs[photographs.method == "gauss-newton"]
    if not len(rows):
        return found + [judged(name, None) for name in ("below", "bias-gauss-newton", "bias-adam")]
    above = (rows.mse >= rows.predicted_mse).groupby(rows.image).all()[rows.groupby("image").converged.all()]
    found.append(judged("below", estimates.share(above), rows.converged.mean(), **_about(rows)))
    for method, name in NAMES.items():
        rows = photographs[(photographs["index"] == 0) & (photographs.method == method)]
        if not len(rows):
            found.append(judged(f"bias-{name}", None))
            continue
        done = shared.scored(rows) if method == "dgl" else rows[rows.converged]
        ratio = estimates.geometric_mean(done.rmse / done.predicted_rmse)
        found.append(judged(f"bias-{name}", ratio, len(done) / len(rows), **_about(rows)))
    return found


def _about(rows: pd.DataFrame) -> dict[str, Any]:
    name = rows.dataset.iloc[0]
    return {"dataset": DATASETS[name], "looked": LOOKED[name], "converged": convergence(rows)}
