"""The damping ε of I²F: what each choice leaves out, and which attacker it describes.

Damped I²F is the displacement  d_ε = (J Jᵀ + εI)⁻¹ J δ  (Eq. 4). An attacker who minimises  ‖∇L(x) − g‖² + ε‖x − m‖²
moves, to first order, by  (J Jᵀ + εI)⁻¹ (J δ + ε(m − x₀)):  d_ε is the part that noise makes, and leaves out the pull
of the prior, which errs without any noise. For noise of variance σ² and pixels N(m, τ²) the expected squared error
is  Σ (σ²λ + ε²τ²)/(λ + ε)², least at ε = σ²/τ², the Bayes choice, where it is  σ² Σ 1/(λ + ε).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from i2f.attacks import invert
from i2f.core import spectrum
from i2f.core.jacobian import GradientJacobian
from i2f.paper import sweep
from i2f.paper.attackers import ATTACKERS
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.rows import declare
from i2f.paper.statistics import Floats, Statistic, convergence, rounded, spearman, worst
from i2f.paper.sweep import Problem, Row, Settings

DAMPED, PULLED = "damped_rmse", "pulled_rmse"
MISSES = ("damped_miss", "pulled_miss")
TOGETHER = ("image", "size")  # problems that share J and δ
DIGITS = 9  # of computed values of problems, which must be the same on every machine: rows are known by them
CURVES = "curve_"  # what the columns begin with that hold a list, one number for each of `epsilons`
KINDS = {name: "converged" for miss in MISSES for name in (miss, CURVES + miss)} | {"picture": "diagnostic"}


def problems(config: Config) -> list[Problem]:
    """Every attacker on the same noisy gradients, each image under one of `weight_seeds`, in rotation; `bayes` is
    σ²/τ², `ridge` the attacker's own ε.

    config: init, weight_seeds; digits of MNIST's train split from first_digit on, of which the first known_digits are
    what the attackers' prior is made of; variances of the noise; paper: the paper's ε; gauss_newton_steps, adam_steps:
    budgets; smallest, largest: ends of the grid of ε at which errors are predicted.
    """
    known = config["known_digits"]
    tau_squared = shared.pixels("mnist", None, known)[1]
    steps = {"gauss-newton": config["gauss_newton_steps"], "dgl": config["adam_steps"]}
    found = []
    for image, weight_seed in shared.rotated(config["first_digit"], config["digits"], config["weight_seeds"]):
        for variance in config["variances"]:
            bayes = rounded(variance / tau_squared, DIGITS)
            gradient = {
                **{"dataset": "mnist", "split": "train", "init": config["init"]},
                **{"image": image, "weight_seed": weight_seed, "noise": "gaussian", "size": variance},
                **{"noise_seed": 1000 * weight_seed + image, "known_images": known, "bayes": bayes},
                **{"start_seed": image, "drawn": image == config["first_digit"]},
                "dampings": grid(config["smallest"], config["largest"], config["paper"]),
            }
            for attacker, ridge in priors(bayes, config["paper"]).items():
                method = ATTACKERS[attacker].options["method"]
                own = {"attacker": attacker, "method": method, "ridge": ridge, "budget": steps[method]}
                found.append({**gradient, **own})
    return found


def priors(bayes: float, paper: Sequence[float]) -> dict[str, float]:
    """Attacker -> the ε of its prior."""
    return {"no prior": 0.0, "MAP": bayes, **{f"MAP, ε = {e:g}": e for e in paper}, "Adam": 0.0}


def grid(low: float, high: float, paper: Sequence[float], a_decade: int = 2) -> list[float]:
    """0, the paper's ε, and `a_decade` values per decade from `low` to `high`; ascending."""
    count = round(a_decade * np.log10(high / low)) + 1
    return sorted({0.0, *paper, *(rounded(e, DIGITS) for e in np.geomspace(low, high, count))})


