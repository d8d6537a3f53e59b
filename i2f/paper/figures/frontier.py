"""What a defence costs to training: accuracy against privacy."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i2f.paper.figures.style import AMBER, BLUE, GREEN, INK, PINK, VERMILION, style

METHODS = {  # name -> label, colour, marker
    "none": ("no defence", INK, "*"),
    "isotropic": ("isotropic noise", VERMILION, "X"),
    "designed": ("designed noise", BLUE, "o"),
    "row-space": ("row-space noise", GREEN, "v"),
    "dp": ("clipping and noise, local DP", AMBER, "P"),
    "prune": ("pruning", PINK, "D"),
}


def overview(table: pd.DataFrame) -> Figure:
    """Accuracy against privacy; a thin bar is the range over seeds."""
    style()
    figure, ax = plt.subplots(figsize=(6.4, 4.3), layout="constrained")
    accuracy_against_privacy(ax, table)
    return figure


def accuracy_against_privacy(ax: Axes, table: pd.DataFrame) -> None:
    for method, (label, colour, marker) in METHODS.items():
        groups = table[table.method == method].groupby("value")
        if not len(groups):
            continue
        curve = groups.accuracy.agg(["mean", "min", "max"]).assign(privacy=groups.privacy.mean()).sort_values("privacy")
        ax.plot(curve.privacy, curve["mean"], color=colour, marker=marker, lw=1.3, ms=6, label=label)
        ax.vlines(curve.privacy, curve["min"], curve["max"], color=colour, lw=0.9, alpha=0.6)
    ax.set(xlabel="judged RMSE of an audit at the first step", ylabel="accuracy on held-out digits")
    ax.set_title("The cost to training")
    ax.legend(fontsize="small", loc="lower left")
