"""Training for privacy: accuracy against an attack's error, one mark per method and weight."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i2f.paper import claims
from i2f.paper.figures.style import BLUE, GREEN, INK, VERMILION, readable_ticks, style
from i2f.paper.results import Config, Results

METHODS = {  # name -> label, colour, marker
    "plain": ("plain", INK, "o"),
    "bound": ("penalty on λ$_{max}$", BLUE, "s"),
    "bayes": ("penalty on the Bayes error", GREEN, "D"),
    "dp": ("clipping and noise, local DP", VERMILION, "X"),
}


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    return {"overview.svg": overview(found.tables["problems"])}


def overview(table: pd.DataFrame) -> Figure:
    """Accuracy against the attacker's error, where every network learnt: a pale mark per seed, a full one per weight.
    Left: Gauss–Newton's clamped RMSE. Right: the expected error, under noise in proportion to the gradient."""
    style()
    table = table.assign(clamped=table.mse_clamped**0.5, relative=table.expected_rmse * table.gradient_norm)
    least = table.groupby(["method", "weight"]).accuracy.transform("min")
    learnt, others = table[least >= claims.LEARNT], table[least < claims.LEARNT]
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 4), layout="constrained", sharey=True)
    attacks = learnt.converged.dropna().astype(bool)
    axes[0].set(
        xlabel=f"clamped RMSE; {attacks.sum()} of {len(attacks)} attacks converged",
        ylabel="accuracy on held-out digits",
    )
    axes[1].set(xlabel="√E[I²] · ‖g‖, for noise in proportion to ‖g‖")
    for ax, column in zip(axes, ("clamped", "relative"), strict=True):
        for method, (label, colour, marker) in METHODS.items():
            rows = learnt[learnt.method == method]
            if len(rows):
                _method(ax, rows, column, label, colour, marker)
        ax.set(xscale="log")
        readable_ticks(ax)
    if len(learnt):
        axes[0].legend(fontsize="small")
    if len(others):
        weights = others.groupby("method").weight.unique()
        left_out = "; ".join(f"{METHODS[m][0]}, {', '.join(f'{w:g}' for w in sorted(ws))}" for m, ws in weights.items())
        figure.supxlabel(f"Not drawn, accuracy below {claims.LEARNT:g}: {left_out}", fontsize="small")
    return figure


def _method(ax: Axes, rows: pd.DataFrame, column: str, label: str, colour: str, marker: str) -> None:
    """One method's marks, its weights written next to them."""
    seeds = rows.groupby(["weight", "seed"]).agg({column: "median", "accuracy": "mean"})
    ax.plot(seeds[column], seeds.accuracy, marker=marker, color=colour, ls="none", ms=4, mew=0, alpha=0.3)
    weights = rows.groupby("weight").agg({column: "median", "accuracy": "mean"})
    ax.plot(weights[column], weights.accuracy, marker=marker, color=colour, ms=7, lw=1.2, label=label)
    for weight, row in weights[weights.index > 0].iterrows():
        at = row[column], row.accuracy
        ax.annotate(f"{weight:g}", at, (5, 5), textcoords="offset points", fontsize="x-small", color=colour)