def run(problems: list[Problem], settings: Settings = sweep.DEFAULT) -> Results:
    """problems: one row per attack, `problems.score`'s columns, and `predictions` at the attacker's own ε. curves: one
    row per attack and ε, of its `dampings` and the Bayes choice, `predictions`' columns.

    Of the `drawn` image: `truth`; `found`, clamped, in the first table's order; `values`, the spectrum of J Jᵀ.
    """
    found = sweep.run(solve, problems, settings, TOGETHER, len(problems), whole=True, description="attacks")
    pictures, values = found.pop("picture").dropna(), found.pop("spectrum").dropna().iloc[0]
    table = found.drop(columns=["dampings", *(name for name in found if name.startswith(CURVES))])
    truth = shared.jacobian(next(p for p in problems if p["drawn"])).x[0].cpu().numpy()
    return Results(
        {"problems": table, "curves": _curves(found)},
        {"truth": truth, "found": np.stack([*pictures]), "values": values},
    )


def _curves(found: pd.DataFrame) -> pd.DataFrame:
    """The lists of every attack, one row per ε."""
    lists = [name for name in found if name.startswith(CURVES)]
    keys = shared.lost(found)[["image", "size", "attacker", "bayes", "rmse"]]
    table = keys.join(found[lists]).assign(epsilon=[epsilons(p) for p in found.to_dict("records")])
    table = table.explode([*lists, "epsilon"], ignore_index=True).astype(dict.fromkeys([*lists, "epsilon"], float))
    return table.rename(columns=lambda name: name.removeprefix(CURVES))


def epsilons(problem: Problem) -> list[float]:
    """Where a problem's curves are taken: at its `dampings` and at the Bayes choice."""
    return sorted({*problem["dampings"], problem["bayes"]})


@declare("problems", defaults=shared.DEFAULTS, kinds=KINDS)
def solve(chunk: list[Problem]) -> list[Row]:
    rows = []
    for p in chunk:
        J = shared.jacobian(p)
        delta, mean = shared.perturbation(J, p), shared.pixels(p["dataset"], p.get("root"), p["known_images"])[0]
        # Adam's prior is its start, the same mean image: it is stopped before it has left it altogether
        start = mean if p["method"] == "dgl" else None
        own = {"method": p["method"], "steps": p["budget"], "ridge": p["ridge"], "mean": mean, "start": start}
        own["seed"] = p["start_seed"]
        found = invert(J.map.model, J.gradient + delta, J.map.y, J.x.shape, **own)
        at = partial(predictions, J, delta, p, found.x.to(J.x) - J.x)
        (mine,) = at([p["ridge"]]).drop(columns=["epsilon", "below"]).to_dict("records")
        row = mine | shared.score(J, delta, found)
        row |= at(epsilons(p)).drop(columns="epsilon").add_prefix(CURVES).to_dict("list")
        if p["drawn"]:
            row["picture"] = found.x[0].clamp(0, 1).cpu().numpy().astype(np.float32)
            row["spectrum"] = spectrum.decompose(J).values.cpu().numpy().astype(np.float32)
        rows.append(row)
    return rows


def predictions(
    J: GradientJacobian, delta: Tensor, problem: Problem, moved: Tensor, dampings: Sequence[float]
) -> pd.DataFrame:
    """What is predicted at each ε of `dampings`, per pixel; at ε = 0 the pseudo-inverse's answers.

    below: the share of eigenvalues less than ε.
    damped_rmse: ‖d_ε‖/√d_x. pulled_rmse: with the pull ε(m − x₀) to the mean image m. expected_rmse: root of the
    expected squared error of a MAP attacker with this ε, under the problem's noise and pixels N(m, τ²). damped_miss,
    pulled_miss: the distance of either displacement from the one found, `moved`, over that one's length.
    """
    mean, tau_squared = shared.pixels(problem["dataset"], problem.get("root"), problem["known_images"])
    values, vectors = spectrum.decompose(J)
    noise, pull, moved = (
        vectors.T @ v.double().reshape(-1) for v in (J.matvec(delta), mean.to(J.x) - J.x, moved)
    )  # in the eigenbasis every equation is a scalar one
    epsilon = torch.tensor(dampings, dtype=values.dtype, device=values.device)[:, None]
    inverse = 1 / (values + epsilon)
    inverse[:, spectrum.rank(J) :] *= epsilon > 0
    damped, pulled = noise * inverse, (noise + epsilon * pull) * inverse
    expected = (problem["size"] * values + epsilon**2 * tau_squared) * inverse.square()
    columns = {
        "epsilon": epsilon[:, 0],
        "below": (values < epsilon).double().mean(1),
        DAMPED: damped.square().mean(1).sqrt(),
        PULLED: pulled.square().mean(1).sqrt(),
        "expected_rmse": expected.mean(1).sqrt(),
        "damped_miss": (damped - moved).norm(dim=1) / moved.norm(),
        "pulled_miss": (pulled - moved).norm(dim=1) / moved.norm(),
    }
    return pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})


