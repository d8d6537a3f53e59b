"""Whom the same noise protects: samples, classes, and noise sized by E[I²]."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from i2f.paper.experiments import problems as shared
from i2f.paper.experiments.fairness import by_image, equalised
from i2f.paper.figures.style import BLUE, GREEN, INK, VERMILION, pictures, readable_ticks, style
from i2f.paper.results import Config, Results

COLOURS = {"same": BLUE, "strong": VERMILION, "equal": GREEN}
SHARES = np.linspace(0.5, 99.5, 100)  # percentiles, of which curves are drawn


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    return {
        "overview.svg": overview(found.tables["problems"], config["target"]),
        "pictures.png": recoveries(found, config["shown"]),
    }


def overview(table: pd.DataFrame, target: float) -> Figure:
    """Three panels: the distribution over samples; classes; the same images under noise sized by E[I²]."""
    style()
    figure, (samples, classes, equal) = plt.subplots(1, 3, figsize=(13.0, 4.4), layout="constrained")
    distribution(samples, table)
    samples.set_title("Predicted class: larger errors")
    by_class(classes, table)
    classes.set_title("At variance 1e-5, classes differ")
    own_noise(equal, table, target)
    equal.set_title("Own variance: nearer to the target")
    return figure


def distribution(ax: Axes, table: pd.DataFrame) -> None:
    """The share of attacks whose MSE is at most so many times the typical one of their weight seed: the median over
    images whose class the network does not predict anyway."""
    for part in ("same", "strong"):
        rows = shared.scored(table[table.part == part])
        answered = rows.answered.astype(bool)
        times = rows.mse / rows.weight_seed.map(rows[~answered].groupby("weight_seed").mse.median())
        for mine, words, line in ((~answered, "", "-"), (answered, ", predicted class", (0, (3, 2)))):
            if mine.any():
                label = f"variance {_size(rows)}{words}"
                ax.plot(np.percentile(times[mine], SHARES), SHARES, color=COLOURS[part], ls=line, lw=1.8, label=label)
    ax.set(
        xscale="log", xlabel="MSE / median of its weight seed", ylabel="attacks with at most this, in %", ylim=(0, 135)
    )
    ax.set_yticks(range(0, 101, 25))
    readable_ticks(ax)
    ax.legend(fontsize="small", loc="upper left")


def by_class(ax: Axes, table: pd.DataFrame) -> None:
    """Every image's MSE, the geometric mean over weight seeds, over that of all images; by class, with the median and
    the middle 80%."""
    for part, shift in (("same", -0.2), ("strong", 0.2)):
        rows = table[table.part == part]
        centred, labels = by_image(rows)
        for label, values in np.exp(centred.mean(axis=1)).groupby(labels):
            _cloud(ax, float(label) + shift, values, COLOURS[part], f"variance {_size(rows)}")
    ax.set(yscale="log", xlabel="class", ylabel="MSE / geometric mean of all images")
    _readable(ax, sorted(table.label.dropna().unique()))
    handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    ax.legend(handles.values(), handles.keys(), fontsize="small")


def own_noise(ax: Axes, table: pd.DataFrame, target: float) -> None:
    """The MSE of the same images under one variance for all, and under one of their own."""
    both = equalised(table)
    for place, part in enumerate(both):
        _cloud(ax, place, both[part], COLOURS[part], part)
    ax.axhline(target, color=INK, lw=1.0, ls=":", zorder=1)
    ax.set(yscale="log", xlim=(-0.6, 1.6), ylabel="MSE per pixel")
    _readable(ax, [0, 1])
    ax.set_xticklabels(["one variance\nfor all", "each image's own,\nfor one expected MSE (dotted)"])


def _cloud(ax: Axes, place: float, values: ArrayLike, colour: str, label: str) -> None:
    """Values around one place: dots, their middle 80% as a bar, their median as a line."""
    found = np.asarray(values, dtype=float)
    jitter = 0.12 * (2 * ((np.arange(len(found)) * 0.618034) % 1) - 1)  # the same at every drawing
    ax.scatter(place + jitter, found, s=9, color=colour, alpha=0.35, linewidth=0, label=label, zorder=2)
    low, middle, high = np.percentile(found, [10, 50, 90])
    ax.vlines(place, low, high, color=colour, lw=3, zorder=3)
    ax.hlines(middle, place - 0.16, place + 0.16, color=INK, lw=1.6, zorder=4)


def recoveries(found: Results, count: int) -> Figure:
    """Private images and what was recovered under weight seed 1: of each variance, the `count` least protected (lowest
    measured MSE) and the `count` best protected, in the order of their error."""
    table, truth, recovered = found.tables["problems"], found.arrays["truth"], found.arrays["pictures"]
    kept = table[table.pictured.astype(bool)].reset_index(drop=True)
    lines = []
    for part in ("same", "strong"):
        rows = extremes(kept, part, count)
        captions = [f"MSE {mse:.2g}" for mse in rows.mse]
        lines.append(("private", list(truth[rows.index]), [f"a {label:g}" for label in rows.label]))
        lines.append((f"recovered,\nvariance {_size(rows)}", list(recovered[rows.index]), captions))
    return pictures(lines)


def extremes(table: pd.DataFrame, part: str, count: int) -> pd.DataFrame:
    """The rows of the `count` least protected images (lowest measured MSE) and of the `count` best protected."""
    rows = shared.scored(table[table.part == part]).sort_values("mse")
    count = min(count, len(rows) // 2)
    return pd.concat([rows.iloc[:count], rows.iloc[len(rows) - count :]])


def _size(table: pd.DataFrame) -> str:
    return np.format_float_positional(table.variance.iloc[0], trim="-")


def _readable(ax: Axes, categories: list[float]) -> None:
    """Readable ticks of a logarithmic y over categories."""
    readable_ticks(ax)
    ax.set_xticks(categories, [f"{name:g}" for name in categories])
    ax.grid(axis="x", visible=False)
