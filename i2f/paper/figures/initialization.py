"""The initialisation experiment: what I²F expects of every draw, beside what every attacker finds."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from i2f.paper.figures.style import INK, LINE, diagonal, style

INITS = {"uniform": "#0072B2", "normal": "#D55E00", "kaiming": "#009E73", "xavier": "#CC79A7"}
ATTACKERS = {"gauss-newton": "Gauss–Newton", "gauss-newton, box": "Gauss–Newton, box", "dgl": "DGL, Adam"}
MARKERS = "osD^v"  # a variance each, the largest first


def published(run: Path) -> dict[str, Figure]:
    """The figures of a run's folder, by file name."""
    return {"overview.svg": overview(pd.read_csv(run / "problems.csv"))}


def overview(table: pd.DataFrame) -> Figure:
    """A row an attacker: RMSE per pixel against √(E[I²]/d_x), as found and clamped to [0, 1]. `table`: problems.csv."""
    style()
    attackers = [name for name in ATTACKERS if (table.attacker == name).any()]
    figure, axes = plt.subplots(
        len(attackers), 2, figsize=(8.6, 3.6 * len(attackers)), squeeze=False, layout="constrained"
    )
    for attacker, line in zip(attackers, axes, strict=True):
        rows = table[(table.attacker == attacker) & table.mse.notna()]
        for ax, column, words in zip(line, ("mse", "mse_clamped"), ("as found", "clamped to [0, 1]"), strict=True):
            measured_against_expected(ax, rows, column, sorted(table["size"].unique(), reverse=True))
            ax.set_title(f"{ATTACKERS[attacker]}, {words}")
    names = [n for n in INITS if n in set(table.init)]
    handles = [Line2D([], [], ls="", marker="o", color=INITS[n], label=n) for n in names]
    variances = sorted(table["size"].unique(), reverse=True)
    handles += [
        Line2D([], [], ls="", marker=marker, color=INK, label=f"variance {size:g}")
        for marker, size in zip(MARKERS, variances, strict=False)
    ]
    handles += [
        Line2D([], [], ls="", marker="o", mfc="white", mec=INK, label="not converged"),
        Line2D([], [], color=LINE, label="measured = expected"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize="small")
    return figure


def measured_against_expected(ax: Axes, rows: pd.DataFrame, column: str, sizes: list[float]) -> Axes:
    """One attacker's errors, both axes RMSE per pixel and logarithmic; hollow: not settled (Adam never says so)."""
    for (init, size), some in rows.groupby(["init", "size"], sort=False):
        settled = some.converged.astype(bool) | (some.attacker == "dgl")
        colour = INITS.get(init, INK)
        ax.scatter(
            np.sqrt(some.expected_mse), np.sqrt(some[column]),
            s=32, marker=MARKERS[sizes.index(size) % len(MARKERS)], zorder=3,
            facecolors=[colour if yes else "white" for yes in settled],
            edgecolors=["white" if yes else colour for yes in settled],
            linewidths=[0.5 if yes else 1.2 for yes in settled],
        )  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="expected RMSE per pixel, √(E[I²]/dₓ)", ylabel="measured RMSE per pixel")
    diagonal(ax)
    return ax
