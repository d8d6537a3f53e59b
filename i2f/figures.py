"""One style; one function a figure. They know tables, never models, and return what they drew on."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

INK, LINE = "#333333", "#888888"
METHODS = {  # name in tables -> label, colour (colour-blind safe), marker
    "gauss-newton": ("Gauss–Newton", "#0072B2", "o"),
    "dgl": ("Adam", "#D55E00", "X"),
}
ATTACKERS = {  # name in tables -> label, what it knows besides the model, colour, line
    "gauss-newton": ("Gauss–Newton", "label", "#0072B2", "-"),
    "dgl": ("DGL, Adam", "label", "#D55E00", "-"),
    "dlg": ("DLG, L-BFGS", "nothing else", "#009E73", "-"),
    "idlg": ("iDLG, Adam", "nothing else", "#E69F00", (0, (4, 3))),
    "gs": ("GS, cosine", "label, pixel range", "#CC79A7", "-"),
}


def style() -> None:
    """The project's look: white ground (legible on dark pages too), thin grid, text that SVG keeps as text."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", font_scale=0.85)
    plt.rcParams.update(
        {
            "axes.edgecolor": LINE,
            "axes.labelcolor": INK,
            "axes.titlesize": "medium",
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "figure.dpi": 110,
            "grid.color": "#e4e4e4",
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "svg.fonttype": "none",
            "svg.hashsalt": "i2f",
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],
        }
    )


def save(figure: Figure, path: Path) -> None:
    """Write SVG or PNG by the path's ending; the same drawing gives the same bytes (no date, fixed salt)."""
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(path, bbox_inches="tight", dpi=150, metadata=metadata)
    plt.close(figure)


def eigenvectors(table: pd.DataFrame, cut: float) -> Figure:
    """The eigenvector experiment in three panels: the law, the paper's own noise size, and where the law ends.

    `table` is the experiment's, as `problems.csv` holds it; `cut` the predicted RMSE that bounds the linear regime.
    """
    style()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11.5, 3.7), layout="constrained")
    law = table[table.part == "law"]
    paper = table[table.part == "paper"]
    error_against_eigenvalue(left, law)
    left.set_title(f"Small noise, c = {law.norm.iloc[0]:.2g}: the law")
    error_against_eigenvalue(middle, paper)
    middle.set_title(f"The paper's noise, c = {paper.norm.iloc[0]:g}")
    end_of_law(right, table[(table.part == "end") & (table.method == "gauss-newton")], cut)
    right.set_title("Where the law ends")
    return figure


def error_against_eigenvalue(ax: Axes, table: pd.DataFrame) -> Axes:
    """MSE against λ for δ = c·v, both logarithmic, with the prediction c²/(d_x λ); hollow: not settled."""
    line = table.sort_values("eigenvalue")
    ax.plot(line.eigenvalue, line.predicted_mse, color=LINE, lw=1.5, label="predicted, c²/(dₓλ)", zorder=1)
    for method, (label, colour, marker) in METHODS.items():
        rows = table[table.method == method]
        settled = rows.converged | (method == "dgl")  # Adam never says that it has settled
        for some, face in ((settled, colour), (~settled, "white")):
            if some.any():
                name = label if face == colour else f"{label}, not converged"
                ax.scatter(
                    rows.eigenvalue[some], rows.mse[some],
                    s=34, marker=marker, facecolor=face, edgecolor=colour if face == "white" else "white",
                    linewidth=1.2 if face == "white" else 0.5, label=name, zorder=3,
                )  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="eigenvalue λ of J Jᵀ", ylabel="MSE per pixel")
    _readable_ticks(ax)
    ax.legend(fontsize="small")
    return ax


def end_of_law(ax: Axes, table: pd.DataFrame, cut: float) -> Axes:
    """Measured over predicted MSE against the predicted RMSE, a line a direction; 1 is the law."""
    ax.axhspan(0.9, 1.1, color="#eeeeee", zorder=0)
    ax.axhline(1, color=LINE, lw=1.2, zorder=1)
    ax.axvline(cut, color=LINE, lw=1, ls=":", zorder=1)
    directions = list(table.groupby(["image", "index"]))
    colours = dict(zip(sorted({key[1] for key, _ in directions}), sns.color_palette("viridis", 3), strict=False))
    named = set()
    for (_, index), rows in directions:
        rows = rows.sort_values("predicted_rmse")
        label = None if index in named else f"direction {index + 1}"
        named.add(index)
        ax.plot(rows.predicted_rmse, rows.mse / rows.predicted_mse, "o-", ms=4, lw=1, color=colours[index], label=label)
    ax.set(xscale="log", yscale="log", xlabel="predicted RMSE per pixel", ylabel="measured / predicted MSE")
    ax.annotate("cut", (cut, 1), (3, -4), xycoords=("data", "axes fraction"), textcoords="offset points", va="top",
                fontsize="small", color=INK)  # fmt: skip
    _readable_ticks(ax)
    ax.legend(fontsize="small")
    return ax


