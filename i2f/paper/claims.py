"""A claim: a sentence that can be false, its statistic, its interval, its verdict."""

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Formatter
from typing import Any, Self

import pandas as pd

from i2f.core import checks
from i2f.paper import estimates
from i2f.paper.attackers import knows
from i2f.paper.estimates import Estimate
from i2f.paper.statistics import LEAST_RANKED, LEAST_UNITS, Statistic, bootstrap, rounded, verdict

LEARNT = 0.5  # accuracy of a trained network below which a comparison of trainings means nothing
VERDICTS = ("holds", "holds except when", "holds only when", "fails", "inconclusive", "not run")
LEDGERS = {"paper": "the paper's claims", "beyond": "what goes beyond it", "": "older claims, of few images"}
LEAST_FINISHED = 0.9  # share of attacks that must have ended at a stationary point, or there is no verdict
EXCEPTIONS = {("fails", "holds"): "holds only when", ("holds", "fails"): "holds except when"}  # (whole, within) -> both
WORDS = Path(__file__).parent / "experiments"  # EXPERIMENT.toml: what its claims say
LEAST = {"ranked": LEAST_RANKED, "units": LEAST_UNITS}
TEXTS = ("statement", "statistic", "source", "note", "condition")
KEYS = {
    *TEXTS,
    "number",
    "ledger",
    "attacker",
    "unit",
    "at_least",
    "at_most",
    "least",
    "not_run",
}  # of a claim in words
LEDGER = ("number", "ledger", "method", "p", "needed")  # what claims of the numbered ledgers have besides
NUMBERS = {"value": math.nan, "low": -math.inf, "high": math.inf, "p": math.nan, "needed": math.nan}  # what null is

Thresholds = Mapping[str, Any]  # by name, among a run's other parameters


