"""Pruned gradients: an attacker who matches the zeros as if they were true, and one who takes them for the mask.

The ρ·d_θ smallest entries of g₀ are set to zero before it is sent. To whoever matches the whole of it, that is a
perturbation δ = −g₀ on the pruned entries, with I(δ) of Eq. 4. But zeros show. With K the entries kept, matching those
alone has δ = 0 and J_K in J's place, the kept columns: the image follows as long as J_K J_Kᵀ has full rank, and else
all but its null space, in which the attack keeps the values that it started from.
"""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from i2f.core import spectrum
from i2f.core.jacobian import GradientJacobian
from i2f.paper import estimates, sweep
from i2f.paper.attackers import ATTACKERS
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.rows import declare
from i2f.paper.statistics import convergence
from i2f.paper.sweep import Problem, Row, Settings

WHO = ("ignores", "reads")
TOGETHER = ("image", "weight_seed")  # problems that share J
GRAY = 0.5  # the mean of the images that Gauss–Newton starts from


def problems(config: Config) -> list[Problem]:
    """Attacks on pruned gradients; the share pruned is `size`. Each image is under one of `weight_seeds`, in rotation.

    config: init, weight_seeds; digits of MNIST's train split from first_digit on meet the reader of the mask at the
    ratio half, the first law_digits both attackers at all ratios; gauss_newton_steps: budget of the attacks, and
    patient_steps: of those that ignore the mask at the largest ratio, whose minimum takes hundreds of steps.
    """
    pairs = shared.rotated(config["first_digit"], config["digits"], config["weight_seeds"])
    law, ratios = config["first_digit"] + config["law_digits"], sorted({config["half"], *config["ratios"]})

    def budget(attacker: str, ratio: float) -> int:
        patient = attacker == "ignores" and ratio == max(ratios)
        return int(config["patient_steps" if patient else "gauss_newton_steps"])

    return [
        {
            **{"dataset": "mnist", "split": "train", "init": config["init"]},
            **{"image": image, "weight_seed": weight_seed, "noise": "prune", "size": ratio, "attacker": attacker},
            **ATTACKERS[attacker].options,
            **{"budget": budget(attacker, ratio), "start_seed": image, "drawn": image == config["first_digit"]},
        }
        for image, weight_seed in pairs
        for attacker in WHO
        for ratio in ratios
        if image < law or (attacker == "reads" and ratio == config["half"])
    ]


def run(problems: list[Problem], settings: Settings = sweep.DEFAULT) -> Results:
    """One row per problem: what was predicted, what was recovered (see `problems.attack`), and for the reader of the
    mask `kept`'s columns. pictures: the `drawn` image's, the truth in front, in the table's order."""
    table = sweep.run(solve, problems, settings, TOGETHER, at_most=6, description="attacks")
    pictures, (first, *_) = table.pop("picture").dropna(), (p for p in problems if p["drawn"])
    truth = shared.jacobian(first).x[0].cpu().numpy()
    return Results({"problems": table}, {"pictures": np.stack([truth, *pictures])})


@declare("problems", defaults=shared.DEFAULTS, kinds={"picture": "diagnostic"})
def solve(chunk: list[Problem]) -> list[Row]:
    attacked = shared.attack([{**problem, "steps": problem["budget"]} for problem in chunk], keep=True)
    rows = []
    for problem, found in zip(chunk, attacked, strict=True):
        J = shared.jacobian(problem)
        row = kept(J, shared.perturbation(J, problem)) if problem["mask"] == "zeros" else _whole(problem)
        row |= found | {"mse": max(found["mse"], shared.FLOOR), "rmse": max(found["rmse"], shared.FLOOR**0.5)}
        picture = row.pop("picture")[0]
        if problem["drawn"]:
            row["picture"] = picture
        rows.append(row)
    return rows


def _whole(problem: Problem) -> Row:
    """Eq. 4 and Eq. 5 for δ = −(pruned part); predicted_rmse and bound_rmse per pixel."""
    (row,) = shared.predict([problem])
    return {name: row[name] for name in ("predicted_rmse", "bound_rmse", "rank", "lambda_min", "noise_norm")}


def kept(J: GradientJacobian, delta: Tensor) -> Row:
    """What the kept columns of J know of the image: rank and smallest eigenvalue of J_K J_Kᵀ, (d_x, d_x).

    predicted_rmse: ‖P(x̄ − x₀)‖/√d_x per pixel, P the projection on the null space of J_K J_Kᵀ and x̄ the gray image,
    since on the row space I²F is zero and the null space keeps the start; 0 where the rank is full. last_layer: the
    share of the kept entries that belong to the last layer.
    """
    mask = J.gradient + delta != 0
    columns = J.dense().double()[:, mask]
    values, vectors = torch.linalg.eigh(columns @ columns.T)
    unseen = vectors[:, values <= spectrum.zero_level(J) * values[-1]]
    missed = unseen.T @ (GRAY - J.x.double().reshape(-1))
    last = sum(p.numel() for p in list(J.map.model.parameters())[-2:])
    return {
        "predicted_rmse": float(missed.norm()) / J.shape[0] ** 0.5,
        "rank": J.shape[0] - unseen.shape[1],
        "lambda_min": max(float(values[0]), 0.0),
        "noise_norm": float(delta.norm()),
        "last_layer": float(mask[-last:].sum() / mask.sum()),
    }


def predicted(table: pd.DataFrame) -> pd.DataFrame:
    """By ratio, medians over images: the RMSE that I²F predicts and the one that is measured, of both attackers; the
    rank of the kept columns over d_x, and the last layer's share of the kept entries."""
    whole, mask = (table[table.attacker == name].groupby("size") for name in WHO)
    return pd.DataFrame(
        {
            "mask ignored: predicted": whole.predicted_rmse.median(),
            "mask ignored: measured": whole.rmse.median(),
            "mask read: predicted": mask.predicted_rmse.median(),
            "mask read: measured": mask.rmse.median(),
            "rank kept": mask["rank"].median() / whole["rank"].median(),
            "last layer": mask.last_layer.median(),
            "converged, mask ignored": whole.converged.mean(),
            "converged, mask read": mask.converged.mean(),
        }
    ).rename_axis(index="ratio")


def judge(tables: Tables, thresholds: Thresholds) -> list[Claim]:
    """The experiment's claims. Of the thresholds, `exact` is an MSE that counts as recovered, `half` the ratio at which
    the reader of the mask is judged; the other attacker, at that and the largest of the `ratios`."""
    table = tables["problems"]
    judged = Judge.of("pruning", "pruning", {**thresholds, "most": max(thresholds["ratios"])})
    half, most = (table[table["size"] == size] for size in (thresholds["half"], max(thresholds["ratios"])))
    less, more = (rows[rows.attacker == "ignores"].set_index("image") for rows in (half, most))
    reads = shared.lost(half[half.attacker == "reads"])
    both = pd.concat([less, more])
    # an attack that failed has an infinite error at the smaller ratio, where that speaks against the claim, alone
    pairs = shared.scored(more)[["rmse"]].join(shared.lost(less).rmse.rename("less"))
    return [
        judged("more", estimates.share(pairs.rmse > pairs.less), _finished(both), converged=convergence(both)),
        judged(
            "mask",
            estimates.share(reads.mse <= thresholds["exact"]),
            _finished(reads),
            converged=convergence(reads),
        ),
    ]


def _finished(rows: pd.DataFrame) -> float:
    return float(rows.converged.eq(True).mean())
