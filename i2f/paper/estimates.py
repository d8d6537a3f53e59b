"""A statistic with its confidence interval at any level; to each statistic the interval that fits it.

Intervals are two-sided. A p-value follows by inverting them: it is the smallest α at which the interval of level 1 − α
decides.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from i2f.paper.statistics import spearman

LEVEL = 0.95
LEAST = 8  # units without which there is no verdict
DRAWS = 20_000  # of a bootstrap
BATCH = 500  # samples at once
SMALLEST = 1e-16  # p-value that is told from 0

Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """value: of the statistic. at: its interval, by confidence level. n: independent units behind it. method: the name
    of the interval."""

    value: float
    at: Callable[[float], Interval]
    n: int
    method: str

    @property
    def interval(self) -> Interval:
        """At 95%."""
        return self.at(LEVEL)

    def map(self, function: Callable[[float], float]) -> Self:
        """An increasing function of it, as exp is of a mean of logarithms."""

        def at(level: float) -> Interval:
            low, high = self.at(level)
            return function(low), function(high)

        return replace(self, value=function(self.value), at=at)


def verdict(estimate: Estimate, low: float, high: float, level: float = LEVEL) -> str:
    """ "holds" where the whole interval lies in [low, high], "fails" where all of it lies outside, "inconclusive"
    otherwise, or with fewer than `LEAST` units."""
    bottom, top = estimate.at(level)
    if estimate.n < LEAST or math.isnan(bottom) or math.isnan(top):
        return "inconclusive"
    if low <= bottom and top <= high:
        return "holds"
    return "fails" if top < low or bottom > high else "inconclusive"


def p_value(estimate: Estimate, low: float, high: float) -> float:
    """The smallest α at which the interval of level 1 − α decides for the side of [low, high] on which the value lies;
    1 where none does, and never below `SMALLEST`."""

    def decides(logarithm: float) -> bool:
        return verdict(estimate, low, high, 1 - 10**logarithm) != "inconclusive"

    first, last = math.log10(SMALLEST), -1e-9
    if not decides(last):
        return 1.0
    if decides(first):
        return SMALLEST
    for _ in range(60):
        middle = (first + last) / 2
        first, last = (first, middle) if decides(middle) else (middle, last)
    return float(10**last)


def needed(estimate: Estimate, low: float, high: float) -> float:
    """About how many units would decide, were the value what it is: n times the squared ratio of the interval's width
    on the side of a threshold to the distance from it. Infinite where the value is at a threshold."""
    value, (bottom, top) = estimate.value, estimate.interval
    if low <= value <= high:
        edges = [(low, value - bottom), (high, top - value)]
    else:
        edges = [(low, top - value)] if value < low else [(high, value - bottom)]
    ratios = [width / abs(value - edge) if value != edge else math.inf for edge, width in edges if math.isfinite(edge)]
    times = max(ratios, default=math.inf) ** 2  # none: the value is no number
    return max(LEAST, math.ceil(estimate.n * times * (1 - 1e-9))) if math.isfinite(times) else math.inf


def share(successes: ArrayLike) -> Estimate:
    """The share of independent units that succeed; Clopper and Pearson 1934, exact."""
    found = np.asarray(successes, dtype=bool)
    n, k = len(found), int(found.sum())

    def at(level: float) -> Interval:
        tail = (1 - level) / 2
        low = float(stats.beta.ppf(tail, k, n - k + 1)) if k else 0.0
        high = float(stats.beta.isf(tail, k + 1, n - k)) if k < n else 1.0
        return low, high

    return Estimate(k / n if n else math.nan, at, n, "Clopper–Pearson")


def mean(values: ArrayLike) -> Estimate:
    """The mean over units; Student's t. Without an interval for fewer than two units, or values that are not finite."""
    found = np.asarray(values, dtype=float)
    n, whole = len(found), len(found) > 1 and bool(np.isfinite(found).all())
    return _student(float(found.mean()), float(found.std(ddof=1)) / math.sqrt(n) if whole else math.inf, n - 1, n)


