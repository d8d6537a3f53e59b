"""Texts: predicted and measured errors of embeddings, how much is recovered under noise, and the words themselves."""

import itertools

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i2f.paper.attackers import ATTACKERS
from i2f.paper.figures.style import AMBER, BLUE, GREEN, INK, LINE, PINK, SKY, VERMILION, diagonal, marks, style
from i2f.paper.results import Config, Results

NETWORKS = {  # (network, task) -> label, colour, marker
    ("bert-tiny", "classification"): ("BERT-type, tiny", BLUE, "o"),
    ("gpt2-tiny", "classification"): ("GPT-2-type, tiny", VERMILION, "s"),
    ("gpt2-tiny", "causal"): ("GPT-2-type, next token", PINK, "D"),
    ("minilm", "classification"): ("MiniLM", GREEN, "P"),
}
OTHERS = (AMBER, SKY, "#F0E442")
READ, REFINED = "reading", "gauss-newton"
SHOWN = {READ: ATTACKERS["reading"], REFINED: ATTACKERS["gauss-newton, texts"]}
RIGHT, WRONG = BLUE, VERMILION


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    table = found.tables["problems"]
    return {"overview.svg": overview(table, config["low"], config["high"]), "words.svg": words(table)}


def overview(table: pd.DataFrame, low: float, high: float) -> Figure:
    """Three panels: the text that is read and the change of the logits against I_lb, embeddings' errors against I²F.

    low, high: values of I_lb that the claims are about.
    """
    style()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12.5, 4.4), layout="constrained")
    noisy = table[table.variance > 0]
    read = noisy[noisy.attacker == READ]
    _against_bound(left, read, "rougeL")
    for ax, bound in itertools.product((left, middle), (low, high)):
        ax.axvline(bound, color=LINE, lw=1, ls=":", zorder=1)
    left.set(ylabel="ROUGE-L", ylim=(-0.04, 1.04))
    left.set_title("Noise takes the text away")
    _against_bound(middle, read[read.feature_mse > 0], "feature_mse")  # a text read whole changes nothing
    middle.set(yscale="log", ylabel="mean squared change of the logits")
    middle.set_title("The logits move with the bound")
    _prediction(right, noisy[noisy.attacker == REFINED])
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    return figure


def _prediction(ax: Axes, refined: pd.DataFrame) -> None:
    for name, rows in refined.groupby(["network", "task"], sort=False):
        _, colour, marker = _look(name, 0)
        marks(ax, rows.predicted_rmse, rows.rmse, rows.converged, colour, marker, alpha=0.8)
    ax.set(xscale="log", yscale="log", xlabel="predicted RMSE of an embedding's entry, I²F", ylabel="measured RMSE")
    ax.set_title("I²F predicts small errors of embeddings")
    if not len(refined):
        return
    diagonal(ax)
    spread = refined.spread.iloc[0]
    ax.axvline(spread, color=LINE, lw=1, ls=":")
    ax.annotate(
        "deviation of\nan embedding",
        (spread, 0.03),
        (-4, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right",
        fontsize="x-small",
        color=INK,
    )


def _against_bound(ax: Axes, read: pd.DataFrame, column: str) -> None:
    """Per network: the texts under levels of relative noise, a cloud with its mean; at the given bounds, side by side,
    the median over texts and the middle four in five."""
    for number, (name, rows) in enumerate(read.groupby(["network", "task"], sort=False)):
        label, colour, marker = _look(name, number)
        given, swept = rows[rows.bound.notna()].groupby("bound")[column], rows[rows.bound.isna()]
        ax.scatter(swept.bound_norm, swept[column], s=12, marker=marker, color=colour, alpha=0.3, lw=0, zorder=2)
        levels = swept.groupby("relative")
        ax.plot(levels.bound_norm.median(), levels[column].mean(), color=colour, lw=1.2, label=label, zorder=3)
        middle = given.median()
        at = middle.index.to_numpy() * 1.25 ** (number - 1.5)
        ax.vlines(at, given.quantile(0.1), given.quantile(0.9), color=colour, lw=3, alpha=0.35, zorder=4)
        ax.plot(at, middle, marker=marker, ms=5, ls="", color=colour, mec="white", mew=0.6, zorder=5)
    ax.set(xscale="log", xlabel="I$_{lb}$, L2 norm")


def _look(name: tuple[str, str], number: int) -> tuple[str, str, str]:
    return NETWORKS.get(name, (" ".join(name), OTHERS[number % len(OTHERS)], "v"))


def _plain(token: str) -> str:
    """As the figures' font has it: other scripts as a box, long words cut."""
    return "".join(letter if letter.isascii() else "□" for letter in token)[:12].replace("$", r"\$")


def words_shown(table: pd.DataFrame) -> pd.DataFrame:
    """The first text of the first network as it is recovered under each noise, read and refined."""
    rows = table[(table[["network", "task", "text"]] == table[["network", "task", "text"]].iloc[0]).all(axis=1)]
    rows = rows[rows.attacker.isin([*SHOWN])].sort_values(["attacker", "bound_norm"], ascending=[False, True])
    return rows[["network", "task", "attacker", "bound_norm", "truth", "found"]].reset_index(drop=True)


def words(table: pd.DataFrame) -> Figure:
    """The texts of `words_shown`: right words blue, wrong ones orange."""
    style()
    rows = words_shown(table)
    truth = rows.truth.iloc[0].split()
    lines = [("the text", truth)]
    for attacker, bound, found in zip(rows.attacker, rows.bound_norm, rows.found, strict=True):
        size = f"{bound:.0e}" if bound else "0"
        lines.append((f"{SHOWN[attacker].label}  {size}", str(found).split()))
    inside = [place for place, token in enumerate(truth) if token != "[CLS]"]
    figure, ax = plt.subplots(figsize=(0.92 * len(inside) + 2.2, 0.3 * len(lines) + 0.7), layout="constrained")
    for row, (name, tokens) in enumerate(lines):
        ax.text(-0.15, -row, name, ha="right", va="center", fontsize=8.5, color=INK)
        for column, place in enumerate(inside):
            colour = RIGHT if tokens[place] == truth[place] else WRONG
            word = ax.text(column + 0.5, -row, _plain(tokens[place]), ha="center", va="center", fontsize=8)
            word.set(color=colour if row else INK, weight="normal" if row else "bold", family="DejaVu Sans")
    ax.set(xlim=(-2.2, len(inside)), ylim=(-len(lines) + 0.4, 0.7))
    ax.set_axis_off()
    label = _look((rows.network[0], rows.task[0]), 0)[0]
    ax.set_title(
        f"{label}: what is recovered, by the I$_{{lb}}$ of the noise (blue: right, orange: wrong)", fontsize="small"
    )
    return figure
