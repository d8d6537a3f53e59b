"""Measures of risk beside each other: how well each ranks images, and how near its value is."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from i2f.paper.figures.style import LINE, readable_ticks, style

NAMES = {
    "gradient_norm": "gradient norm", "sensitivity": "sensitivity", "fisher": "Fisher (LAVP)", "trace": "tr(J Jᵀ)",
    "bound": "I$_{lb}$", "bayes": "Bayes error", "expected": "E[I²] (Cramér–Rao)", "influence": "I²F",
}  # fmt: skip
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


def published(run: Path) -> dict[str, Figure]:
    """The figures of a run's folder, by file name."""
    return {"overview.svg": overview(pd.read_csv(run / "problems.csv"))}


def overview(table: pd.DataFrame) -> Figure:
    """Left: Spearman over images within a level, a mark a network. Right: measured over foretold, median and 10–90%."""
    style()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    table = table[~table.failed.astype(bool)]
    rows = list(NAMES)
    for number, (network, its) in enumerate(table.groupby("network", sort=False)):
        colour, shift = COLOURS[number % len(COLOURS)], 0.16 * (number - 1)
        for height, name in enumerate(rows):
            ranks = [level[[name, "rmse"]].rank().corr().iloc[0, 1] for _, level in its.groupby("level")]
            left.plot(np.mean(ranks), -height - shift, "o", color=colour, ms=6, label=network if height == 0 else None)
            low, middle, high = np.percentile(its.rmse / its[name], [10, 50, 90])
            right.plot([low, high], [-height - shift] * 2, color=colour, lw=1.4)
            right.plot(middle, -height - shift, "o", color=colour, ms=5)
    left.axvline(0, color=LINE, lw=1)
    left.set(xlim=(-1.05, 1.05), xlabel="Spearman with the measured error, over images")
    left.set_yticks([-k for k in range(len(rows))], [NAMES[name] for name in rows])
    left.set_title("Who ranks images?")
    right.axvline(1, color=LINE, lw=1)
    right.set(xscale="log", xlabel="measured RMSE / what the measure foretells")
    right.set_title("Whose number is right?")
    readable_ticks(right)
    right.set_yticks([-k for k in range(len(rows))], [NAMES[name] for name in rows])
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    return figure
