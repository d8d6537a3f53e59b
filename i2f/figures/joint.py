"""Privacy trained for: accuracy against what an attack leaves, a mark a method and weight."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from i2f.figures.style import style

METHODS = {  # name -> label, colour, marker
    "plain": ("plain", "#333333", "o"), "bound": ("penalty on λ$_{max}$", "#0072B2", "s"),
    "bayes": ("penalty on the Bayes error", "#009E73", "D"), "dp": ("clipping and noise, local DP", "#D55E00", "X"),
}  # fmt: skip


def published(run: Path) -> dict[str, Figure]:
    """The figures of a run's folder, by file name."""
    return {"overview.svg": overview(pd.read_csv(run / "problems.csv"))}


def overview(table: pd.DataFrame) -> Figure:
    """Left: accuracy against the clamped error of the attack, medians over images. Right: the same, expected error."""
    style()
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 4), layout="constrained", sharey=True)
    table = table.assign(clamped=table.mse_clamped**0.5)
    for ax, column, label in zip(
        axes, ("clamped", "expected_rmse"),
        ("RMSE after Gauss–Newton, clamped to [0, 1]", "expected RMSE under this noise, E[I²]"), strict=True,
    ):  # fmt: skip
        for method, (words, colour, marker) in METHODS.items():
            rows = table[table.method == method].groupby("weight")[[column, "accuracy"]].agg(
                {column: "median", "accuracy": "mean"})  # fmt: skip
            if len(rows):
                ax.plot(rows[column], rows.accuracy, marker=marker, ms=7, color=colour, lw=1.2, label=words)
                for weight, row in rows.iterrows():
                    ax.annotate(f"{weight:g}", (row[column], row.accuracy), (5, 4), textcoords="offset points",
                                fontsize="x-small", color=colour)  # fmt: skip
        ax.set(xlabel=label, xscale="log")
    axes[0].set(ylabel="accuracy on held-out digits")
    axes[0].legend(fontsize="small")
    return figure
