"""Pruned gradients: an attacker who ignores the mask, one who reads it, and what each is left with."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from i2f.paper.attackers import ATTACKERS
from i2f.paper.figures.style import AMBER, BLUE, INK, LINE, VERMILION, Image, diagonal, marks, pictures, style
from i2f.paper.results import Config, Results

COLOURS = (BLUE, AMBER, VERMILION)  # of the ratios, the smallest first
DASHES = ("-", (0, (4, 2)), (0, (1, 1)))
SHAPES = ("o", "s", "^")


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    table = found.tables["problems"]
    return {
        "overview.svg": overview(table, config["exact"]),
        "pictures.png": recoveries(table[table.drawn], list(found.arrays["pictures"])),
    }


def overview(table: pd.DataFrame, exact: float) -> Figure:
    """Error against the ratio pruned, error against its prediction, and how many images the reader recovers.

    `table` is the experiment's; `exact` the MSE that counts as recovered.
    """
    style()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 4.0), layout="constrained")
    error_against_ratio(left, table)
    left.set_title("Reading the mask reduces the error")
    measured_against_predicted(middle, table[table.attacker == "ignores"])
    middle.set_title("Mask ignored: I²F is right at 50%")
    recovered(right, table[table.attacker == "reads"], exact)
    right.set_title("Mask read: exact at 50% and 70%")
    return figure


def error_against_ratio(ax: Axes, table: pd.DataFrame) -> None:
    """RMSE per pixel against the ratio: medians over images, and the range of four in five as bands."""
    for name, rows in table.groupby("attacker", sort=False):
        look, ratios = ATTACKERS[name], rows.groupby("size").rmse
        middle = ratios.median()
        ax.fill_between(middle.index, ratios.quantile(0.1), ratios.quantile(0.9), color=look.colour, alpha=0.2, lw=0)
        ax.plot(middle.index, middle, color=look.colour, marker=look.marker, ms=5, lw=1.5, label=look.label, zorder=3)
    ax.set(yscale="log", xlabel="share of the gradient pruned", ylabel="RMSE per pixel")
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.legend(fontsize="small", loc="center left")


def measured_against_predicted(ax: Axes, table: pd.DataFrame) -> None:
    """Measured against predicted RMSE per pixel, one mark per attack, hollow where it did not converge."""
    sizes = table.groupby("size")
    for (ratio, rows), colour, shape in zip(sizes, COLOURS, SHAPES, strict=False):
        marks(ax, rows.predicted_rmse, rows.rmse, rows.converged, colour, shape, alpha=0.7)
        ax.scatter([], [], color=colour, marker=shape, s=26, label=f"{ratio:.0%} pruned")
    ax.scatter([], [], s=26, facecolor="white", edgecolor=INK, label="not converged")
    ax.set(xscale="log", yscale="log", xlabel="predicted RMSE per pixel", ylabel="measured RMSE per pixel")
    diagonal(ax)
    ax.legend(fontsize="small", loc="lower right")


def recovered(ax: Axes, table: pd.DataFrame, exact: float) -> None:
    """The share of images whose MSE is at most x, by ratio; vertical: the MSE that counts as recovered."""
    for (ratio, rows), colour, dashes in zip(table.groupby("size"), COLOURS, DASHES, strict=False):
        mse = np.sort(rows.mse.fillna(np.inf))
        shares = np.arange(len(mse) + 1) / len(mse)
        (line,) = ax.step([mse[0], *mse], shares, where="post", color=colour, ls=dashes, lw=1.8)
        line.set_label(f"{ratio:.0%} pruned, n = {len(mse)}")
    ax.axvline(exact, color=LINE, lw=1, ls=":", zorder=1)
    ax.set(xscale="log", ylim=(-0.03, 1.03), xlabel="MSE per pixel", ylabel="share of images at or below")
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.legend(fontsize="small", loc="center", bbox_to_anchor=(0.32, 0.5))


def recoveries(table: pd.DataFrame, images: Sequence[Image]) -> Figure:
    """What each attacker recovers of one image, one column per ratio, clamped to [0, 1].

    `table` holds that image's rows, in the order of `images`, whose first is the truth.
    """
    truth, *found = images
    rows = []
    for name in dict.fromkeys(table.attacker):
        mine = np.flatnonzero(table.attacker == name)
        captions = [f"{table['size'].iloc[i]:.0%} pruned\nRMSE {_short(table.rmse.iloc[i])}" for i in mine]
        label = ATTACKERS[name].label.replace(" the", "\nthe")
        rows.append((label, [truth, *(found[i] for i in mine)], ["private image\n", *captions]))
    return pictures(rows)


def _short(value: float) -> str:
    return "< 1e-8" if value < 1e-8 else f"{value:.2g}"
