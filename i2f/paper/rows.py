"""The row store: every solved problem with its rows, in published tables and in finished chunks that are not published.

A published table is results/RUN/TABLE.csv: one line per row, the problem's values in front, every number in full
precision; arrays (pictures) lie beside it in TABLE.npz. results/RUN/provenance.json says which columns are the
problem's, which solver found the rest, at which commit, and with which versions. A chunk is one JSON file, written
when its problems are solved.

A problem is known by its key, a digest of every value that affects its rows: solver, version, data, and the problem
itself with its defaults filled in. Neither the order of the problems nor the number of processes is part of it.
"""

import base64
import csv
import hashlib
import io
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from i2f.paper import data
from i2f.paper.workers import Problem, Row, Solve

SCHEMA = 1  # of tables and chunks; rows of another one are refused
PROVENANCE = "provenance.json"
WHEREABOUTS = ("root",)  # where the data lie is no part of a key: their digest is
NUMBER = re.compile(r"-?\d+|(-?\d+\.?\d*(e[-+]?\d+)?|nan|-?inf)")
DECLARED = "declared"  # the attribute of a solver that holds its declaration
S = TypeVar("S", bound=Callable[..., Any])
LITERALS: dict[str, Any] = {"None": None, "True": True, "False": False}


@dataclass(frozen=True)
class Declared:
    """What is known of a solver; see `declare`."""

    name: str
    table: str
    version: int
    defaults: Mapping[str, Any]
    kinds: Mapping[str, str]
    brief: "Brief | None"

    def filled(self, problem: Problem) -> Problem:
        """The problem with its defaults, plain."""
        return {name: plain(value, name) for name, value in {**self.defaults, **problem}.items()}

    def key(self, problem: Problem) -> str:
        """The digest that the problem's rows are known by."""
        values = {name: _merged(v) for name, v in self.filled(problem).items() if name not in WHEREABOUTS}
        source = data.digest(values.get("dataset"), problem.get("root"))
        return _digest([self.name, self.version, source, values])


@dataclass(frozen=True)
class Brief:
    """How a long row is verified without solving all of it.

    head: problem -> one that stops early, or None where the row is short. column: what of the early end is stored in
    the whole row. again: (problem, row) -> columns that follow from the stored arrays.
    """

    head: Callable[[Problem], Problem | None]
    column: str
    again: Callable[[Problem, Row], Row]


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


@dataclass(frozen=True)
class Entry:
    """One problem, filled in, with its rows and where they come from."""

    problem: Problem
    rows: list[Row]
    origin: dict[str, Any]


Asked = dict[str, tuple[Declared, dict[str, Entry]]]


@dataclass
class Store:
    """The rows that sweeps read, and where new ones go.

    published: folders of published tables. chunks: the folder of finished chunks, read too; None: none are kept.
    solve: whether missing rows are solved; otherwise they are an error. asked: by table, the solver and the entries
    that sweeps asked for, in their order.
    """

    published: Sequence[Path] = ()
    chunks: Path | None = None
    solve: bool = True
    asked: Asked = field(default_factory=dict)
    _known: dict[str, dict[str, Entry]] = field(default_factory=dict)

    def find(self, declared: Declared, key: str) -> list[Row] | None:
        """The rows of the problem with this key, or None."""
        if declared.name not in self._known:
            self._known[declared.name] = self._read(declared)
        entry = self._known[declared.name].get(key)
        return None if entry is None else [dict(row) for row in entry.rows]

    def ask(self, declared: Declared, keys: Iterable[str]) -> None:
        """Note that a sweep was about these problems, as far as they are known by now."""
        known, asked = self._known[declared.name], self.asked.setdefault(declared.table, (declared, {}))[1]
        asked |= {key: known[key] for key in keys if key in known}

    def add(self, declared: Declared, problems: Sequence[Problem], rows: Sequence[list[Row]]) -> None:
        """Keep a finished chunk: one file, complete or absent."""
        problems, own = [declared.filled(problem) for problem in problems], origin()
        known = self._known.setdefault(declared.name, {})
        for problem, found in zip(problems, rows, strict=True):
            known[declared.key(problem)] = Entry(problem, found, own)
        if self.chunks is not None:
            head = {"schema": SCHEMA, "solver": declared.name, "version": declared.version, "origin": own}
            content = json.dumps({**head, "problems": problems, "rows": rows}, default=_packed)
            name = f"{declared.table}-{_digest([declared.name, declared.version, problems])}.json"
            write(self.chunks / name, content.encode())

    def _read(self, declared: Declared) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for folder in self.published:
            if declared.table in provenance(folder):
                found |= published(folder, declared)
        for path in sorted(self.chunks.glob("*.json")) if self.chunks is not None else ():
            found |= _chunk(path, declared)
        return found


