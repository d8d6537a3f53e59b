"""The project's own map: its notebooks, the verdicts they reached, and where each part of the paper is found again."""

import io
import math
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import yaml

from i2f.paper import books, claims
from i2f.paper.books import ROOT
from i2f.paper.claims import LEDGERS, Claim

MAP = tomllib.loads((Path(__file__).parent / "ledger.toml").read_text(encoding="utf-8"))
TEMPLATE = Path(__file__).parent / "report.md"


def runs() -> dict[str, dict[str, Any]]:
    """The runs of params.yaml, by key."""
    found: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["runs"]
    return found


def index(width: int = 560) -> None:
    """Show every notebook by track: its question, why to read it, how long that takes, its answer, its main figure."""
    from IPython.display import Image, Markdown, display  # in a notebook only

    for track, names in MAP["tracks"].items():
        display(Markdown(f"## {track.capitalize()}"))
        for name, why in names.items():
            path = books.NOTEBOOKS / f"{name}.ipynb"
            book = nbformat.read(path, as_version=4)
            question = book.cells[0].source.splitlines()[0].lstrip("# ")
            keys = [key for key, entry in runs().items() if entry["notebook"] == name]
            counted = f" Its claims: {verdicts(_of(keys))}." if keys else ""
            lines = f"### [{question}]({path.name})", f"{why} *{_minutes(book)} minutes.*", f"{_answer(book)}{counted}"
            display(Markdown("\n\n".join(line for line in lines if line)))
            for figure in (ROOT / "results" / key / "overview.png" for key in keys):
                display(Image(_small(figure, width)))


def _minutes(book: Any) -> int:
    """To read a notebook's prose, at 200 words a minute, and half a minute for each of its figures and tables."""
    words = sum(len(cell.source.split()) for cell in book.cells if cell.cell_type == "markdown")
    shown = sum(bool(cell.outputs) for cell in book.cells if cell.cell_type == "code")
    return round(words / 200 + shown / 2)


def _answer(book: Any) -> str:
    """The first sentence in words that the notebook computes."""
    said = (o.data.get("text/markdown") for c in book.cells if c.cell_type == "code" for o in c.outputs if "data" in o)
    return next(filter(None, said), "")


def _small(figure: Path, width: int) -> bytes:
    """The picture, scaled to so many pixels."""
    from PIL import Image

    found, scaled = Image.open(figure).convert("RGB"), io.BytesIO()
    found.resize((width, round(width * found.height / found.width)), Image.Resampling.LANCZOS).save(scaled, "png")
    return scaled.getvalue()


def verdicts(found: Iterable[Claim]) -> str:
    """ "3 hold, 1 fails", in the order of `claims.VERDICTS`."""
    counted = Counter(claim.verdict for claim in found)
    many = {"holds": "hold", "fails": "fail"}
    words = ((n, v if n == 1 else many.get(v, v)) for v in claims.VERDICTS if (n := counted[v]))
    return ", ".join(f"{n} {word}" for n, word in words)


def _of(keys: Iterable[str]) -> list[Claim]:
    paths = [ROOT / "results" / key / "claims.json" for key in keys]
    return [claim for path in paths if path.exists() for claim in claims.load(path)]


def load(path: Path = ROOT / "results" / "claims.json") -> dict[str, list[Claim]]:
    """The published claims by ledger, in the order of their numbers."""
    found = sorted(claims.load(path), key=lambda claim: claim.number)
    return {ledger: mine for ledger in LEDGERS if (mine := [claim for claim in found if claim.ledger == ledger])}


def table(found: Sequence[Claim]) -> pd.DataFrame:
    """The claims of one ledger as readers see them, by number, with p-values adjusted over all of them (Holm 1979)."""
    adjusted = claims.adjusted(found)
    shown = claims.to_frame(found)
    shown.insert(0, "", [str(c.number) for c in found])
    return shown.assign(**{"p (Holm)": [_p(adjusted.get(c.id, math.nan)) for c in found]})


def _p(value: float) -> str:
    return "–" if math.isnan(value) else "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def pages() -> dict[str, str]:
    """What is written from the claims, by path in the repository."""
    return {"PAPER.md": paper(), "docs/report.md": report()}


def paper() -> str:
    """PAPER.md: part by part of the paper, what it says, our answer, where it is found, how it is run again."""
    stems = {entry["experiment"]: entry["notebook"] for entry in runs().values()}
    parts = [MAP["preface"].strip()]
    for part in MAP["paper"]:
        keys = [key for key, entry in runs().items() if entry["experiment"] == part["experiment"]]
        mine = [claim for claim in _of(keys) if claim.ledger == "paper"]
        notebook = stems[part["experiment"]]
        again = f"dvc repro --force --single-item {' '.join(f'run@{key}' for key in keys)}"
        here = [f"  - {_sentence(claim)}" for claim in mine]
        lines = [
            f"## {part['what']}",
            f"- *The paper* ({part['where']}): {part['says']}",
            "- *Here*:",
            *here,
            f"- *Notebook*: [{notebook}](notebooks/{notebook}.ipynb). On the published rows: `{again}`; from nothing: "
            f"`python -m i2f.paper verify --share 1 --runs {' '.join(keys)}`",
            f"- *Different here*: {part['different']}",
        ]
        parts.append("\n".join([lines[0], "", *lines[1:]]))
    return "\n\n".join(parts) + "\n"


def _sentence(c: Claim) -> str:
    if c.verdict == "not run":
        return f"{c.statement} **Not run**: {c.note}."
    measured = f"{c.statistic} {claims.interval((c.value, c.low, c.high))}, {c.sample}"
    return f"{c.statement} **{c.verdict.capitalize()}**: {measured}."


def report() -> str:
    """docs/report.md: the template beside this module, in which `{id}` stands for what the claim of that id measured,
    and `{id:verdict}`, `{id:n}` for its verdict and its units; `{verdicts}` for how all of the paper's came out."""
    return TEMPLATE.read_text(encoding="utf-8").format(**_words(), verdicts=verdicts(load()["paper"]))


def findings() -> str:
    """What the README shows: the sentences of `findings`, with what their claims measured."""
    words = _words()
    parts = [
        "\n".join([f"**{part['title']}**", "", *(f"- {line.format(**words)}" for line in part["says"])])
        for part in MAP["findings"]
    ]
    return "\n\n".join(parts)


def _words() -> dict[str, "_Words"]:
    return {c.id: _Words(c) for mine in load().values() for c in mine}


class _Words:
    """A claim as a template's placeholder: its value with its interval; `{id:.2g}`, its value alone; `{id:n}`."""

    def __init__(self, claim: Claim) -> None:
        self.claim = claim

    def __format__(self, part: str) -> str:
        c = self.claim
        if not part:
            return "(not run)" if c.verdict == "not run" else claims.interval((c.value, c.low, c.high))
        return str(getattr(c, part)) if hasattr(c, part) else format(c.value, part)
