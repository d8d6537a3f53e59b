"""A figure in words: what each panel shows, rounded, so that a stored output says what was drawn."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure


def summary(figure: Figure) -> pd.DataFrame:
    """One row per panel and kind of mark: how many points, and the median and range of both coordinates, three digits.

    Pictures count their pixels, as y. Points that are not finite are not drawn, and not counted.
    """
    rows = []
    for number, ax in enumerate(figure.axes, 1):
        for kind, x, y in _marks(ax):
            shown = np.isfinite(x) & np.isfinite(y)
            name = ax.get_title(loc="left") or ax.get_title() or ax.get_ylabel()
            row: dict[str, Any] = {"panel": number, "shows": " ".join(name.split()), "drawn as": kind}
            rows.append(row | {"points": int(shown.sum()), "x": _spread(x[shown]), "y": _spread(y[shown])})
    return pd.DataFrame(rows)


def _marks(ax: Axes) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    lines = [np.column_stack([np.asarray(v, float) for v in line.get_data()]) for line in ax.lines]
    points = [
        np.ma.filled(np.ma.asarray(c.get_offsets(), float), np.nan)
        for c in ax.collections
        if isinstance(c, PathCollection)
    ]
    bars = [
        np.array([[p.get_x() + p.get_width() / 2, p.get_y() + p.get_height()]])
        for c in ax.containers
        for p in c
        if hasattr(p, "get_height")
    ]
    for kind, found in (("lines", lines), ("points", points), ("bars", bars)):
        if found:
            yield kind, *np.concatenate(found).T
    if ax.images:
        pixels = np.concatenate([np.ma.filled(np.ma.asarray(i.get_array(), float), np.nan).ravel() for i in ax.images])
        yield "picture", np.zeros_like(pixels), pixels


def _spread(values: np.ndarray) -> str:
    """ "median [smallest, largest]" """
    return f"{np.median(values):.3g} [{values.min():.3g}, {values.max():.3g}]" if len(values) else "–"
