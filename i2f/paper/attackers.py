"""The attackers of the experiments: what each knows, in words, how it is run, and how figures draw it."""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from i2f.audit import colours
from i2f.core import checks


@dataclass(frozen=True)
class Attacker:
    """knows: method, and what it is told, in words, for a claim. options: what runs it, in `problems.attack`'s words.

    In figures: label, told (what it knows apart from the model), colour, marker, line (a style of Matplotlib's).
    """

    knows: str
    options: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    told: str = "label"
    colour: str = colours.BLUE
    marker: str = "o"
    line: Any = "-"


def _read(path: Path) -> dict[str, Attacker]:
    """The file's attackers, by their names in tables; a colour by its name in `colours`, a line by its dashes."""
    found = {}
    for name, entry in tomllib.loads(path.read_text(encoding="utf-8")).items():
        if "colour" in entry:
            entry["colour"] = getattr(colours, entry["colour"])
        if "line" in entry:
            entry["line"] = (0, tuple(entry["line"]))
        found[name] = Attacker(**entry)
    return found


ATTACKERS = _read(Path(__file__).with_suffix(".toml"))


def knows(name: str) -> str:
    """What the attacker of that name knows; several words that are no attacker's name stand for themselves.

    Raises: ValueError for a single word that is neither a name nor "none".
    """
    if name == "none" or (" " in name and name not in ATTACKERS):
        return name
    return ATTACKERS[checks.one_of("attacker", name, ATTACKERS)].knows
