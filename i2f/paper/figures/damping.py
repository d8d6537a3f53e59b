"""The damping ε: what is predicted at each, and what attackers with and without a prior recover."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from i2f.paper.attackers import ATTACKERS
from i2f.paper.figures.style import GREEN, INK, LINE, diagonal, marks, pictures, readable_ticks, style
from i2f.paper.results import Config, Results

DASHED = (0, (4, 2))
SHOWN = ("no prior", "MAP", "MAP, ε = 0.1", "MAP, ε = 1", "MAP, ε = 10", "Adam")
BAND = (0.1, 0.9)  # quantiles over images


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    table, arrays = found.tables["problems"], found.arrays
    return {
        "overview.svg": overview(table, found.tables["curves"], arrays["values"], config["paper"]),
        "pictures.png": recoveries(table[table.drawn], arrays["truth"], arrays["found"]),
    }


def overview(table: pd.DataFrame, curves: pd.DataFrame, values: NDArray[Any], paper: Sequence[float]) -> Figure:
    """Above: errors against ε at the least and the most noise. Below: how far off the displacement is, and every attack
    against its prediction. `curves`: of the experiment; values: (d_x,), eigenvalues of one image; paper: its ε."""
    style()
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 8.2), layout="constrained")
    least, most = table["size"].min(), table["size"].max()
    for ax, noise, words in ((axes[0, 0], least, "Little noise"), (axes[0, 1], most, "Much noise")):
        error_against_damping(ax, curves[curves["size"] == noise], table[table["size"] == noise], values)
        _marked(ax, table[table["size"] == noise].bayes.iloc[0], paper)
        ax.set_title(f"{words}: each attacker at its own ε")
    axes[0, 0].legend(fontsize="x-small", loc="lower left", bbox_to_anchor=(0, 0.03))
    miss_against_damping(axes[1, 0], curves[curves["size"] == least])
    _marked(axes[1, 0], table[table["size"] == least].bayes.iloc[0], paper)
    axes[1, 0].set_title("Little noise: which ε describes whom")
    measured_against_predicted(axes[1, 1], table)
    axes[1, 1].set_title("The pull belongs to the prediction")
    return figure


def error_against_damping(ax: Axes, curves: pd.DataFrame, table: pd.DataFrame, values: NDArray[Any]) -> None:
    """Lines, medians over images, and bands of four images in five: what is predicted at ε. Marks: what each MAP
    attacker recovered, at its own ε; level lines: attackers without one. Ticks at the foot: the eigenvalues of J Jᵀ."""
    ratios = curves[(curves.attacker == "no prior") & (curves.epsilon > 0)].groupby("epsilon")
    for column, label, dashes in (
        ("damped_rmse", "predicted: damped I²F", DASHED),
        ("pulled_rmse", "predicted: with the pull", "-"),
        ("expected_rmse", "expected under the prior", ":"),
    ):
        middle = ratios[column].median()
        ax.plot(middle.index, middle, color=INK, lw=1.6, ls=dashes, label=label, zorder=2)
        ax.fill_between(middle.index, *(ratios[column].quantile(q) for q in BAND), color=INK, alpha=0.12, lw=0)
    for name, rows in table.groupby("attacker", sort=False):
        who, ridge, middle_error = ATTACKERS[name], rows.ridge.iloc[0], rows.rmse.median()
        low, high = (rows.rmse.quantile(q) for q in BAND)
        if ridge:
            ax.vlines(ridge, low, high, color=who.colour, lw=2.5, alpha=0.5, zorder=3)
            mark = ax.scatter(ridge, middle_error, s=55, marker=who.marker, color=who.colour, zorder=4)
            mark.set(edgecolor="white", linewidth=0.7, label=f"measured: {who.label}")
        else:
            ax.axhspan(low, high, color=who.colour, alpha=0.12, lw=0, zorder=0)
            ax.axhline(middle_error, color=who.colour, lw=1.6, label=f"measured: {who.label}", zorder=1)
    ax.set(xscale="log", yscale="log", xlabel="ε, in units of λ", ylabel="RMSE per pixel")
    feet = np.column_stack([values, values, np.full(len(values), np.nan)]).ravel()
    heights = np.tile([0, 0.03, np.nan], len(values))  # one line with gaps: a small file
    ax.plot(feet, heights, color=LINE, lw=0.6, transform=ax.get_xaxis_transform(), zorder=1)
    ax.set_ylim(top=3 * ax.get_ylim()[1])  # room for the names of the vertical lines


def miss_against_damping(ax: Axes, curves: pd.DataFrame) -> None:
    """Distance of predicted from measured displacement, over the latter's length, against ε: medians over images;
    dashed: without the pull."""
    for name in SHOWN:
        middle = curves[(curves.attacker == name) & (curves.epsilon > 0)].groupby("epsilon").median(numeric_only=True)
        who = ATTACKERS[name]
        ax.plot(middle.index, middle.pulled_miss, color=who.colour, lw=1.8, zorder=3)
        ax.plot(middle.index, middle.damped_miss, color=who.colour, lw=1.2, ls=DASHED, zorder=2)
    ax.set(xscale="log", yscale="log", xlabel="ε, in units of λ", ylabel="displacement missed, relative")
    ax.plot([], [], color=INK, lw=1.2, ls=DASHED, label="without the pull")
    readable_ticks(ax)
    ax.legend(fontsize="x-small", loc="lower left")


def measured_against_predicted(ax: Axes, table: pd.DataFrame) -> None:
    """Measured against predicted RMSE per pixel at each attacker's own ε; filled: with the pull, hollow: without."""
    for name, rows in table.groupby("attacker", sort=False):
        who = ATTACKERS[name]
        if rows.ridge.iloc[0]:
            marks(ax, rows.damped_rmse, rows.rmse, [False] * len(rows), who.colour, who.marker, "none", alpha=0.5)
        marks(ax, rows.pulled_rmse, rows.rmse, [True] * len(rows), who.colour, who.marker, alpha=0.6)
        ax.scatter([], [], color=who.colour, marker=who.marker, s=26, label=who.label)
    ax.set(xscale="log", yscale="log", xlabel="predicted RMSE per pixel", ylabel="measured RMSE per pixel")
    diagonal(ax)
    ax.scatter([], [], s=26, facecolor="none", edgecolor=INK, label="hollow: without the pull")
    ax.legend(fontsize="x-small", loc="lower right")


