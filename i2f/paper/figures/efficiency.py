"""What an answer costs: estimates and attacks side by side, in gradient evaluations."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i2f.attacks import METHODS
from i2f.paper.attackers import ATTACKERS
from i2f.paper.figures.style import DATASETS, INK, style
from i2f.paper.results import Config, Results

LOOKS = {  # name in tables -> label, colour, marker
    "I_lb": ("lower bound I_lb", "#111111", "<"),
    "I²F": ("exact I²F", "#777777", ">"),
    **{name: (ATTACKERS[name].label, ATTACKERS[name].colour, ATTACKERS[name].marker) for name in METHODS},
}


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    return {"overview.svg": overview(found.tables["problems"])}


def overview(table: pd.DataFrame) -> Figure:
    """One panel per network, one row per method, one point per image; hollow: the attack did not arrive."""
    style()
    networks = list(table.network.unique())
    size = (1.4 + 3.1 * len(networks), 3.2)
    figure, axes = plt.subplots(
        1, len(networks), figsize=size, layout="constrained", squeeze=False, sharey=True, sharex=True
    )
    for ax, network in zip(axes[0], networks, strict=True):
        cost(ax, table[table.network == network], [m for m in LOOKS if m in set(table.method)])
        ax.set_title(f"{DATASETS.get(table.dataset.iloc[0], table.dataset.iloc[0])}, {network}", fontsize="medium")
    figure.supxlabel("gradient evaluations (hollow: budget spent, not arrived)", fontsize="medium", color=INK)
    return figure


def cost(ax: Axes, table: pd.DataFrame, methods: list[str]) -> None:
    """Gradient evaluations of every method, logarithmic; a row is empty where a network was not asked for it."""
    for row, method in enumerate(methods):
        _, colour, marker = LOOKS[method]
        for reached, face in ((True, colour), (False, "white")):
            some = table[(table.method == method) & (table.reached == reached)]
            ax.scatter(
                some.evaluations, [row] * len(some), s=34, marker=marker, facecolor=face, edgecolor=colour, zorder=3
            )
    ax.set(xscale="log")
    ax.set_yticks(range(len(methods)), [LOOKS[m][0] for m in methods], color=INK)
    ax.set_ylim(len(methods) - 0.5, -0.5)
