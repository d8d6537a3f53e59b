"""The benchmarks' tables as the README and docs/scaling.md show them: `python benchmarks/pages.py` writes them anew."""

import re
from pathlib import Path

import pandas as pd
from common import HERE, show_in_readme

ROOT = HERE.parent
README = "<!-- benchmarks/deep_bound.csv -->"
MAP = "<!-- benchmarks/deep_inversion.csv -->"
TEXTS = "<!-- benchmarks/texts.csv -->"
DOCS = "<!-- a million images -->"
CLOSE = "<!-- end -->"
DAY, HOUR, MILLION, CORES = 86_400, 3_600, 1e6, 1_000


def _number(value: float, digits: int = 2) -> str:
    return "–" if pd.isna(value) else f"{float(f'{value:.{digits}g}'):,g}"


def deep_table(products: pd.DataFrame, bound: pd.DataFrame) -> str:
    """A row a network: a pair of products over a gradient, the bound's cost and memory, the other side's products."""
    lines = [
        "| network | pixels | parameters | J v and Jᵀ v, in gradients | I_lb to 1%: products | seconds | "
        "peak memory, GB | ARPACK on parameters: products | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for network, rows in bound.groupby("network", sort=False):
        ours = rows[rows.side == "input"].iloc[0]
        theirs = rows[rows.side != "input"]
        pair = products.set_index("network")["pair / gradient"].get(network, float("nan"))
        other = [theirs.products.iloc[0], theirs.seconds.iloc[0]] if len(theirs) else [float("nan")] * 2
        cells = [network, f"{ours.d_x:,}", f"{ours.d_theta:,}", _number(pair), f"{ours.products:,}",
                 _number(ours.seconds), _number(ours["peak, GB"]), *map(_number, other)]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def map_table(inversion: pd.DataFrame) -> str:
    """A row an attack: from the gray start's error to what is left, and how it ended."""
    lines = [
        "| network | image | way | MSE at the start | MSE | relative residual | steps | evaluations | how it ended |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in inversion.to_dict("records"):
        ended = str(row["reason"]).split(";")[0].split(":")[0]
        cells = [row["network"], row["image"], row["way"], _number(row["start mse"]), f"{row['mse']:.1e}",
                 f"{row['relative_residual']:.1e}", row["steps"], f"{row['evaluations']:,}", ended]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def texts_table(texts: pd.DataFrame) -> str:
    """A row a network and attacker: how many texts came back whole, and what it took."""
    lines = ["| network | attacker | found whole | tokens | evaluations | seconds |", "|---|---|---|---|---|---|"]
    for row in texts.to_dict("records"):
        lines.append(
            f"| {row['network']} | `{row['attacker']}` | {row['found whole']:.0f} of {row['texts']} | "
            f"{row['tokens']:.1%} | {_number(row['evaluations'], 3)} | {_number(row['seconds'])} |"
        )
    return "\n".join(lines)


def million_table(folder: Path = HERE) -> str:
    """What 10⁶ images cost: seconds of one image in a committed table, times its cores."""
    bound, inversion, jacobian, attacks = (
        pd.read_csv(folder / f"{name}.csv") for name in ("deep_bound", "deep_inversion", "jacobian", "attacks")
    )
    bound = bound[bound.side == "input"].set_index("network").seconds
    timed = re.search(r"threads a process: (\d+)", (folder / "deep_machine.txt").read_text())
    two = re.search(r"threads a process: (\d+)", (folder / "machine.txt").read_text())
    threads, attackers = int(timed.group(1)), int(two.group(1))
    slowest = inversion[(inversion.network == "resnet18 gelu") & (inversion.way == "plain")]
    attacks = attacks.set_index(["dataset", "method"]).seconds
    formed = jacobian[(jacobian.dataset == "cifar10") & (jacobian.dtype == "float64")].iloc[0]
    rows = [
        *((f"I_lb, {name}", "deep_bound", threads, bound[name]) for name in ("resnet18 gelu", "vit", "resnet152")),
        ("J alone, LeNet, CIFAR-10, float64", "jacobian", int(formed.threads), formed.seconds),
        ("`gauss-newton`, LeNet, MNIST", "attacks", attackers, attacks["mnist", "gauss-newton"]),
        ("`gauss-newton`, LeNet, CIFAR-10", "attacks", attackers, attacks["cifar10", "gauss-newton"]),
        ("`dgl`, 24,000 steps, LeNet, MNIST", "attacks", attackers, attacks["mnist", "dgl"]),
        (f"`gauss-newton`, resnet18 gelu, the median of {len(slowest)}", "deep_inversion", 1, slowest.seconds.median()),
    ]
    lines = [
        "| for every image | table | cores | s, one image | core-days, 10⁶ | hours on 1,000 cores |",
        "|---|---|---|---|---|---|",
    ]
    for what, table, cores, seconds in rows:
        work = seconds * cores * MILLION
        lines.append(f"| {what} | {table} | {cores} | {_number(seconds)} | {_number(work / DAY)} | "
                     f"{_number(work / CORES / HOUR)} |")  # fmt: skip
    return "\n".join(lines)


def put(page: Path, opening: str, table: str) -> None:
    """The table between its markers in a page."""
    before, rest = page.read_text(encoding="utf-8").split(opening)
    after = rest.split(CLOSE, 1)[1]
    page.write_text(f"{before}{opening}\n\n{table}\n\n{CLOSE}{after}", encoding="utf-8")


def main() -> None:
    show_in_readme()
    products, bound = (pd.read_csv(HERE / f"deep_{part}.csv") for part in ("products", "bound"))
    put(ROOT / "README.md", README, deep_table(products, bound))
    put(ROOT / "README.md", MAP, map_table(pd.read_csv(HERE / "deep_inversion.csv")))
    put(ROOT / "README.md", TEXTS, texts_table(pd.read_csv(HERE / "texts.csv")))
    put(ROOT / "docs" / "scaling.md", DOCS, million_table())


if __name__ == "__main__":
    main()
