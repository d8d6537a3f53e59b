"""Depth and smoothness: what was recovered of which network, how far spectra reach, what noise would hide."""

import matplotlib.pyplot as plt
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
    """Three panels, of the widest networks: the attack's error, the condition of J Jᵀ, what relative noise hides."""
    style()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11.5, 3.9), layout="constrained")
    wide = table[table.width == table.width.max()]
    _against_depth(left, wide.assign(rmse=wide.rmse.clip(lower=FLOOR)), "rmse", "RMSE per pixel, attack")
    left.set_title("What the attack recovers, no noise")
    _against_depth(middle, wide, "condition", "λ$_{max}$ / λ$_{min}$ of J Jᵀ")
    middle.set_title("How ill-conditioned J is")
    _against_depth(right, wide, "expected_rmse", "expected RMSE per pixel, relative noise")
    right.set_title("What noise would hide")
    left.legend(fontsize="small", loc="center left")
    return figure


def _against_depth(ax: Axes, table: pd.DataFrame, column: str, label: str) -> Axes:
    """One mark per image (hollow: the attack did not converge), a line through an activation's medians."""
    for number, (name, (words, colour, marker)) in enumerate(ACTIVATIONS.items()):
        rows = table[(table.activation == name) & ~table.failed.astype(bool)]
        if not len(rows):
            continue
        shift = 1.04 ** (number - 1.5)  # side by side, not one upon the other
        median = rows.groupby("depth")[column].median()
        ax.plot(median.index * shift, median, color=colour, lw=1.4, label=words)
        marks(ax, rows.depth * shift, rows[column], rows.converged, colour, marker)
    ax.set(xscale="log", yscale="log", xlabel="depth, convolutions", ylabel=label)
    readable_ticks(ax)
    depths = sorted(table.depth.unique())
    ax.set_xticks(depths, [str(depth) for depth in depths])
    return ax
