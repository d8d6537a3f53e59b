"""Pruned gradients: an attacker who matches the zeros as if they were true, and one who takes them for the mask.

The ρ·d_θ smallest entries of g₀ are set to zero before it is sent. To whoever matches the whole of it, that is a
perturbation δ = −g₀ on the pruned entries, with I(δ) of Eq. 4. But zeros show. With K the entries kept, matching those
alone has δ = 0 and J_K in J's place, the kept columns: the image follows as long as J_K J_Kᵀ has full rank, and else
all but its null space, in which the attack keeps the values that it started from.
"""

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from i2f.core import spectrum
from i2f.core.jacobian import GradientJacobian
from i2f.paper import claims, sweep
from i2f.paper.experiments import problems as shared
from i2f.paper.sweep import Problem, Row

ATTACKERS = {  # name in tables -> the attack, in the words of `experiments.problems`
    "ignores": {"method": "gauss-newton", "mask": "none"},
    "ignores, Adam": {"method": "dgl", "mask": "none"},
    "reads": {"method": "gauss-newton", "mask": "zeros"},
}
GRAY = 0.5  # the mean of the images that Gauss–Newton starts from


def problems(setting: dict[str, Any], images: int, ratios: list[float], steps: dict[str, int]) -> list[Problem]:
    """Every attacker on every image at every ratio; the ratio is `size`, the share of the gradient pruned."""
    return [
        {**problem, **ATTACKERS[problem["attacker"]], "steps": steps[ATTACKERS[problem["attacker"]]["method"]]}
        for problem in sweep.grid(
            **setting, noise="prune", attacker=list(ATTACKERS), image=range(images), size=list(ratios)
        )
    ]


def attack(tasks: list[Problem], jobs: int | None = None) -> tuple[pd.DataFrame, np.ndarray]:
    """A row a problem: what was predicted, what was recovered (see `problems.attack`), and for the reader of the mask
    `kept`'s columns. Also the first image's pictures, the truth in front, in the table's order."""
    solve = partial(_solve, min(task["image"] for task in tasks))
    # an image's problems share J
    table = sweep.run(solve, tasks, together=("attacker", "image"), at_most=9, jobs=jobs, description="attacks")
    pictures = table.pop("picture").dropna()
    return table, np.stack([shared.jacobian(tasks[0]).x[0].cpu().numpy(), *pictures])


def _solve(pictured: int, chunk: list[Problem]) -> list[Row]:
    rows = []
    for problem, found in zip(chunk, shared.attack(chunk, keep=True), strict=True):
        J = shared.jacobian(problem)
        row = kept(J, shared.perturbation(J, problem)) if problem["mask"] == "zeros" else _whole(problem)
        row |= found | {"mse": max(found["mse"], shared.FLOOR), "rmse": max(found["rmse"], shared.FLOOR**0.5)}
        picture = row.pop("picture")[0]
        if problem["image"] == pictured:
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


def foretold(table: pd.DataFrame) -> pd.DataFrame:
    """By ratio, before any attack, medians over images: the RMSE that I²F predicts for both Gauss–Newton attackers,
    the rank of the kept columns over that of J, and the last layer's share of them."""
    whole, mask = (table[table.attacker == name].groupby("size") for name in ("ignores", "reads"))
    return pd.DataFrame(
        {
            "predicted RMSE, mask ignored": whole.predicted_rmse.median(),
            "predicted RMSE, mask read": mask.predicted_rmse.median(),
            "rank kept": mask["rank"].median() / whole["rank"].median(),
            "last layer": mask.last_layer.median(),
        }
    ).rename_axis(index="ratio")


def knowledge(table: pd.DataFrame) -> pd.DataFrame:
    """By ratio, medians over images: both Gauss–Newton attackers' MSE, clamped to [0, 1], and the share of the first
    that is gone once the mask is read: how much of the protection is ignorance."""
    medians = table.pivot_table("mse_clamped", "size", "attacker", aggfunc="median")
    shown = medians[["ignores", "reads"]].clip(lower=shared.FLOOR)
    return shown.assign(ignorance=1 - shown.reads / shown.ignores).rename_axis(index="ratio", columns=None)


def reach(table: pd.DataFrame, exact: float) -> pd.Series:
    """By image, the largest ratio up to which the image is recovered to an MSE of `exact`; 0: at none."""
    recovered = (table.pivot(index="image", columns="size", values="mse").sort_index(axis=1) <= exact).cummin(axis=1)
    return (recovered * recovered.columns.to_numpy()).max(axis=1)


