"""The reproduction report: how many published rows were solved anew, how many agree, and which do not."""

from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import pandas as pd

from i2f.paper import rows, tables
from i2f.paper.cells import write as write_file
from i2f.paper.rows import Declared
from i2f.paper.tolerances import Deviation
from i2f.paper.workers import Problem, Row, Solve


@dataclass(frozen=True)
class Case:
    """One published problem with its rows. cost: in seconds of one core, from gradient evaluations."""

    run: str
    table: str
    solve: Solve
    problem: Problem
    rows: list[Row]
    cost: float

    @property
    def declared(self) -> Declared:
        return rows.declaration(self.solve)

    @property
    def name(self) -> str:
        return f"{self.run}/{self.table}"


@dataclass
class Report:
    """cases: the sample, of `known` published problems. found: those tried, with the deviations of their columns.
    changed: claims with another verdict than the published one: (id, published, now)."""

    cases: list[Case]
    known: int
    found: list[tuple[Case, list[Deviation]]] = field(default_factory=list)
    changed: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def disagreements(self) -> list[tuple[Case, Deviation]]:
        return [(case, one) for case, several in self.found for one in several if not one.agrees]

    @property
    def reproduced(self) -> bool:
        return not self.disagreements and not self.changed and len(self.found) == len(self.cases)


def write(report: Report, path: Path) -> None:
    """The report in the terminal, and as one HTML file."""
    wrong = report.disagreements
    by_table, columns = _by_table(report), _by_column(report)
    print(f"\n{by_table.to_string(index=False)}\n\nlargest deviation by column, over its tolerance")
    print(f"{columns.to_string(index=False)}\n")
    for case, one in wrong:
        print("DISAGREES " + words(case, one))
    for name, published, now in report.changed:
        print(f"CHANGED   {name}: {published} -> {now}")
    print(f"{'reproduced' if report.reproduced else 'NOT reproduced'}: {_sentence(report)}; report: {path}")
    folder = Path(__file__).parent
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined
    ).get_template("verify.html.j2")
    page = template.render(
        report=report,
        sentence=_sentence(report),
        tables=by_table.to_dict("records"),
        columns=columns.to_dict("records"),
        wrong=[(case.name, _described(case), one) for case, one in wrong],
        origin=tables.origin(),
    )
    write_file(path, page.encode())


def _sentence(report: Report) -> str:
    agreed = len(report.found) - len({id(case) for case, _ in report.disagreements})
    return (
        f"{agreed:,} of {len(report.found):,} problems agree, tried of {report.known:,} published; "
        f"{len(report.changed)} verdicts changed"
    )


def _by_table(report: Report) -> pd.DataFrame:
    wrong = {id(case) for case, _ in report.disagreements}
    tried = pd.DataFrame({"table": case.name, "agreed": id(case) not in wrong} for case, _ in report.found)
    return tried.groupby("table", sort=True).agreed.agg(tried="size", agreed="sum").reset_index()


def _by_column(report: Report) -> pd.DataFrame:
    found = pd.DataFrame(
        {"table": case.name, "column": d.column, "tolerance": d.kind, "relative": d.relative, "over tolerance": d.size}
        for case, several in report.found
        for d in several
        if d.size > 0
    )
    if not len(found):
        return pd.DataFrame(columns=["table", "column", "tolerance", "relative", "over tolerance"])
    worst = found.loc[found.groupby(["column", "tolerance"])["over tolerance"].idxmax()]
    worst = worst.sort_values("over tolerance", ascending=False)
    return worst.assign(**{n: worst[n].map("{:.2g}".format) for n in ("relative", "over tolerance")})


def words(case: Case, one: Deviation) -> str:
    return (
        f"{case.name}: {one.column} was {one.published!r}, is {one.again!r}, {one.size:.3g} times its tolerance "
        f"({one.kind}); of {_described(case)}"
    )


def _described(case: Case) -> str:
    defaults = case.declared.defaults
    return ", ".join(
        f"{name}={value}" for name, value in case.problem.items() if name not in defaults or defaults[name] != value
    )
