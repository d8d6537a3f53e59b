"""The damping ε: what is predicted at each, and what attackers with and without a prior recover."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from i2f.paper.attackers import ATTACKERS, Attacker
from i2f.paper.figures.style import GREEN, INK, LINE, diagonal, pictures, readable_ticks, style
from i2f.paper.results import Config, Results

PAPER = (0.1, 1.0, 10.0)  # the paper's ε
DASHED = (0, (4, 2))
SINGLE = ("no prior", "MAP", "MAP, ε = 1", "Adam")


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    table, arrays = found.tables["problems"], found.arrays
    return {
        "overview.svg": overview(table, found.tables["medians"], arrays["values"]),
        "pictures.png": recoveries(table[table.image == 0], arrays["truth"], arrays["found"]),
    }


def overview(table: pd.DataFrame, middle: pd.DataFrame, values: NDArray[Any]) -> Figure:
    """Above: errors against ε at the least and the most noise. Below: how far off the displacement is, and every attack
    against its prediction. `middle`: `experiments.damping.medians`; values: (d_x,), eigenvalues of the first image."""
    style()
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 8.2), layout="constrained")
    least, most = table["size"].min(), table["size"].max()
    for ax, noise in zip(axes[0], (least, most), strict=True):
        error_against_damping(ax, middle[middle["size"] == noise], table[table["size"] == noise], values)
        ax.set_title(f"Predicted and measured, noise variance {noise:g}")
    axes[0, 0].legend(fontsize="x-small", loc="lower left", bbox_to_anchor=(0, 0.03))
    miss_against_damping(axes[1, 0], middle[middle["size"] == most])
    axes[1, 0].set_title(f"Which ε describes whom, noise variance {most:g}")
    measured_against_predicted(axes[1, 1], table)
    axes[1, 1].set_title("Each attacker at its own ε")
    return figure


def error_against_damping(ax: Axes, middle: pd.DataFrame, table: pd.DataFrame, values: NDArray[Any]) -> None:
    """Lines, medians over images: what is predicted at ε. Marks: what each MAP attacker recovered, at its own ε; level
    lines: attackers without one. Vertical: σ²/τ² and the paper's ε. Ticks at the foot: the eigenvalues of J Jᵀ."""
    line = middle[(middle.attacker == "no prior") & (middle.epsilon > 0)].sort_values("epsilon")
    for column, label, dashes in (
        ("damped_rmse", "predicted: damped I²F", DASHED),
        ("pulled_rmse", "predicted: with the pull", "-"),
        ("expected_rmse", "expected under the prior", ":"),
    ):
        ax.plot(line.epsilon, line[column], color=INK, lw=1.6, ls=dashes, label=label, zorder=2)
    for name, rows in table.groupby("attacker", sort=False):
        who, ridge, middle_error = _who(name), rows.ridge.iloc[0], rows.rmse.median()
        if ridge:
            mark = ax.scatter(ridge, middle_error, s=55, marker=who.marker, color=who.colour, zorder=4)
            mark.set(edgecolor="white", linewidth=0.7, label=f"measured: {who.label}")
        else:
            ax.axhline(middle_error, color=who.colour, lw=1.6, label=f"measured: {who.label}", zorder=1)
    ax.set(xscale="log", yscale="log", xlabel="ε, in units of λ", ylabel="RMSE per pixel")
    feet = np.column_stack([values, values, np.full(len(values), np.nan)]).ravel()
    heights = np.tile([0, 0.03, np.nan], len(values))  # one line with gaps: a small file
    ax.plot(feet, heights, color=LINE, lw=0.6, transform=ax.get_xaxis_transform(), zorder=1)
    ax.set_ylim(top=3 * ax.get_ylim()[1])  # room for the names of the vertical lines
    _marked(ax, table.bayes.iloc[0])


def miss_against_damping(ax: Axes, middle: pd.DataFrame) -> None:
    """Distance of predicted from measured displacement, over the latter's length, against ε; medians over images."""
    for name in SINGLE:
        rows = middle[(middle.attacker == name) & (middle.epsilon > 0)].sort_values("epsilon")
        who = _who(name)
        ax.plot(rows.epsilon, rows.pulled_miss, color=who.colour, lw=1.8, label=who.label, zorder=3)
        ax.plot(rows.epsilon, rows.damped_miss, color=who.colour, lw=1.3, ls=DASHED, zorder=2)
    ax.set(xscale="log", yscale="log", xlabel="ε, in units of λ", ylabel="displacement missed, relative")
    ax.plot([], [], color=INK, lw=1.3, ls=DASHED, label="dashed: without the pull")
    _marked(ax, middle.bayes.iloc[0])
    readable_ticks(ax)
    ax.legend(fontsize="x-small", loc="best")


def measured_against_predicted(ax: Axes, table: pd.DataFrame) -> None:
    """Measured against predicted RMSE per pixel at each attacker's own ε; filled: with the pull, hollow: without."""
    for name, rows in table.groupby("attacker", sort=False):
        who = _who(name)
        if rows.ridge.iloc[0]:
            hollow = ax.scatter(rows.damped_rmse, rows.rmse, s=26, marker=who.marker, facecolor="none", zorder=3)
            hollow.set(edgecolor=who.colour)
        marks = ax.scatter(rows.pulled_rmse, rows.rmse, s=26, marker=who.marker, color=who.colour, zorder=4)
        marks.set(edgecolor="white", linewidth=0.5, label=who.label)
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
        mine = np.flatnonzero((table["size"] == noise) & table.attacker.isin(SINGLE))
        captions = [f"{_who(table.attacker.iloc[i]).label}\nRMSE {table.rmse.iloc[i]:.2g}" for i in mine]
        rows.append((f"variance {noise:g}", [truth, *(found[i] for i in mine)], ["private image\n", *captions]))
    return pictures(rows)


def _who(name: str) -> Attacker:
    """MAP attackers with further weights are drawn alike."""
    return ATTACKERS.get(name, Attacker("", label=name.replace("ε", " σ²/τ²"), colour=LINE, marker="."))


def _marked(ax: Axes, bayes: float) -> None:
    for epsilon, words in ((bayes, "σ²/τ²"), *((e, f"{e:g}") for e in PAPER)):
        line, ink = (GREEN, GREEN) if epsilon == bayes else (LINE, INK)
        ax.axvline(epsilon, color=line, lw=1, ls=(0, (1, 2)), zorder=0)
        note = ax.annotate(words, (epsilon, 1), (3, -11), xycoords=("data", "axes fraction"), fontsize="x-small")
        note.set(color=ink, anncoords="offset points")
