"""What a defence costs to training: accuracy against privacy."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from i2f.paper import estimates
from i2f.paper.figures.style import AMBER, BLUE, GREEN, INK, PINK, VERMILION

METHODS = {  # name -> label, colour, marker
    "none": ("no defence", INK, "*"),
    "isotropic": ("isotropic noise", VERMILION, "X"),
    "designed": ("designed noise", BLUE, "o"),
    "row-space": ("row-space noise", GREEN, "v"),
    "dp": ("clipping and noise, local DP", AMBER, "P"),
    "prune": ("pruning", PINK, "D"),
}


def accuracy_against_privacy(ax: Axes, table: pd.DataFrame) -> None:
    """A pale mark per training, and for each method and value the mean over seeds with its 95% interval."""
    for method, (label, colour, marker) in METHODS.items():
        rows = table[table.method == method]
        if not len(rows):
            continue
        ax.plot(rows.privacy, rows.accuracy, marker=marker, color=colour, ls="none", ms=4, mew=0, alpha=0.25)
        groups = sorted(rows.groupby("value"), key=lambda group: group[1].privacy.mean())
        means = [estimates.mean(group.accuracy) for _, group in groups]
        low, high = np.transpose([mean.interval for mean in means])
        x, y = [group.privacy.mean() for _, group in groups], np.array([mean.value for mean in means])
        ax.errorbar(x, y, (y - low, high - y), color=colour, marker=marker, lw=1.3, ms=6, label=label)
    ax.set(xlabel="judged RMSE of an audit at the first step", ylabel="accuracy on held-out digits")
    ax.set_title("Training loses slightly less")
    ax.legend(fontsize="small", loc="lower left")
