"""Noise of one energy, five covariances: the errors of an attacker, and the cost to training."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from i2f.paper.figures.frontier import accuracy_against_privacy
from i2f.paper.figures.style import BLUE, GREEN, PINK, SKY, VERMILION, readable_ticks, style
from i2f.paper.results import Config, Results

KINDS = {  # name -> label, colour, marker
    "isotropic": ("isotropic", VERMILION, "X"),
    "row-space": ("row space", PINK, "D"),
    "linear": ("∝ JᵀJ, drawn as √c Jᵀz", SKY, "v"),
    "designed": ("designed: a noisy input's", BLUE, "o"),
    "averaged": ("water-filled", GREEN, "s"),
}


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    return {"overview.svg": overview(found.tables["problems"], found.tables["frontier"])}


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
    accuracy_against_privacy(right, frontier)
    return figure
