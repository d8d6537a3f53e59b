"""The lower bound and what it bounds: I_lb against I, and how far each cheap estimate is from I."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i2f.paper.attackers import ATTACKERS
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
    """Left: I_lb against I, one point per problem. Right: each estimate of I over I, LeNet and the linear layer."""
    style()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.6), layout="constrained", width_ratios=[1, 1.1])
    bound_against_influence(left, table)
    left.set_title("The lower bound against I²F")
    estimates_over_influence(right, table)
    right.set_title("What each estimate says of I²F")
    return figure


def bound_against_influence(ax: Axes, table: pd.DataFrame) -> None:
    """I_lb/√d_x against I/√d_x, both logarithmic; rings: what attacks measured, on the same horizontal axis."""
    for (model, init), rows in table.groupby(["model", "init"], sort=False):
        colour, marker = NETWORKS.get((model, init), OTHER)
        marks = ax.scatter(rows.predicted_rmse, rows.bound_rmse, s=26, marker=marker, facecolor=colour, zorder=3)
        marks.set(edgecolor="white", linewidth=0.5, alpha=0.9, label=f"{NAMES.get(model, model)}, {init}")
    attacked = table[table.attacked.astype(bool)]
    if len(attacked):
        rings = ax.scatter(attacked.rmse.astype(float), attacked.bound_rmse, s=70, facecolor="none", zorder=4)
        rings.set(edgecolor=INK, linewidth=1.2, label=f"measured, {ATTACKERS['gauss-newton'].label}")
    ax.set(xscale="log", yscale="log", xlabel="I, RMSE per pixel", ylabel="I_lb, RMSE per pixel")
    diagonal(ax, "I_lb = I")
    readable_ticks(ax)
    ax.legend(fontsize="x-small", loc="upper left")


def estimates_over_influence(ax: Axes, table: pd.DataFrame) -> None:
    """One row per estimate, its ratio to I on a logarithmic axis, one point per problem; a bar at the median."""
    estimates = {"I_lb, Eq. 5": "bound_rmse"}
    estimates |= {name.replace("cg_rmse, ", "CG, "): name for name in table if name.startswith("cg_rmse")}
    estimates |= {"√E[I²]": "expected_rmse", "‖Jδ‖/λ_min": "upper_rmse"}
    ax.axvline(1, color=LINE, lw=1.2, zorder=1)
    for y, column in enumerate(estimates.values()):
        for shift, model in ((-0.18, "lenet"), (0.18, "linear")):
            rows = table[table.model == model]
            if not len(rows):
                continue
            colour, marker = (NETWORKS["lenet", "uniform"][0], "o") if model == "lenet" else OTHER
            ratio = (rows[column] / rows.predicted_rmse).to_numpy()
            jitter = np.linspace(-0.1, 0.1, len(ratio))
            label = NAMES[model] if y == 0 else None
            ax.scatter(ratio, y + shift + jitter, s=10, marker=marker, color=colour, alpha=0.35, label=label, lw=0)
            ax.plot([np.median(ratio)] * 2, [y + shift - 0.15, y + shift + 0.15], color=colour, lw=2.5, zorder=3)
    ax.set(xscale="log", xlabel="estimate / I", yticks=range(len(estimates)), yticklabels=list(estimates))
    ax.grid(visible=False, axis="y")
    ax.invert_yaxis()
    ax.legend(fontsize="small", loc="lower left", markerscale=2)
