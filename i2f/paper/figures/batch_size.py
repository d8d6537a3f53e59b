"""Batches: their spectra, what noise leaves of their members, and the attack against the prediction."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i2f.paper.experiments.batch_size import NONE, ratios
from i2f.paper.figures.style import AMBER, BLUE, GREEN, LINE, VERMILION, diagonal, marks, readable_ticks, style
from i2f.paper.results import Config, Results

LOOKS = [(BLUE, "o"), (AMBER, "s"), (VERMILION, "^"), (GREEN, "D")]  # by batch size, in rising order
MIDDLE = (0.1, 0.9)  # quantiles of a band


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    return {"overview.svg": overview(found.tables["problems"], found.tables["spectra"])}


def overview(table: pd.DataFrame, spectra: pd.DataFrame) -> Figure:
    """Three panels: spectra of J Jᵀ by batch size, expected RMSE against batch size, measured against predicted."""
    style()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11.5, 3.9), layout="constrained")
    spectrum(left, spectra)
    against_size(middle, table)
    measured_against_predicted(right, table)
    return figure


def spectrum(ax: Axes, spectra: pd.DataFrame) -> None:
    """Eigenvalues of B² J Jᵀ in falling order, without the averaging: the median over batches and the middle 80%."""
    for (batch, lines), (colour, _) in zip(spectra.groupby("batch"), LOOKS, strict=False):
        ranks = (batch**2 * lines.eigenvalue.astype(float)).groupby(lines.share.astype(float))
        low, high = (ranks.quantile(q) for q in MIDDLE)
        ax.fill_between(low.index, low, high, color=colour, alpha=0.25, lw=0)
        ax.plot(ranks.median(), color=colour, lw=1.6, label=f"B = {batch}")
    ax.set(yscale="log", xlabel="rank of the eigenvalue / d$_x$", ylabel="eigenvalue of B² J Jᵀ")
    ax.set_title("A batch has weaker directions")
    ax.legend(fontsize="small", loc="lower left")


def against_size(ax: Axes, table: pd.DataFrame) -> None:
    """Expected RMSE over that of the same images alone, against the size of the batch: the median over batches, the
    middle 80%, and a mark for every batch; the line of averaging alone, and what mixing adds."""
    sizes = sorted(table.batch.unique())
    found = {batch: ratios(table, batch) for batch in sizes}
    ax.plot(sizes, sizes, color=LINE, lw=1.4, ls="--", label="averaging alone, B", zorder=1)
    for column, label, (colour, marker) in (("total", "in all", LOOKS[0]), ("mixing", "mixing, in all / B", LOOKS[2])):
        low, high = ([found[b][column].quantile(q) for b in sizes] for q in MIDDLE)
        ax.fill_between(sizes, low, high, color=colour, alpha=0.2, lw=0)
        ax.plot(sizes, [found[b][column].median() for b in sizes], color=colour, lw=1.6, label=label)
        for batch in sizes[1:]:
            each = found[batch][column]
            spread = batch * 1.06 ** np.linspace(-1, 1, len(each))  # side by side, not one upon the other
            ax.scatter(spread, each, s=10, marker=marker, color=colour, alpha=0.4, lw=0, zorder=3)
    ax.set(xscale="log", yscale="log", xlabel="images behind one gradient, B", ylabel="expected RMSE / alone")
    readable_ticks(ax)
    ax.set_xticks(sizes, [str(batch) for batch in sizes])
    ax.set_title("Averaging and mixing raise the error")
    ax.legend(fontsize="small")


def measured_against_predicted(ax: Axes, table: pd.DataFrame) -> None:
    """RMSE of the attack against that predicted for the same noise, one mark per image; hollow: not converged."""
    rows = table[table.attacked & ~table.failed.astype(bool) & (table.part != NONE)]
    for batch, (colour, marker) in zip(sorted(table.batch.unique()), LOOKS, strict=False):
        mine = rows[rows.batch == batch]
        if len(mine):
            words = f"B = {batch}"
            marks(ax, mine.predicted_rmse, mine.rmse, mine.converged, colour, marker, s=22, alpha=0.7, label=words)
    ax.set(xscale="log", yscale="log", xlabel="predicted RMSE per pixel (I²F)", ylabel="measured RMSE per pixel")
    diagonal(ax)
    readable_ticks(ax)
    ax.set_title("Small errors are the predicted ones")
    ax.legend(fontsize="small")