def published(folder: Path, declared: Declared) -> dict[str, Entry]:
    """The entries of a published table, by key; none where another version of the solver found them.

    Raises: ValueError for a table that is incomplete, altered, or names a problem twice.
    """
    about = provenance(folder)[declared.table]
    if (about["solver"], about["version"]) != (declared.name, declared.version):
        return {}
    path = folder / f"{declared.table}.csv"
    found: dict[str, Entry] = {}
    origins = [
        {name: value for name, value in origin.items() if name != "problems"}
        for origin in about["origins"]
        for _ in range(origin["problems"])
    ]
    for problem, rows in read(path, about):
        key = declared.key(problem)
        if key in found:
            raise ValueError(f"{path}: the problem {problem} stands there twice: restore the file from git")
        found[key] = Entry(problem, rows, origins[len(found)])
    return found


def read(path: Path, about: Mapping[str, Any]) -> list[tuple[Problem, list[Row]]]:
    """The problems of a table and their rows, in the file's order; about: of its provenance.

    Raises: ValueError for a table that is incomplete or altered; FileNotFoundError for one that is missing.
    """
    content = path.read_bytes()
    lines = list(csv.reader(io.StringIO(content.decode(), newline=""), strict=True))
    header = lines[0] if lines else []
    if missing := [name for name in about["key"] if name not in header]:
        raise ValueError(f"{path}: the column {missing[0]!r} is missing: restore the file from git")
    for number, line in enumerate(lines, 1):
        if len(line) != len(header):
            raise ValueError(
                f"{path}: line {number} has {len(line)} cells where {len(header)} are named: the file is cut off or "
                "altered; restore it from git"
            )
    beside = path.with_suffix(".npz")
    arrays = dict(np.load(beside)) if beside.exists() else {}
    found: list[tuple[Problem, list[Row]]] = []
    for number, line in enumerate(lines[1:]):
        cells = {name: decoded(text) for name, text in zip(header, line, strict=True) if text}
        row = {name: value for name, value in cells.items() if name not in about["key"]}
        row |= {name.split("/", 1)[1]: array for name, array in arrays.items() if name.startswith(f"{number}/")}
        problem = {name: cells[name] for name in about["key"] if name in cells}
        if row.pop("row", 0):
            found[-1][1].append(row)
        else:
            found.append((problem, [row]))
    if len(lines) - 1 != about["rows"] or hashlib.sha256(content).hexdigest() != about["sha256"]:
        raise ValueError(
            f"{path}: its {len(lines) - 1} rows are not the {about['rows']} that were published: the file was cut off "
            "or altered; restore it from git"
        )
    return found


def save(folder: Path, asked: Asked) -> str:
    """Write what was asked for as published tables with their provenance; their `digest`."""
    about = {}
    for table, (declared, entries) in asked.items():
        key, header = _columns(entries.values())
        text, arrays = io.StringIO(newline=""), dict[str, Any]()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        number = 0
        for entry in entries.values():
            for place, row in enumerate(entry.rows):
                cells = {**entry.problem, **({"row": place} if "row" in header else {}), **row}
                writer.writerow([encoded(cells[name]) if name in cells else "" for name in header])
                arrays |= {f"{number}/{n}": value for n, value in row.items() if isinstance(value, np.ndarray)}
                number += 1
        content = text.getvalue().encode()
        write(folder / f"{table}.csv", content)
        if arrays:
            pictures = io.BytesIO()
            np.savez_compressed(pictures, **arrays)
            write(folder / f"{table}.npz", pictures.getvalue())
        about[table] = {
            "solver": declared.name,
            "version": declared.version,
            "key": key,
            "rows": number,
            "sha256": hashlib.sha256(content).hexdigest(),
            "origins": _grouped(entry.origin for entry in entries.values()),
        }
    write(folder / PROVENANCE, (json.dumps({"schema": SCHEMA, "tables": about}, indent=1) + "\n").encode())
    return digest(folder)


def digest(folder: Path) -> str:
    """Of all tables of a folder: what is drawn from them names it."""
    return _digest({table: about["sha256"] for table, about in provenance(folder).items()})


def provenance(folder: Path) -> dict[str, Any]:
    """Of a folder's tables, by name. Raises: ValueError for another schema version, or a file that is cut off."""
    path = folder / PROVENANCE
    if not path.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is cut off or altered ({error}): restore it from git") from error
    _same_schema(path, found["schema"])
    tables: dict[str, Any] = found["tables"]
    return tables


