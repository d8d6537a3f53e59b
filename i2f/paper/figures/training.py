"""Risk through training: how well the network does, its spectra, what noise hides, and whether the attack agrees."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from i2f.paper.figures.style import BLUE, GREEN, INK, LINE, PINK, VERMILION, diagonal, mark_cut, marks, style
from i2f.paper.results import Config, Results

SPECTRUM = {  # column -> label, colour
    "lambda_max": ("largest", BLUE),
    "lambda_median": ("median", GREEN),
    "lambda_min": ("smallest", VERMILION),
}
STARTS = {  # start -> label, marker, colour
    "random": ("random start", "o", BLUE),
    "near": ("start near the truth", "^", PINK),
}
FLOOR = 1e-20  # an MSE below this is rounding


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    return {"overview.svg": overview(found.tables["problems"], found.tables["progress"], config["cut"])}


def overview(table: pd.DataFrame, progress: pd.DataFrame, cut: float) -> Figure:
    """Six panels: accuracy, gradients, spectra; expected error under two kinds of noise, attacks without, attacks with.

    table, progress: the experiment's tables. cut: the predicted RMSE that bounds the linear regime.
    """
    style()
    figure, axes = plt.subplots(2, 3, figsize=(12.5, 7.2), layout="constrained")
    learning(axes[0, 0], progress)
    gradients(axes[0, 1], table)
    spectra(axes[0, 2], table)
    risk(axes[1, 0], table)
    without_noise(axes[1, 1], table)
    measured_against_predicted(axes[1, 2], table, cut)
    return figure


def learning(ax: Axes, progress: pd.DataFrame) -> Axes:
    """Accuracy by epoch."""
    ax.plot(progress.epoch, progress.train_accuracy, color=BLUE, marker="o", ms=4, label="training digits")
    dashes = (0, (4, 3))
    ax.plot(
        progress.epoch, progress.test_accuracy, color=VERMILION, ls=dashes, marker="o", ms=4, label="held-out digits"
    )
    ax.set(ylim=(0, 1.05), xlabel="epoch", ylabel="accuracy", xticks=progress.epoch)
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.legend(fontsize="small", loc="lower right")
    ax.set_title("Does it learn?")
    return ax


def gradients(ax: Axes, table: pd.DataFrame) -> Axes:
    """‖g‖ of the attacked images by epoch: thin an image, thick their median."""
    _lines(ax, table, "gradient_norm", INK, "median")
    ax.set(yscale="log", xlabel="epoch", ylabel="gradient norm ‖g‖", xticks=sorted(table.epoch.unique()))
    ax.set_title("Gradients of the attacked")
    return ax


def spectra(ax: Axes, table: pd.DataFrame) -> Axes:
    """Largest, median and smallest eigenvalue of J Jᵀ by epoch: thin an image, thick their median."""
    for column, (label, colour) in SPECTRUM.items():
        _lines(ax, table, column, colour, label)
    ax.set(yscale="log", xlabel="epoch", ylabel="eigenvalue λ of J Jᵀ", xticks=sorted(table.epoch.unique()))
    ax.legend(fontsize="small")
    ax.set_title("The spectrum")
    return ax


def risk(ax: Axes, table: pd.DataFrame) -> Axes:
    """Expected RMSE by epoch for the smallest noise of each kind: thin an image, thick their median."""
    for kind, colour in (("fixed", BLUE), ("relative", PINK)):
        rows = table[table.noise == kind]
        size = rows["size"].min()
        label = f"fixed size, σ² = {size:g}" if kind == "fixed" else f"‖δ‖ = {size:g} ‖g‖"
        _lines(ax, rows[rows["size"] == size], "expected_rmse", colour, label)
    ax.set(yscale="log", xlabel="epoch", ylabel="expected RMSE per pixel", xticks=sorted(table.epoch.unique()))
    ax.legend(fontsize="small")
    ax.set_title("What noise hides, by I²F")
    return ax


def _lines(ax: Axes, table: pd.DataFrame, column: str, colour: str, label: str) -> None:
    """`table` may hold several attacks on an image at a checkpoint: the column does not depend on them."""
    table = table.drop_duplicates(["epoch", "image"])
    for _, rows in table.groupby("image"):
        ax.plot(rows.epoch, rows[column], color=colour, lw=0.8, alpha=0.35, zorder=2)
    middle = table.groupby("epoch")[column].median()
    ax.plot(middle.index, middle, color=colour, lw=2.2, marker="o", ms=4, label=label, zorder=3)


def without_noise(ax: Axes, table: pd.DataFrame) -> Axes:
    """The attack's MSE by epoch where nothing was added to the gradient; hollow: not converged."""
    rows = table[(table.noise == "none") & np.isfinite(table.mse)]
    shift = 0.012 * max(table.epoch.max(), 1)  # so that the two starts do not cover each other
    for start, some in rows.groupby("start"):
        _, marker, colour = STARTS[start]
        x, y = some.epoch + (shift if start == "near" else -shift), some.mse.clip(FLOOR)
        marks(ax, x, y, some.converged, colour, marker, hollow="none", s=34, linewidth=1.2)
    for label, marker, colour in STARTS.values():
        ax.scatter([], [], marker=marker, color=colour, s=30, label=label)
    ax.scatter([], [], facecolor="none", edgecolor=LINE, s=30, label="hollow: not converged")
    ax.set(yscale="log", xlabel="epoch", ylabel="MSE per pixel", xticks=sorted(table.epoch.unique()))
    ax.legend(fontsize="small")
    ax.set_title("Attacks without noise")
    return ax


def measured_against_predicted(ax: Axes, table: pd.DataFrame, cut: float) -> Axes:
    """The attack's RMSE against I²F's, both per pixel, all noises; colour: epoch; hollow: not converged."""
    noisy = table[(table.noise != "none") & np.isfinite(table.rmse)]
    epochs = sorted(table.epoch.unique())
    colours = dict(zip(epochs, sns.color_palette("viridis", len(epochs)), strict=True))
    for (epoch, start), rows in noisy.groupby(["epoch", "start"]):
        x, y, colour, marker = rows.predicted_rmse, rows.rmse, colours[epoch], STARTS[start][1]
        marks(ax, x, y, rows.converged, colour, marker, hollow="none", s=30, linewidth=1.2)
    for epoch in epochs:
        ax.scatter([], [], color=colours[epoch], s=26, label=f"epoch {epoch}")
    for label, marker, _ in STARTS.values():
        ax.scatter([], [], color=LINE, marker=marker, s=26, label=label)
    ax.set(xscale="log", yscale="log", xlabel="predicted RMSE per pixel", ylabel="measured RMSE per pixel")
    diagonal(ax)
    mark_cut(ax, cut, foot=True)
    ax.legend(fontsize="x-small", loc="best")
    ax.set_title("Attacks with noise")
    return ax
