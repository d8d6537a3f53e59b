"""Whether a row that is solved anew is the published one: a tolerance for every kind of column, see tolerances.toml."""

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from i2f.core import checks
from i2f.paper.workers import Row

TABLE = tomllib.loads((Path(__file__).parent / "tolerances.toml").read_text(encoding="utf-8"))
KINDS: dict[str, dict[str, Any]] = TABLE["kinds"]


class Deviation(NamedTuple):
    """One column of a row, published and solved anew. size: how many times its tolerance the two differ by, at most 1
    where they agree. relative: their difference over the larger."""

    column: str
    kind: str
    published: Any
    again: Any
    relative: float
    size: float

    @property
    def agrees(self) -> bool:
        return self.size <= 1


def kind(column: str, value: Any, own: Mapping[str, str], finished: bool) -> str:
    """The kind of a column's tolerance; own: what the experiment declares, of a column or of all whose names go on with
    a comma ("cg_rmse" of "cg_rmse, 20 steps"). finished: the row's attack converged."""
    named = own.get(column) or own.get(column.split(", ")[0]) or TABLE["columns"].get(column)
    if named is None:
        return "prediction" if isinstance(value, (float, list, np.ndarray)) else "exact"
    named = named if finished else TABLE["unfinished"].get(named, named)
    return checks.one_of(f"kind of the column {column}", named, KINDS)


def deviations(published: Row, again: Row, own: Mapping[str, str]) -> list[Deviation]:
    """One per column of either row."""
    finished = bool(published.get("converged", True)) and bool(again.get("converged", True))
    found = []
    for column in dict.fromkeys((*published, *again)):
        pair = published.get(column), again.get(column)
        named = kind(column, next((v for v in pair if v is not None), None), own, finished)
        found.append(Deviation(column, named, *pair, *_compared(column, named, *pair)))
    return found


def _compared(column: str, named: str, published: Any, again: Any) -> tuple[float, float]:
    """The relative difference, and the difference over the tolerance."""
    about = KINDS[named]
    if math.isinf(about["relative"]) or _same(published, again):
        return 0.0, 0.0
    try:
        a, b = (np.asarray(value, dtype=float) for value in (published, again))
    except (TypeError, ValueError):
        return math.inf, math.inf
    if a.shape != b.shape or published is None or again is None:
        return math.inf, math.inf
    low, high = TABLE["floors"].get(column, -math.inf), about.get("ceiling", math.inf)
    a, b = (np.sign(v) * np.clip(np.abs(v), low, high) if low > 0 else np.clip(v, None, high) for v in (a, b))
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    larger = np.maximum(np.abs(a), np.abs(b))
    difference = np.where(same, 0.0, np.abs(a - b))
    difference = np.where(np.isnan(difference) | np.isinf(difference), np.inf, difference)  # one of them is no number
    allowed = about["relative"] * larger + about.get("absolute", 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        size = np.where(difference == 0, 0.0, np.where(np.isinf(difference), np.inf, difference / allowed))
        relative = np.where(difference == 0, 0.0, np.where(np.isinf(difference), np.inf, difference / larger))
    return float(relative.max(initial=0.0)), float(size.max(initial=0.0))


def _same(published: Any, again: Any) -> bool:
    if isinstance(published, np.ndarray) or isinstance(again, np.ndarray):
        return False
    return bool(published == again)
