"""A claim: a sentence that can be false, its statistic, its interval, its verdict."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.special import gammaln, ndtr, stdtrit

from i2f.core import checks

if TYPE_CHECKING:
    from IPython.display import HTML

LEAST_UNITS = 4  # fewer images or seeds say nothing about others: no interval
LEAST_RANKED = 8  # the same for a rank correlation over them: four stand in perfect order once in 24 times, by chance
LEARNT = 0.5  # accuracy of a trained network below which a comparison of trainings means nothing
UNKNOWN = 0.025  # share of resamplings without a value that may be passed over: what an interval leaves out at an end
VERDICTS = ("holds", "holds except when", "holds only when", "fails", "inconclusive")

EXCEPTIONS = {("fails", "holds"): "holds only when", ("holds", "fails"): "holds except when"}  # (whole, within) -> both


@dataclass(frozen=True)
class Claim:
    """One sentence of the paper, in our words, and what was measured of it.

    id: unique. statement, source: what is claimed, and where. attacker: what the attack knows. statistic: what
    `value` is, with its unit. low, high: its 95% bootstrap interval over `n` units of `unit`. holds_when: the
    threshold; the claim's notebook says whether it stood before a first look. verdict: of `VERDICTS`. condition:
    under which the claim was judged a second time, and within: what came out then, (value, low, high). note: what
    else a reader must know.
    """

    id: str
    statement: str
    source: str
    attacker: str
    statistic: str
    value: float
    low: float
    high: float
    n: int
    unit: str
    holds_when: str
    verdict: str
    note: str = ""
    condition: str = ""
    within: tuple[float, float, float] | None = None

    @property
    def sentence(self) -> str:
        """The verdict in words, with the condition where it decides."""
        return f"{self.verdict} {self.condition}" if self.conditional else self.verdict

    @property
    def sample(self) -> str:
        """ "8 images", "1 weight seed": what the interval stands on."""
        return f"{self.n} {self.unit.replace('_', ' ')}{'s' * (self.n != 1)}"

    @property
    def conditional(self) -> bool:
        return self.verdict in ("holds except when", "holds only when")


def bootstrap(
    statistic: Callable[[pd.DataFrame], float], table: pd.DataFrame, unit: str, draws: int = 500, seed: int = 0,
    least: int = LEAST_UNITS,
) -> tuple[float, float, float]:  # fmt: skip
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


def _samples(n: int, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples of n out of n units with replacement, each different one once, (k, n), and how often each comes, (k,)."""
    if math.comb(2 * n - 1, n) <= draws:
        samples = np.array(list(combinations_with_replacement(range(n), n)))
        times = np.stack([(samples == unit).sum(1) for unit in range(n)])
        return samples, np.exp(gammaln(n + 1) - gammaln(times + 1).sum(0) - n * math.log(n))
    picks = np.random.default_rng(seed).integers(n, size=(draws, n))
    return np.unique(np.sort(picks), axis=0, return_counts=True)


def _copies(samples: np.ndarray) -> np.ndarray:
    """How often each entry of a sorted sample has stood in it before, (k, n): 0, or 1 for a unit's second copy, …"""
    place = np.arange(samples.shape[1])
    first = np.where(np.diff(samples, axis=1, prepend=-1) > 0, place, 0)
    return place - np.maximum.accumulate(first, axis=1)


def _repeated(
    table: pd.DataFrame, unit: str, groups: list[np.ndarray], times: int
) -> tuple[pd.DataFrame, list[np.ndarray]]:
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


def judge(
    table: pd.DataFrame,
    measure: Callable[[pd.DataFrame], float],
    unit: str,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    only: tuple[str, pd.DataFrame] | None = None,
    least: int = LEAST_UNITS,
    **words: str,
) -> Claim:
    """The claim that `measure` of the table lies within the thresholds; `words` are the claim's own texts.

    only: a condition in words ("the predicted RMSE is at most 0.05"), and the rows that meet it: judged by themselves
    too. A claim that fails over the whole table, but holds over these, holds only then; one that holds, but fails over
    these, holds except then. least: units without which there is no verdict. Numbers are compared as they are
    published, rounded, so that no verdict hangs on a last digit.
    """
    value, low, high = bootstrap(measure, table, unit, least=least)
    bounds = [f"≥ {at_least:g}"] * (at_least > -math.inf) + [f"≤ {at_most:g}"] * (at_most < math.inf)
    decision, condition, within = verdict(rounded(low), rounded(high), at_least, at_most), "", None
    if only and len(only[1]):
        condition, within = only[0], bootstrap(measure, only[1], unit, least=least)
        inside = verdict(*map(rounded, within[1:]), at_least, at_most)
        decision = EXCEPTIONS.get((decision, inside), decision)
    return Claim(
        value=value,
        low=low,
        high=high,
        n=table[unit].nunique(),
        unit=unit,
        holds_when=" and ".join(bounds),
        verdict=decision,
        condition=condition,
        within=within,
        **words,
    )


def worst(table: pd.DataFrame, by: str | list[str], column: str) -> float:
    """The largest of the groups' medians, NaN where one is; arrays, since a bootstrap asks for it often."""
    names = [by] if isinstance(by, str) else by
    values, groups = table[column].to_numpy(), np.zeros(len(table), dtype=int)
    for name in names:
        codes, found = pd.factorize(table[name])
        groups = groups * len(found) + codes
    return float(np.max([np.median(values[groups == group]) for group in np.unique(groups)]))


