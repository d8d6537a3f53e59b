"""Texts: predicted and measured errors of embeddings, how much is left as noise grows, and the words themselves."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i2f.paper.figures.style import INK, LINE, diagonal, style

NETWORKS = {  # (network, task) -> label, colour, marker
    ("bert-tiny", "classification"): ("BERT-type, tiny", "#0072B2", "o"),
    ("gpt2-tiny", "classification"): ("GPT-2-type, tiny", "#D55E00", "s"),
    ("gpt2-tiny", "causal"): ("the same, next token", "#CC79A7", "D"),
    ("minilm", "classification"): ("MiniLM", "#009E73", "P"),
}
OTHERS = ("#E69F00", "#56B4E9", "#F0E442")
READ, REFINED = "reading", "gauss-newton"
RIGHT, WRONG = "#0072B2", "#D55E00"


def published(run: Path) -> dict[str, Figure]:
    """The figures of a run's folder, by file name."""
    table = pd.read_csv(run / "problems.csv")
    return {"overview.svg": overview(table), "words.svg": words(table)}


def overview(table: pd.DataFrame) -> Figure:
    """Three panels: the error of embeddings against I²F; what is left of the text, and of the answer, against I_lb."""
    style()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12.5, 4.1), layout="constrained")
    noisy = table[(table.relative > 0) & ~table.failed.astype(bool)]
    _prediction(left, noisy)
    _against_bound(middle, noisy, "rougeL")
    middle.set(ylabel="mean ROUGE-L", ylim=(-0.04, 1.04))
    middle.set_title("How much text is left")
    _against_bound(right, noisy, "feature_mse")
    right.set(yscale="log", ylabel="mean squared change of the logits")
    right.set_title("How far the answer moves")
    handles, labels = middle.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    return figure


def _prediction(ax: Axes, noisy: pd.DataFrame) -> None:
    for name, rows in noisy[noisy.attacker == REFINED].groupby(["network", "task"], sort=False):
        _, colour, marker = _look(name, 0)
        face = [colour if settled else "white" for settled in rows.converged]
        ax.scatter(rows.predicted_rmse, rows.rmse, s=26, marker=marker, facecolor=face, edgecolor=colour, zorder=3)
    ax.set(xscale="log", yscale="log", xlabel="predicted RMSE of an embedding's entry, I²F", ylabel="measured RMSE")
    ax.set_title("Is I²F right?")
    if ax.collections:
        diagonal(ax)
        spread = noisy.spread[noisy.attacker == REFINED].iloc[0]
        ax.axvline(spread, color=LINE, lw=1, ls=":")
        ax.annotate("deviation of\nan embedding", (spread, 0.03), (-4, 0), xycoords=("data", "axes fraction"),
                    textcoords="offset points", ha="right", fontsize="x-small", color=INK)  # fmt: skip


def _against_bound(ax: Axes, noisy: pd.DataFrame, column: str) -> None:
    """A line a network and attacker through the means at each level."""
    for number, (name, rows) in enumerate(noisy.groupby(["network", "task"], sort=False)):
        label, colour, marker = _look(name, number)
        for attacker, line, words in ((READ, (0, (4, 2)), "read"), (REFINED, "-", "refined")):
            some = rows[rows.attacker == attacker].groupby("relative")[["bound_norm", column]].mean()
            some = some[some[column] > 0] if column == "feature_mse" else some  # a text read whole changes nothing
            if len(some):
                ax.plot(some.bound_norm, some[column], marker=marker, ms=5, ls=line, color=colour, lw=1.4,
                        mfc=colour if attacker == REFINED else "white", label=f"{label}, {words}")  # fmt: skip
    ax.set(xscale="log", xlabel="I$_{lb}$, L2 norm")


def _look(name: tuple[str, str], number: int) -> tuple[str, str, str]:
    return NETWORKS.get(name, (" ".join(name), OTHERS[number % len(OTHERS)], "v"))


def _plain(token: str) -> str:
    """As the figures' font has it: other scripts as a box, long words cut."""
    return "".join(letter if letter.isascii() else "□" for letter in token)[:12].replace("$", r"\$")


def words(table: pd.DataFrame, network: str = "bert-tiny", task: str = "classification", text: int = 0) -> Figure:
    """One text as it comes back from each level of noise, read and refined: right words blue, wrong ones red."""
    style()
    rows = table[(table.network == network) & (table.task == task) & (table.text == text)]
    rows = rows[rows.attacker.isin([READ, REFINED])].sort_values(["attacker", "relative"], ascending=[False, True])
    truth = rows.truth.iloc[0].split()
    lines = [("the text", "", truth)]
    lines += [(f"{row.relative:g}", {READ: "read", REFINED: "refined"}[row.attacker], str(row.found).split())
              for row in rows.itertuples()]  # fmt: skip
    inside = [place for place, token in enumerate(truth) if token not in ("[CLS]",)]
    figure, ax = plt.subplots(figsize=(0.92 * len(inside) + 2.2, 0.3 * len(lines) + 0.7), layout="constrained")
    for height, (level, attacker, tokens) in enumerate(lines):
        first = height == 0
        ax.text(-0.15, -height, f"{attacker}  {level}".strip(), ha="right", va="center", fontsize=8.5, color=INK)
        for column, place in enumerate(inside):
            right = tokens[place] == truth[place]
            ax.text(column + 0.5, -height, _plain(tokens[place]), ha="center", va="center", fontsize=8,
                    color=INK if first else RIGHT if right else WRONG, weight="bold" if first else "normal",
                    family="DejaVu Sans")  # fmt: skip
    ax.set(xlim=(-2.2, len(inside)), ylim=(-len(lines) + 0.4, 0.7))
    ax.set_axis_off()
    label = _look((network, task), 0)[0]
    ax.set_title(f"{label}: what comes back, by relative noise (blue: right, red: wrong)", fontsize="small")
    return figure
