"""The project's own map: its notebooks, the verdicts they reached, and where each part of the paper is found again."""

import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from i2f.paper import claims
from i2f.paper.claims import Claim

ROOT = Path(__file__).resolve().parents[2]
MAP = tomllib.loads((Path(__file__).parent / "ledger.toml").read_text(encoding="utf-8"))
HEADLINES: list[str] = MAP["headlines"]  # claims that the README shows first
COLUMNS = ("claim", "attacker", "measured [95% interval]", "holds when", "verdict")


def runs() -> dict[str, dict[str, Any]]:
    """The runs of params.yaml, by key."""
    found: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["runs"]
    return found


def notebooks() -> dict[str, tuple[str, list[str]]]:
    """File name -> (its question, the keys of its runs), in reading order; without the index."""
    import nbformat  # of the companion's tools, which claims alone do not need

    found = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        title = nbformat.read(path, as_version=4).cells[0].source.splitlines()[0].lstrip("# ")
        keys = [key for key, entry in runs().items() if entry["notebook"] == path.stem]
        if path.stem != "00_index":
            found[path.name] = (title, keys)
    return found


def contents() -> pd.DataFrame:
    """One row per notebook: its question and how its claims came out."""
    return pd.DataFrame(
        {"notebook": name, "question": title, "claims": _counted(keys) or "–"}
        for name, (title, keys) in notebooks().items()
    )


def paper() -> pd.DataFrame:
    """One row per experiment of the paper: the notebook, its claims' verdicts, what is different here."""
    books = {entry["experiment"]: entry["notebook"] for entry in runs().values()}
    return pd.DataFrame(
        {
            "of the paper": part["what"],
            "notebook": books[part["experiment"]],
            "claims": _counted(key for key, entry in runs().items() if entry["experiment"] == part["experiment"]),
            "different here": part["different"],
        }
        for part in MAP["paper"]
        if part["experiment"] in books
    )


def _counted(keys: Iterable[str]) -> str:
    return _verdicts([claim for key in keys for claim in _claims(key)])


def _claims(key: str) -> list[Claim]:
    path = ROOT / "results" / key / "claims.json"
    return claims.load(path) if path.exists() else []


def _verdicts(found: Sequence[Claim]) -> str:
    """ "3 holds, 1 fails", in the order of `claims.VERDICTS`."""
    counted = Counter(claim.verdict for claim in found)
    return ", ".join(f"{counted[v]} {v}" for v in claims.VERDICTS if counted[v])


def thumbnails(width: int = 460) -> None:
    """Show every run's main figure in small, under its notebook's question."""
    from IPython.display import HTML, SVG, Image, Markdown, display  # in a notebook only

    for name, (title, keys) in notebooks().items():
        for key in keys:
            for path in sorted((ROOT / "results" / key).glob("overview.*")):
                display(Markdown(f"**[{title}]({name})** — {key}"))
                if path.suffix == ".png":
                    display(Image(str(path), width=width))
                else:
                    fit = "<style>.small svg {width: 100%; height: auto}</style>"
                    display(HTML(f'<div class="small" style="width: {width}px">{SVG(str(path)).data}</div>{fit}'))


def markdown(path: Path = ROOT / "results" / "claims.json") -> str:
    """The claims as the README shows them: the headlines, and every one in a table that opens."""
    found = claims.load(path)
    first = [c for name in HEADLINES for c in found if c.id == name]
    summary = f"All {len(found)} claims: {_verdicts(found)}"
    return f"{_rows(first)}\n\n<details><summary>{summary}</summary>\n\n{_rows(found)}\n\n</details>"


def _rows(found: Sequence[Claim]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for c in found:
        within = f" {c.condition}: {claims.interval(c.within)}" if c.within and c.conditional else ""
        note = f" <br><sub>{c.note}</sub>" if c.note else ""
        measured = f"{c.statistic}: {claims.interval((c.value, c.low, c.high))}, {c.sample}{note}"
        cells = f"{c.statement} <br>*{c.id}*", c.attacker, measured, c.holds_when, f"**{c.verdict}**{within}"
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)
