"""Noise of one energy, five covariances: the errors of an attacker, and the cost to training."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i2f.paper import estimates
from i2f.paper.experiments import problems as shared
from i2f.paper.figures.frontier import accuracy_against_privacy
from i2f.paper.figures.style import BLUE, GREEN, INK, PINK, SKY, VERMILION, readable_ticks, style
from i2f.paper.results import Config, Results

KINDS = {  # name -> label, colour, marker
    "isotropic": ("isotropic", VERMILION, "X"),
    "row-space": ("row space", PINK, "D"),
    "linear": ("linear", SKY, "v"),
    "designed": ("designed", BLUE, "o"),
    "averaged": ("water-filled", GREEN, "s"),
}
SPREAD = 0.22  # of a cloud about its place


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    return {"overview.svg": overview(found.tables["problems"], found.tables["frontier"])}


def overview(table: pd.DataFrame, frontier: pd.DataFrame) -> Figure:
    """Left: the error along the sharpest directions, by kind of noise. Middle: the mean error, and where the covariance
    is known. Right: accuracy against privacy."""
    style()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12.5, 4.1), layout="constrained")
    table = shared.scored(table)
    told = table.told.astype(bool)
    titles = "Designed noise protects sharp directions", "Water-filled noise: largest mean error"
    for ax, column, title in zip((left, middle), ("sharpest", "mse"), titles, strict=True):
        for place, (kind, (_, colour, marker)) in enumerate(KINDS.items()):
            usual, known = table[~told & (table.kind == kind)], table[told & (table.kind == kind)]
            cloud(ax, place, usual[column] ** 0.5, colour, marker)
            if column == "mse":
                cloud(ax, place + 0.4, known[column] ** 0.5, INK, "*")
            expected = usual[f"predicted_{column}"]
            if (expected > 0).all():
                middle_of = float(np.exp(np.log(expected).mean())) ** 0.5
                ax.plot([place - SPREAD, place + SPREAD], [middle_of] * 2, color=INK, lw=1, ls=":", zorder=1)
        ax.set_xticks(range(len(KINDS)), [label for label, _, _ in KINDS.values()], rotation=20)
        ax.set(yscale="log", title=title)
        readable_ticks(ax)
    left.set_ylabel("RMSE along the ten sharpest directions")
    middle.set_ylabel("RMSE; stars: covariance known")
    accuracy_against_privacy(right, frontier)
    return figure


def cloud(ax: Axes, place: float, errors: pd.Series, colour: str, marker: str) -> None:
    """A pale mark per image, and their geometric mean with its 95% interval."""
    errors = errors[errors > 0]
    if not len(errors):
        return
    ax.scatter(
        place + SPREAD * np.linspace(-1, 1, len(errors)), errors, color=colour, marker=marker, s=14, alpha=0.35, lw=0
    )
    mean = estimates.geometric_mean(errors)
    low, high = mean.interval
    ax.errorbar(place, mean.value, [[mean.value - low], [high - mean.value]], color=colour, marker=marker, ms=7, lw=1.5)
