"""What a solver's rows are known by: a declaration, and the key of a problem."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from i2f.paper import data
from i2f.paper.cells import plain
from i2f.paper.workers import Problem, Row, Solve

WHEREABOUTS = ("root",)  # where the data lie is no part of a key: their digest is
DECLARED = "declared"  # the attribute of a solver that holds its declaration
S = TypeVar("S", bound=Callable[..., Any])


class Brief(NamedTuple):
    """How a long row is verified without solving all of it.

    head: problem -> one that stops early, or None where the row is short. column: what of the early end is stored in
    the whole row. again: (problem, row) -> columns that follow from the stored arrays.
    """

    head: Callable[[Problem], Problem | None]
    column: str
    again: Callable[[Problem, Row], Row]


class Declared(NamedTuple):
    """What is known of a solver; see `declare`."""

    name: str
    table: str
    version: int
    defaults: Mapping[str, Any]
    kinds: Mapping[str, str]
    brief: Brief | None

    def filled(self, problem: Problem) -> Problem:
        """The problem with its defaults, plain."""
        return {name: plain(value, name) for name, value in {**self.defaults, **problem}.items()}

    def key(self, problem: Problem) -> str:
        """The digest that the problem's rows are known by."""
        values = {name: _merged(v) for name, v in self.filled(problem).items() if name not in WHEREABOUTS}
        source = data.digest(values.get("dataset"), problem.get("root"))
        return digest([self.name, self.version, source, values])


def declare(
    table: str,
    version: int = 1,
    defaults: Mapping[str, Any] | None = None,
    kinds: Mapping[str, str] | None = None,
    brief: Brief | None = None,
) -> Callable[[S], S]:
    """Decorator of a solver whose rows are kept.

    table: the name of their file. version: to be raised when the same problem gets other values. defaults: of the
    problem's values. kinds: column -> kind of its tolerance, where `tolerances.toml` has another or none. brief: how
    long rows are verified.
    """

    def declared(solve: S) -> S:
        name = f"{solve.__module__}:{solve.__qualname__}"
        setattr(solve, DECLARED, Declared(name, table, version, defaults or {}, kinds or {}, brief))
        return solve

    return declared


def declaration(solve: Solve) -> Declared:
    """Raises: ValueError for a solver that is not declared, or that has values bound to it: they belong into the
    problem, where the key sees them."""
    found = getattr(solve, DECLARED, None)
    if not isinstance(found, Declared):
        raise ValueError(
            f"{solve} is no declared solver: decorate a function of a module with @rows.declare('TABLE'), and put what "
            "would be bound to it into its problems"
        )
    return found


def _merged(value: Any) -> Any:
    """As a key has it: 1 for 1.0, and None apart from NaN, which JSON spells by itself."""
    if isinstance(value, list):
        return [_merged(item) for item in value]
    if isinstance(value, dict):
        return {key: _merged(item) for key, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def digest(value: Any) -> str:
    """Of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]
