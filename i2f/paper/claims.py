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
from i2f.paper.statistics import rounded

LEARNT = 0.5  # accuracy of a trained network below which a comparison of trainings means nothing
VERDICTS = ("holds", "fails", "inconclusive", "not run")
LEDGERS = {"paper": "the paper's claims", "beyond": "what goes beyond it"}
LEAST_FINISHED = 0.9  # share of attacks that must have ended at a stationary point, or there is no verdict
WORDS = Path(__file__).parent / "experiments"  # EXPERIMENT.toml: what its claims say
TEXTS = ("statement", "statistic", "source", "note")
KEYS = {*TEXTS, "number", "ledger", "attacker", "unit", "at_least", "at_most", "not_run"}  # of a claim in words
NUMBERS = ("value", "low", "high", "p", "needed")

Thresholds = Mapping[str, Any]  # by name, among a run's other parameters


@dataclass(frozen=True)
class Claim:
    """One sentence, in our words, and what was measured of it.

    id: unique. number, ledger: its place among the paper's claims, or among those beyond it. statement, source: what is
    claimed, and where. attacker: what the attack knows. statistic: what `value` is, with its unit. low, high: its 95%
    interval over `n` units of `unit`, by `method`. holds_when: the threshold. verdict: of `VERDICTS`. p: the smallest
    level at which the interval decides. needed: about how many units would decide. note: what else a reader must know.
    """

    id: str
    number: int
    ledger: str
    statement: str
    source: str
    attacker: str
    statistic: str
    value: float
    low: float
    high: float
    n: int
    unit: str
    method: str
    holds_when: str
    verdict: str
    p: float = math.nan
    needed: float = math.nan
    note: str = ""

    @property
    def sentence(self) -> str:
        """The verdict, with its p, or with how many units would decide."""
        if math.isfinite(self.needed):
            return f"{self.verdict} (about {self.needed:,.0f} {self.unit.replace('_', ' ')}s would decide)"
        if math.isnan(self.p) or self.verdict == "inconclusive":
            return self.verdict
        return f"{self.verdict} (p {'< 0.0001' if self.p < 1e-4 else f'= {self.p:.2g}'})"

    @property
    def sample(self) -> str:
        """ "8 images", "1 weight seed": the units behind the interval."""
        return f"{self.n} {self.unit.replace('_', ' ')}{'s' * (self.n != 1)}"


@dataclass(frozen=True)
class Judge:
    """Builds the claims of one experiment: words from its TOML file, thresholds by name, numbers from its tables.

    A table of the file is a claim: `number`, `ledger` ("paper" unless said), `statement`, `statistic`, `source`,
    `attacker` (a name of `attackers.ATTACKERS`, or words), `unit`, `at_least`, `at_most` (numbers, or names of
    thresholds), and if needed `note` and `not_run` (why it was not). `[defaults]` holds what they share. Texts are
    templates, `str.format`, of the thresholds and of the words that a call gives; a text of that name in the call
    replaces the file's.

    entries: of the file (`Judge.of` reads it). prefix: what ids begin with: "pruning". thresholds: fixed beforehand.

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
        estimate: Estimate | None,
        finished: float = 1.0,
        p: float | None = None,
        suffix: str = "",
        **words: Any,
    ) -> Claim:
        """The claim `name` of the file, with the id PREFIX-NAME followed by `suffix`: `estimate` lies within its
        thresholds.

        estimate: None for a claim that was not run; its entry says why (`not_run`), which takes the note's
        place. finished: the share of its attacks that ended at a stationary point, or spent the budget that the
        claim names; too few decide nothing. p: of a test that must reject as well before the claim holds.
        Numbers are compared as they are published, rounded, so that no verdict hangs on a last digit.
        """
        entry = self._entry(name, words)
        low, high = self._bound(entry.pop("at_least", -math.inf)), self._bound(entry.pop("at_most", math.inf))
        if math.isinf(low) and math.isinf(high):
            raise ValueError(f"claim {name!r} has no threshold: give at_least or at_most")
        if estimate is None:
            entry["note"] = entry["not_run"]
        given = {**self.thresholds, **entry}
        about: dict[str, Any] = {key: entry[key].format(**given) for key in TEXTS}
        about |= {key: entry[key] for key in ("number", "ledger", "unit")}
        about |= {"id": f"{self.prefix}-{name}{suffix}", "attacker": knows(entry["attacker"]).format(**given)}
        about["holds_when"] = " and ".join([f"≥ {low:g}"] * (low > -math.inf) + [f"≤ {high:g}"] * (high < math.inf))
        if estimate is None:
            nothing: dict[str, Any] = {"value": math.nan, "low": -math.inf, "high": math.inf, "n": 0, "method": ""}
            return Claim(**about, **nothing, verdict="not run")
        measured = _rounded(estimate)
        decision, chance = estimates.verdict(measured, low, high), estimates.p_value(measured, low, high)
        needed = estimates.needed(measured, low, high) if decision == "inconclusive" else math.nan
        if decision == "holds" and p is not None:
            decision, chance = "holds" if p < 1 - estimates.LEVEL else "inconclusive", max(chance, p)
        if not finished >= LEAST_FINISHED:  # more units would not help
            decision, chance, needed = "inconclusive", 1.0, math.nan
            about["note"] = "; ".join([*filter(None, [about["note"]]), f"only {finished:.0%} of the attacks finished"])
        return Claim(
            **about,
            value=estimate.value,
            low=estimate.interval[0],
            high=estimate.interval[1],
            n=estimate.n,
            method=estimate.method,
            verdict=decision,
            p=rounded(chance),  # as it is published, so that a notebook says no other last digit than the ledger
            needed=needed,
        )

    def _entry(self, name: str, words: dict[str, Any]) -> dict[str, Any]:
        checks.one_of("claim", name, self.entries)
        texts = [text for entry in self.entries.values() for text in entry.values() if isinstance(text, str)]
        fields = {field for text in texts for _, field, _, _ in Formatter().parse(text) if field}
        for word in words:
            checks.one_of("word", word, KEYS | fields)
        return {"note": "", "ledger": "paper"} | self.entries.get("defaults", {}) | self.entries[name] | words

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
            "over": c.sample if c.n else "–",
            "holds when": c.holds_when,
            "verdict": c.sentence,
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
    """Write claims as JSON, keyed by id, numbers rounded; null is no number, and infinite ones are text."""

    def plain(number: float) -> float | str | None:
        return rounded(number, digits) if math.isfinite(number) else None if math.isnan(number) else str(number)

    records = {}
    for claim in claims:
        checks.one_of("verdict", claim.verdict, VERDICTS)
        checks.one_of("ledger", claim.ledger, LEDGERS)
        record = asdict(claim) | {key: plain(getattr(claim, key)) for key in NUMBERS}
        records[record.pop("id")] = record
    Path(path).write_text(json.dumps(records, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load(path: Path) -> list[Claim]:
    """Claims as written by `save`, in their order."""
    found = []
    for key, record in json.loads(Path(path).read_text(encoding="utf-8")).items():
        numbers = {name: math.nan if record[name] is None else float(record[name]) for name in NUMBERS}
        found.append(Claim(id=key, **record | numbers))
    return found
