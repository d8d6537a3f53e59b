"""Pictures of a prediction: where I²F says that the attacker ends, beside where the attacker does end."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from i2f.attacks import invert
from i2f.core.influence import influence
from i2f.paper import estimates, sweep
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.rows import declare
from i2f.paper.statistics import convergence
from i2f.paper.sweep import Problem, Row, Settings

KEPT = ("rmse", "psnr", "ssim", "steps", "converged", "matched", "failed", "reason")  # of an attack's row
KINDS = {"cosine": "converged", "predicted": "shade", "recovered": "diagnostic"}
PICTURES = ("predicted", "recovered")
DROPPED = ("noise", "noise_seed", "budget", "start_seed")  # of a problem, and no columns of the table


def problems(config: Config) -> list[Problem]:
    """Gauss–Newton under noise of growing variance, on a few images of each network.

    config: networks: "mnist lenet uniform [activation]" -> the variances; digits: how many of MNIST's train split, from
    first_digit on; photographs: how many of CIFAR-10's test split; gauss_newton_steps: the attacker's budget. All under
    weight seed 1, since the pictures stand side by side.
    """
    first = config["first_digit"]
    digits, photographs = range(first, first + config["digits"]), range(config["photographs"])
    return [  # the noise is scaled from variance to variance
        shared.under_noise(network, variance, image, 1, 1000 + image, config["gauss_newton_steps"])
        for network, variances in config["networks"].items()
        for image in (digits if network.startswith("mnist") else photographs)
        for variance in variances
    ]


def run(problems: list[Problem], settings: Settings = sweep.DEFAULT) -> Results:
    """One row per attack: errors and how it ended, predicted_rmse, and the cosine of the predicted with the measured
    displacement. Arrays, in the table's order, one per row since images differ in size: the pictures by `PICTURES`,
    (C, H, W), 0 to 255."""
    table = sweep.run(solve, problems, settings, ("network", "image"), at_most=6, description="attacks")
    arrays = {name: np.array([*table.pop(name), None], dtype=object)[:-1] for name in PICTURES}
    return Results({"problems": table.drop(columns=[*DROPPED]).rename(columns={"size": "variance"})}, arrays)


@declare("problems", defaults=shared.DEFAULTS, kinds=KINDS)
def solve(chunk: list[Problem]) -> list[Row]:
    return [_row(problem) for problem in chunk]


def _row(problem: Problem) -> Row:
    J = shared.jacobian(problem)
    delta = shared.perturbation(J, problem)
    predicted = influence(J, delta)
    budget, seed = problem["budget"], problem["start_seed"]
    found = invert(J.map.model, J.gradient + delta, J.map.y, J.x.shape, steps=budget, seed=seed)
    attack = shared.score(J, delta, found)
    expected, moved = predicted.displacement.flatten(), (found.x.to(J.x) - J.x).flatten()
    return {
        **{name: attack[name] for name in KEPT},
        "predicted_rmse": predicted.rmse,
        "cosine": float(expected @ moved / (expected.norm() * moved.norm())),
        "predicted": shades(J.x + predicted.displacement.reshape(J.x.shape)),
        "recovered": shades(found.x),
    }


def shades(x: Tensor) -> NDArray[np.uint8]:
    """An image (1, C, H, W) as a screen shows it, (C, H, W): clamped to [0, 1], in 255ths."""
    found: NDArray[np.uint8] = (255 * x[0].detach().clamp(0, 1)).round().byte().cpu().numpy()
    return found


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Medians over a network's images at each variance, of the attacks that converged, and the share that did."""
    by = ["network", "variance"]
    done = table[table.converged.eq(True)]
    medians = done.groupby(by, sort=False)[["predicted_rmse", "rmse", "cosine", "ssim"]].median()
    shares = table.groupby(by, sort=False).converged.agg(lambda c: c.eq(True).mean())
    return medians.reindex(shares.index).assign(converged=shares)


def judge(tables: Tables, thresholds: Thresholds) -> list[Claim]:
    """The experiment's claims, one per network with eight images: the unit is the image, which counts with its mean
    cosine over the variances at which I²F predicts at most `cut`."""
    table = tables["problems"]
    judged = Judge.of("gallery", "gallery", thresholds)
    found = []
    for network, its in table[table.predicted_rmse <= thresholds["cut"]].groupby("network", sort=False):
        done = its[its.converged.eq(True)]
        cosines = done.groupby("image").cosine.mean()
        if its.image.nunique() >= estimates.LEAST:
            about: dict[str, Any] = {"network": network, "converged": convergence(its)}
            suffix = f"-{str(network).replace(' ', '-')}"
            found.append(judged("picture", estimates.mean(cosines), len(done) / len(its), suffix=suffix, **about))
    return found
