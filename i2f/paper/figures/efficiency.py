"""What I_lb costs against an attack, by network, and against exact I²F and Gauss–Newton, in gradient evaluations."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i2f.paper.experiments.efficiency import ATTACK, BOUND, EXACT, attack_cost
from i2f.paper.figures.style import AMBER, BLUE, GREEN, INK, LINE, VERMILION, style
from i2f.paper.results import Config, Results


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    return {"overview.svg": overview(found.tables["problems"], config["adam_steps"], config["cheaper"])}


def overview(table: pd.DataFrame, steps: int, cheaper: float) -> Figure:
    """Left: the share of an attack's cost, by network. Right: the same, with what an exact answer costs, on the network
    on which that was measured."""
    style()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 3.9), layout="constrained", width_ratios=[1.4, 1])
    shares(left, table, steps, cheaper)
    left.set_title("The bound takes under 0.1% of the budget")
    alternatives(right, table[table.network == table.network.iloc[0]], steps)
    right.set(title="Exact I²F costs half of Gauss–Newton", xlabel=f"gradient evaluations, {table.network.iloc[0]}")
    return figure


def shares(ax: Axes, table: pd.DataFrame, steps: int, cheaper: float) -> None:
    """I_lb's evaluations over an attack's: the median over images or texts, and their range. Dotted: the claim."""
    shares = table[table.method == BOUND].assign(share=lambda t: t.evaluations / attack_cost(steps))
    networks = shares.groupby("network", sort=False).share
    rows = range(networks.ngroups)
    ax.hlines(rows, networks.min(), networks.max(), color=BLUE, lw=5, alpha=0.35, zorder=2)
    ax.scatter(networks.median(), rows, s=34, marker="o", color=BLUE, zorder=3)
    ax.axvline(cheaper, color=VERMILION, lw=1.2, ls=":", zorder=1)
    ax.set(xscale="log", xlim=(None, 1), xlabel="gradient evaluations of I_lb over those of the attack")
    ax.set_yticks(rows, networks.median().index, color=INK)
    ax.set_ylim(len(rows) - 0.5, -0.5)


def alternatives(ax: Axes, table: pd.DataFrame, steps: int) -> None:
    """Median evaluations of I_lb, exact I²F and Gauss–Newton, and of the attack's published budget."""
    medians = table.groupby("method").evaluations.median()
    bars = {
        "lower bound I_lb": (medians[BOUND], BLUE),
        "exact I²F": (medians[EXACT], GREEN),
        "Gauss–Newton": (medians[ATTACK], AMBER),
        f"Adam, {steps:,} steps (not run)": (attack_cost(steps), LINE),
    }
    for row, (count, colour) in enumerate(bars.values()):
        ax.barh(row, count, color=colour, height=0.6)
        ax.annotate(f"{count:,.0f}", (count, row), (3, 0), textcoords="offset points", va="center", fontsize="small")
    ax.set(xscale="log", xlim=(1, 10 * attack_cost(steps)))
    ax.set_yticks(range(len(bars)), list(bars), color=INK)
    ax.invert_yaxis()