@dataclass(frozen=True)
class Claim:
    """One sentence of the paper, in our words, and what was measured of it.

    id: unique. statement, source: what is claimed, and where. attacker: what the attack knows. statistic: what
    `value` is, with its unit. low, high: its 95% bootstrap interval over `n` units of `unit`. holds_when: the
    threshold; the claim's notebook says whether it was fixed before a first look. verdict: of `VERDICTS`. condition:
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
    number: int = 0
    ledger: str = ""
    method: str = "bootstrap"
    p: float = math.nan
    needed: float = math.nan

    @property
    def sentence(self) -> str:
        """The verdict in words, with the condition where it decides, its p, or how many units would decide."""
        if self.conditional:
            return f"{self.verdict} {self.condition}"
        if math.isfinite(self.needed):
            return f"{self.verdict} (about {self.needed:,.0f} {self.unit.replace('_', ' ')}s would decide)"
        if math.isnan(self.p) or self.verdict == "inconclusive":
            return self.verdict
        return f"{self.verdict} (p {'< 0.0001' if self.p < 1e-4 else f'= {self.p:.2g}'})"

    @property
    def sample(self) -> str:
        """ "8 images", "1 weight seed": the units behind the interval."""
        return f"{self.n} {self.unit.replace('_', ' ')}{'s' * (self.n != 1)}"

    @property
    def conditional(self) -> bool:
        return self.verdict in ("holds except when", "holds only when")


@dataclass(frozen=True)
class Judge:
    """Builds the claims of one experiment: words from its TOML file, thresholds by name, numbers from its tables.

    A table of the file is a claim: `statement`, `statistic`, `source`, `attacker` (a name of `attackers.ATTACKERS`, or
    words), and if needed `note`, `condition`, `unit`, `at_least`, `at_most` (numbers, or names of thresholds), `least`
    ("units", "ranked" or a number: units without which there is no verdict). `[defaults]` holds what they share. Texts
    are templates, `str.format`, of the thresholds and of the words that a call gives; a text of that name in the call
    replaces the file's.

    entries: of the file (`Judge.of` reads it). prefix: what ids begin with: "pruning". thresholds: fixed
    beforehand.

    Raises: ValueError for a key, a claim or a word that is unknown, or a claim without a threshold; KeyError for a
    placeholder or a threshold that nothing fills.
    """

    entries: Mapping[str, dict[str, Any]]
    prefix: str
    thresholds: Thresholds

    def __post_init__(self) -> None:
        for key in {key for entry in self.entries.values() for key in entry}:
            checks.one_of("key of a claim", key, KEYS)

    @classmethod
    def of(cls, experiment: str, prefix: str, thresholds: Thresholds) -> Self:
        """With the words of EXPERIMENT.toml."""
        return cls(tomllib.loads((WORDS / f"{experiment}.toml").read_text(encoding="utf-8")), prefix, thresholds)

    def __call__(
        self,
        name: str,
        table: pd.DataFrame,
        measure: Statistic,
        within: pd.DataFrame | None = None,
        suffix: str = "",
        interval: bool = True,
        **words: Any,
    ) -> Claim:
        """The claim `name` of the file, with the id PREFIX-NAME followed by `suffix`: `measure` of the table lies
        within its thresholds.

        within: the rows that meet the claim's `condition`, judged by themselves too. A claim that fails over the whole
        table and holds over these holds only then; one that holds and fails over these holds except then. interval:
        False where `measure` is the p-value of a test, which has no bootstrap interval; a p-value above its threshold
        is inconclusive, since it does not prove equality. Numbers are compared as they are published, rounded, so that
        no verdict hangs on a last digit.
        """
        entry = self._entry(name, words)
        unit, least = entry.pop("unit"), entry.pop("least", "units")
        least = LEAST[checks.one_of("least", least, LEAST)] if isinstance(least, str) else least
        at_least, at_most = self._bound(entry.pop("at_least", -math.inf)), self._bound(entry.pop("at_most", math.inf))
        if math.isinf(at_least) and math.isinf(at_most):
            raise ValueError(f"claim {name!r} has no threshold: give at_least or at_most")
        given = {**self.thresholds, **entry}
        texts = {key: entry[key].format(**given) for key in TEXTS}
        value, low, high = bootstrap(measure, table, unit, least=least) if interval else (measure(table),) * 3
        decision, inside = verdict(rounded(low), rounded(high), at_least, at_most), None
        if not interval:
            low, high = -math.inf, math.inf
            decision = "holds" if decision == "holds" else "inconclusive"
        if within is not None and not texts["condition"]:
            raise ValueError(f"claim {name!r} has no condition: within= has rows that meet it")
        if within is not None and len(within):
            inside = bootstrap(measure, within, unit, least=least)
            second = verdict(rounded(inside[1]), rounded(inside[2]), at_least, at_most)
            decision = EXCEPTIONS.get((decision, second), decision)
        else:
            texts["condition"] = ""
        bounds = [f"≥ {at_least:g}"] * (at_least > -math.inf) + [f"≤ {at_most:g}"] * (at_most < math.inf)
        return Claim(
            id=f"{self.prefix}-{name}{suffix}",
            attacker=knows(entry["attacker"]).format(**given),
            **texts,
            value=value,
            low=low,
            high=high,
            n=table[unit].nunique(),
            unit=unit,
            holds_when=" and ".join(bounds),
            verdict=decision,
            within=inside,
        )

    def estimate(
        self,
        name: str,
        estimate: Estimate | None,
        finished: float = 1.0,
        p: float | None = None,
        suffix: str = "",
        **words: Any,
    ) -> Claim:
        """The claim `name` of the file, with the id PREFIX-NAME followed by `suffix`: `estimate` lies within its
        thresholds.

        estimate: None for a claim that was not run; its entry says why (`not_run`). finished: the share of its attacks
        that ended at a stationary point, or spent the budget that the claim names; too few decide nothing. p: of a test
        that must reject as well before the claim holds. Numbers are compared as they are published, rounded, so that no
        verdict hangs on a last digit.
        """
        entry = self._entry(name, words)
        low, high = self._bound(entry.pop("at_least", -math.inf)), self._bound(entry.pop("at_most", math.inf))
        if math.isinf(low) and math.isinf(high):
            raise ValueError(f"claim {name!r} has no threshold: give at_least or at_most")
        given = {**self.thresholds, **entry}
        about: dict[str, Any] = {key: entry[key].format(**given) for key in TEXTS}
        about |= {key: entry[key] for key in ("number", "ledger", "unit")}
        about |= {"id": f"{self.prefix}-{name}{suffix}", "attacker": knows(entry["attacker"]).format(**given)}
        about["holds_when"] = " and ".join([f"≥ {low:g}"] * (low > -math.inf) + [f"≤ {high:g}"] * (high < math.inf))
        if estimate is None:
            about["note"] = entry["not_run"].format(**given)
            nothing: dict[str, Any] = {"value": math.nan, "low": -math.inf, "high": math.inf, "n": 0, "method": ""}
            return Claim(**about, **nothing, verdict="not run")
        measured = _rounded(estimate)
        decision, chance = estimates.verdict(measured, low, high), estimates.p_value(measured, low, high)
        if decision == "holds" and p is not None:
            decision, chance = "holds" if p < 1 - estimates.LEVEL else "inconclusive", max(chance, p)
        if not finished >= LEAST_FINISHED:
            decision = "inconclusive"
            about["note"] = "; ".join([*filter(None, [about["note"]]), f"only {finished:.0%} of the attacks finished"])
        return Claim(
            **about,
            value=estimate.value,
            low=estimate.interval[0],
            high=estimate.interval[1],
            n=estimate.n,
            method=estimate.method,
            verdict=decision,
            p=chance,
            needed=estimates.needed(measured, low, high) if decision == "inconclusive" else math.nan,
        )

    def _entry(self, name: str, words: dict[str, Any]) -> dict[str, Any]:
        checks.one_of("claim", name, self.entries)
        texts = [text for entry in self.entries.values() for text in entry.values() if isinstance(text, str)]
        fields = {field for text in texts for _, field, _, _ in Formatter().parse(text) if field}
        for word in words:
            checks.one_of("word", word, KEYS | fields)
        return (
            {"note": "", "condition": "", "ledger": "paper"}
            | self.entries.get("defaults", {})
            | self.entries[name]
            | words
        )

    def _bound(self, bound: float | str) -> float:
        return float(self.thresholds[bound] if isinstance(bound, str) else bound)


def _rounded(estimate: Estimate) -> Estimate:
    """Value and ends in the digits that are published."""

    def at(level: float) -> estimates.Interval:
        low, high = estimate.at(level)
        return rounded(low), rounded(high)

    return Estimate(rounded(estimate.value), at, estimate.n, estimate.method)


def adjusted(found: Sequence[Claim]) -> dict[str, float]:
    """By id, Holm's adjusted p-value of every claim that was run, within its ledger."""
    result: dict[str, float] = {}
    for ledger in LEDGERS:
        mine = [claim for claim in found if claim.ledger == ledger and not math.isnan(claim.p)]
        result |= zip([claim.id for claim in mine], estimates.holm([claim.p for claim in mine]), strict=True)
    return result


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
            "verdict": c.sentence + (f": {interval(c.within)}" if c.within and c.conditional else ""),
        }
        for c in claims
    )


