"""I²F against recovery: error against prediction, where the law ends, one noise level, and the other measures."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i2f.paper.attackers import ATTACKERS
from i2f.paper.figures.style import INK, LINE, diagonal, mark_cut, readable_ticks, style
from i2f.paper.results import Config, Results

LABELS = {name: ATTACKERS[name].label for name in ("gauss-newton", "gauss-newton, box", "dgl", "gs")}
LABELS["gs"] += ", box"  # among attackers with and without one
X_LABEL = "predicted RMSE per pixel (I²F)"


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    table = found.tables["problems"]
    return {
        "overview.svg": overview(table, config["level"], config["cut"], config["tolerance"]),
        "measures.svg": measures(table),
    }


def overview(table: pd.DataFrame, level: float, cut: float, tolerance: float) -> Figure:
    """Three panels: error against prediction; their ratio, where the law ends; images at one noise level.

    cut: the predicted RMSE that bounds the linear regime.
    """
    style()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12.5, 4.2), layout="constrained")
    main = table[table.model == table.model.iloc[0]]
    error_against_prediction(left, main, "rmse")
    left.scatter(main.predicted_rmse, main.bound_rmse, s=26, marker="_", color=INK, label="lower bound", zorder=2)
    diagonal(left)
    left.set_title("All noise levels")
    left.set_ylabel("measured RMSE per pixel")
    ratio(middle, table, cut, tolerance)
    middle.set_title("Where the law ends")
    error_against_prediction(right, main[main.variance == level], "rmse")
    diagonal(right)
    readable_ticks(right)
    right.set_title(f"Across images, variance {level:g}")
    right.set_ylabel("measured RMSE per pixel")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize="small")
    return figure


def error_against_prediction(ax: Axes, table: pd.DataFrame, error: str) -> None:
    """An error against the predicted RMSE, both logarithmic, one mark per attack."""
    for name, label in LABELS.items():
        mine = table[table.attacker == name]
        if len(mine):
            colour, marker = ATTACKERS[name].colour, ATTACKERS[name].marker
            marks = ax.scatter(
                mine.predicted_rmse, mine[error], s=34, marker=marker, color=colour, alpha=0.85, zorder=3
            )
            marks.set(edgecolor="white", linewidth=0.5, label=label)
    ax.set(xscale="log", yscale="log", xlabel=X_LABEL)


def ratio(ax: Axes, table: pd.DataFrame, cut: float, tolerance: float) -> None:
    """Measured over predicted RMSE of the second-order attackers, one line per image; hollow: the further models."""
    ax.axhspan(1 - tolerance, 1 + tolerance, color="#eeeeee", zorder=0)
    ax.axhline(1, color=LINE, lw=1.2, zorder=1)
    named = set()
    second = table[table.attacker.isin(["gauss-newton", "gauss-newton, box"])]
    for (attacker, model, _), rows in second.groupby(["attacker", "model", "image"], sort=False):
        colour, further = ATTACKERS[attacker].colour, model != table.model.iloc[0]
        name = f"{LABELS[attacker]}, {model}"
        rows = rows.sort_values("predicted_rmse")
        (line,) = ax.plot(rows.predicted_rmse, rows.rmse / rows.predicted_rmse, ms=5, lw=0.8, color=colour)
        line.set(marker=ATTACKERS[attacker].marker, ls="--" if further else "-", mfc="white" if further else colour)
        if name not in named:
            line.set_label(name)
        named.add(name)
    ax.set(xscale="log", yscale="log", xlabel=X_LABEL, ylabel="measured / predicted RMSE")
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 0.6), max(high, 1.7))  # so that a ratio of 1.1 looks like one
    mark_cut(ax, cut)
    readable_ticks(ax)
    if named:
        ax.legend(fontsize="small")


def measures(table: pd.DataFrame) -> Figure:
    """PSNR, SSIM and feature MSE of the same attacks against the predicted RMSE."""
    style()
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.9), layout="constrained")
    main = table[table.model == table.model.iloc[0]]
    names = {"psnr": "PSNR in dB (clamped)", "ssim": "SSIM (clamped)", "feature_mse": "feature MSE (logits²)"}
    for ax, (column, name) in zip(axes, names.items(), strict=True):
        error_against_prediction(ax, main, column)
        ax.set_yscale("log" if column == "feature_mse" else "linear")
        ax.set_ylabel(name)
        readable_ticks(ax)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    return figure