def write(path: Path, content: bytes) -> None:
    """A file, complete or absent: a kill or a full disk in the middle leaves nothing under its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def plain(value: Any, name: str = "value") -> Any:
    """The value in Python's own types. Raises: TypeError for one that a problem cannot hold, such as a tensor."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple, range)):
        return [plain(item, name) for item in value]
    if isinstance(value, dict):
        return {key: plain(item, name) for key, item in value.items()}
    raise TypeError(
        f"{name} is a {type(value).__name__}: problems and rows hold numbers, texts and lists of them; give what it is "
        "made from instead (of a training, its recipe)"
    )


def plain_row(row: Row) -> Row:
    """A row in Python's own types, but for its arrays, which come last."""
    arrays = {name: value for name, value in row.items() if isinstance(value, np.ndarray)}
    return {name: plain(value, name) for name, value in row.items() if name not in arrays} | arrays


def encoded(value: Any) -> str:
    """A value as the text of a cell, from which `decoded` gets it back to the last bit; "" for an array."""
    if isinstance(value, np.ndarray):
        return ""
    value = plain(value)
    if isinstance(value, str):
        return value if value and decoded(value) == value else json.dumps(value, ensure_ascii=False)
    return json.dumps(value) if isinstance(value, (list, dict)) else repr(value)


@cache
def _scalar(text: str) -> Any:
    if text in LITERALS:
        return LITERALS[text]
    if not (match := NUMBER.fullmatch(text)):
        return text
    return float(text) if match[1] else int(text)


def decoded(text: str) -> Any:
    """The value behind the text of a cell."""
    try:
        return json.loads(text) if text[:1] in ('"', "[", "{") else _scalar(text)
    except json.JSONDecodeError:
        return text


def origin() -> dict[str, Any]:
    """By what rows are solved here and now: commit, versions, kind of machine."""
    return dict(_origin())


@cache
def _origin() -> tuple[tuple[str, Any], ...]:
    packages = tuple((name, version(name)) for name in ("torch", "numpy", "scipy"))
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return (("commit", _commit()), ("python", platform.python_version()), *packages, ("machine", machine))


def _commit() -> str:
    """The commit that is checked out, "+" behind it where tracked files differ; "" outside a repository."""
    git = partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    try:
        head = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        return head + "+" * bool(git(["git", "status", "--porcelain", "-uno", "--", "."]).stdout)
    except FileNotFoundError:
        return ""


def _columns(entries: Iterable[Entry]) -> tuple[list[str], list[str]]:
    """Names of the problems' values, and of all columns."""
    entries = list(entries)
    key = list(dict.fromkeys(name for entry in entries for name in entry.problem))
    found = dict.fromkeys(name for entry in entries for row in entry.rows for name in row)
    arrays = {n for entry in entries for row in entry.rows for n, value in row.items() if isinstance(value, np.ndarray)}
    row = ["row"] * any(len(entry.rows) > 1 for entry in entries)
    return key, [*key, *row, *(name for name in found if name not in arrays and name not in key)]


def _grouped(origins: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Equal origins that follow each other, with their number of problems."""
    found: list[dict[str, Any]] = []
    for one in origins:
        if found and {k: v for k, v in found[-1].items() if k != "problems"} == one:
            found[-1]["problems"] += 1
        else:
            found.append({**one, "problems": 1})
    return found


def _chunk(path: Path, declared: Declared) -> dict[str, Entry]:
    """The entries of a finished chunk, by key; none of another solver's, or another version's."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_hook=_unpacked)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is cut off or altered ({error}): delete it, and its problems are solved anew"
        ) from error
    _same_schema(path, found["schema"])
    if (found["solver"], found["version"]) != (declared.name, declared.version):
        return {}
    pairs = zip(found["problems"], found["rows"], strict=True)
    return {declared.key(problem): Entry(problem, rows, found["origin"]) for problem, rows in pairs}


def _same_schema(path: Path, schema: int) -> None:
    if schema != SCHEMA:
        raise ValueError(
            f"{path} has schema version {schema}, and this code reads {SCHEMA}: check out the code that wrote it"
        )


def _packed(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"array": base64.b64encode(value.tobytes()).decode(), "dtype": str(value.dtype), "shape": value.shape}
    return plain(value)


def _unpacked(found: dict[str, Any]) -> Any:
    if found.keys() != {"array", "dtype", "shape"}:
        return found
    return np.frombuffer(base64.b64decode(found["array"]), found["dtype"]).reshape(found["shape"])


def _merged(value: Any) -> Any:
    """As a key has it: 1 for 1.0, and None apart from NaN, which JSON spells by itself."""
    if isinstance(value, list):
        return [_merged(item) for item in value]
    if isinstance(value, dict):
        return {key: _merged(item) for key, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]
