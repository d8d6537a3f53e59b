"""The spectra of an audit's samples, as a figure."""

import io
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from i2f.audit.colours import BLUE
from i2f.audit.style import style


def spectra(values: Sequence[Sequence[float]]) -> Figure:
    """λ of J Jᵀ from the largest to the smallest, one line per sample."""
    style()
    figure, ax = plt.subplots(figsize=(7, 2.6), layout="constrained")
    for line in values:
        shown = np.clip(line, max(line) * 1e-16, None)
        ax.plot(np.linspace(0, 1, len(line)), shown, color=BLUE, lw=1, alpha=max(0.15, 1 / len(values) ** 0.5))
    ax.set(yscale="log", xlabel="rank / d_x", ylabel="λ of J Jᵀ", xlim=(0, 1))
    return figure


def svg(figure: Figure) -> str:
    """The figure as SVG, without a date; it is closed."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
    return file.getvalue()
