"""Noise along eigenvectors: the law, the paper's own noise size, and where the law ends."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from i2f.paper.attackers import ATTACKERS
from i2f.paper.figures.style import LINE, mark_cut, pictures, readable_ticks, style
from i2f.paper.results import Config, Results

METHODS = ("gauss-newton", "dgl")


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    table = found.tables["problems"]
    shown = table[(table.part == "paper") & (table.image == 0)]
    return {
        "overview.svg": overview(table, config["cut"]),
        "pictures.png": recoveries(shown, list(found.arrays["pictures"])),
    }


def overview(table: pd.DataFrame, cut: float) -> Figure:
    """The eigenvector experiment in two or three panels: the law, the paper's own noise size, and where the law ends.

    `table` is the experiment's; `cut` the predicted RMSE that bounds the linear regime.
    """
    style()
    ends = table[(table.part == "end") & (table.method == "gauss-newton")]
    panels = 3 if len(ends) else 2  # where no noise was made to grow, there is no end to show
    figure, (left, middle, *right) = plt.subplots(1, panels, figsize=(3.9 * panels, 3.7), layout="constrained")
    law = table[table.part == "law"]
    paper = table[table.part == "paper"]
    error_against_eigenvalue(left, law)
    left.set_title(f"Small noise, c = {law.norm.iloc[0]:.2g}: the law")
    error_against_eigenvalue(middle, paper)
    middle.set_title(f"The paper's noise, c = {paper.norm.iloc[0]:g}")
    for ax in right:
        end_of_law(ax, ends, cut)
        ax.set_title("Where the law ends")
    return figure


def error_against_eigenvalue(ax: Axes, table: pd.DataFrame) -> None:
    """MSE against λ for δ = c·v, both logarithmic, with the prediction c²/(d_x λ); hollow: not converged."""
    line = table.sort_values("eigenvalue")
    ax.plot(line.eigenvalue, line.predicted_mse, color=LINE, lw=1.5, label="predicted, c²/(dₓλ)", zorder=1)
    for method in METHODS:
        who, rows = ATTACKERS[method], table[table.method == method]
        arrived = rows.converged | (method == "dgl")  # Adam has no criterion of convergence
        for some, hollow in ((rows[arrived], False), (rows[~arrived], True)):
            if len(some):
                face, edge = ("white", who.colour) if hollow else (who.colour, "white")
                marks = ax.scatter(some.eigenvalue, some.mse, s=34, marker=who.marker, facecolor=face, edgecolor=edge)
                label = f"{who.label}, not converged" if hollow else who.label
                marks.set(linewidth=1.2 if hollow else 0.5, label=label, zorder=3)
    ax.set(xscale="log", yscale="log", xlabel="eigenvalue λ of J Jᵀ", ylabel="MSE per pixel")
    readable_ticks(ax)
    ax.legend(fontsize="small", loc="lower left")


def end_of_law(ax: Axes, table: pd.DataFrame, cut: float) -> None:
    """Measured over predicted MSE against the predicted RMSE, one line per direction; 1 is the law."""
    ax.axhspan(0.9, 1.1, color="#eeeeee", zorder=0)
    ax.axhline(1, color=LINE, lw=1.2, zorder=1)
    directions = list(table.groupby(["image", "index"]))
    colours = dict(zip(sorted({key[1] for key, _ in directions}), sns.color_palette("viridis", 3), strict=False))
    named = set()
    for (_, index), rows in directions:
        rows = rows.sort_values("predicted_rmse")
        label = None if index in named else f"direction {index + 1}"
        named.add(index)
        ax.plot(rows.predicted_rmse, rows.mse / rows.predicted_mse, "o-", ms=4, lw=1, color=colours[index], label=label)
    ax.set(xscale="log", yscale="log", xlabel="predicted RMSE per pixel", ylabel="measured / predicted MSE")
    mark_cut(ax, cut)
    readable_ticks(ax)
    ax.legend(fontsize="small", loc="lower left")


def recoveries(table: pd.DataFrame, images: Sequence[NDArray[Any]]) -> Figure:
    """The paper's row of recoveries: the truth, then what each attacker recovers, under λ and MSE.

    `table` holds the rows of part "paper" of one image, in the order of `images`, whose first is the truth.
    """
    truth, *found = images
    rows = []
    for method in METHODS:
        mine = [i for i, name in enumerate(table.method) if name == method]
        captions = [f"λ = {table.eigenvalue.iloc[i]:.3g}\nMSE {table.mse.iloc[i]:.2g}" for i in mine]
        rows.append((ATTACKERS[method].label, [truth, *(found[i] for i in mine)], ["private image\n", *captions]))
    return pictures(rows)