def settled(table: pd.DataFrame) -> str:
    """ "7 of 9 attacks converged", and how many failed: for a claim's note."""
    failed = int(table.failed.astype(bool).sum())
    converged = int(table.converged.fillna(False).astype(bool).sum())
    return f"{converged} of {len(table)} attacks converged" + (f", {failed} failed" if failed else "")


def log_slope(table: pd.DataFrame, x: str, y: str) -> float:
    """The least-squares slope of log y on log x."""
    return float(np.polyfit(np.log(table[x]), np.log(table[y]), 1)[0])


def log_correlation(table: pd.DataFrame, x: str, y: str) -> float:
    """Pearson's correlation of log y with log x: how near the points lie to a power law."""
    return float(np.corrcoef(np.log(table[x]), np.log(table[y]))[0, 1])


def rank_correlation(table: pd.DataFrame, x: str, y: str) -> float:
    """Spearman's rank correlation of y with x."""
    return spearman(table[x].to_numpy(), table[y].to_numpy())


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """The same of arrays; NaN where one of them is all ties, or has a NaN."""
    with np.errstate(invalid="ignore", divide="ignore"):  # a draw of one unit many times has no order
        return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def rank_agreement(table: pd.DataFrame, x: str, y: str) -> float:
    """Spearman's correlation of y with x over the largest that their ties allow: 1 where y never falls as x grows, −1
    where it never grows. For outcomes that tie by their nature, as shares of words do: of five levels of noise at three
    of which nothing is lost, no predictor without ties has a Spearman above 0.89. NaN where one of them is all ties."""
    first, second = (_ranks(table[name].to_numpy(dtype=float)) for name in (x, y))
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
        order = rank_correlation(rows, x, y)
        flat = rows[y].nunique(dropna=False) == 1 and rows[y].notna().all() and rows[x].nunique() > 1
        found.append((name, 0.0 if flat else order))
    return pd.DataFrame(found, columns=[unit, "order"])


def mean_order(table: pd.DataFrame) -> float:
    """The mean of `orders`; NaN where one is."""
    return float(table.order.to_numpy().mean())


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ties share the mean of their ranks. (That of SciPy and of pandas check more, and take ten times as long.)"""
    _, place, times = np.unique(values, return_inverse=True, return_counts=True)
    return np.where(np.isnan(values), np.nan, (np.cumsum(times) - (times - 1) / 2)[place])


def rounded(value: float, digits: int = 4) -> float:
    """`value` to a number of significant digits: what is the same from machine to machine."""
    return float(f"{value:.{digits - 1}e}")


def to_frame(claims: Sequence[Claim]) -> pd.DataFrame:
    """Claims as readers see them: id, claim, attacker, statistic and note, value, over what, threshold, verdict."""
    return pd.DataFrame(
        {
            "id": c.id,
            "claim": c.statement,
            "attacker": c.attacker,
            "statistic": f"{c.statistic} ({c.note})" if c.note else c.statistic,
            "value [95% interval]": interval((c.value, c.low, c.high)),
            "over": c.sample,
            "holds when": c.holds_when,
            "verdict": c.sentence + (f": {interval(c.within)}" if c.conditional else ""),
        }
        for c in claims
    )


def show(claims: Sequence[Claim]) -> "HTML":
    """`to_frame` as a notebook shows it."""
    return page(to_frame(claims), "claims")


def page(table: pd.DataFrame, name: str = "page") -> "HTML":
    """A table as a notebook shows it, the same at every run: sentences whole, read from the left, no row numbers."""
    from IPython.display import HTML

    left = [{"selector": "th, td", "props": "text-align: left; vertical-align: top"}]
    return HTML(table.style.hide(axis="index").set_table_styles(left).set_uuid(name).to_html())


def interval(numbers: tuple[float, float, float]) -> str:
    """value [low, high], in four digits; alone where there is no interval, or one of no width."""
    value, low, high = (f"{number:.4g}" for number in numbers)
    return value if math.isinf(numbers[1]) or value == low == high else f"{value} [{low}, {high}]"


def save(claims: Sequence[Claim], path: Path, digits: int = 4) -> None:
    """Write claims as JSON, keyed by id, numbers rounded."""
    records = {}
    for claim in claims:
        checks.one_of("verdict", claim.verdict, VERDICTS)
        record = asdict(claim)
        for key in ("value", "low", "high"):
            record[key] = _plain(record[key], digits)
        record["within"] = claim.within and [_plain(number, digits) for number in claim.within]
        records[record.pop("id")] = record
    Path(path).write_text(json.dumps(records, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load(path: Path) -> list[Claim]:
    """Claims as written by `save`, in their order; an unbounded interval end is null in the file."""
    records = json.loads(Path(path).read_text(encoding="utf-8"))
    found = []
    for key, record in records.items():
        record["value"], record["low"], record["high"] = _numbers([record[k] for k in ("value", "low", "high")])
        record["within"] = record["within"] and _numbers(record["within"])
        found.append(Claim(id=key, **record))
    return found


def _plain(number: float, digits: int) -> float | None:
    return rounded(number, digits) if math.isfinite(number) else None


def _numbers(record: Sequence[float | None]) -> tuple[float, ...]:
    absent = (math.nan, -math.inf, math.inf)
    return tuple(default if number is None else number for number, default in zip(record, absent, strict=True))
