"""An audit: the spectra of its samples, and what the real attack left against what was predicted."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from i2f.figures.style import LINE, style

BLUE = "#0072B2"


def spectra(values: Sequence[Sequence[float]]) -> Figure:
    """λ of J Jᵀ from the largest to the smallest, a line a sample."""
    style()
    figure, ax = plt.subplots(figsize=(7, 2.6), layout="constrained")
    for line in values:
        shown = np.clip(line, max(line) * 1e-16, None)
        ax.plot(np.linspace(0, 1, len(line)), shown, color=BLUE, lw=1, alpha=max(0.15, 1 / len(values) ** 0.5))
    ax.set(yscale="log", xlabel="rank / d_x", ylabel="λ of J Jᵀ", xlim=(0, 1))
    return figure


def attacked(table: pd.DataFrame) -> Figure:
    """The PSNR after a real attack against the predicted one, a point a sample."""
    style()
    figure, ax = plt.subplots(figsize=(4.4, 4), layout="constrained")
    ax.scatter(table.psnr, table.attacked_psnr, s=26, color=BLUE, zorder=3)
    ax.set(xlabel="predicted PSNR, dB", ylabel="PSNR after Gauss–Newton, dB")
    low, high = min(ax.get_xlim()[0], ax.get_ylim()[0]), max(ax.get_xlim()[1], ax.get_ylim()[1])
    ax.plot([low, high], [low, high], color=LINE, lw=1.2, zorder=1)
    return figure
