"""Depth and smoothness: what was recovered of which network, how far spectra reach, what noise would hide."""

from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i2f.paper.figures.style import BLUE, GREEN, PINK, VERMILION, marks, readable_ticks, style
from i2f.paper.results import Config, Results

ACTIVATIONS = {  # name -> label, colour, marker
    "sigmoid": ("sigmoid", GREEN, "s"),
    "softplus": ("softplus", BLUE, "o"),
    "gelu": ("GELU", PINK, "D"),
    "relu": ("ReLU", VERMILION, "X"),
}
FLOOR = 1e-16  # what an RMSE is raised to, to have a place on a logarithmic axis


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    return {"overview.svg": overview(found.tables["problems"])}


def overview(table: pd.DataFrame) -> Figure:
    """Three panels against the depth: the attack's error, the condition of J Jᵀ, the expected error under noise."""
    style()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11.5, 3.9), layout="constrained")
    _against_depth(left, table[table.attacked], _cloud, "rmse", "measured RMSE per pixel, no noise")
    left.set_title("No noise: GELU and ReLU often fail")
    _against_depth(middle, table, _band, "condition", "λ$_{max}$ / λ$_{min}$ of J Jᵀ")
    middle.set_title("Depth 8 is worse conditioned")
    _against_depth(right, table, _band, "expected_rmse", "expected RMSE per pixel, relative noise")
    right.set_title("Under noise, depth 8 hides more")
    figure.legend(*middle.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    return figure


Drawing = Callable[[Axes, pd.DataFrame, str, float], None]


def _against_depth(ax: Axes, table: pd.DataFrame, draw: Drawing, column: str, label: str) -> None:
    for number, name in enumerate(ACTIVATIONS):
        rows = table[(table.activation == name) & ~table.failed.astype(bool)]
        if len(rows):
            draw(ax, rows, column, 1.12 ** (number - 1.5))  # side by side, not one upon the other
    ax.set(xscale="log", yscale="log", xlabel="depth, convolutions", ylabel=label)
    readable_ticks(ax)
    depths = sorted(table.depth.unique())
    ax.set_xticks(depths, [str(depth) for depth in depths])


def _cloud(ax: Axes, rows: pd.DataFrame, column: str, shift: float) -> None:
    """One mark per image; hollow: the attack did not converge."""
    words, colour, marker = ACTIVATIONS[rows.activation.iloc[0]]
    for depth, mine in rows.groupby("depth"):
        x = depth * shift * 1.04 ** np.linspace(-1, 1, len(mine))
        marks(ax, x, mine[column].clip(lower=FLOOR), mine.converged, colour, marker, s=18, alpha=0.6, label=words)


def _band(ax: Axes, rows: pd.DataFrame, column: str, shift: float) -> None:
    """The median over images, and the range of the middle 80%."""
    words, colour, marker = ACTIVATIONS[rows.activation.iloc[0]]
    depths = rows.groupby("depth")[column]
    middle, low, high = (depths.quantile(q, interpolation="nearest") for q in (0.5, 0.1, 0.9))
    ax.vlines(middle.index * shift, low, high, color=colour, lw=3, alpha=0.35, zorder=2)
    ax.plot(middle.index * shift, middle, color=colour, marker=marker, ms=5, lw=1.2, label=words, zorder=3)
