"""What an answer costs: estimates and attacks side by side, in gradient evaluations."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i2f.figures.style import ATTACKERS, DATASETS, INK, style

ESTIMATES = {"I_lb": ("lower bound I_lb", "#111111", "<"), "I²F": ("exact I²F", "#777777", ">")}


def published(run: Path) -> dict[str, Figure]:
    """The figures of a run's folder, by file name."""
    return {"overview.svg": overview(pd.read_csv(run / "problems.csv"))}


def overview(table: pd.DataFrame) -> Figure:
    """A panel a data set: a row a method, a point an image; hollow: the budget ended before the attack arrived."""
    style()
    datasets = list(table.dataset.unique())
    figure, axes = plt.subplots(
        1, len(datasets), figsize=(1 + 5 * len(datasets), 3.6), layout="constrained", squeeze=False, sharey=True
    )
    for ax, dataset in zip(axes[0], datasets, strict=True):
        cost(ax, table[table.dataset == dataset])
        ax.set_title(DATASETS.get(dataset, dataset))
    return figure


def cost(ax: Axes, table: pd.DataFrame) -> Axes:
    """Gradient evaluations of every method, logarithmic; networks are set a little apart."""
    methods, networks = list(table.method.unique()), list(table.network.unique())
    for row, method in enumerate(methods):
        colour, marker = ESTIMATES[method][1:] if method in ESTIMATES else ATTACKERS[method][2:4]
        for k, network in enumerate(networks):
            points = table[(table.method == method) & (table.network == network)]
            for reached, face in ((True, colour), (False, "white")):
                some = points[points.reached == reached]
                height = row + 0.18 * (k - (len(networks) - 1) / 2)
                ax.scatter(
                    some.evaluations,
                    [height] * len(some),
                    s=34,
                    marker=marker,
                    facecolor=face,
                    edgecolor=colour,
                    zorder=3,
                )
    ax.set(xscale="log", xlabel="gradient evaluations (hollow: budget spent, not arrived)")
    labels = [ESTIMATES[m][0] if m in ESTIMATES else ATTACKERS[m][0] for m in methods]
    ax.set_yticks(range(len(methods)), labels, color=INK)
    ax.set_ylim(len(methods) - 0.5, -0.5)
    return ax
