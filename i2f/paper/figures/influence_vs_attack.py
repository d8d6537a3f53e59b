"""I²F against recovery: error against prediction, where the law ends, one noise level, and the other measures."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i2f.paper.attackers import ATTACKERS
from i2f.paper.claims import LEAST_FINISHED
from i2f.paper.experiments.influence_vs_attack import DEEP, DIGITS, PHOTOGRAPHS
from i2f.paper.figures.style import AMBER, GREEN, INK, LINE, diagonal, mark_cut, readable_ticks, style
from i2f.paper.results import Config, Results

LABELS = {name: ATTACKERS[name].label for name in ("gauss-newton", "gauss-newton, box", "dgl", "gs")}
LABELS["gs"] += ", box"  # among attackers with and without one
X_LABEL = "predicted RMSE per pixel (I²F)"


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    table = found.tables["problems"]
    return {
        "overview.svg": overview(table, config["level"], config["cut"], config["tolerance"]),
        "measures.svg": measures(table, config["level"]),
    }


def overview(table: pd.DataFrame, level: float, cut: float, tolerance: float) -> Figure:
    """Three panels: error against prediction; their ratio, where the law ends; digits at one noise level.

    cut: the predicted RMSE that bounds the linear regime.
    """
    style()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12.5, 4.4), layout="constrained")
    digits = table[table.subject == DIGITS]
    error_against_prediction(left, digits, "rmse")
    for subject, colour, marker in ((PHOTOGRAPHS, AMBER, "D"), (DEEP, GREEN, "^")):
        rows = table[table.subject == subject]
        marks = left.scatter(rows.predicted_rmse, rows.rmse, s=22, marker=marker, color=colour, alpha=0.7, zorder=3)
        marks.set(edgecolor="white", linewidth=0.4, label=f"{LABELS['gauss-newton']}, {subject}")
    left.scatter(digits.predicted_rmse, digits.bound_rmse, s=14, marker="_", color=INK, label="lower bound", zorder=2)
    diagonal(left)
    left.set_title("Small errors are the predicted ones")
    left.set_ylabel("measured RMSE per pixel")
    ratio(middle, digits, cut, tolerance)
    middle.set_title("Beyond 0.3, larger; with a box, smaller")
    error_against_prediction(right, digits[digits.variance == level], "rmse")
    diagonal(right)
    readable_ticks(right)
    right.set_title(f"Variance {level:g}: I²F ranks digits")
    right.set_ylabel("measured RMSE per pixel")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    return figure


def error_against_prediction(ax: Axes, table: pd.DataFrame, error: str) -> None:
    """An error against the predicted RMSE, both logarithmic, one mark per attack; many are a cloud."""
    for name, label in LABELS.items():
        mine = table[table.attacker == name]
        if len(mine):
            colour, marker = ATTACKERS[name].colour, ATTACKERS[name].marker
            marks = ax.scatter(
                mine.predicted_rmse,
                mine[error],
                s=26 if len(mine) < 200 else 12,
                marker=marker,
                color=colour,
                alpha=0.6,
                zorder=3,
            )
            marks.set(edgecolor="white", linewidth=0.5, label=label)
    ax.set(xscale="log", yscale="log", xlabel=X_LABEL)


def ratio(ax: Axes, digits: pd.DataFrame, cut: float, tolerance: float) -> None:
    """Measured over predicted RMSE of the second-order attackers at each noise level: the median over digits and the
    range of four in five, at the median prediction."""
    ax.axhspan(1 - tolerance, 1 + tolerance, color="#eeeeee", zorder=0)
    ax.axhline(1, color=LINE, lw=1.2, zorder=1)
    rows = digits.assign(ratio=digits.rmse / digits.predicted_rmse)
    for attacker in ("gauss-newton", "gauss-newton, box"):
        levels = rows[(rows.attacker == attacker) & np.isfinite(rows.ratio)].groupby("variance")
        if not levels.ngroups:
            continue
        colour, marker = ATTACKERS[attacker].colour, ATTACKERS[attacker].marker
        x, middle = levels.predicted_rmse.median(), levels.ratio.median()
        low, high = levels.ratio.quantile(0.1), levels.ratio.quantile(0.9)
        ax.vlines(x, low, high, color=colour, lw=3, alpha=0.35, zorder=2)
        ax.plot(x, middle, color=colour, marker=marker, ms=5, lw=1.2, label=LABELS[attacker], zorder=3)
        few = levels.converged.agg(lambda c: c.eq(True).mean()) < LEAST_FINISHED
        ax.scatter(x[few], middle[few], s=25, marker=marker, facecolor="white", edgecolor=colour, zorder=4)
    ax.set(xscale="log", yscale="log", xlabel=X_LABEL, ylabel="measured / predicted RMSE")
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 0.6), max(high, 1.7))  # so that a ratio of 1.1 looks like one
    mark_cut(ax, cut)
    readable_ticks(ax)
    ax.legend(fontsize="small")


def measures(table: pd.DataFrame, level: float) -> Figure:
    """PSNR, SSIM and feature MSE of the digits' attacks at one noise level against the predicted RMSE."""
    style()
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.9), layout="constrained")
    digits = table[(table.subject == DIGITS) & (table.variance == level)]
    names = {"psnr": "PSNR in dB (clamped)", "ssim": "SSIM (clamped)", "feature_mse": "feature MSE (logits²)"}
    for ax, (column, name) in zip(axes, names.items(), strict=True):
        error_against_prediction(ax, digits, column)
        ax.set_yscale("log" if column == "feature_mse" else "linear")
        ax.set_ylabel(name)
        readable_ticks(ax)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    return figure
