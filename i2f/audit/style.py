"""The look of every figure."""

import matplotlib.pyplot as plt
import seaborn as sns

from i2f.audit.colours import GRID, INK, LINE


def style() -> None:
    """White ground (legible on dark pages too), a thin grid, text that SVG keeps as text."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", font_scale=0.85)
    plt.rcParams.update(
        {
            "axes.edgecolor": LINE,
            "axes.labelcolor": INK,
            "axes.titlesize": "medium",
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "figure.dpi": 110,
            "grid.color": GRID,
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "svg.fonttype": "none",
            "svg.hashsalt": "i2f",
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],
        }
    )
