"""Measures of risk compared: how well each ranks images, and how near its value is to the measured error."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from i2f.paper.figures.style import AMBER, BLUE, GREEN, LINE, PINK, VERMILION, readable_ticks, style
from i2f.paper.results import Config, Results
from i2f.paper.statistics import rank_correlation

NAMES = {
    "gradient_norm": "gradient norm",
    "sensitivity": "sensitivity",
    "fisher": "Fisher (LAVP)",
    "trace": "tr(J Jᵀ)",
    "bound": "I$_{lb}$",
    "bayes": "Bayes error",
    "expected": "E[I²] (Cramér–Rao)",
    "influence": "I²F",
}
COLOURS = (BLUE, VERMILION, GREEN, PINK, AMBER)  # of networks


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    return {"overview.svg": overview(found.tables["problems"])}


def overview(table: pd.DataFrame) -> Figure:
    """Left: Spearman over images, mean over levels, one mark per network. Right: measured over predicted RMSE, median
    and 10–90%."""
    style()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    table = table[~table.failed.astype(bool)]
    for number, (network, its) in enumerate(table.groupby("network", sort=False)):
        colour, shift = COLOURS[number % len(COLOURS)], 0.16 * (number - 1)
        for row, name in enumerate(NAMES):
            height = -row - shift
            order = np.mean([rank_correlation(level, name, "rmse") for _, level in its.groupby("level")])
            left.plot(order, height, "o", color=colour, ms=6, label=None if row else network)
            low, middle, high = np.percentile(its.rmse / its[name], [10, 50, 90])
            right.plot([low, high], [height] * 2, color=colour, lw=1.4)
            right.plot(middle, height, "o", color=colour, ms=5)
    left.set(xlim=(-1.05, 1.05), xlabel="Spearman with the measured error, over images")
    left.set_title("Which measure ranks images?")
    right.set(xscale="log", xlabel="measured / predicted RMSE")
    right.set_title("Which value is right?")
    readable_ticks(right)
    for ax, neutral in ((left, 0), (right, 1)):
        ax.axvline(neutral, color=LINE, lw=1)
        ax.set_yticks([-row for row in range(len(NAMES))], NAMES.values())
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    return figure