def _readable_ticks(ax: Axes) -> None:
    """Log axes that span little are labelled 1, 2, 5, …; wide ones by powers of ten alone."""
    for axis in (ax.xaxis, ax.yaxis):
        low, high = axis.get_view_interval()
        axis.set_minor_formatter(NullFormatter())
        if high / low < 200:
            axis.set_major_locator(
                LogLocator(subs=(1.0, 2.0, 5.0) if high / low > 5 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
            )
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def pictures(rows: Sequence[tuple[str, Sequence[np.ndarray], Sequence[str]]]) -> Figure:
    """Rows of images: (name, images (C, H, W) in [0, 1], a caption under each)."""
    style()
    columns = max(len(images) for _, images, _ in rows)
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(1.55 * columns, 1.9 * len(rows)), squeeze=False, layout="constrained"
    )
    for (name, images, captions), line in zip(rows, axes, strict=True):
        for ax in line:
            ax.set_axis_off()
        for ax, image, caption in zip(line, images, captions, strict=False):
            ax.set_axis_on()
            ax.set(xticks=[], yticks=[])
            ax.imshow(_displayable(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set_xlabel(caption, fontsize="small")
        line[0].set_ylabel(name, fontsize="small")
    return figure


def _displayable(image: np.ndarray) -> np.ndarray:
    image = np.clip(image, 0, 1)
    return image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)


def leakage(paths: pd.DataFrame, truth: np.ndarray, images: np.ndarray, costs: Sequence[int]) -> Figure:
    """Five attackers on one gradient: error against cost, and what each holds in hands at the same cost.

    paths: (method, evaluations, mse). truth: (C, H, W). images: (attackers, costs, C, H, W), attackers in the order of
    their first row in `paths`.
    """
    style()
    methods = list(dict.fromkeys(paths.method))
    figure = plt.figure(figsize=(11.5, 5.0), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.18, 1])
    error_against_cost(left.subplots(), paths, costs)
    grid = right.subplots(len(methods), 1 + len(costs))
    for row, (method, line) in enumerate(zip(methods, grid, strict=True)):
        label, _, colour, _ = ATTACKERS[method]
        for ax, image in zip(line, [truth, *images[row]], strict=True):
            ax.set(xticks=[], yticks=[])
            ax.imshow(_displayable(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        for ax in line[1:]:
            for side in ax.spines.values():
                side.set(color=colour, linewidth=1.2)
        line[0].set_visible(row == 0)
        line[1].set_ylabel(
            label.replace(", ", ",\n").replace("–", "–\n"), fontsize="small", color=colour, fontweight="bold"
        )
    grid[0, 0].set_title("private", fontsize="small", loc="center")
    for ax, cost in zip(grid[0, 1:], costs, strict=True):
        ax.set_title(f"{cost:,}", fontsize="small", loc="center")
    right.suptitle("What each holds after so many evaluations", fontsize="medium", fontweight="bold")
    return figure


def error_against_cost(ax: Axes, paths: pd.DataFrame, costs: Sequence[int] = ()) -> Axes:
    """MSE of an attacker's best iterate against the gradient evaluations it has spent, both logarithmic."""
    for cost in costs:
        ax.axvline(cost, color=LINE, lw=0.8, ls=":", zorder=1)
    for method, path in paths.groupby("method", sort=False):
        label, knows, colour, line = ATTACKERS[method]
        ax.plot(
            path.evaluations, path.mse,
            color=colour, ls=line, lw=2, drawstyle="steps-post", label=f"{label} (knows {knows})", zorder=3,
        )  # fmt: skip
        ax.plot(path.evaluations.iloc[-1], path.mse.iloc[-1], "o", color=colour, ms=5, zorder=4)
    ax.set(xscale="log", yscale="log", xlabel="gradient evaluations", ylabel="MSE per pixel")
    ax.set_xlim(left=8)
    ax.set_title("How near, at what cost")
    ax.legend(fontsize="small", loc="lower left")
    return ax


def eigenvector_pictures(table: pd.DataFrame, images: Sequence[np.ndarray]) -> Figure:
    """The paper's row of recoveries: the truth, then what each attacker recovers, under λ and MSE.

    `table` holds the rows of part "paper" of one image, in the order of `images`, whose first is the truth.
    """
    truth, *found = images
    rows = []
    for method, (label, _, _) in METHODS.items():
        mine = [i for i, name in enumerate(table.method) if name == method]
        captions = [f"λ = {table.eigenvalue.iloc[i]:.3g}\nMSE {table.mse.iloc[i]:.2g}" for i in mine]
        rows.append((label, [truth, *(found[i] for i in mine)], ["private image\n", *captions]))
    return pictures(rows)
