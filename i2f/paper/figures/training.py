"""Risk through training: how well the networks do, their spectra, what noise hides, and whether the attack agrees."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from i2f.paper.figures.style import BLUE, GREEN, INK, PINK, VERMILION, diagonal, marks, readable_ticks, style
from i2f.paper.results import Config, Results

SPECTRUM = {  # column -> label, colour
    "lambda_max": ("largest λ", BLUE),
    "lambda_median": ("median λ", GREEN),
    "lambda_min": ("smallest λ", VERMILION),
}
NOISES = {"relative": ("in proportion to the gradient", PINK), "fixed": ("of fixed size", BLUE)}
ACCURACIES = {"train_accuracy": ("training digits", BLUE), "test_accuracy": ("held-out digits", VERMILION)}
MARKERS = "os^DvP"


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    return {"overview.svg": overview(found.tables["problems"], found.tables["progress"])}


def overview(table: pd.DataFrame, progress: pd.DataFrame) -> Figure:
    """Four panels: accuracy, gradients and spectra, expected error under two kinds of noise, attacks.

    table, progress: the experiment's tables.
    """
    style()
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 7.6), layout="constrained")
    learning(axes[0, 0], progress)
    spectra(axes[0, 1], table)
    risk(axes[1, 0], table)
    measured_against_predicted(axes[1, 1], table)
    return figure


def learning(ax: Axes, progress: pd.DataFrame) -> Axes:
    """Accuracy by epoch: the median over weight seeds in the range of all."""
    for column, (label, colour) in ACCURACIES.items():
        _band(ax, progress, column, colour, label, (0.0, 1.0))
    ax.set(ylim=(0, 1.05), xlabel="epoch", ylabel="accuracy", xticks=progress.epoch.unique())
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.legend(fontsize="small", loc="lower right")
    ax.set_title("The networks learn")
    return ax


def spectra(ax: Axes, table: pd.DataFrame) -> Axes:
    """‖g‖² and eigenvalues of J Jᵀ by epoch: medians over weight seeds and images, and the middle four in five."""
    once = table.drop_duplicates(["weight_seed", "epoch", "image"])
    once = once.assign(energy=once.gradient_norm**2)
    _band(ax, once, "energy", INK, "‖g‖²")
    for column, (label, colour) in SPECTRUM.items():
        _band(ax, once, column, colour, label)
    ax.set(yscale="log", xlabel="epoch", ylabel="‖g‖², eigenvalues of J Jᵀ", xticks=sorted(table.epoch.unique()))
    ax.legend(fontsize="small", ncols=2)
    ax.set_title("Training shrinks the gradient more than J")
    return ax


def risk(ax: Axes, table: pd.DataFrame) -> Axes:
    """Expected RMSE by epoch under each kind of noise: as `spectra`; thin: the geometric mean of a weight seed."""
    for kind, (label, colour) in NOISES.items():
        rows = table[table.noise == kind]
        _band(ax, rows, "expected_rmse", colour, label)
        logarithms = np.log(rows.expected_rmse).groupby([rows.weight_seed, rows.epoch]).mean().unstack()
        ax.plot(logarithms.columns, np.exp(logarithms).T, color=colour, lw=0.7, alpha=0.6, zorder=2)
    ax.set(yscale="log", xlabel="epoch", ylabel="expected RMSE per pixel", xticks=sorted(table.epoch.unique()))
    ax.legend(fontsize="small", title="noise")
    ax.set_title("By the end, fixed noise hides more")
    return ax


def _band(
    ax: Axes, table: pd.DataFrame, column: str, colour: str, label: str, ends: tuple[float, float] = (0.1, 0.9)
) -> None:
    """The median by epoch and the quantiles `ends`."""
    groups = table.groupby("epoch")[column]
    middle, low, high = groups.median(), *(groups.quantile(end) for end in ends)
    ax.fill_between(middle.index, low, high, color=colour, alpha=0.15, lw=0, zorder=1)
    ax.plot(middle.index, middle, color=colour, lw=2.2, marker="o", ms=4, label=label, zorder=3)


def measured_against_predicted(ax: Axes, table: pd.DataFrame) -> Axes:
    """The attack's RMSE against I²F's; colour: the noise; mark: the epoch; hollow: not converged."""
    attacks = table[table.budget.notna()]
    attacks = attacks[np.isfinite(attacks.rmse)] if len(attacks) else attacks
    epochs = sorted(attacks.epoch.unique())
    for (epoch, noise), rows in attacks.groupby(["epoch", "noise"]):
        label, colour = NOISES[noise]
        marker = MARKERS[epochs.index(epoch) % len(MARKERS)]
        marks(ax, rows.predicted_rmse, rows.rmse, rows.converged, colour, marker, alpha=0.8)
        ax.scatter([], [], color=colour, marker=marker, s=26, label=f"epoch {epoch}, {label}")
    ax.set(xscale="log", yscale="log", xlabel="predicted RMSE per pixel", ylabel="measured RMSE per pixel")
    if len(attacks):
        diagonal(ax)
        readable_ticks(ax)
        ax.legend(fontsize="x-small")
    ax.set_title("Attacks that converge meet the prediction")
    return ax
