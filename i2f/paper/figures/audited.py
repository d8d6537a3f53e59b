"""Audits and attacks: the PSNR predicted and measured, requested and measured."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from i2f.paper.figures.style import BLUE, LINE, marks, style
from i2f.paper.results import Config, Results


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    return {"overview.svg": overview(found.tables["problems"])}


def overview(table: pd.DataFrame) -> Figure:
    """The PSNR after an attack against the predicted one (left), and against the requested one (right)."""
    style()
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 4), layout="constrained")
    panels = {
        "predicted": ("psnr", "predicted PSNR, dB", "Noise of a given variance"),
        "suggested": ("asked", "requested PSNR, dB", "Recommended noise"),
    }
    for ax, (part, (column, label, title)) in zip(axes, panels.items(), strict=True):
        rows = table[table.part == part]
        marks(ax, rows[column], rows.attacked_psnr, rows.converged, BLUE, "o")
        low, high = min(ax.get_xlim()[0], ax.get_ylim()[0]), max(ax.get_xlim()[1], ax.get_ylim()[1])
        ax.plot([low, high], [low, high], color=LINE, lw=1.2, zorder=1)
        ax.set(xlabel=label, ylabel="PSNR after Gauss–Newton, dB")
        ax.set_title(title)
    return figure