def geometric_mean(values: ArrayLike) -> Estimate:
    """exp of the mean logarithm over units; Student's t on the logarithms."""
    with np.errstate(divide="ignore"):
        logarithms = mean(np.log(np.asarray(values, dtype=float)))
    return replace(logarithms.map(lambda value: float(np.exp(value))), method="t on logarithms")


def welch(first: ArrayLike, second: ArrayLike) -> Estimate:
    """The difference of two independent samples' means, first minus second; Welch 1947. n: of the smaller sample."""
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    parts = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    freedom = (
        sum(parts) ** 2 / (parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1)) if sum(parts) else math.inf
    )
    found = _student(float(a.mean() - b.mean()), math.sqrt(sum(parts)), freedom, min(len(a), len(b)))
    return replace(found, method="Welch's t")


def _student(value: float, error: float, freedom: float, n: int) -> Estimate:
    def at(level: float) -> Interval:
        if not math.isfinite(error):
            return -math.inf, math.inf
        width = float(stats.t.isf((1 - level) / 2, freedom)) * error
        return value - width, value + width

    return Estimate(value, at, n, "Student's t")


def median(values: ArrayLike) -> Estimate:
    """The median over units, some of which may be infinite (censored); exact, by order statistics. Where n is too small
    for the level, an end is open."""
    found = np.sort(np.asarray(values, dtype=float))
    n = len(found)

    def at(level: float) -> Interval:
        k = int(stats.binom.ppf((1 - level) / 2, n, 0.5))  # the smallest k with P(Bin ≤ k) ≥ tail
        k -= bool(stats.binom.cdf(k, n, 0.5) > (1 - level) / 2)
        return (float(found[k]), float(found[n - 1 - k])) if k >= 0 else (-math.inf, math.inf)

    return Estimate(float(np.median(found)), at, n, "order statistics")


def rank_correlation(groups: Sequence[tuple[ArrayLike, ArrayLike]], repeated: bool = False) -> Estimate:
    """Spearman's ρ of pairs (x, y) within groups, averaged; Fisher's z with the variance (1 + ρ²/2)/(n − 3) of Bonett
    and Wright 2000 (Psychometrika 65).

    repeated: the groups are the same units again (under other weights), so that averaging over them is taken to remove
    no error; otherwise they are different units.
    """
    pairs = [(np.asarray(x, dtype=float), np.asarray(y, dtype=float)) for x, y in groups]
    values = np.array([spearman(x, y) for x, y in pairs])
    sizes = np.array([len(x) for x, _ in pairs])
    n, value = int(sizes.max() if repeated else sizes.sum()), float(values.mean())
    variances = (1 + values**2 / 2) / np.maximum(sizes - 3, 1)
    least = max(2, int(sizes.min()))
    edge = 1 - 12 / (least**3 - least)  # ρ with two neighbours exchanged: a perfect order has no z
    error = math.sqrt(float(variances.mean()) / (1 if repeated else len(sizes)))

    def at(level: float) -> Interval:
        if sizes.min() < 5 or math.isnan(value):
            return -1.0, 1.0
        width = float(stats.norm.isf((1 - level) / 2)) * error
        z = math.atanh(max(-edge, min(edge, value)))
        return min(value, math.tanh(z - width)), max(value, math.tanh(z + width))

    return Estimate(value, at, n, "Fisher z (Bonett–Wright)")


def effect(values: ArrayLike, labels: ArrayLike) -> Estimate:
    """η², the share of the variance of a unit's value that its class explains; the interval inverts the noncentral F
    distribution (Steiger 2004, Psychological Methods 9): η² = λ/(λ + n)."""
    found, names = np.asarray(values, dtype=float), np.asarray(labels)
    classes, n = len(np.unique(names)), len(found)
    within, between = classes - 1, n - classes
    value = explained(found, names)
    f = value / (1 - value) * between / within

    def at(level: float) -> Interval:
        tail = (1 - level) / 2

        def solve(share: float) -> float:
            if stats.f.cdf(f, within, between) < share:
                return 0.0
            top = max(4 * f * within, 100.0)
            while stats.ncf.cdf(f, within, between, top) > share:
                top *= 2
            root = optimize.brentq(lambda size: stats.ncf.cdf(f, within, between, size) - share, 0, top)
            return float(root / (root + n))

        return solve(1 - tail), solve(tail)

    return Estimate(value, at, n, "noncentral F")


