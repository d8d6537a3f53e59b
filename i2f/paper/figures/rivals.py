"""Measures of risk compared: how well each ranks images, and how near its value is to the measured error."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from i2f.paper.experiments import rivals
from i2f.paper.figures.style import AMBER, BLUE, GREEN, INK, LINE, PINK, VERMILION, readable_ticks, style
from i2f.paper.results import Config, Results

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
    return {"overview.svg": overview(found.tables["problems"], config["order"])}


def overview(table: pd.DataFrame, order: float) -> Figure:
    """Left: the rank correlation within a weight seed with its 95% interval, one mark per network; dotted: the
    threshold `order`. Right: measured over predicted RMSE, geometric mean and the range of the middle 80%."""
    style()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for number, (network, its) in enumerate(table[table.converged.eq(True)].groupby("network", sort=False)):
        colour, shift = COLOURS[number % len(COLOURS)], 0.2 * (number - 1)
        for row, name in enumerate(NAMES):
            height, ranked, ratio = -row - shift, rivals.order(its, name), its.rmse / its[name]
            left.plot(ranked.interval, [height] * 2, color=colour, lw=1.6, alpha=0.5)
            left.plot(ranked.value, height, "o", color=colour, ms=6, label=None if row else network)
            right.plot(ratio.quantile([0.1, 0.9]), [height] * 2, color=colour, lw=1.6, alpha=0.5)
            right.plot(np.exp(np.log(ratio).mean()), height, "o", color=colour, ms=5)
    left.axvline(order, color=INK, lw=1, ls=":")
    left.set(xlim=(-1.05, 1.05), xlabel="Spearman with the measured error, over images")
    left.set_title("Knowing the noise, I²F ranks images best")
    right.set(xscale="log", xlabel="measured / predicted RMSE")
    right.set_title("I²F, E[I²] and Bayes have the right size")
    readable_ticks(right)
    for ax, neutral in ((left, 0), (right, 1)):
        ax.axvline(neutral, color=LINE, lw=1)
        ax.set_yticks([-row for row in range(len(NAMES))], NAMES.values())
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    return figure
