"""Predicted pictures beside recovered ones, and how alike they are."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i2f.paper import data
from i2f.paper.experiments.gallery import PICTURES
from i2f.paper.figures.style import AMBER, BLUE, DATASETS, GREEN, LINE, diagonal, mark_cut, marks, pictures, style
from i2f.paper.results import Config, Results

LOOKS = ((BLUE, "o"), (GREEN, "s"), (AMBER, "D"))  # by network


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    return {
        "pictures.png": rows_of_pictures(found),
        "overview.svg": overview(found.tables["problems"], config["cut"]),
    }


def rows_of_pictures(found: Results) -> Figure:
    """The first image of every network: the private one, then the predicted and the recovered one at each variance."""
    table = found.tables["problems"].reset_index(drop=True)
    lines = []
    for network, its in table.groupby("network", sort=False):
        own = its[its.image == its.image.min()]
        first = own.iloc[0]
        truth = data.load(first.dataset, 1, int(first.image), split=first.split)[0][0].numpy()
        for name in PICTURES:
            errors = own.predicted_rmse if name == "predicted" else own.rmse
            captions = [f"RMSE {error:.2g}" for error in errors]
            some = [found.arrays[name][k] / 255 for k in own.index]
            lines.append((f"{_short(str(network))},\n{name}", [truth, *some], ["private", *captions]))
    return pictures(lines)


def overview(table: pd.DataFrame, cut: float) -> Figure:
    """Left: measured against predicted RMSE. Right: the cosine of the two displacements."""
    style()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.0, 4.2), layout="constrained")
    _scatter(left, table, "rmse")
    left.set(xscale="log", yscale="log", ylabel="measured RMSE per pixel")
    diagonal(left)
    _scatter(right, table, "cosine")
    right.axhline(1, color=LINE, lw=1.2, zorder=1)
    right.set(xscale="log", ylim=(min(0.0, float(table.cosine.min())) - 0.05, 1.05))
    right.set_ylabel("cosine of predicted and measured displacement")
    mark_cut(right, cut)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    return figure


def _scatter(ax: Axes, table: pd.DataFrame, column: str) -> None:
    """One mark per attack, hollow where it did not converge."""
    for (network, its), (colour, marker) in zip(table.groupby("network", sort=False), LOOKS, strict=False):
        finite = its[np.isfinite(its[column])]
        marks(ax, finite.predicted_rmse, finite[column], finite.converged.eq(True), colour, marker, alpha=0.7)
        ax.scatter([], [], color=colour, marker=marker, s=26, label=_short(str(network)))
    ax.set_xlabel("predicted RMSE per pixel (I²F)")


def _short(network: str) -> str:
    dataset, *rest = network.split()
    return f"{DATASETS.get(dataset, dataset)}, {' '.join(rest)}"
