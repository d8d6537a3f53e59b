"""The initialisation experiment: what every attacker finds against what I²F expects of every draw."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from i2f.paper.attackers import ATTACKERS
from i2f.paper.figures.style import BLUE, GREEN, INK, LINE, PINK, VERMILION, diagonal, style
from i2f.paper.results import Config, Results

INITS = {"uniform": BLUE, "normal": VERMILION, "kaiming": GREEN, "xavier": PINK}
MARKERS = "osD^v"  # one per variance, the largest first


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    return {"overview.svg": overview(found.tables["problems"])}


def overview(table: pd.DataFrame) -> Figure:
    """One row per attacker: RMSE per pixel against √(E[I²]/d_x), as found and clamped to [0, 1]."""
    style()
    attackers = [name for name in ("gauss-newton", "gauss-newton, box", "dgl") if (table.attacker == name).any()]
    size = (8.6, 3.6 * len(attackers))
    figure, axes = plt.subplots(len(attackers), 2, figsize=size, squeeze=False, layout="constrained")
    variances = sorted(table["size"].unique(), reverse=True)
    for attacker, line in zip(attackers, axes, strict=True):
        rows = table[(table.attacker == attacker) & table.mse.notna()]
        for ax, column, words in zip(line, ("mse", "mse_clamped"), ("as found", "clamped to [0, 1]"), strict=True):
            measured_against_expected(ax, rows, column, variances)
            ax.set_title(f"{ATTACKERS[attacker].label}, {words}")
    handles = [_handle(label, marker="o", color=INITS[label]) for label in INITS if (table.init == label).any()]
    handles += [
        _handle(f"variance {size:g}", marker=marker, color=INK)
        for marker, size in zip(MARKERS, variances, strict=False)
    ]
    handles.append(_handle("not converged", marker="o", mfc="white", mec=INK))
    handles.append(Line2D([], [], color=LINE, label="measured = expected"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize="small")
    return figure


def _handle(label: str, **look: Any) -> Line2D:
    return Line2D([], [], ls="", label=label, **look)


def measured_against_expected(ax: Axes, rows: pd.DataFrame, column: str, sizes: list[float]) -> Axes:
    """One attacker's errors, both axes RMSE per pixel and logarithmic; hollow: not converged (Adam never says)."""
    for (init, size), some in rows.groupby(["init", "size"], sort=False):
        converged = some.converged.astype(bool) | (some.attacker == "dgl")
        colour = INITS.get(init, INK)
        marker = MARKERS[sizes.index(size) % len(MARKERS)]
        points = ax.scatter(np.sqrt(some.expected_mse), np.sqrt(some[column]), s=32, marker=marker, zorder=3)
        points.set(
            facecolors=[colour if yes else "white" for yes in converged],
            edgecolors=["white" if yes else colour for yes in converged],
            linewidths=[0.5 if yes else 1.2 for yes in converged],
        )
    ax.set(xscale="log", yscale="log", xlabel="expected RMSE per pixel, √(E[I²]/dₓ)", ylabel="measured RMSE per pixel")
    diagonal(ax)
    return ax
