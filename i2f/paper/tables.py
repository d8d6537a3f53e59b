"""Tables of rows: a CSV file in full precision, arrays beside it, and a provenance that says how to read both.

FOLDER/TABLE.csv has one line per row, the problem's values in front; arrays (pictures) lie in TABLE.npz.
FOLDER/provenance.json says which columns are the problem's, which solver found the rest, at which commit, and with
which versions. results/RUN is such a folder, and so is every finished chunk.
"""

import csv
import hashlib
import io
import json
import os
import platform
import subprocess
import zipfile
from collections.abc import Mapping
from functools import cache, partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from i2f.paper import declared as declarations
from i2f.paper.cells import decoded, encoded, write
from i2f.paper.declared import Declared
from i2f.paper.workers import Problem, Row

SCHEMA = 1  # of tables; rows of another one are refused
PROVENANCE = "provenance.json"
MEND = "restore it from git, or delete it if it is a chunk"


class Entry(NamedTuple):
    """One problem, filled in, with its rows and by what they were solved."""

    problem: Problem
    rows: list[Row]
    origin: dict[str, Any]


Asked = dict[str, tuple[Declared, dict[str, Entry]]]  # by table


def entries(folder: Path, declared: Declared) -> dict[str, Entry]:
    """The entries of a solver's table in this folder, by key; none where there is no table, or where another solver or
    version found its rows.

    Raises: ValueError for a table that is incomplete, altered, or names a problem twice.
    """
    about = provenance(folder).get(declared.table, {})
    if (about.get("solver"), about.get("version")) != (declared.name, declared.version):
        return {}
    path, found = folder / f"{declared.table}.csv", dict[str, Entry]()
    origins = [rest for n, rest in ((o["problems"], _rest(o)) for o in about["origins"]) for _ in range(n)]
    for problem, rows in read(path, about):
        key = declared.key(problem)
        if key in found:
            raise ValueError(f"{path}: the problem {problem} stands there twice: {MEND}")
        found[key] = Entry(problem, rows, origins[len(found)])
    return found


def read(path: Path, about: Mapping[str, Any]) -> list[tuple[Problem, list[Row]]]:
    """The problems of a table and their rows, in the file's order; about: of its provenance.

    Raises: ValueError for a table that is incomplete or altered; FileNotFoundError for one that is missing.
    """
    content = path.read_bytes()
    header, *lines = list(csv.reader(io.StringIO(content.decode(), newline=""), strict=True)) or [[]]
    if missing := [name for name in about["key"] if name not in header]:
        raise ValueError(f"{path}: the column {missing[0]!r} is missing: {MEND}")
    for number, line in enumerate(lines, 2):
        if len(line) != len(header):
            raise ValueError(
                f"{path}: line {number} has {len(line)} cells where {len(header)} are named: the file is cut off or "
                f"altered; {MEND}"
            )
    if (len(lines), _checksum(path)) != (about["rows"], about["sha256"]):
        raise ValueError(
            f"{path}: its {len(lines)} rows are not the {about['rows']} that were written: the file is cut off or "
            f"altered; {MEND}"
        )
    beside = path.with_suffix(".npz")
    arrays = dict(np.load(beside)) if beside.exists() else {}
    found: list[tuple[Problem, list[Row]]] = []
    for number, line in enumerate(lines):
        cells = {name: decoded(text) for name, text in zip(header, line, strict=True) if text}
        row = {name: value for name, value in cells.items() if name not in about["key"]}
        row |= {name.split("/", 1)[1]: array for name, array in arrays.items() if name.startswith(f"{number}/")}
        if row.pop("row", 0):
            found[-1][1].append(row)
        else:
            found.append(({name: cells[name] for name in about["key"] if name in cells}, [row]))
    return found


def save(folder: Path, asked: Asked) -> str:
    """Write what was asked for as tables with their provenance; their `digest`."""
    about = {}
    for table, (declared, found) in asked.items():
        path = folder / f"{table}.csv"
        lines = [(e.problem, place, row) for e in found.values() for place, row in enumerate(e.rows)]
        key = list(dict.fromkeys(name for problem, _, _ in lines for name in problem))
        arrays = {f"{n}/{k}": v for n, (*_, row) in enumerate(lines) for k, v in row.items() if _is_array(v)}
        columns = dict.fromkeys(name for *_, row in lines for name, value in row.items() if not _is_array(value))
        header = [*key, *["row"] * any(place for _, place, _ in lines), *(name for name in columns if name not in key)]
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        for problem, place, row in lines:
            cells = {**row, "row": place, **problem}
            writer.writerow([encoded(cells[name]) if name in cells else "" for name in header])
        write(path, text.getvalue().encode())
        if arrays:
            write(path.with_suffix(".npz"), _npz(arrays))
        origins = [{**o, "problems": len(list(same))} for o, same in groupby(entry.origin for entry in found.values())]
        about[table] = {"solver": declared.name, "version": declared.version, "key": key, "rows": len(lines)}
        about[table] |= {"sha256": _checksum(path), "origins": origins}
    write(folder / PROVENANCE, (json.dumps({"schema": SCHEMA, "tables": about}, indent=1) + "\n").encode())
    return digest(folder)


def provenance(folder: Path) -> dict[str, Any]:
    """Of a folder's tables, by name. Raises: ValueError for another schema version, or a file that is cut off."""
    path = folder / PROVENANCE
    try:
        found: dict[str, Any] = {"schema": SCHEMA, "tables": {}}
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else found
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is cut off or altered ({error}): {MEND}") from error
    if (schema := found["schema"]) != SCHEMA:
        raise ValueError(f"{path} has schema version {schema}, and this code reads {SCHEMA}: check out what wrote it")
    about: dict[str, Any] = found["tables"]
    return about


def digest(folder: Path) -> str:
    """Of all tables of a folder: what is drawn from them names it."""
    return declarations.digest({table: about["sha256"] for table, about in provenance(folder).items()})


@cache
def _origin() -> tuple[tuple[str, Any], ...]:
    packages = tuple((name, version(name)) for name in ("torch", "numpy", "scipy"))
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return (("commit", _commit()), ("python", platform.python_version()), *packages, ("machine", machine))


def origin() -> dict[str, Any]:
    """By what rows are solved here and now: commit, versions, kind of machine."""
    return dict(_origin())


def _commit() -> str:
    """The commit that is checked out, "+" behind it where the package's files differ; "" outside a repository."""
    git = partial(subprocess.run, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    try:
        head = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        return head + "+" * bool(git(["git", "status", "--porcelain", "--", "."]).stdout)
    except FileNotFoundError:
        return ""


def _rest(origin: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in origin.items() if name != "problems"}


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)


def _npz(arrays: Mapping[str, Any]) -> bytes:
    """As `numpy.load` reads it, the same on every machine: what NumPy's own function writes depends on the version of
    Python, and what is compressed on that of zlib."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            member, about = io.BytesIO(), zipfile.ZipInfo(f"{name}.npy")  # dated 1980
            np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
            about.create_system = 3  # Unix, wherever
            archive.writestr(about, member.getvalue())
    return file.getvalue()


def _checksum(path: Path) -> str:
    """Of a table and the arrays beside it."""
    beside = path.with_suffix(".npz")
    return hashlib.sha256(path.read_bytes() + (beside.read_bytes() if beside.exists() else b"")).hexdigest()
