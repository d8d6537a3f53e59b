"""Pruned gradients: attackers who ignore the mask, one who reads it, and the rank of the kept entries."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from i2f.paper.attackers import ATTACKERS
from i2f.paper.figures.style import INK, LINE, Image, diagonal, mark_cut, pictures, style
from i2f.paper.results import Config, Results

CONVERGING = ("ignores", "reads")  # Adam reports no convergence


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    table = found.tables["problems"]
    return {
        "overview.svg": overview(table, config["cut"]),
        "pictures.png": recoveries(table[table.image == 0], list(found.arrays["pictures"])),
    }


def overview(table: pd.DataFrame, cut: float) -> Figure:
    """Error against the ratio pruned, error against its prediction, and the rank of the kept columns.

    `table` is the experiment's; `cut` the predicted RMSE that bounds the linear regime.
    """
    style()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11.5, 3.9), layout="constrained")
    error_against_ratio(left, table)
    left.set_title("Does the attacker read the mask?")
    measured_against_predicted(middle, table[table.attacker != "reads"], cut)
    middle.set_title("Zeros taken for true: I²F")
    rank_against_ratio(right, table[table.attacker == "reads"])
    right.set_title("What the kept entries determine")
    return figure


def error_against_ratio(ax: Axes, table: pd.DataFrame) -> Axes:
    """RMSE per pixel against the ratio: one mark per attack, a line through each attacker's medians; hollow: not
    converged."""
    for name, rows in table.groupby("attacker", sort=False):
        medians = rows.groupby("size").rmse.median()
        ax.plot(medians.index, medians, color=ATTACKERS[name].colour, lw=1.5, label=ATTACKERS[name].label, zorder=2)
        _marks(ax, rows, "size", name)
    ax.set(yscale="log", xlabel="share of the gradient pruned", ylabel="RMSE per pixel")
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if ((table.attacker.isin(CONVERGING)) & ~table.converged.astype(bool)).any():
        ax.scatter([], [], s=26, facecolor="white", edgecolor=INK, linewidth=1.2, label="not converged")
    ax.legend(fontsize="small", loc="lower right", bbox_to_anchor=(1, 0.06))
    return ax


def measured_against_predicted(ax: Axes, table: pd.DataFrame, cut: float) -> Axes:
    """Measured against predicted RMSE per pixel, with the diagonal and the end of the linear regime."""
    for name, rows in table.groupby("attacker", sort=False):
        _marks(ax, rows, "predicted_rmse", name)
    ax.set(xscale="log", yscale="log", xlabel="predicted RMSE per pixel", ylabel="measured RMSE per pixel")
    diagonal(ax)
    mark_cut(ax, cut, foot=True, left=True)
    ax.legend(fontsize="small", loc="upper left")
    return ax


def rank_against_ratio(ax: Axes, table: pd.DataFrame) -> Axes:
    """Rank of the kept columns, one mark per image; dotted: that of J."""
    ax.plot(table["size"], table["rank"], "s", color=ATTACKERS["reads"].colour, ms=5, zorder=3)
    ax.axhline(table["rank"].max(), color=LINE, lw=1, ls=":", zorder=1)
    ax.set(xlabel="share of the gradient pruned", ylabel="rank of the kept columns of J", ylim=(0, None))
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return ax


def recoveries(table: pd.DataFrame, images: Sequence[Image]) -> Figure:
    """What each attacker recovers of one image, one column per ratio, clamped to [0, 1].

    `table` holds that image's rows, in the order of `images`, whose first is the truth.
    """
    truth, *found = images
    rows = []
    for name in dict.fromkeys(table.attacker):
        mine = np.flatnonzero(table.attacker == name)
        captions = [f"{table['size'].iloc[i]:.0%} pruned\nRMSE {_short(table.rmse.iloc[i])}" for i in mine]
        label = ATTACKERS[name].label.replace(" the", "\nthe").replace(", ", ",\n")
        rows.append((label, [truth, *(found[i] for i in mine)], ["private image\n", *captions]))
    return pictures(rows)


def _short(value: float) -> str:
    return "< 1e-8" if value < 1e-8 else f"{value:.2g}"


def _marks(ax: Axes, rows: pd.DataFrame, x: str, name: str) -> None:
    look = ATTACKERS[name]
    converged = rows.converged.astype(bool) | (name not in CONVERGING)
    for some, face, edge, width in ((converged, look.colour, "white", 0.5), (~converged, "white", look.colour, 1.2)):
        if some.any():
            label = look.label if face == look.colour else f"{look.label}, not converged"
            marks = ax.scatter(rows[x][some], rows.rmse[some], s=26, marker=look.marker, zorder=3)
            marks.set(facecolor=face, edgecolor=edge, linewidth=width, label=None if x == "size" else label)
