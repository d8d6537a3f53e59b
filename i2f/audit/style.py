"""The look of every figure, and its colours (Okabe and Ito's, safe for colour-blind readers)."""

import matplotlib.pyplot as plt
import seaborn as sns

INK, LINE, GRID = "#333333", "#888888", "#e4e4e4"
BLUE, VERMILION, GREEN, AMBER, PINK, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"


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
