"""The initialisation experiment: what each attacker finds against what E[I²] expects, and how singular J Jᵀ is."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from i2f.paper.attackers import ATTACKERS
from i2f.paper.experiments import problems as shared
from i2f.paper.figures.style import BLUE, GREEN, INK, LINE, PINK, VERMILION, diagonal, style
from i2f.paper.results import Config, Results

INITS = {"uniform": BLUE, "normal": VERMILION, "kaiming": GREEN, "xavier": PINK}
MARKERS = "osD^v"  # one per variance, the smallest first


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    return {"overview.svg": overview(found.tables["problems"])}


def overview(table: pd.DataFrame) -> Figure:
    """A panel for every attacker, RMSE against √(E[I²]/d_x), and one for the condition number of J Jᵀ."""
    style()
    attackers = [name for name in ("gauss-newton", "dgl") if name in table.attacker.unique()]
    count = len(attackers) + 1
    figure, (*axes, condition) = plt.subplots(1, count, figsize=(1 + 4 * count, 4.7), layout="constrained")
    for ax, attacker in zip(axes, attackers, strict=True):
        measured_against_expected(ax, table[table.attacker == attacker])
        ax.set_title(f"{ATTACKERS[attacker].label}: found and expected")
    conditions(condition, table)
    condition.set_title("Condition of $J J^T$")
    handles = [Line2D([], [], ls="", marker="o", color=INITS[name], label=name) for name in INITS]
    handles += [
        Line2D([], [], ls="", marker=marker, color=INK, label=f"variance {size:g}")
        for marker, size in zip(MARKERS, sorted(table["size"].unique()), strict=False)
    ]
    handles.append(Line2D([], [], color=LINE, label="found = expected"))
    figure.legend(handles=handles, loc="outside lower center", ncols=7, fontsize="small")
    return figure


def measured_against_expected(ax: Axes, table: pd.DataFrame) -> None:
    """One attacker's RMSE per pixel, the geometric mean over each weight seed's images: a cloud per initialisation and
    variance, with its median and the middle 80%."""
    rows = shared.scored(table)
    sizes = sorted(rows["size"].unique())
    logs = rows[["init", "size", "weight_seed"]].assign(
        expected=np.log(rows.expected_mse) / 2, measured=np.log(rows.mse) / 2
    )
    for (init, size), some in np.exp(logs.groupby(["init", "size", "weight_seed"]).mean()).groupby(["init", "size"]):
        colour, marker = INITS.get(str(init), INK), MARKERS[sizes.index(size) % len(MARKERS)]
        ax.scatter(some.expected, some.measured, s=18, marker=marker, color=colour, alpha=0.35, linewidth=0, zorder=2)
        (left, x, right), (low, y, high) = (
            np.percentile(some[name], [10, 50, 90]) for name in ("expected", "measured")
        )
        ax.plot([left, right], [y, y], color=colour, lw=1.5, zorder=3)
        ax.plot([x, x], [low, high], color=colour, lw=1.5, zorder=3)
        ax.plot([x], [y], marker=marker, ms=8, color=colour, mec="white", zorder=4)
    ax.set(xscale="log", yscale="log", xlabel="expected RMSE per pixel, √(E[I²]/dₓ)", ylabel="measured RMSE per pixel")
    diagonal(ax)


def conditions(ax: Axes, table: pd.DataFrame) -> None:
    """λ_max/λ_min, the geometric mean over each weight seed's images: a cloud per initialisation, its median and the
    middle 80%."""
    networks = table[table.init.isin(INITS)].drop_duplicates(["init", "weight_seed", "image"])
    logs = networks[["init", "weight_seed"]].assign(log=np.log(networks.lambda_max / networks.lambda_min))
    seeds = np.exp(logs.groupby(["init", "weight_seed"]).log.mean())
    names = [name for name in INITS if name in seeds.index.levels[0]]
    for place, name in enumerate(names):
        values = seeds[name].to_numpy()
        jitter = 0.18 * (2 * ((np.arange(len(values)) * 0.618034) % 1) - 1)  # the same at every drawing
        ax.scatter(place + jitter, values, s=18, color=INITS[name], alpha=0.5, linewidth=0, zorder=2)
        low, middle, high = np.percentile(values, [10, 50, 90])
        ax.vlines(place, low, high, color=INITS[name], lw=3, zorder=3)
        ax.hlines(middle, place - 0.25, place + 0.25, color=INK, lw=1.6, zorder=4)
    ax.set(yscale="log", ylabel="λ_max/λ_min")
    ax.set_xticks(range(len(names)), names)
    ax.grid(axis="x", visible=False)