def medians(curves: pd.DataFrame) -> pd.DataFrame:
    """By noise, attacker and ε, over the images. damped_off, pulled_off: the factor by which the measured RMSE is
    mispredicted, exp median |log(predicted/measured)|; infinite for an attack that failed."""
    measured = np.log(curves.rmse)
    off = {name.replace("rmse", "off"): (np.log(curves[name]) - measured).abs() for name in (DAMPED, PULLED)}
    by = ["size", "attacker", "epsilon"]
    found = curves.assign(**off).drop(columns="image").groupby(by, sort=False).median().reset_index()
    return found.assign(**{name: np.exp(found[name]) for name in off})


def predicted(middle: pd.DataFrame) -> pd.DataFrame:
    """Of `medians`, what is known before any attack, by noise and ε: the Bayes choice, the paper's, and 0."""
    chosen = middle.epsilon.isin([0, *PAPER]) | (middle.epsilon == middle.bayes)
    rows = middle[(middle.attacker == "no prior") & chosen]
    names = {"below": "share of λ below ε", DAMPED: "damped I²F", PULLED: "with pull"}
    names |= {"expected_rmse": "expected with prior"}
    where = np.where(rows.epsilon == rows.bayes, "σ²/τ² = ", "") + rows.epsilon.map("{:.2g}".format)
    index = pd.MultiIndex.from_arrays([rows["size"].map("{:g}".format), where], names=["noise variance", "ε"])
    return rows[list(names)].rename(columns=names).set_axis(index)


def choices(middle: pd.DataFrame) -> pd.DataFrame:
    """Of `medians`, by noise and attacker: the measured RMSE, the ε whose prediction comes nearest to it and the factor
    that remains, for damped I²F and with the pull; then damped I²F's factor at ε = 0 and at the paper's ε."""
    by = [middle["size"].map("{:g}".format).rename("noise variance"), middle.attacker]
    found = {"RMSE": middle.groupby(by, sort=False).rmse.first()}
    for words, off in (("damped", "damped_off"), ("with pull", "pulled_off")):
        best = middle.loc[middle.groupby(by, sort=False)[off].idxmin()].set_axis(found["RMSE"].index)
        found |= {f"best ε, {words}": best.epsilon, f"off by, {words}": best[off]}
    for e in (0.0, *PAPER):
        rows = middle[middle.epsilon == e]
        found[f"off by, ε = {e:g}"] = rows.set_index([b[rows.index] for b in by]).damped_off
    return pd.DataFrame(found)


def judge(tables: Tables, thresholds: Thresholds, dataset: str) -> list[Claim]:
    """The experiment's claims. Of the thresholds, `cut` on the predicted RMSE bounds the linear regime, `accuracy` is a
    relative error, `near` a relative distance of displacements."""
    table = shared.lost(tables["problems"])
    table = table.assign(damped=shared.relative_error(table, DAMPED), pulled=shared.relative_error(table, PULLED))
    free, bayes = (table[table.attacker == name] for name in ("no prior", "MAP"))
    noises = ", ".join(f"{v:g}" for v in sorted(table["size"].unique()))
    judged = partial(Judge.of("damping", f"damping-{dataset}", thresholds), noises=noises)
    damped, pulled = (partial(worst, by="size", column=name) for name in ("damped", "pulled"))
    numbers, regime = bayes.select_dtypes("number"), free[free[DAMPED] <= thresholds["cut"]].select_dtypes("number")
    weighed = table[table.method == "gauss-newton"]
    names = sorted(weighed.attacker.unique())
    ours, others = names.index("MAP"), ", ".join(name for name in names if name != "MAP")
    squares = bayes.assign(bayes=bayes.expected_rmse**2).melt(["image", "size"], ["bayes", "mse"], "what")
    over_bayes, over_best = _on_cube(table, _over_bayes), _on_cube(table, partial(_over_best, ours=ours))
    return [
        judged("none", free.select_dtypes("number"), damped, regime, converged=convergence(free)),
        judged("map", numbers, damped, converged=convergence(bayes)),
        judged("pull", numbers, pulled, converged=convergence(bayes)),
        judged("bayes", _by_image(squares, "what", "value"), over_bayes, at_least=1 / thresholds["factor"]),
        judged("weight", _by_image(weighed, "attacker", "mse"), over_best, others=others),
        *_judge_damped(judged, table, tables),
    ]


