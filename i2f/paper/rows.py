"""The row store: every solved problem with its rows, in published tables and in finished chunks that are not published.

A problem is known by its key, a digest of every value that affects its rows: solver, version, data, and the problem
itself with its defaults filled in. Neither the order of the problems nor the number of processes is part of it.
"""

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from i2f.paper.declared import Brief, Declared, declaration, declare, digest
from i2f.paper.tables import Asked, Entry, entries, origin, save
from i2f.paper.workers import Problem, Row

__all__ = ["Brief", "Declared", "Entry", "Store", "declaration", "declare", "digest"]


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
            chunks = sorted(self.chunks.glob(f"{declared.table}-*")) if self.chunks is not None else []
            found = self._known[declared.name] = {}
            for folder in (*self.published, *chunks):
                found |= entries(folder, declared)
        entry = self._known[declared.name].get(key)
        return None if entry is None else [dict(row) for row in entry.rows]

    def add(self, declared: Declared, problems: Sequence[Problem], rows: Sequence[list[Row]]) -> None:
        """Keep a finished chunk: one folder, complete or absent.

        Raises: ValueError for a row that has a column with the name of one of the problems' values.
        """
        solved = [Entry(declared.filled(p), found, origin()) for p, found in zip(problems, rows, strict=True)]
        clash = {name for p in problems for name in declared.filled(p)} & {n for e in solved for r in e.rows for n in r}
        if clash:
            raise ValueError(
                f"{min(clash)!r} is a value of {declared.name}'s problems and a column of its rows: rename one"
            )
        chunk = {declared.key(entry.problem): entry for entry in solved}
        self._known.setdefault(declared.name, {}).update(chunk)
        if self.chunks is not None:
            target = self.chunks / f"{declared.table}-{digest(list(chunk))}"
            scratch = target.with_name(f".{target.name}.{os.getpid()}")
            try:
                save(scratch, {declared.table: (declared, chunk)})
                if not target.exists():
                    scratch.rename(target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

    def ask(self, declared: Declared, keys: Iterable[str]) -> None:
        """Note that a sweep was about these problems, as far as they are known by now."""
        known, asked = self._known[declared.name], self.asked.setdefault(declared.table, (declared, {}))[1]
        asked |= {key: known[key] for key in keys if key in known}
