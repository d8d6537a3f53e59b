"""Batches: their spectra, what noise leaves of their members, and the attack against the prediction."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i2f.paper.figures.style import BLUE, VERMILION, diagonal, marks, readable_ticks, style
from i2f.paper.results import Config, Results

PARTS = {"fixed": ("noise of fixed size", BLUE, "o"), "over B²": ("variance over B²", VERMILION, "s")}
MARKERS = "os^Dv"  # by batch size, so that colour is not all there is


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    return {"overview.svg": overview(found.tables["problems"], found.tables["spectra"])}


def overview(table: pd.DataFrame, spectra: pd.DataFrame) -> Figure:
    """Three panels: spectra of J Jᵀ by batch size, RMSE against batch size, measured against predicted."""
    style()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11.5, 3.9), layout="constrained")
    spectrum(left, spectra)
    against_size(middle, table)
    measured_against_predicted(right, table)
    return figure


Look = tuple[tuple[float, float, float], str]  # colour and marker


def sizes(table: pd.DataFrame) -> dict[int, Look]:
    """A colour and a marker for each batch size."""
    found = sorted(table.batch.unique())
    return dict(zip(found, zip(sns.color_palette("viridis", len(found)), MARKERS, strict=False), strict=True))


def spectrum(ax: Axes, spectra: pd.DataFrame) -> Axes:
    """Eigenvalues of B² J Jᵀ in falling order, without the averaging; one line per batch."""
    for batch, (colour, _) in sizes(spectra).items():
        lines = spectra[spectra.batch == batch].groupby("image")
        for number, (_, line) in enumerate(lines):
            label = f"B = {batch}" if number == 0 else None
            ax.plot(line.share, batch**2 * line.eigenvalue, color=colour, lw=1.4, alpha=0.8, label=label)
    ax.set(yscale="log", xlabel="rank of the eigenvalue / d$_x$", ylabel="eigenvalue of B² J Jᵀ")
    ax.set_title("Mixing: the spectrum's tail")
    ax.legend(fontsize="small", loc="lower left")
    return ax


def against_size(ax: Axes, table: pd.DataFrame) -> Axes:
    """RMSE of each image against the size of its batch: expected (line: median) and attacked (marks; hollow: not
    converged)."""
    for number, (part, (label, colour, marker)) in enumerate(PARTS.items()):
        rows = table[(table.part == part) | ((table.part == "fixed") & (table.batch == 1))]
        median = rows.groupby("batch").expected_rmse.median()
        ax.plot(median.index, median, color=colour, lw=1.6, ls=("-", "--")[number], label=f"expected, {label}")
        hit = rows[rows.attacked & ~rows.failed]
        shift = 1.04 ** (2 * number - 1)  # side by side, not one upon the other
        marks(ax, hit.batch * shift, hit.rmse, hit.converged, colour, marker, label=f"attack, {label}")
    ax.set(xscale="log", yscale="log", xlabel="images behind one gradient, B", ylabel="RMSE per pixel")
    readable_ticks(ax)
    ax.set_xticks(sorted(table.batch.unique()), [str(b) for b in sorted(table.batch.unique())])
    ax.set_title("What noise hides")
    ax.legend(fontsize="small")
    return ax


def measured_against_predicted(ax: Axes, table: pd.DataFrame) -> Axes:
    """RMSE of the attack against that predicted for the same noise, one mark per image; hollow: not converged."""
    rows = table[table.attacked & ~table.failed & (table.part != "no noise")]
    for batch, (colour, marker) in sizes(table).items():
        mine = rows[rows.batch == batch]
        if len(mine):
            label = f"B = {batch}"
            marks(ax, mine.predicted_rmse, mine.rmse, mine.converged, colour, marker, s=30, label=label)
    ax.set(xscale="log", yscale="log", xlabel="RMSE per pixel, predicted", ylabel="RMSE per pixel, attack")
    diagonal(ax)
    readable_ticks(ax)
    ax.set_title("Does I²F predict the attack?")
    ax.legend(fontsize="small")
    return ax
