"""Noise along eigenvectors: the law, the paper's own noise size, and where the law ends."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from i2f.paper.attackers import ATTACKERS
from i2f.paper.experiments import eigenvectors as experiment
from i2f.paper.figures.style import (
    AMBER,
    BLUE,
    DATASETS,
    LINE,
    VERMILION,
    mark_cut,
    marks,
    pictures,
    readable_ticks,
    style,
)
from i2f.paper.results import Config, Results

WHO = {  # (data set, method) -> colour, marker
    ("mnist", "gauss-newton"): (BLUE, "o"),
    ("cifar10", "gauss-newton"): (AMBER, "D"),
    ("cifar10", "dgl"): (VERMILION, "X"),
}


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    table = found.tables["problems"]
    shown = experiment.shown_of(config)
    first = (table.dataset == shown) & (table.part == "paper") & (table.image == config["first_image"])
    return {
        "overview.svg": overview(table, config["cut"]),
        "pictures.png": recoveries(table[first], list(found.arrays["pictures"])),
    }


def overview(table: pd.DataFrame, cut: float) -> Figure:
    """Three panels: small noise, the paper's noise, and noise that grows.

    `table` is the experiment's; `cut` the predicted RMSE that bounds the linear regime.
    """
    style()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12.5, 4.2), layout="constrained")
    law, paper = (table[table.part == part] for part in ("law", "paper"))
    error_against_eigenvalue(left, law)
    left.set_title(f"c = {law.norm.iloc[0]:.2g}: {_slopes(law)}")
    error_against_eigenvalue(middle, paper)
    middle.set_title(f"c = {paper.norm.iloc[0]:g}, the paper's: {_slopes(paper)}, above 1/λ")
    end_of_law(right, table[table.part == "end"], cut)
    right.set_title("Sharp directions deviate at smaller errors")
    figure.legend(*middle.get_legend_handles_labels(), loc="outside lower left", ncols=4, fontsize="small")
    return figure


def _slopes(table: pd.DataFrame) -> str:
    """The mean slope over images, which the law says is −1, by data set."""
    ours = table[table.method == "gauss-newton"].assign(converged=lambda t: t.converged.eq(True))
    means = {DATASETS[name]: experiment.slopes(rows).mean() for name, rows in ours.groupby("dataset", sort=False)}
    return "slope " + ", ".join(f"{value:.2f}".replace("-", "−") for value in means.values())


def error_against_eigenvalue(ax: Axes, table: pd.DataFrame) -> None:
    """‖x̂ − x₀‖²/c² against λ for δ = c·v, both logarithmic, with the prediction 1/λ; hollow: not converged."""
    ends = np.array([table.eigenvalue.min(), table.eigenvalue.max()])
    ax.plot(ends, 1 / ends, color=LINE, lw=1.5, label="predicted, 1/λ", zorder=1)
    for (dataset, method), (colour, marker) in WHO.items():
        rows = table[(table.dataset == dataset) & (table.method == method)]
        if len(rows):
            error = rows.mse / rows.predicted_mse / rows.eigenvalue
            arrived = rows.converged.eq(True) | (method == "dgl")  # Adam has no criterion of convergence
            look: dict[str, Any] = {"s": 20, "alpha": 0.6, "label": f"{ATTACKERS[method].label}, {DATASETS[dataset]}"}
            marks(ax, rows.eigenvalue, error, arrived, colour, marker, **look)
    ax.set(xscale="log", yscale="log", xlabel="eigenvalue λ of J Jᵀ", ylabel="squared error / c²")
    readable_ticks(ax)


def end_of_law(ax: Axes, table: pd.DataFrame, cut: float) -> None:
    """Measured over predicted RMSE against the predicted RMSE, one line per image and direction; 1 is the law."""
    ax.axhspan(0.9, 1.1, color="#eeeeee", zorder=0)
    ax.axhline(1, color=LINE, lw=1.2, zorder=1)
    colours = dict(zip(sorted(table["index"].unique()), sns.color_palette("viridis", 3), strict=False))
    for (image, index), rows in table.sort_values("predicted_rmse").groupby(["image", "index"]):
        label = f"direction {index + 1:.0f}" if image == table.image.min() else None
        x, y = rows.predicted_rmse, rows.rmse / rows.predicted_rmse
        ax.plot(x, y, lw=1.2, marker="o", ms=3, alpha=0.8, color=colours[index], label=label)
        stray = rows.converged.eq(False)
        ax.scatter(x[stray], y[stray], s=12, facecolor="white", edgecolor=[colours[index]], zorder=4)
    ax.set(xscale="log", yscale="log", xlabel="predicted RMSE per pixel", ylabel="measured / predicted RMSE")
    mark_cut(ax, cut)
    readable_ticks(ax)
    ax.legend(fontsize="small")


def recoveries(table: pd.DataFrame, images: Sequence[NDArray[Any]]) -> Figure:
    """The paper's row of recoveries: the truth, then what each attacker recovers, under λ and MSE.

    `table` holds the rows of part "paper" of one image, in the order of `images`, whose first is the truth.
    """
    truth, *found = images
    rows = []
    for method in table.method.unique():
        mine = [i for i, name in enumerate(table.method) if name == method]
        captions = [f"λ = {table.eigenvalue.iloc[i]:.3g}\nMSE {table.mse.iloc[i]:.2g}" for i in mine]
        rows.append((ATTACKERS[method].label, [truth, *(found[i] for i in mine)], ["private image\n", *captions]))
    return pictures(rows)
