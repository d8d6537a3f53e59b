"""Deep networks: what each question costs, the bound beside damped I²F, the head of the spectrum."""

import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i2f.paper.figures.style import INK, LINE, style

MARKERS = "os^DvP"


def published(run: Path) -> dict[str, Figure]:
    """The figures of a run's folder, by file name."""
    return {"overview.svg": overview(pd.read_csv(run / "problems.csv"))}


def overview(table: pd.DataFrame) -> Figure:
    """Three panels: products by network, RMSE of every estimate by network, the bound against damped I²F."""
    style()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.9), layout="constrained")
    cost(left, table)
    estimates(middle, table)
    bound_against_damped(right, table)
    return figure


def cost(ax: Axes, table: pd.DataFrame) -> Axes:
    """Products with J and Jᵀ: a row a network, a mark an image and question."""
    names = list(dict.fromkeys(table.network))
    for column, label, colour, marker in (
        ("products", "I$_{lb}$, to 1%", "#0072B2", "o"),
        ("solve_products", "damped I²F", "#D55E00", "s"),
        ("trace_products", "Bayes error", "#009E73", "^"),
    ):
        if column in table:
            rows = table[table[column].notna()]
            ax.scatter(rows[column], [names.index(n) for n in rows.network], s=28, marker=marker, color=colour,
                       label=label, zorder=3)  # fmt: skip
    sizes = table.groupby("network").d_x.first()
    ax.scatter(sizes, [names.index(n) for n in sizes.index], s=120, marker="|", color=LINE, label="to form J")
    ax.set(xscale="log", xlabel="products with J and Jᵀ", xlim=(3, 3 * sizes.max()))
    ax.set_yticks(range(len(names)), names, color=INK)
    ax.set_ylim(len(names) + 1.2, -1)  # room for the legend
    ax.set_title("What an answer costs")
    ax.legend(fontsize="small", loc="lower right", ncols=2)
    return ax


def estimates(ax: Axes, table: pd.DataFrame) -> Axes:
    """RMSE per pixel of the bound, of damped I²F and of the average over noise; the line is what was known before."""
    names = list(dict.fromkeys(table.network))
    for number, (column, label, colour, marker) in enumerate((
        ("bound_rmse", "I$_{lb}$", "#0072B2", "o"),
        ("damped_rmse", "damped I²F: the noise's part", "#D55E00", "s"),
        ("bayes_value", "Bayes error: with the prior's", "#009E73", "^"),
    )):  # fmt: skip
        if column in table:
            rows = table[table[column].notna()]
            at = np.array([names.index(n) for n in rows.network]) + 0.12 * (number - 1)
            ax.scatter(rows[column], at, s=28, marker=marker, color=colour, label=label, zorder=3)
    ax.axvline(table.prior_rmse.iloc[0], color=LINE, lw=1.2, ls="--")
    ax.text(table.prior_rmse.iloc[0], -0.62, "prior ", color=INK, fontsize="small", va="center", ha="right")
    ax.set(xscale="log", xlabel="RMSE per pixel")
    ax.set_yticks(range(len(names)), names, color=INK)
    ax.set_ylim(len(names) + 1.2, -1)  # room for the legend
    ax.set_title("What the noise hides")
    ax.legend(fontsize="small", loc="lower left")
    return ax


def bound_against_damped(ax: Axes, table: pd.DataFrame) -> Axes:
    """A mark an image: does the bound put images in the order of damped I²F?"""
    rows = table[table.damped_rmse.notna()] if "damped_rmse" in table else table.iloc[:0]
    names = list(dict.fromkeys(rows.network))
    for name, colour, marker in zip(
        names, sns.color_palette("colorblind", len(names)), itertools.cycle(MARKERS), strict=False
    ):
        mine = rows[rows.network == name]
        ax.scatter(mine.bound_rmse, mine.damped_rmse, s=30, marker=marker, color=colour, label=name, zorder=3)
    ax.set(xscale="log", yscale="log", xlabel="I$_{lb}$, RMSE per pixel", ylabel="damped I²F, RMSE per pixel")
    if len(rows):
        ax.legend(fontsize="small")
    ax.set_title("Does the bound rank images?")
    return ax
