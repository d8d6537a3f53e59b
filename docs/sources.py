"""What the site adds to the repository's own pages: folded code, equations of docstrings, the ledgers as tables."""

import html
import json
import math
import os
import re
from typing import Any

import play  # beside this file

from i2f.paper import claims, ledger
from i2f.paper.books import ROOT
from i2f.paper.claims import LEDGERS, VERDICTS, Claim

LEDGER = "<!-- ledger -->"  # where docs/ledger.md has the tables
PLAY = "<!-- play -->"  # where docs/play.md has its form


def written(app: Any, docname: str, source: list[str]) -> None:
    """Sphinx's "source-read": notebooks with their code folded, apart from the parameters, since the site is read
    before it is run; the ledgers' tables."""
    if docname.startswith("notebooks/"):
        book, name = json.loads(source[0]), docname.removeprefix("notebooks/")
        if (repository := os.environ.get("I2F_REPOSITORY")) and name in ledger.MAP["tracks"]["start"]:
            about = {"cell_type": "markdown", "metadata": {}, "source": elsewhere(repository, name)}
            book["cells"].insert(1, about)
        for cell in book["cells"]:
            tags = cell["metadata"].setdefault("tags", [])
            if cell["cell_type"] == "code" and "parameters" not in tags:
                tags.append("hide-input")
        source[0] = json.dumps(book)
        return
    here = (ROOT / docname).parent
    folder = lambda m: f"`{m[1]}`" if (here / m[2]).is_dir() else m[0]  # noqa: E731
    source[0] = re.sub(r"\[([^\]]+)\]\(([^)#:]+)\)", folder, source[0])  # a site has no page for a folder
    if LEDGER in source[0]:
        source[0] = source[0].replace(LEDGER, f"```{{raw}} html\n{tables()}\n```")
    if PLAY in source[0]:
        source[0] = source[0].replace(PLAY, f"```{{raw}} html\n{play.page(play.published())}\n```")


def elsewhere(repository: str, name: str) -> str:
    """Where else a notebook runs, whose rows the wheel carries. repository: OWNER/NAME on GitHub, the one place that
    says it; the workflow that publishes the site knows its own."""
    return (
        f"Run it: [in Binder](https://mybinder.org/v2/gh/{repository}/HEAD?labpath=notebooks%2F{name}.ipynb), or "
        f"[in Colab](https://colab.research.google.com/github/{repository}/blob/HEAD/notebooks/{name}.ipynb) with "
        f'`%pip install "i2f[companion] @ git+https://github.com/{repository}"` as its first cell.'
    )


def tables() -> str:
    """Both ledgers in one table with a search field and two filters, which docs/static/site.js serves."""
    rows = []
    for found in ledger.load().values():
        chances = claims.adjusted(found)
        rows += [_row(c, chances.get(c.id, math.nan)) for c in found]
    names = ("", "claim", "measured", "holds when", "verdict", "p (Holm)")
    head = "".join(f"<th scope='col'>{name}</th>" for name in names)
    ways = "".join(f"<option>{name}</option>" for name in VERDICTS)
    which = "".join(f"<option value='{name}'>{words}</option>" for name, words in LEDGERS.items())
    return (
        "<div class='ledger'><p><label>Search <input type='search'></label> "
        f"<label>Ledger <select name='ledger'><option value=''>both</option>{which}</select></label> "
        f"<label>Verdict <select name='verdict'><option value=''>any</option>{ways}</select></label> "
        "<output></output></p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(c: Claim, chance: float) -> str:
    measured = "" if c.verdict == "not run" else f": {claims.interval((c.value, c.low, c.high))}, {c.sample}"
    undecided = f"<br><small>about {c.needed:,.0f} would decide</small>" if math.isfinite(c.needed) else ""
    note = f"<br><small>{html.escape(c.note)}</small>" if c.note else ""
    cells = (
        str(c.number),
        f"{html.escape(c.statement)}<br><small>{html.escape(c.attacker)}</small>",
        f"{html.escape(c.statistic + measured)}{note}",
        html.escape(c.holds_when),
        f"<strong>{c.verdict}</strong>{undecided}",
        "–" if math.isnan(chance) else "&lt; 0.0001" if chance < 1e-4 else f"{chance:.2g}",
    )
    inside = "".join(f"<td>{cell}</td>" for cell in cells)
    return f"<tr id='{html.escape(c.id)}' data-ledger='{c.ledger}' data-verdict='{c.verdict}'>{inside}</tr>"


SECTION = re.compile(r"(Args|Raises|Returns|Attributes):.*")
OWN = re.compile(r"(Keywords \(|Errors of|One draw of|Further).*:")
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ᵀ", "0123456789-T")


def equations(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Sphinx's "autodoc-process-docstring": an indented block that is no section's is display mathematics, one equation
    a line; what stands behind two spaces or more, without an equality, is text."""
    found, section, inside = [], False, False
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if OWN.fullmatch(line):  # sections of our own, which no style guide knows
            found += [f"**{line.rstrip(':')}**", "", "Attributes:" if "Keywords" not in line else "Keyword Args:"]
            section = True
            continue
        section = bool(SECTION.fullmatch(line)) or (section and (indent > 0 or not line.strip()))
        opens = indent >= 4 and not section and (not number or not lines[number - 1].strip())
        inside = bool(line.strip()) and (inside or opens) and indent >= 4
        if inside:
            equation, words = line.strip(), ""
            if aside := re.search(r"\s{2,}(?!=)([^=]*)$", equation):
                equation, words = equation[: aside.start()], rf"\qquad\text{{{re.sub(' {2,}', ', ', aside[1])}}}"
            found += ["", f".. math:: {tex(equation)}{words.replace('`', '')}", ""]
        else:
            found.append(line)
    lines[:] = found


def tex(equation: str) -> str:
    """Mathematics as docstrings write it, in letters of its own, for KaTeX."""
    equation = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻ᵀ]+", lambda m: f"^{{{m[0].translate(RAISED)}}}", equation)
    equation = re.sub("[₀₁₂₃]", lambda m: f"_{'₀₁₂₃'.index(m[0])}", equation)
    for sign, command in {"‖": r"\Vert ", "⟨": r"\langle ", "⟩": r"\rangle ", "→": r"\to ", "·": r"\cdot "}.items():
        equation = equation.replace(sign, command)
    return equation
