"""Deep networks: what each estimate costs, what it says, and the bound against damped I²F."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i2f.paper.figures.style import BLUE, GREEN, INK, LINE, VERMILION, style
from i2f.paper.results import Config, Results

MARKERS = "os^DvP"
Columns = dict[str, tuple[str, str, str]]  # of the table -> label, colour, marker
COSTS: Columns = {
    "products": ("I$_{lb}$, to 1%", BLUE, "o"),
    "solve_products": ("damped I²F", VERMILION, "s"),
    "trace_products": ("Bayes error", GREEN, "^"),
}
ESTIMATES: Columns = {
    "bound_rmse": ("I$_{lb}$", BLUE, "o"),
    "damped_rmse": ("damped I²F: the noise's part", VERMILION, "s"),
    "bayes_value": ("Bayes error: with the prior's", GREEN, "^"),
}


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    return {"overview.svg": overview(found.tables["problems"], config["tight"])}


def overview(table: pd.DataFrame, tight: float) -> Figure:
    """Three panels: products by network, RMSE of every estimate by network, the bound against damped I²F."""
    style()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.9), layout="constrained")
    cost(left, table)
    estimates(middle, table)
    bound_against_damped(right, table, tight)
    return figure


def cost(ax: Axes, table: pd.DataFrame) -> Axes:
    """Products with J and Jᵀ that each estimate took."""
    _by_network(ax, table, COSTS, apart=0.22)
    sizes = table.groupby("network", sort=False).d_x.first()
    ax.scatter(sizes, range(len(sizes)), s=120, marker="|", color=LINE, label="to form J")
    ax.set(xscale="log", xlabel="products with J and Jᵀ", xlim=(3, 3 * sizes.max()))
    ax.set_title("Tens to hundreds of products, not thousands")
    ax.legend(fontsize="small", loc="lower right", ncols=2)
    return ax


def estimates(ax: Axes, table: pd.DataFrame) -> Axes:
    """RMSE per pixel of the bound, of damped I²F and of the Bayes error; the line is what was known before."""
    _by_network(ax, table, ESTIMATES, apart=0.22)
    ax.axvline(table.prior_rmse.iloc[0], color=LINE, lw=1.2, ls="--")
    ax.text(table.prior_rmse.iloc[0], -0.62, "prior ", color=INK, fontsize="small", va="center", ha="right")
    ax.set(xscale="log", xlabel="RMSE per pixel")
    ax.set_title("The bound lies far below damped I²F")
    ax.legend(fontsize="small", loc="lower left")
    return ax


def _by_network(ax: Axes, table: pd.DataFrame, columns: Columns, apart: float = 0.0) -> None:
    """One row per network and a cloud of its images per column, `apart` from the next one's, with a bar at its
    median."""
    names = list(dict.fromkeys(table.network))
    for number, (column, (label, colour, marker)) in enumerate(columns.items()):
        if column in table:
            rows = table[table[column].notna()]
            at = np.array([names.index(n) for n in rows.network]) + apart * (number - 1)
            jitter = np.random.default_rng(number).uniform(-0.1, 0.1, len(rows))
            ax.scatter(rows[column], at + jitter, s=16, marker=marker, color=colour, alpha=0.45, lw=0, zorder=3)
            middle = rows.groupby("network")[column].median()
            y = np.array([names.index(n) for n in middle.index]) + apart * (number - 1)
            ax.scatter(middle, y, s=150, marker="|", lw=2, color=colour, label=label, zorder=4)
    ax.set_yticks(range(len(names)), names, color=INK)
    ax.set_ylim(len(names) + 1.2, -1)  # room for the legend


def bound_against_damped(ax: Axes, table: pd.DataFrame, tight: float) -> Axes:
    """A cloud per network: damped I²F against the bound, with the lines of equality and of the factor `tight`."""
    rows = table[table.damped_rmse.notna()] if "damped_rmse" in table else table.iloc[:0]
    names = list(dict.fromkeys(rows.network))
    for name, colour, marker in zip(
        names, sns.color_palette("colorblind", len(names)), itertools.cycle(MARKERS), strict=False
    ):
        mine = rows[rows.network == name]
        ax.scatter(
            mine.bound_rmse, mine.damped_rmse, s=26, marker=marker, color=colour, alpha=0.6, label=name, zorder=3
        )
    ax.set(xscale="log", yscale="log", xlabel="I$_{lb}$, RMSE per pixel", ylabel="damped I²F, RMSE per pixel")
    if len(rows):
        ends = np.array([rows.bound_rmse.min() / 2, rows.bound_rmse.max() * 2])
        for factor, line in ((1, "-"), (tight, ":")):
            ax.plot(ends, factor * ends, color=LINE, lw=1.2, ls=line, zorder=1, label=f"{factor:g} times the bound")
        ax.legend(fontsize="small")
    ax.set_title("On most images by more than 10 times")
    return ax
