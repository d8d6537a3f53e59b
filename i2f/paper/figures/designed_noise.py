"""Noise of one energy, five covariances: the errors of an attacker, and the cost to training."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i2f.paper.attackers import BLUE, GREEN, ORANGE, PINK, YELLOW
from i2f.paper.figures.style import INK, readable_ticks, style

KINDS = {  # name -> label, colour, marker
    "isotropic": ("isotropic", ORANGE, "X"),
    "row-space": ("row space", PINK, "D"),
    "linear": ("∝ JᵀJ, drawn as √c Jᵀz", "#56B4E9", "v"),
    "designed": ("designed: a noisy input's", BLUE, "o"),
    "averaged": ("water-filled", GREEN, "s"),
}
METHODS = {  # name -> label, colour, marker
    "none": ("no defence", INK, "*"),
    "isotropic": ("isotropic noise", ORANGE, "X"),
    "designed": ("designed noise", BLUE, "o"),
    "row-space": ("row-space noise", GREEN, "v"),
    "dp": ("clipping and noise, local DP", YELLOW, "P"),
    "prune": ("pruning", PINK, "D"),
}


def published(run: Path) -> dict[str, Figure]:
    """The figures of a run's folder, by file name."""
    return {"overview.svg": overview(pd.read_csv(run / "problems.csv"), pd.read_csv(run / "frontier.csv"))}


def overview(table: pd.DataFrame, frontier: pd.DataFrame) -> Figure:
    """Left: the error along the sharpest directions. Middle: the mean error. Right: accuracy against privacy."""
    style()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12.5, 4.1), layout="constrained")
    rows = table[~table.told.astype(bool) & ~table.failed.astype(bool)]
    for ax, column, title in ((left, "sharpest", "The least protected directions"), (middle, "mse", "All directions")):
        for kind, (label, colour, marker) in KINDS.items():
            its = rows[rows.kind == kind]
            ax.scatter(its.level, its[column] ** 0.5, color=colour, marker=marker, s=22, alpha=0.7)
            means = its.groupby("level")[column].mean() ** 0.5
            ax.plot(means.index, means, color=colour, lw=1.3, marker=marker, ms=6, label=label)
        ax.set(xscale="log", yscale="log", xlabel="‖noise‖ / ‖gradient‖", ylabel="RMSE after Gauss–Newton")
        ax.set_title(title)
        readable_ticks(ax)
    left.set_ylabel("RMSE along the ten sharpest directions")
    middle.legend(fontsize="small")
    _curves(right, frontier)
    return figure


def frontier(table: pd.DataFrame) -> Figure:
    """Accuracy against privacy alone, of longer trainings; the thin bar is the range over seeds."""
    style()
    figure, ax = plt.subplots(figsize=(6.4, 4.3), layout="constrained")
    _curves(ax, table)
    return figure


def _curves(ax: Axes, table: pd.DataFrame) -> None:
    for method, (label, colour, marker) in METHODS.items():
        groups = table[table.method == method].groupby("value")
        if not len(groups):
            continue
        curve = groups.accuracy.agg(["mean", "min", "max"]).assign(privacy=groups.privacy.mean()).sort_values("privacy")
        ax.plot(curve.privacy, curve["mean"], color=colour, marker=marker, lw=1.3, ms=6, label=label)
        ax.vlines(curve.privacy, curve["min"], curve["max"], color=colour, lw=0.9, alpha=0.6)
    ax.set(xlabel="judged RMSE of an audit at the first step", ylabel="accuracy on held-out digits")
    ax.set_title("The cost to training")
    ax.legend(fontsize="small", loc="lower left")
