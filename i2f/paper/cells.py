"""Values as the text of a CSV's cells, and back to the last bit; files that are complete or absent."""

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

NUMBER = re.compile(r"-?\d+|(-?\d+\.?\d*(e[-+]?\d+)?|nan|-?inf)")
LITERALS: dict[str, Any] = {"None": None, "True": True, "False": False}


def plain(value: Any, name: str = "value") -> Any:
    """The value in Python's own types, arrays as they are. Raises: TypeError for what no row can hold, such as a
    tensor."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str, np.ndarray)):
        return value
    if isinstance(value, (list, tuple, range)):
        return [plain(item, name) for item in value]
    if isinstance(value, dict):
        return {key: plain(item, name) for key, item in value.items()}
    raise TypeError(
        f"{name} is a {type(value).__name__}: problems and rows hold numbers, texts and lists of them; give what it is "
        "made from instead (of a training, its recipe)"
    )


def plain_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row in Python's own types, its arrays last."""
    arrays_last = sorted(row.items(), key=lambda item: isinstance(item[1], np.ndarray))
    return {name: plain(value, name) for name, value in arrays_last}


def encoded(value: Any) -> str:
    """A value as the text of a cell, from which `decoded` gets it back; never ""."""
    if isinstance(value, str):
        return value if value and decoded(value) == value else json.dumps(value, ensure_ascii=False)
    return json.dumps(value) if isinstance(value, (list, dict)) else repr(value)


def decoded(text: str) -> Any:
    """The value behind the text of a cell."""
    try:
        return json.loads(text) if text[:1] in ('"', "[", "{") else _scalar(text)
    except json.JSONDecodeError:
        return text


@cache
def _scalar(text: str) -> Any:
    if text in LITERALS:
        return LITERALS[text]
    if not (match := NUMBER.fullmatch(text)):
        return text
    return float(text) if match[1] else int(text)


def write(path: Path, content: bytes) -> None:
    """A file, complete or absent: a kill or a full disk in the middle leaves nothing under its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
