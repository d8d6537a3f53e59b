"""Descriptions of a table's columns: rank correlations, power laws, how attacks ended."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def ranks(values: NDArray[Any]) -> Floats:
    """Ranks along the first axis, from 1; ties share their mean rank, NaN has none.

    SciPy's and pandas' functions check more, and take ten times as long in a bootstrap.
    """
    if values.ndim > 1:
        columns = values.reshape(len(values), -1).T
        return np.stack([ranks(column) for column in columns], axis=-1).reshape(values.shape)
    _, place, times = np.unique(values, return_inverse=True, return_counts=True)
    return np.where(np.isnan(values), np.nan, (np.cumsum(times) - (times - 1) / 2)[place])


def spearman(x: NDArray[Any], y: NDArray[Any]) -> Any:
    """Spearman's rank correlation along the first axis, of shape x.shape[1:]; x and y broadcast.

    NaN where one of them is all ties (a draw of one unit many times has no order), or has a NaN.
    """
    first, second = (r - r.mean(0) for r in (ranks(x), ranks(y)))
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (first * second).sum(0) / np.sqrt(np.square(first).sum(0) * np.square(second).sum(0))
    return found if found.ndim else float(found)


def rank_correlation(table: pd.DataFrame, x: str, y: str) -> float:
    """Spearman's rank correlation of the columns y and x."""
    return float(spearman(table[x].to_numpy(), table[y].to_numpy()))


def log_slope(table: pd.DataFrame, x: str, y: str) -> float:
    """The least-squares slope of log y on log x."""
    return float(np.polyfit(np.log(table[x]), np.log(table[y]), 1)[0])


def log_correlation(table: pd.DataFrame, x: str, y: str) -> float:
    """Pearson's correlation of log y with log x: how near the points lie to a power law."""
    return float(np.corrcoef(np.log(table[x]), np.log(table[y]))[0, 1])


def convergence(table: pd.DataFrame) -> str:
    """ "7 of 9 attacks converged", and how many failed: for a claim's note."""
    failed = int(table.failed.astype(bool).sum())
    converged = int(table.converged.fillna(False).astype(bool).sum())
    return f"{converged} of {len(table)} attacks converged" + (f", {failed} failed" if failed else "")


def rounded(value: float, digits: int = 4) -> float:
    """`value` to a number of significant digits: what is the same from machine to machine."""
    return float(f"{value:.{digits - 1}e}")
