"""The lower bound and what it bounds: I_lb against I, and how far each cheap estimate is from I."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i2f.paper.experiments.lower_bound import named
from i2f.paper.figures.style import AMBER, BLUE, GREEN, INK, LINE, PINK, VERMILION, diagonal, readable_ticks, style
from i2f.paper.results import Config, Results

NETWORKS = {  # (model, init) -> colour, marker
    ("lenet", "uniform"): (BLUE, "o"),
    ("lenet", "normal"): (VERMILION, "s"),
    ("lenet", "kaiming"): (GREEN, "^"),
    ("lenet", "xavier"): (PINK, "D"),
    ("lenet", "default"): (AMBER, "v"),
}
OTHER = (INK, "X")  # one linear layer
NAMES = {"lenet": "LeNet", "linear": "linear"}


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    return {"overview.svg": overview(found.tables["problems"])}


def overview(table: pd.DataFrame) -> Figure:
    """Left: I_lb against I, one point per image and network. Right: each estimate of I over I, by network."""
    style()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.8), layout="constrained", width_ratios=[1, 1.1])
    bound_against_influence(left, table)
    left.set_title("The bound lies far below I²F")
    estimates_over_influence(right, table)
    right.set_title("Conjugate gradients come closer, step by step")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize="small")
    return figure


def bound_against_influence(ax: Axes, table: pd.DataFrame) -> None:
    """I_lb/√d_x against I/√d_x, both logarithmic: a cloud of images for each network."""
    for network, rows in table.groupby(["model", "init"], sort=False):
        colour, marker = NETWORKS.get(network, OTHER)
        marks = ax.scatter(rows.predicted_rmse, rows.bound_rmse, s=18, marker=marker, color=colour, alpha=0.5, zorder=3)
        marks.set(edgecolor="white", linewidth=0.3, label=f"{NAMES.get(network[0], network[0])}, {network[1]}")
    ax.set(xscale="log", yscale="log", xlabel="I, RMSE per pixel", ylabel="I_lb, RMSE per pixel")
    diagonal(ax, "I_lb = I")
    readable_ticks(ax)


def estimates_over_influence(ax: Axes, table: pd.DataFrame) -> None:
    """Each estimate over I, on a logarithmic axis: the median over a network's images and the range of four in five."""
    names = named(table)
    networks = list(table.groupby(["model", "init"], sort=False))
    ax.axvline(1, color=LINE, lw=1.2, zorder=1)
    shifts = np.linspace(-0.3, 0.3, len(networks)) if len(networks) > 1 else [0.0]
    for y, column in enumerate(names.values()):
        for shift, (network, rows) in zip(shifts, networks, strict=True):
            colour, marker = NETWORKS.get(network, OTHER)
            ratio = rows[column] / rows.predicted_rmse
            ratio = ratio[np.isfinite(ratio)]  # where J Jᵀ is singular there is no upper bound
            if len(ratio):
                ax.hlines(y + shift, *ratio.quantile([0.1, 0.9]), color=colour, lw=3, alpha=0.4, zorder=2)
                ax.plot(ratio.median(), y + shift, marker, color=colour, ms=4.5, zorder=3)
    ax.set(xscale="log", xlabel="estimate / I", yticks=range(len(names)), yticklabels=list(names))
    ax.grid(visible=False, axis="y")
    ax.invert_yaxis()
