"""Noise of one size along eigenvectors of J Jᵀ: δ = c·v_i, for which I²F predicts an MSE of c²/(d_x λ_i)."""

from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from i2f.core import spectrum
from i2f.paper import data, sweep
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.rows import declare
from i2f.paper.statistics import convergence, log_slope
from i2f.paper.sweep import Problem, Row, Settings

PUBLISHED = ("dataset", "part", "image", "index", "norm", "method")  # what the table says of a problem


def problems(config: Config) -> list[Problem]:
    """Gauss–Newton on every problem of the parts `law`, `paper` and `end`, and Adam on those of the first images (but
    "end").

    config: dataset, init, weight_seed, start_seed; images, levels, law_norm, cut (see `law`); paper_images,
    paper_indices, paper_norm; end_images, end_norms; gauss_newton_steps, adam_steps, adam_images: of the attacks.
    """
    steps = {"gauss-newton": config["gauss_newton_steps"], "dgl": config["adam_steps"]}
    setting = shared.setting(config) | {"start_seed": config["start_seed"]}
    d_x = data.load(config["dataset"], 1)[0].numel()
    parts = [
        *law(config["images"], d_x, config["levels"], config["law_norm"], config["cut"]),
        *paper(config["paper_images"], config["paper_indices"], config["paper_norm"]),
        *end(config["end_images"], d_x, config["end_norms"]),
    ]
    adam = [p for p in parts if p["part"] != "end" and p["image"] < config["adam_images"]]
    found = [{**p, "method": "gauss-newton"} for p in parts] + [{**p, "method": "dgl"} for p in adam]
    return [{**setting, **p, "budget": steps[p["method"]]} for p in found]


def law(images: int, d_x: int, levels: int, norm: float, cut: float) -> list[Problem]:
    """`levels` directions of every image, spread evenly over log λ, whose predicted RMSE stays within `cut`.

    Which ones these are depends on the spectrum, and so `direction` finds them where the problem is solved: `share` of
    the way down from λ_max to the smallest eigenvalue that is at least `floor`.
    """
    floor, shares = norm * norm / (d_x * cut * cut), np.linspace(0, 1, levels).tolist()
    return sweep.grid(part="law", image=range(images), share=shares, floor=floor, norm=norm)


def direction(values: Tensor, share: float, floor: float) -> int:
    """The index of a "law" problem's eigenvalue among `values`, λ descending."""
    inside = values[values >= floor].log()
    if not len(inside):
        raise ValueError(
            f"no direction is within the cut: λ_max = {float(values[0]):.3g}, and noise of this norm needs {floor:.3g}"
        )
    return int((inside - torch.lerp(inside[0], inside[-1], share)).abs().argmin())


def paper(images: int, indices: list[int], norm: float) -> list[Problem]:
    """The paper's own: `norm` 5 along four of the first hundred directions; `index` of λ descending."""
    return sweep.grid(part="paper", image=range(images), index=list(indices), norm=norm)


def end(images: int, d_x: int, norms: list[float]) -> list[Problem]:
    """Growing noise along the first, the middle and the last direction."""
    return sweep.grid(part="end", image=range(images), index=[0, d_x // 2, d_x - 1], norm=list(norms))


def run(problems: list[Problem], settings: Settings = sweep.DEFAULT) -> Results:
    """One row per attack (see `problems.score`) with the direction's `index` and `eigenvalue`, λ_max, λ_min and what
    Eq. 4 predicts. pictures: the images that the "paper" attacks on the first image recovered, the truth in front, in
    the table's order, in [0, 1]."""
    table = sweep.run(solve, problems, settings, ("image",), at_most=9, description="attacks")
    table["index"] = table.pop("direction")
    again = table.duplicated(["part", "image", "index", "norm", "method"]) & table["index"].notna()
    dropped = {name for p in problems for name in p} - {*PUBLISHED}
    table = table[~again].drop(columns=list(dropped)).reset_index(drop=True)
    pictures = table.pop("picture").dropna()
    truth = shared.jacobian({**problems[0], "image": 0}).x[0].cpu().numpy()
    return Results({"problems": table}, {"pictures": np.stack([truth, *pictures])})


@declare("problems", defaults=shared.DEFAULTS, kinds={"picture": "diagnostic"})
def solve(chunk: list[Problem]) -> list[Row]:
    tasks, rows = [], []
    for p in chunk:
        index = direction(_spectrum(p), p["share"], p["floor"]) if p["part"] == "law" else p["index"]
        tasks.append({**p, "index": index, "noise": "eigenvector", "steps": p["budget"]})
    for p, predicted, found in zip(tasks, shared.predict(tasks), shared.attack(tasks, keep=True), strict=True):
        picture = found.pop("picture")[0]
        row = {"direction": p["index"], "eigenvalue": float(_spectrum(p)[p["index"]])}
        row |= {name: predicted[name] for name in ("predicted_mse", "predicted_rmse", "lambda_max", "lambda_min")}
        row |= found
        rows.append(row | {"picture": picture} if p["part"] == "paper" and p["image"] == 0 else row)
    return rows


def _spectrum(problem: Problem) -> Tensor:
    return spectrum.decompose(shared.jacobian(problem)).values


def rivals(table: pd.DataFrame) -> pd.DataFrame:
    """Medians over the problems that both attackers had: the error over the predicted one, the objective over c²."""
    both = table[table.part != "end"].assign(excess=table.mse / table.predicted_mse)
    problem = ["part", "image", "index"]
    both = both[both.groupby(problem).method.transform("nunique") == 2]
    columns = {"excess": "MSE / predicted", "objective_ratio": "objective / c²"}
    names = {"gauss-newton": "Gauss–Newton", "dgl": "Adam"}
    medians = both.groupby(["part", "method"])[list(columns)].median().unstack("method")
    return medians.rename(columns=columns | names).rename_axis(columns=[None, None])


def judge(tables: Tables, thresholds: Thresholds, dataset: str) -> list[Claim]:
    """The experiment's claims, about Gauss–Newton."""
    table = tables["problems"]
    ours = table[table.method == "gauss-newton"]
    ours = ours.assign(ratio=ours.mse / ours.predicted_mse)
    law, converged = ours[ours.part == "law"], {part: convergence(rows) for part, rows in ours.groupby("part")}
    ours = shared.scored(ours)
    linear, published = ours[ours.part == "law"], ours[ours.part == "paper"]
    spread = linear.groupby("image", as_index=False).mse.agg(lambda mse: mse.max() / mse.min())
    judged = Judge.of("eigenvectors", f"eigenvectors-{dataset}", thresholds)
    small = {"norm": linear.norm.iloc[0], "converged": converged["law"]}
    large = {"norm": published.norm.iloc[0], "converged": converged["paper"]}
    return [
        judged("slope", linear, partial(log_slope, x="eigenvalue", y="mse"), **small),
        judged("prediction", law, lambda t: float(shared.relative_error(t).median()), **small),
        judged("bound-linear", linear, _least, **small),
        judged("bound-paper", published, _least, **large),
        judged("inequality", spread, lambda t: float(t.mse.median()), **small),
        judged("excess", linear, lambda t: float(t.ratio.median()), **small),
    ]


def _least(table: pd.DataFrame) -> float:
    return float(table.ratio.min())
