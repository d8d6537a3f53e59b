"""A claim: a sentence that can be false, its statistic, its interval, its verdict."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from i2f import checks

VERDICTS = ("holds", "fails", "inconclusive")


@dataclass(frozen=True)
class Claim:
    """One sentence of the paper, in our words, and what was measured of it.

    id: unique. statement, source: what is claimed, and where. attacker: what the attack knows. statistic: what `value`
    is, with its unit. low, high: its 95% bootstrap interval over `n` units of `unit`. holds_when: the threshold, fixed
    before looking. verdict: of `VERDICTS`. note: what else a reader must know.
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


def bootstrap(
    statistic: Callable[[pd.DataFrame], float], table: pd.DataFrame, unit: str, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """`statistic` of the table, and its 95% percentile interval when whole units (images, seeds) are resampled.

    Args:
        table: tidy, with a column `unit` that says which rows belong together; resampling never splits a unit.
    """
    groups = [group for _, group in table.groupby(unit)]
    if not groups:
        raise ValueError(f"table has no rows: a claim needs at least one {unit}")
    value = statistic(table)
    if len(groups) == 1:
        return value, -math.inf, math.inf  # one unit says nothing about the others
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(groups), size=(draws, len(groups)))
    low, high = np.nanquantile([statistic(pd.concat([groups[i] for i in pick])) for pick in picks], [0.025, 0.975])
    return value, float(low), float(high)


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
    **words: str,
) -> Claim:
    """The claim that `measure` of the table lies within the thresholds; `words` are the claim's own texts."""
    value, low, high = bootstrap(measure, table, unit)
    bounds = [f"≥ {at_least:g}"] * (at_least > -math.inf) + [f"≤ {at_most:g}"] * (at_most < math.inf)
    return Claim(
        value=value,
        low=low,
        high=high,
        n=table[unit].nunique(),
        unit=unit,
        holds_when=" and ".join(bounds),
        verdict=verdict(low, high, at_least, at_most),
        **words,
    )


def slope(table: pd.DataFrame, x: str, y: str) -> float:
    """The least-squares slope of log y on log x."""
    return float(np.polyfit(np.log(table[x]), np.log(table[y]), 1)[0])


def rounded(value: float, digits: int = 4) -> float:
    """`value` to a number of significant digits: what is the same from machine to machine."""
    return float(f"{value:.{digits - 1}e}")


def to_frame(claims: Sequence[Claim]) -> pd.DataFrame:
    """The table that a notebook shows: id, claim, attacker, statistic, value [interval], threshold, verdict."""
    return pd.DataFrame(
        {
            "id": c.id,
            "claim": c.statement,
            "attacker": c.attacker,
            "statistic": c.statistic,
            "value [95% interval]": f"{c.value:.4g} [{c.low:.4g}, {c.high:.4g}]",
            "holds when": c.holds_when,
            "verdict": c.verdict,
        }
        for c in claims
    )


def save(claims: Sequence[Claim], path: Path, digits: int = 4) -> None:
    """Write claims as JSON, keyed by id, numbers rounded."""
    records = {}
    for claim in claims:
        checks.one_of("verdict", claim.verdict, VERDICTS)
        record = asdict(claim)
        for key in ("value", "low", "high"):
            number = rounded(record[key], digits)
            record[key] = number if math.isfinite(number) else None
        records[record.pop("id")] = record
    Path(path).write_text(json.dumps(records, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load(path: Path) -> list[Claim]:
    """Claims as written by `save`, in their order; an unbounded interval end is null in the file."""
    records = json.loads(Path(path).read_text(encoding="utf-8"))
    open_ends = {"low": -math.inf, "high": math.inf}
    return [
        Claim(id=key, **{k: open_ends[k] if k in open_ends and v is None else v for k, v in record.items()})
        for key, record in records.items()
    ]
