"""The damping ε of I²F: what each choice leaves out, and which attacker it describes.

Damped I²F is the displacement  d_ε = (J Jᵀ + εI)⁻¹ J δ  (Eq. 4). An attacker who minimises  ‖∇L(x) − g‖² + ε‖x − m‖²
moves, to first order, by  (J Jᵀ + εI)⁻¹ (J δ + ε(m − x₀)):  d_ε is the part that noise makes, and leaves out the pull
of the prior, which errs without any noise. For noise of variance σ² and pixels N(m, τ²) the expected squared error
is  Σ (σ²λ + ε²τ²)/(λ + ε)², least at ε = σ²/τ², the Bayes choice, where it is  σ² Σ 1/(λ + ε).
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from i2f.attacks import invert
from i2f.core import spectrum
from i2f.core.jacobian import GradientJacobian
from i2f.paper import estimates, sweep
from i2f.paper.attackers import ATTACKERS
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.estimates import Estimate
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.rows import declare
from i2f.paper.statistics import convergence, rounded
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
    keys = shared.lost(found)[["image", "size", "attacker", "bayes", "rmse", "converged", "failed"]]
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


def off(curves: pd.DataFrame, paper: Sequence[float], column: str = DAMPED) -> pd.DataFrame:
    """By noise and attacker, the factor by which a prediction misses the measured RMSE, exp median |log(predicted/
    measured)| over images, at ε = 0, at the Bayes choice and at the paper's; infinite for attacks that failed."""
    bayes = curves.epsilon == curves.bayes
    chosen = curves[curves.epsilon.isin([0.0, *paper]) | bayes]
    words = chosen.epsilon.map("ε = {:g}".format).mask(bayes, "ε = σ²/τ²").rename("")
    factors = (np.log(chosen[column]) - np.log(chosen.rmse)).abs()
    by = [chosen["size"].map("{:g}".format).rename("noise variance"), chosen.attacker, words]
    table = np.exp(factors.groupby(by, sort=False).median()).unstack()
    return table[["ε = 0", "ε = σ²/τ²", *(f"ε = {e:g}" for e in paper)]]


def judge(tables: Tables, thresholds: Thresholds) -> list[Claim]:
    """The experiment's claims. Of the thresholds, `paper_variance` is the noise at which the `paper`'s ε are judged."""
    table, curves = tables["problems"], tables["curves"]
    judged = Judge.of("damping", "damping", thresholds)
    found = []
    for variance, rows in table[table.attacker == "MAP"].groupby("size"):
        about = {"suffix": f"-{variance:.0e}".replace("e-0", "e-"), "variance": variance}
        found.append(judged("pull", *_ratio(rows, PULLED), converged=convergence(rows), **about))
    free = curves[(curves.attacker == "no prior") & (curves["size"] == thresholds["paper_variance"])]
    for epsilon in thresholds["paper"]:
        rows, about = free[free.epsilon == epsilon], {"suffix": f"-{epsilon:g}", "epsilon": epsilon}
        found.append(judged("paper", *_ratio(rows, DAMPED), converged=convergence(rows), **about))
    return found


def _ratio(rows: pd.DataFrame, predicted: str) -> tuple[Estimate, float]:
    """The geometric mean of the measured over the predicted RMSE, of the attacks that converged, and their share."""
    done = rows[rows.converged.eq(True)]
    return estimates.geometric_mean(done.rmse / done[predicted]), len(done) / len(rows)
