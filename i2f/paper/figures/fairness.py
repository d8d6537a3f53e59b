"""Whom the same noise protects: classes, images, what I²F says of them, and noise sized by it."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i2f.paper.figures.style import (
    AMBER,
    BLUE,
    GREEN,
    INK,
    LINE,
    VERMILION,
    diagonal,
    mark_cut,
    pictures,
    readable_ticks,
    style,
)
from i2f.paper.results import Config, Results

PARTS = {"same": (BLUE, "o"), "strong": (VERMILION, "s"), "equal": (GREEN, "D")}
PREDICTED = AMBER


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    return {
        "overview.svg": overview(found.tables["problems"], config["cut"]),
        "pictures.png": recoveries(found, config["shown"]),
    }


def overview(table: pd.DataFrame, cut: float) -> Figure:
    """The fairness experiment: classes, the distribution over images, measured against predicted, equalised noise.

    cut: the predicted RMSE that bounds the linear regime.
    """
    style()
    table = table[~table.failed]
    parts = dict(iter(table.groupby("part")))
    figure, ((classes, images), (scatter, equal)) = plt.subplots(2, 2, figsize=(11.5, 8.0), layout="constrained")
    by_class(classes, parts["same"])
    classes.set_title(f"By class, variance {_size(parts['same'])}")
    distribution(images, [parts["same"], parts["strong"]])
    images.set_title("By image")
    measured_against_predicted(scatter, [parts["same"], parts["strong"]], cut)
    scatter.set_title("I²F, image by image")
    equalised(equal, parts["same"], parts["equal"])
    equal.set_title("Noise sized by E[I²]")
    return figure


def by_class(ax: Axes, table: pd.DataFrame) -> Axes:
    """Boxes of measured and of predicted MSE of each class, side by side, and every image as a dot."""
    labels = sorted(table.label.unique())
    sides = (("mse", "measured", PARTS["same"][0], -0.2), ("predicted_mse", "predicted, I²F", PREDICTED, 0.2))
    for name, words, colour, shift in sides:
        values = [table[name][table.label == label].to_numpy() for label in labels]
        places = np.arange(len(labels)) + shift
        lines = {"medianprops": {"color": INK, "lw": 1.6}, "whiskerprops": {"color": LINE}, "capprops": {"color": LINE}}
        options: dict[str, Any] = {
            "widths": 0.32,
            "showfliers": False,
            "patch_artist": True,
            "manage_ticks": False,
            **lines,
        }
        for box in ax.boxplot(values, positions=places, **options)["boxes"]:
            box.set(facecolor=colour, alpha=0.45, edgecolor=colour)
        x = np.concatenate([place + _jitter(len(v)) for place, v in zip(places, values, strict=True)])
        ax.scatter(x, np.concatenate(values), s=7, color=colour, linewidth=0, label=words, zorder=3)
    ax.set(yscale="log", xlabel="class", ylabel="MSE per pixel", xticks=range(len(labels)))
    ax.set_xticklabels([f"{label:g}" for label in labels])
    ax.grid(axis="x", visible=False)
    _readable(ax)
    ax.legend(fontsize="small", markerscale=2)
    return ax


def distribution(ax: Axes, parts: list[pd.DataFrame]) -> Axes:
    """The share of images whose MSE is at most so much: measured, and as predicted."""
    for table in parts:
        colour, _ = PARTS[table.part.iloc[0]]
        share = (np.arange(len(table)) + 1) / len(table)
        name = f"variance {_size(table)}"
        ax.plot(np.sort(table.mse), share, color=colour, lw=2, drawstyle="steps-post", label=f"{name}, measured")
        dashed: dict[str, Any] = {"lw": 1.2, "ls": (0, (3, 2)), "drawstyle": "steps-post"}
        ax.plot(np.sort(table.predicted_mse), share, color=colour, label=f"{name}, predicted", **dashed)
    ax.set(xscale="log", xlabel="MSE per pixel", ylabel="share of images with at most this", ylim=(0, 1.5))
    ax.set_yticks(np.linspace(0, 1, 6))
    ax.legend(fontsize="small", loc="upper left")
    return ax


def measured_against_predicted(ax: Axes, parts: list[pd.DataFrame], cut: float) -> Axes:
    """RMSE per pixel on both axes, one dot per image; hollow: the attack did not converge."""
    for table in parts:
        colour, marker = PARTS[table.part.iloc[0]]
        filled: dict[str, Any] = {"facecolor": colour, "edgecolor": "white", "linewidth": 0.5}
        hollow: dict[str, Any] = {"facecolor": "none", "edgecolor": colour, "linewidth": 1.1}
        for converged, words, look in ((True, "", filled), (False, ", not converged", hollow)):
            rows = table[table.converged.astype(bool) == converged]
            if len(rows):
                label = f"variance {_size(table)}{words}"
                ax.scatter(rows.predicted_rmse, rows.rmse, s=24, marker=marker, label=label, zorder=3, **look)
    ax.set(xscale="log", yscale="log", xlabel="predicted RMSE per pixel, I²F", ylabel="measured RMSE per pixel")
    diagonal(ax)
    mark_cut(ax, cut, foot=True)
    readable_ticks(ax)
    ax.legend(fontsize="small")
    return ax


def equalised(ax: Axes, same: pd.DataFrame, equal: pd.DataFrame) -> Axes:
    """The same images under one variance for all and under one of their own: one line per image."""
    both = same.merge(equal, on="image", suffixes=("", " equal"))
    ax.plot([0, 1], both[["mse", "mse equal"]].to_numpy().T, color="#cccccc", lw=0.8, zorder=1)
    for place, name, part in ((0, "mse", "same"), (1, "mse equal", "equal")):
        ax.scatter([place] * len(both), both[name], s=24, color=PARTS[part][0], marker=PARTS[part][1], zorder=3)
    ax.axhline(equal.expected_mse.median(), color=LINE, lw=1.2, ls=":", zorder=1, label="the target")
    ax.set(yscale="log", xlim=(-0.4, 1.4), xticks=[0, 1], ylabel="measured MSE per pixel")
    ax.set_xticklabels([f"one variance\nfor all, {_size(same)}", "each image's own,\nthe same expected error"])
    ax.grid(axis="x", visible=False)
    _readable(ax)
    ax.legend(fontsize="small", loc="upper center")
    return ax


def recoveries(found: Results, count: int) -> Figure:
    """Private images and what was recovered: of each variance, the `count` least protected (lowest measured MSE) and
    the `count` best protected, in the order of their error."""
    table, truth, recovered = found.tables["problems"], found.arrays["truth"], found.arrays["pictures"]
    lines = []
    for part in ("same", "strong"):
        rows = extremes(table, part, count)
        captions = [f"MSE {mse:.2g}" for mse in rows.mse]
        lines.append(("private", list(truth[rows.index]), [f"a {label:g}" for label in rows.label]))
        lines.append((f"recovered,\nvariance {_size(rows)}", list(recovered[rows.index]), captions))
    return pictures(lines)


def extremes(table: pd.DataFrame, part: str, count: int) -> pd.DataFrame:
    """The rows of the `count` least protected images (lowest measured MSE) and of the `count` best protected."""
    rows = table[(table.part == part) & ~table.failed].sort_values("mse")
    count = min(count, len(rows) // 2)
    return pd.concat([rows.iloc[:count], rows.iloc[len(rows) - count :]])


def _size(table: pd.DataFrame) -> str:
    return np.format_float_positional(table.variance.iloc[0], trim="-")


def _jitter(n: int) -> np.ndarray:
    """Even steps in a scrambled order: dots apart, the same at every drawing."""
    return 0.13 * (2 * ((np.arange(n) * 0.618034) % 1) - 1)


def _readable(ax: Axes) -> None:
    """`readable_ticks` for a logarithmic y over categories."""
    locator, formatter = ax.xaxis.get_major_locator(), ax.xaxis.get_major_formatter()
    readable_ticks(ax)
    ax.xaxis.set_major_locator(locator)
    ax.xaxis.set_major_formatter(formatter)
