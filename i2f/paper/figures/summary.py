"""A figure in words: what each panel shows, rounded, so that a stored output says what was drawn."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]
Mark = tuple[str, Values | None, Values | None]  # kind, x and y; None: it has no such coordinate


def summary(figure: Figure) -> pd.DataFrame:
    """One row per panel and kind of mark: how many points, and the median and range of both coordinates, three digits.

    Points that are not finite, or not positive on a logarithmic axis, are not drawn, and not counted. Of a bar its end
    counts; of a range (`vlines`) both ends; a rule across the panel (`axvline`) has one coordinate. Pictures count
    their pixels, as y, and texts where nothing else is drawn. A panel without marks has a row that says so; a hidden
    one has none.
    """
    rows = []
    for number, ax in enumerate(figure.axes, 1):
        if not ax.get_visible():
            continue
        name = ax.get_title(loc="left") or ax.get_title() or ax.get_ylabel() or ax.get_xlabel()
        panel: dict[str, Any] = {"panel": number, "shows": " ".join(name.split())}
        marks = list(_marks(ax)) or ([("nothing", None, None)] if ax.axison else [])
        rows += [{**panel, "drawn as": kind, **_described(ax, x, y)} for kind, x, y in marks]
    return pd.DataFrame(rows, columns=["panel", "shows", "drawn as", "points", "x", "y"])


def _marks(ax: Axes) -> Iterator[Mark]:
    """All marks of a kind together."""
    found: dict[str, list[Values]] = {}
    for line in ax.lines:
        points = np.column_stack([_plain(values) for values in line.get_data(orig=False)])
        match line.get_transform().contains_branch_seperately(ax.transData):  # which coordinates are those of data
            case (True, True):
                found.setdefault("lines", []).append(points)
            case (True, False):
                found.setdefault("vertical rules", []).append(points[:1])
            case (False, True):
                found.setdefault("horizontal rules", []).append(points[:1])
    for drawn in ax.collections:
        if isinstance(drawn, PathCollection):
            found.setdefault("points", []).append(_plain(drawn.get_offsets()))
        elif isinstance(drawn, LineCollection):
            found.setdefault("ranges", []).extend(_plain(path.vertices) for path in drawn.get_paths())
    for bars in (container for container in ax.containers if isinstance(container, BarContainer)):
        found.setdefault("bars", []).append(np.array([_end(bar, bars.orientation == "vertical") for bar in bars]))
    if ax.texts and not found and not ax.images:  # elsewhere words only name what is drawn
        found["texts"] = [np.array([text.get_unitless_position() for text in ax.texts], float)]
    for kind, parts in found.items():
        x, y = np.concatenate([part.reshape(-1, 2) for part in parts]).T
        yield kind, None if kind == "horizontal rules" else x, None if kind == "vertical rules" else y
    if ax.images:
        yield "picture", None, np.concatenate([_plain(image.get_array()).ravel() for image in ax.images])


def _end(bar: Rectangle, vertical: bool) -> tuple[float, float]:
    """Where a bar ends, in the middle of its width."""
    x, y = (0.5, 1.0) if vertical else (1.0, 0.5)
    return bar.get_x() + x * bar.get_width(), bar.get_y() + y * bar.get_height()


def _plain(values: ArrayLike | None) -> Values:
    """Masked values as NaN."""
    found: Values = np.ma.filled(np.ma.asarray(values, float), np.nan)
    return found


def _described(ax: Axes, x: Values | None, y: Values | None) -> dict[str, Any]:
    """points, x, y: of those that are drawn."""
    axes = {"x": (x, ax.get_xscale()), "y": (y, ax.get_yscale())}
    own = {name: (values, scale) for name, (values, scale) in axes.items() if values is not None}
    seen = [np.isfinite(values) & ((values > 0) | (scale != "log")) for values, scale in own.values()]
    drawn = np.logical_and.reduce(seen) if seen else np.array([], bool)
    spread = {name: _spread(values[drawn]) for name, (values, _) in own.items()}
    return {"points": int(drawn.sum()), "x": "–", "y": "–", **spread}


def _spread(values: Values) -> str:
    """ "median [smallest, largest]" """
    return f"{np.median(values):.3g} [{values.min():.3g}, {values.max():.3g}]" if len(values) else "–"