def explained(values: ArrayLike, labels: ArrayLike) -> float:
    """The sum of squares between classes over the total, of units along the first axis; further axes (weight seeds)
    centred one by one and pooled."""
    centred, belongs = _centred(values), _belongs(labels)
    total = float(np.square(centred).sum())
    return _between(centred, belongs) / total if total else math.nan


def permutation(values: ArrayLike, labels: ArrayLike, draws: int = DRAWS, seed: int = 0) -> float:
    """p of `explained` when the labels of whole units are exchanged: (1 + draws at least as large)/(1 + draws)."""
    centred, belongs, random = _centred(values), _belongs(labels), np.random.default_rng(seed)
    least = _between(centred, belongs) * (1 - 1e-12)  # rounding makes no draw smaller
    larger = sum(_between(centred, random.permutation(belongs)) >= least for _ in range(draws))
    return (1 + larger) / (1 + draws)


def _centred(values: ArrayLike) -> NDArray[Any]:
    """(units, further axes), each column without its mean."""
    found = np.asarray(values, dtype=float)
    columns = found.reshape(len(found), -1)
    centred: NDArray[Any] = columns - columns.mean(0)
    return centred


def _belongs(labels: ArrayLike) -> NDArray[Any]:
    """(units, classes), 1 where a unit is of a class."""
    codes = np.unique(np.asarray(labels), return_inverse=True)[1]
    return np.eye(codes.max() + 1)[codes]


def _between(centred: NDArray[Any], belongs: NDArray[Any]) -> float:
    """The sum of squares between classes."""
    return float((np.square(belongs.T @ centred) / belongs.sum(0)[:, None]).sum())


def resampled(statistic: Callable[[NDArray[Any]], NDArray[Any]], units: ArrayLike, draws: int = DRAWS) -> Estimate:
    """A statistic of whole units, (n, …): the bias-corrected and accelerated bootstrap (BCa; Efron 1987).

    statistic: (samples, n, …) -> (samples,). Where leaving out any unit changes nothing, the acceleration is zero.
    Without an interval at levels for whose tails the draws are too few, or the acceleration too large.
    """
    found = np.asarray(units, dtype=float)
    n, random = len(found), np.random.default_rng(0)
    value = float(statistic(found[None])[0])
    sizes = [min(BATCH, draws - start) for start in range(0, draws, BATCH)]
    drawn = np.sort(np.concatenate([statistic(found[random.integers(n, size=(size, n))]) for size in sizes]))
    without = statistic(np.stack([np.delete(found, k, axis=0) for k in range(n)]))
    away = without.mean() - without
    spread = float(np.square(away).sum()) ** 1.5
    acceleration = float((away**3).sum()) / (6 * spread) if spread else 0.0
    # half of the ties count as below; never none or all of the draws, which would have no quantile
    below = float(np.clip(((drawn < value).mean() + (drawn <= value).mean()) / 2, 1 / draws, 1 - 1 / draws))
    bias = float(stats.norm.ppf(below))

    def at(level: float) -> Interval:
        tail = (1 - level) / 2
        if n < 2 or np.isnan(drawn).any() or tail < 1 / draws:
            return -math.inf, math.inf
        z = bias + stats.norm.ppf([tail, 1 - tail])
        if (acceleration * z >= 1).any():
            return -math.inf, math.inf
        low, high = np.quantile(drawn, stats.norm.cdf(bias + z / (1 - acceleration * z)), method="inverted_cdf")
        return float(low), float(high)

    return Estimate(value, at, n, "bootstrap (BCa)")


def ordered(pairs: NDArray[Any]) -> NDArray[Any]:
    """Spearman's ρ of each sample of pairs, (samples, n, 2): a statistic for `resampled`."""
    found: NDArray[Any] = spearman(pairs[:, :, 0].T, pairs[:, :, 1].T)
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm 1979's adjusted p-values, in the given order."""
    order = np.argsort(p_values)
    scaled = np.asarray(p_values, dtype=float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.minimum(1.0, np.maximum.accumulate(scaled))
    found = np.empty(len(order))
    found[order] = adjusted
    return found.tolist()
