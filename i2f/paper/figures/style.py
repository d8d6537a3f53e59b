"""What figures share: saving, axes, rows of images. The same drawing gives the same bytes at every run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from i2f.audit.colours import AMBER, BLUE, GREEN, INK, LINE, PINK, SKY, VERMILION
from i2f.audit.style import style

__all__ = [
    "AMBER",
    "BLUE",
    "DATASETS",
    "GREEN",
    "INK",
    "LINE",
    "PINK",
    "SKY",
    "VERMILION",
    "diagonal",
    "displayable",
    "mark_cut",
    "marks",
    "pictures",
    "readable_ticks",
    "save",
    "style",
]

DATASETS = {"mnist": "MNIST", "cifar10": "CIFAR-10", "fashion-mnist": "Fashion-MNIST", "cifar100": "CIFAR-100"}
Image = NDArray[Any]  # (C, H, W)
CLOUD = 250  # points at once


def save(figure: Figure, path: Path, source: str = "") -> None:
    """Write SVG or PNG by the path's ending, a PNG beside every SVG, for pages that show none; the same drawing gives
    the same bytes (no date, fixed salt). More than `CLOUD` points at once become pixels in an SVG too, which would take
    megabytes. source: what it is drawn from, kept in the file's metadata."""
    for points in (c for ax in figure.axes for c in ax.collections if len(np.asarray(c.get_offsets())) > CLOUD):
        points.set_rasterized(True)
    for kind in {".svg": (".svg", ".png"), ".png": (".png",)}[path.suffix]:
        metadata: dict[str, str | None] = {"Date": None} if kind == ".svg" else {"Software": None}
        metadata |= {"Source": source} if source else {}
        figure.savefig(path.with_suffix(kind), bbox_inches="tight", dpi=150, metadata=metadata)
    plt.close(figure)
    if path.suffix == ".svg":  # within a page, no wider than the page
        drawn = path.read_text(encoding="utf-8")
        path.write_text(drawn.replace("<svg ", '<svg style="max-width: 100%; height: auto" ', 1), encoding="utf-8")


def readable_ticks(ax: Axes) -> None:
    """Label log axes that span little with 1, 2, 5, …; wide ones with powers of ten alone."""
    for axis in (axis for axis in (ax.xaxis, ax.yaxis) if axis.get_scale() == "log"):
        low, high = axis.get_view_interval()
        axis.set_minor_formatter(NullFormatter())
        if high / low < 200:
            subs = (1.0, 2.0, 5.0) if high / low > 5 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
            axis.set_major_locator(LogLocator(subs=subs))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def diagonal(ax: Axes, label: str = "measured = predicted") -> None:
    """The line y = x across both logarithmic axes, which get the same limits."""
    limits = np.array([ax.get_xlim(), ax.get_ylim()])
    low, high = limits.min() / 1.3, limits.max() * 1.3  # points in a corner stay whole
    ax.plot([low, high], [low, high], color=LINE, lw=1.2, zorder=1, label=label)
    ax.set(xlim=(low, high), ylim=(low, high))


def mark_cut(ax: Axes, cut: float, foot: bool = False, left: bool = False) -> None:
    """A dotted line at the predicted RMSE that bounds the linear regime, named at its top or foot."""
    ax.axvline(cut, color=LINE, lw=1, ls=":", zorder=1)
    ax.annotate(
        "cut",
        (cut, 0 if foot else 1),
        (-3 if left else 3, 4 if foot else -4),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right" if left else "left",
        va="baseline" if foot else "top",
        fontsize="small",
        color=INK,
    )


def marks(
    ax: Axes, x: Any, y: Any, converged: Any, colour: Any, marker: str, hollow: str = "white", **look: Any
) -> None:
    """One mark per attack, filled with its colour where it converged, else with `hollow`. look: of `scatter`."""
    look = {"s": 26, "linewidth": 0.9, "zorder": 3, "alpha": 1.0, **look}
    alpha = look.pop("alpha")  # of scatter's own, "none" would become black
    filled, empty = to_rgba(colour, alpha), to_rgba(hollow, 0.0 if hollow == "none" else alpha)
    face = [filled if yes is True or yes == 1 else empty for yes in converged]  # NaN: unknown
    ax.scatter(x, y, marker=marker, facecolor=face, edgecolor=filled, **look)


def pictures(rows: Sequence[tuple[str, Sequence[Image], Sequence[str]]]) -> Figure:
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
            ax.imshow(displayable(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set_xlabel(caption, fontsize="small")
        line[0].set_ylabel(name, fontsize="small")
    return figure


def displayable(image: Image) -> NDArray[Any]:
    """As `imshow` takes it: (H, W) or (H, W, 3), clamped to [0, 1]."""
    image = np.clip(image, 0, 1)
    return image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
