"""Five attackers on one gradient: error against cost, and what each holds at the same cost."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from i2f.paper.attackers import ATTACKERS
from i2f.paper.figures.style import LINE, displayable, style
from i2f.paper.results import Config, Results


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    paths, held = found.tables["paths"], found.arrays
    return {"overview.png": overview(paths, held["truth"], held["images"], config["costs"])}


def overview(paths: pd.DataFrame, truth: NDArray[Any], images: NDArray[Any], costs: Sequence[int]) -> Figure:
    """Five attackers on one gradient: error against cost, and what each holds at the same cost.

    paths: (method, evaluations, mse). truth: (C, H, W). images: (attackers, costs, C, H, W), attackers in the order of
    their first row in `paths`.
    """
    style()
    methods = list(dict.fromkeys(paths.method))
    figure = plt.figure(figsize=(11.5, 5.0), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.18, 1], squeeze=False)[0]
    error_against_cost(left.subplots(), paths, costs)
    grid = right.subplots(len(methods), 1 + len(costs))
    for row, (method, line) in enumerate(zip(methods, grid, strict=True)):
        label, colour = ATTACKERS[method].label.replace(", ", ",\n").replace("–", "–\n"), ATTACKERS[method].colour
        for ax, image in zip(line, [truth, *images[row]], strict=True):
            ax.set(xticks=[], yticks=[])
            ax.imshow(displayable(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        for ax in line[1:]:
            for side in ax.spines.values():
                side.set(color=colour, linewidth=1.2)
        line[0].set_visible(row == 0)
        line[1].set_ylabel(label, fontsize="small", color=colour, fontweight="bold")
    grid[0, 0].set_title("private", fontsize="small", loc="center")
    for ax, cost in zip(grid[0, 1:], costs, strict=True):
        ax.set_title(f"{cost:,}", fontsize="small", loc="center")
    right.suptitle("What each holds after so many evaluations", fontsize="medium", fontweight="bold")
    return figure


def error_against_cost(ax: Axes, paths: pd.DataFrame, costs: Sequence[int] = ()) -> None:
    """MSE of an attacker's best iterate against the gradient evaluations it has spent, both logarithmic."""
    for cost in costs:
        ax.axvline(cost, color=LINE, lw=0.8, ls=":", zorder=1)
    for method, path in paths.groupby("method", sort=False):
        who = ATTACKERS[method]
        (steps,) = ax.plot(path.evaluations, path.mse, color=who.colour, ls=who.line, lw=2, zorder=3)
        steps.set(drawstyle="steps-post", label=f"{who.label} (knows {who.told})")
        ax.plot(path.evaluations.iloc[-1], path.mse.iloc[-1], "o", color=who.colour, ms=5, zorder=4)
    ax.set(xscale="log", yscale="log", xlabel="gradient evaluations", ylabel="MSE per pixel")
    ax.set_xlim(left=8)
    ax.set_title("Only Gauss–Newton converges")
    ax.legend(fontsize="small", loc="lower left")