def recoveries(table: pd.DataFrame, truth: NDArray[Any], found: NDArray[Any]) -> Figure:
    """What each attacker recovers of one image, one row per noise variance, clamped to [0, 1].

    `table` holds that image's rows, in the order of `found`.
    """
    rows = []
    for noise in dict.fromkeys(table["size"]):
        mine = np.flatnonzero((table["size"] == noise) & table.attacker.isin(SHOWN))
        captions = [f"{ATTACKERS[table.attacker.iloc[i]].label}\nRMSE {table.rmse.iloc[i]:.2g}" for i in mine]
        rows.append((f"variance {noise:g}", [truth, *(found[i] for i in mine)], ["private image\n", *captions]))
    return pictures(rows)


def _marked(ax: Axes, bayes: float, paper: Sequence[float]) -> None:
    for epsilon, words in ((bayes, "σ²/τ²"), *((e, f"{e:g}") for e in paper)):
        line, ink = (GREEN, GREEN) if epsilon == bayes else (LINE, INK)
        ax.axvline(epsilon, color=line, lw=1, ls=(0, (1, 2)), zorder=0)
        note = ax.annotate(words, (epsilon, 1), (3, -11), xycoords=("data", "axes fraction"), fontsize="x-small")
        note.set(color=ink, anncoords="offset points")