def judge(
    table: pd.DataFrame, dataset: str, cut: float, accuracy: float, order: float, exact: float, share: float,
    far: float, half: float = 0.5, most: float = 0.9,
) -> list[claims.Claim]:  # fmt: skip
    """The experiment's claims. The thresholds are the notebook's parameters: `cut` on the predicted RMSE bounds the
    linear regime, `exact` is an MSE that counts as recovered, `far` the ratio up to which it should be."""
    table = shared.lost(table).assign(miss=shared.relative_error)
    ignores, adam, reads = (table[table.attacker == name] for name in ATTACKERS)
    source = "the pruning experiment"
    blind = {"source": source, "attacker": "gauss-newton: knows model and label, takes the zeros for true, no prior"}
    sees = {
        "source": source,
        "attacker": "gauss-newton: knows model and label, reads the mask from the zeros, no prior",
    }
    published = {"source": source, "attacker": "dgl: knows model and label, takes the zeros for true, no prior"}
    recovered = f"share of images recovered to an MSE of {exact:g}"
    note = f"ratios {table['size'].min():g} to {table['size'].max():g}"
    far = max(reads["size"][reads["size"] <= far + 1e-9], default=far)  # the next lower ratio that was tried
    depth = reach(reads, exact).rename("reach").reset_index()
    found = [
        claims.judge(
            claims.orders(rows, "image", "size", "rmse"), claims.mean_order, "image", at_least=order, **words,
            note=f"{note}; {claims.settled(rows)}",
            id=f"pruning-{dataset}-{name}",
            statement=f"Pruning protects against an attacker who ignores the mask, the more the better{more}.",
            statistic="Spearman correlation of RMSE with the ratio pruned, within an image (0 where all errors are "
            "equal), mean over images",
        )
        for name, rows, words, more in (("protects", ignores, blind, ""), ("protects-adam", adam, published, " (Adam)"))
    ]  # fmt: skip
    found += [
        claims.judge(
            ignores, lambda t: claims.worst(t, "size", "miss"), "image", at_most=accuracy,
            only=(f"the predicted RMSE is at most {cut:g}", ignores[ignores.predicted_rmse <= cut]),
            id=f"pruning-{dataset}-prediction", note=f"{note}; {claims.settled(ignores)}", **blind,
            statement="I²F predicts the error of an attacker who ignores the mask.",
            statistic="median relative error of the predicted RMSE, at the worst ratio",
        ),
        claims.judge(
            ignores, lambda t: claims.rank_correlation(t, "bound_rmse", "rmse"), "image", at_least=order,
            id=f"pruning-{dataset}-bound", note=note, **blind,
            statement="The lower bound puts pruned gradients in the order of their errors.",
            statistic="Spearman correlation of RMSE with the bound",
        ),
    ]  # fmt: skip
    found += [
        claims.judge(
            reads[np.isclose(reads["size"], ratio)], lambda t: float((t.mse <= exact).mean()), "image", at_least=share,
            id=f"pruning-{dataset}-mask-{round(100 * ratio)}", **sees,
            statement=f"Whoever reads the mask recovers the image: {ratio:.0%} pruned.", statistic=recovered,
        )
        for ratio in (half, most)
    ]  # fmt: skip
    return [
        *found,
        claims.judge(
            depth, lambda t: float(t.reach.median()), "image", at_least=far,
            id=f"pruning-{dataset}-reach", note=f"{note}; recovered: MSE of at most {exact:g}", **sees,
            statement=f"Whoever reads the mask recovers the image from any pruning up to {far:.0%}.",
            statistic="largest ratio up to which the image is recovered, median over images",
        ),
        claims.judge(
            reads, lambda t: _agreement(t, exact), "image", at_least=share,
            id=f"pruning-{dataset}-rank", note=note, **sees,
            statement="The image is recovered exactly where the kept columns of J have full rank.",
            statistic="share of problems in which rank and recovery agree",
        ),
    ]  # fmt: skip


def _agreement(table: pd.DataFrame, exact: float) -> float:
    """Share of problems recovered where the rank is full, or not where it is not; none of them where it is unknown."""
    recovered, full = table.mse <= exact, table.predicted_rmse == 0
    return float(((recovered == full) & table.predicted_rmse.notna()).mean())
