"""The benchmarks' tables as the pages of docs/ show them: `python benchmarks/pages.py` writes them anew."""

import re
from pathlib import Path

import pandas as pd
from common import HERE, show

ROOT = HERE.parent
BOUND = "<!-- benchmarks/deep_bound.csv -->"
MAP = "<!-- benchmarks/deep_inversion.csv -->"
TEXTS = "<!-- benchmarks/texts.csv -->"
DOCS = "<!-- a million images -->"
GPU = "<!-- benchmarks/deep_bound-cuda.csv -->"
EXACT = "<!-- benchmarks/deep_influence-cuda.csv -->"
RECOVERED = 1e-6  # an MSE that counts as recovered
EXACTLY = 1e-16  # and as exactly so
RECURSIVE, FORECAST = "<!-- benchmarks/recursive.csv -->", "<!-- benchmarks/recursive_forecast.csv -->"
RGAP, ALONE = "<!-- benchmarks/rgap.csv -->", "<!-- benchmarks/recursive_alone.csv -->"
CLOSE = "<!-- end -->"
DAY, HOUR, MILLION, CORES = 86_400, 3_600, 1e6, 1_000


def _number(value: float, digits: int = 2) -> str:
    return "–" if pd.isna(value) else f"{float(f'{value:.{digits}g}'):,g}"