def show(claims: Sequence[Claim]) -> Any:
    """`to_frame` as a notebook shows it."""
    return page(to_frame(claims), "claims")


def page(table: pd.DataFrame, name: str = "page") -> Any:
    """A table as a notebook shows it (HTML), the same at every run: sentences whole, aligned left, no row numbers."""
    from IPython.display import HTML  # which a worker that solves problems need not have

    left = [{"selector": "th, td", "props": "text-align: left; vertical-align: top"}]
    return HTML(table.style.hide(axis="index").set_table_styles(left).set_uuid(name).to_html())


def interval(numbers: tuple[float, float, float]) -> str:
    """value [low, high], in four digits; alone where there is no interval, or one of no width."""
    value, low, high = (f"{number:.4g}" for number in numbers)
    if math.isnan(numbers[0]):
        return "–"
    return value if math.isinf(numbers[1]) or value == low == high else f"{value} [{low}, {high}]"


def save(claims: Sequence[Claim], path: Path, digits: int = 4) -> None:
    """Write claims as JSON, keyed by id, numbers rounded."""

    def plain(number: float) -> float | None:
        return rounded(number, digits) if math.isfinite(number) else None

    records = {}
    for claim in claims:
        checks.one_of("verdict", claim.verdict, VERDICTS)
        record = asdict(claim) | {key: plain(getattr(claim, key)) for key in NUMBERS}
        record["within"] = claim.within and [plain(number) for number in claim.within]
        if not claim.number:  # a claim outside the numbered ledgers
            record = {key: record[key] for key in record if key not in LEDGER}
        records[record.pop("id")] = record
    Path(path).write_text(json.dumps(records, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load(path: Path) -> list[Claim]:
    """Claims as written by `save`, in their order; an unbounded interval end is null in the file."""
    found = []
    for key, record in json.loads(Path(path).read_text(encoding="utf-8")).items():
        record |= {name: null for name, null in NUMBERS.items() if record.get(name) is None}
        record["within"] = record["within"] and _numbers(record["within"])
        found.append(Claim(id=key, **record))
    return found


def _numbers(record: Sequence[float | None]) -> tuple[float, float, float]:
    value, low, high = record
    return (
        math.nan if value is None else value,
        -math.inf if low is None else low,
        math.inf if high is None else high,
    )
