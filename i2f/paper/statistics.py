"""Statistics of tables: bootstrap intervals over whole units, rank correlations, and the verdict on an interval."""

import math
from collections.abc import Callable
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import gammaln, ndtr, stdtrit

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Statistic = Callable[[pd.DataFrame], float]

LEAST_UNITS = 4  # fewer images or seeds say nothing about others: no interval
LEAST_RANKED = 8  # the same for a rank correlation over them: four stand in perfect order once in 24 times, by chance
UNKNOWN = 0.025  # share of resamplings without a value that may be passed over: what an interval leaves out at an end
DRAWS = 500  # of a bootstrap


def bootstrap(
    statistic: Statistic, table: pd.DataFrame, unit: str, draws: int = DRAWS, seed: int = 0, least: int = LEAST_UNITS
) -> tuple[float, float, float]:
    """`statistic` of the table, and its 95% percentile interval when whole units (images, seeds) are resampled.

    The percentiles are expanded for small samples, by what Student's t differs from the normal and a sample's standard
    deviation from its unbiased estimate (Hesterberg 2015, The American Statistician 69, section 5.3.2). Up to six units
    the distribution is the exact one, over all samples; beyond, that of `draws` at random. Fewer than `least` units, or
    a statistic that is not a number, over the table or over more than `UNKNOWN` of the resamplings, have no interval.
    If every unit agrees, the interval has zero width: judge it by n.

    Args:
        table: tidy, with a column `unit` that says which rows belong together; resampling never splits a unit. In a
            resampled table that column numbers the copies, so that a unit drawn twice counts twice in statistics that
            group by it.

    Raises: ValueError for a table without rows.
    """
    groups = [np.flatnonzero(table[unit] == name) for name in table[unit].unique()]
    if not groups:
        raise ValueError(f"table has no rows: a claim needs at least one {unit}")
    value = statistic(table)
    n = len(groups)
    if n < least or math.isnan(value):
        return value, -math.inf, math.inf
    samples, weights = _samples(n, draws, seed)
    copies = samples + n * _copies(samples)  # a number of its own for every copy of a unit
    table, groups = _repeated(table, unit, groups, 1 + int(copies.max()) // n)
    drawn = np.array([statistic(table.take(np.concatenate([groups[i] for i in copy]))) for copy in copies.tolist()])
    tail = float(ndtr(math.sqrt(n / (n - 1)) * stdtrit(n - 1, 0.025)))
    if weights[np.isnan(drawn)].sum() > UNKNOWN * weights.sum():
        return value, -math.inf, math.inf
    # "inverted_cdf" takes values that were drawn, since some may be infinite
    low, high = np.nanquantile(drawn, [tail, 1 - tail], method="inverted_cdf", weights=weights)
    return value, float(low), float(high)


def _samples(n: int, draws: int, seed: int) -> tuple[Integers, Floats]:
    """Samples of n out of n units with replacement, each different one once, (k, n), and how often each comes, (k,)."""
    if math.comb(2 * n - 1, n) <= draws:
        samples = np.array(list(combinations_with_replacement(range(n), n)))
        times = np.stack([(samples == unit).sum(1) for unit in range(n)])
        weights: Floats = np.exp(gammaln(n + 1) - gammaln(times + 1).sum(0) - n * math.log(n))
        return samples, weights
    picks = np.random.default_rng(seed).integers(n, size=(draws, n))
    samples, counts = np.unique(np.sort(picks), axis=0, return_counts=True)
    return samples, counts.astype(float)


def _copies(samples: Integers) -> Integers:
    """How often each entry of a sorted sample has stood in it before, (k, n): 0, or 1 for a unit's second copy, …"""
    place = np.arange(samples.shape[1])
    first = np.where(np.diff(samples, axis=1, prepend=-1) > 0, place, 0)
    return place - np.maximum.accumulate(first, axis=1)


def _repeated(
    table: pd.DataFrame, unit: str, groups: list[Integers], times: int
) -> tuple[pd.DataFrame, list[Integers]]:
    """The table `times` over, the column `unit` holding the number of the copy, and the rows of each copy."""
    groups = [group + len(table) * time for time in range(times) for group in groups]
    numbers = np.empty(len(table) * times, dtype=table[unit].dtype if table[unit].dtype.kind in "if" else int)
    for number, group in enumerate(groups):
        numbers[group] = number
    table = table.take(np.tile(np.arange(len(table)), times)).reset_index(drop=True)
    return table.assign(**{unit: numbers}).copy(), groups  # one block a type, of which rows are taken far faster


def verdict(low: float, high: float, at_least: float = -math.inf, at_most: float = math.inf) -> str:
    """ "holds" where the whole interval lies within the thresholds, "fails" where all of it lies outside."""
    if at_least <= low and high <= at_most:
        return "holds"
    if high < at_least or low > at_most:
        return "fails"
    return "inconclusive"


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


def rank_agreement(table: pd.DataFrame, x: str, y: str) -> float:
    """Spearman's correlation of y with x over the largest that their ties allow: 1 where y never falls as x grows, −1
    where it never grows; NaN where one of them is all ties.

    For outcomes that tie by their nature, as shares of words do: if nothing is lost at three of five levels of noise,
    no predictor without ties has a Spearman correlation above 0.89.
    """
    first, second = (ranks(table[name].to_numpy(dtype=float)) for name in (x, y))
    first, second = first - first.mean(), second - second.mean()
    found, ascending = first @ second, np.sort(second)
    most = np.sort(first) @ (ascending if found >= 0 else -ascending[::-1])
    return float(found / most) if most else math.nan


def orders(table: pd.DataFrame, unit: str, x: str, y: str) -> pd.DataFrame:
    """Spearman's correlation of y with x within every unit, one row each: (unit, order).

    A perfect order is 1 in each of them, also where units differ in level. Values of y that are equal, as errors at the
    numerical floor are, share their mean rank and count against the order; where all are equal there is none: 0. NaN
    where x has a single value, or a number is missing.
    """
    found = []
    for name, rows in table.groupby(unit, sort=False):
        flat = rows[y].nunique(dropna=False) == 1 and rows[y].notna().all() and rows[x].nunique() > 1
        found.append((name, 0.0 if flat else rank_correlation(rows, x, y)))
    return pd.DataFrame(found, columns=[unit, "order"])


def mean_order(table: pd.DataFrame) -> float:
    """The mean of `orders`; NaN where one is."""
    return float(table.order.to_numpy().mean())


def worst(table: pd.DataFrame, by: str | list[str], column: str) -> float:
    """The largest of the groups' medians, NaN where one is; arrays, since a bootstrap asks for it often."""
    names = [by] if isinstance(by, str) else by
    values, groups = table[column].to_numpy(), np.zeros(len(table), dtype=int)
    for name in names:
        codes, found = pd.factorize(table[name])
        groups = groups * len(found) + codes
    return float(np.max([np.median(values[groups == group]) for group in np.unique(groups)]))


def median(table: pd.DataFrame, column: str) -> float:
    """The median of a column."""
    return float(table[column].median())


def share(table: pd.DataFrame, column: str, at_most: float) -> float:
    """The share of rows whose value in a column is at most so much; NaN never is."""
    return float((table[column] <= at_most).mean())


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