def deep_table(products: pd.DataFrame, bound: pd.DataFrame) -> str:
    """One row per network: cost of a pair of products, of the bound with its memory, and of the other side."""
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
        cells = [
            network,
            f"{ours.d_x:,}",
            f"{ours.d_theta:,}",
            _number(pair),
            f"{ours.products:,}",
            _number(ours.seconds),
            _number(ours["peak, GB"]),
            *map(_number, other),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def map_table(inversions: dict[str, pd.DataFrame]) -> str:
    """One row per network, way and device: how many images came back, what is left of them, cost, and end."""
    lines = [
        f"| network | way | on | images | MSE ≤ {RECOVERED:.0e} | median MSE | largest MSE | "
        "median relative residual | steps | evaluations | how they ended |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    table = pd.concat([t.assign(on=on) for on, t in inversions.items()])
    for (network, way, on), rows in table.groupby(["network", "way", "on"], sort=False):
        endings = rows.reason.str.split("[;:]").str[0].str.replace(r"used its \d+ steps", "out of steps", regex=True)
        cells = [
            network,
            way,
            on,
            len(rows),
            f"{(rows.mse <= RECOVERED).sum()} of {len(rows)}",
            f"{rows.mse.median():.1e}",
            f"{rows.mse.max():.1e}",
            f"{rows.relative_residual.median():.1e}",
            _number(rows.steps.median()),
            _number(rows.evaluations.median(), 3),
            ", ".join(dict.fromkeys(endings)),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def influence_table(influence: pd.DataFrame, rate: pd.DataFrame) -> str:
    """Exact, damped I²F and the bound of one image under one relative noise; then attacks a second."""
    lines = [
        "| network | I_lb, RMSE | s | damped I²F by products, RMSE | residual | s | damped, J Jᵀ formed | "
        "exact I²F, RMSE | rank | λ_min/λ_max | s, J Jᵀ formed |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in influence.to_dict("records"):
        cells = [
            row["network"],
            *(
                _number(row[name])
                for name in ("I_lb", "I_lb: s", "damped", "residual", "damped: s", "damped, dense", "exact")
            ),
            "–" if pd.isna(row["rank"]) else f"{row['rank']:,.0f} of {row['d_x']:,}",
            _number(row["smallest / lambda_max"]),
            _number(row["exact: s"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| attack | network | attacks | attacks a second | evaluations each | median MSE |",
        "|---|---|---|---|---|---|",
    ]
    for row in rate.to_dict("records"):
        steps = f", {row['steps allowed']} steps" if row["method"] != "gauss-newton" else ""
        cells = [
            f"`{row['method']}`{steps}, {row['dtype']}",
            row["network"],
            row["attacks"],
            _number(row["attacks / s"]),
            _number(row["evaluations"], 3),
            f"{row['median mse']:.0e}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def recursive_table(rows: pd.DataFrame) -> str:
    """One row per network, precision and noise: how many images came back, what is left of them, and the time."""
    lines = [
        f"| network | gradient | images | MSE ≤ {RECOVERED:.0e} | MSE ≤ {EXACTLY:.0e} | median MSE | largest MSE "
        "| I²F's, median | median seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (part, network, noise), some in rows.groupby(["part", "network", "noise"], sort=False):
        gradient = "float32" if part == "float32" else f"relative noise {noise:.0e}" if noise else "float64"
        if part == "trained":
            network = f"{network} trained on digits, {some.accuracy.iloc[0]:.0%} right"
        counts = [f"{(some.mse <= level).sum()} of {len(some)}" for level in (RECOVERED, EXACTLY)]
        errors = [
            f"{some.mse.median():.0e}",
            f"{some.mse.max():.0e}",
            f"{some.predicted.median():.0e}" if noise else "–",
        ]
        lines.append(
            f"| {' | '.join([network, gradient, str(len(some)), *counts, *errors, _number(some.seconds.median())])} |"
        )
    return "\n".join(lines)


def forecast_table(rows: pd.DataFrame) -> str:
    """One row per network: how far down the recursion reads by a layer's own equations."""
    lines = [
        "| network | pixels | layers read | the first that is short | equations | unknowns |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows.to_dict("records"):
        if pd.isna(row["layers"]):
            cells = [row["network"], row["pixels"], "none", row["first short"].split(":")[0], "–", "–"]
        else:
            read, first = f"{row['before']:.0f} of {row['layers']:.0f}", row["first short"]
            where = "–" if pd.isna(first) else f"{first}{', behind the pool' if row['what'] == 'pool' else ''}"
            cells = [row["network"], row["pixels"], read, where, _number(row["rank"], 6), _number(row["unknowns"], 6)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rgap_table(rows: pd.DataFrame) -> str:
    """One row per attack on R-GAP's own network."""
    lines = ["| attack | images | median MSE | largest MSE | median seconds |", "|---|---|---|---|---|"]
    for attack, some in rows.groupby("attack"):
        cells = [attack, len(some), f"{some.mse.median():.0e}", f"{some.mse.max():.0e}", _number(some.seconds.median())]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def alone_table(rows: pd.DataFrame) -> str:
    """Seconds and memory of single attacks."""
    seconds, own = rows.seconds, rows["peak, GB"] - rows.before
    cells = [
        len(rows),
        _number(seconds.median()),
        _number(seconds.max()),
        _number(own.max()),
        _number(rows.before.max()),
    ]
    return "\n".join(
        [
            "| images | median seconds | most | memory of the attack, GB | before it: PyTorch, network, gradient |",
            "|---|---|---|---|---|",
            f"| {' | '.join(map(str, cells))} |",
        ]
    )


def texts_table(texts: pd.DataFrame) -> str:
    """One row per network and attacker: how many texts came back whole, and what it took."""
    lines = [
        "| network | attacker | found whole | tokens | most starts | evaluations | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in texts.to_dict("records"):
        found = f"{row['found whole']:.0f} of {row['texts']}"
        counts = [_number(row["starts"]), _number(row["evaluations"], 3), _number(row["seconds"])]
        cells = [row["network"], f"`{row['attacker']}`", found, f"{row['tokens']:.1%}", *counts]
        lines.append(f"| {' | '.join(cells)} |")
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
        lines.append(
            f"| {what} | {table} | {cores} | {_number(seconds)} | {_number(work / DAY)} | "
            f"{_number(work / CORES / HOUR)} |"
        )
    return "\n".join(lines)


def tables(folder: Path = HERE) -> dict[tuple[str, str], str]:
    """Page and marker -> what stands there."""

    def read(name: str) -> pd.DataFrame:
        return pd.read_csv(folder / f"{name}.csv")

    device = (folder / "deep_machine-cuda.txt").read_text().split(";")[0].removeprefix("NVIDIA ")
    return {
        ("docs/costs.md", BOUND): deep_table(read("deep_products"), read("deep_bound")),
        ("docs/costs.md", MAP): map_table({"2 cores": read("deep_inversion"), device: read("deep_inversion-cuda")}),
        ("docs/relu.md", RECURSIVE): recursive_table(read("recursive")),
        ("docs/relu.md", FORECAST): forecast_table(read("recursive_forecast")),
        ("docs/relu.md", RGAP): rgap_table(read("rgap")),
        ("docs/relu.md", ALONE): alone_table(read("recursive_alone")),
        ("docs/texts.md", TEXTS): texts_table(read("texts")),
        ("docs/scaling.md", GPU): deep_table(read("deep_products-cuda"), read("deep_bound-cuda")),
        ("docs/scaling.md", EXACT): influence_table(read("deep_influence-cuda"), read("deep_rate-cuda")),
        ("docs/scaling.md", DOCS): million_table(folder),
    }


def put(page: Path, opening: str, table: str) -> None:
    """The table between its markers in a page."""
    before, rest = page.read_text(encoding="utf-8").split(opening)
    after = rest.split(CLOSE, 1)[1]
    page.write_text(f"{before}{opening}\n\n{table}\n\n{CLOSE}{after}", encoding="utf-8")


def main() -> None:
    show()
    for (page, opening), table in tables().items():
        put(ROOT / page, opening, table)


if __name__ == "__main__":
    main()