def _judge_damped(judged: Callable[..., Claim], table: pd.DataFrame, tables: Tables) -> list[Claim]:
    """Claims about damped I²F at the paper's ε, and about attacks that stop early."""
    curves = tables["curves"]
    curves = curves.assign(pulled_miss=curves.pulled_miss.mask(np.isinf(curves.rmse), np.inf))
    off = curves[curves.epsilon.isin(PAPER)]
    choice = off.attacker + off.epsilon.map(", {:g}".format)
    off = off.assign(choice=choice, off=(np.log(off[DAMPED]) - np.log(off.rmse)).abs())
    exact_first = ["predicted_rmse", *(f"predicted_rmse, ε = {e:g}" for e in PAPER)]
    survey = tables["survey"].melt(["image", "size"], exact_first, "what")
    unit = curves[(curves.attacker == "no prior") & (curves.epsilon == 1)]
    unit = unit.melt(["image", "size"], [DAMPED, "rmse"], "what")
    # ε that every noise variance has, that damp at all, and below every λ_max: beyond, nothing has left the start
    inside = curves.groupby("epsilon").below.transform("max") < 1
    adam = curves[(curves.attacker == "Adam") & (curves.epsilon != curves.bayes) & (curves.epsilon > 0) & inside]
    on, paper = partial(_on_cube, table), ", ".join(f"{e:g}" for e in PAPER)
    best_off = on(lambda cube: np.exp(np.median(cube, axis=(0, 1)).min()))
    return [
        judged("paper", _by_image(off, "choice", "off"), best_off, paper=paper),
        judged("order", _by_image(survey, "what", "value"), on(lambda cube: _orders(cube).min()), paper=paper),
        judged("ranks", _by_image(unit, "what", "value"), on(lambda cube: _orders(cube).mean())),
        judged("stopping", _by_image(adam, "epsilon", "pulled_miss"), on(lambda c: np.median(c, axis=0).min(1).max())),
    ]


def _by_image(table: pd.DataFrame, name: str, value: str) -> pd.DataFrame:
    """One row per image: its number, and its values by noise variance and then by `name`, both in order."""
    wide = table.pivot(index="image", columns=["size", name], values=value).sort_index(axis=1)
    return pd.DataFrame(np.column_stack([wide.index, wide])).rename(columns={0: "image"})


def _on_cube(table: pd.DataFrame, measure: Callable[[Floats], float | np.floating[Any]]) -> Statistic:
    """`measure` of the cube (images, noise variances, names) that `_by_image` laid flat."""
    noises = table["size"].nunique()
    return lambda flat: float(measure(flat.to_numpy()[:, 1:].reshape(len(flat), noises, -1)))


def _over_bayes(cube: Floats) -> float:
    bayes, mse = cube.mean(0).T
    ratios: Floats = mse / bayes
    return float(ratios[np.abs(np.log(ratios)).argmax()])


def _over_best(cube: Floats, ours: int) -> float:
    means = cube.mean(0)
    return float((means[:, ours] / np.delete(means, ours, axis=1).min(1)).max())


def _orders(cube: Floats) -> Floats:
    """Spearman's correlation over the images of the first name with each other, (noise variances, other names)."""
    return np.asarray(spearman(cube[..., :1], cube[..., 1:]))
