"""Training for privacy: accuracy against an attacker's error, and what a penalty changes within a seed."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i2f.paper import estimates
from i2f.paper.estimates import Estimate
from i2f.paper.experiments import joint
from i2f.paper.figures.style import BLUE, GREEN, INK, LINE, VERMILION, readable_ticks, style
from i2f.paper.results import Config, Results

METHODS = {  # name -> label, colour, marker
    "plain": ("plain", INK, "o"),
    "bound": ("penalty on λ$_{max}$", BLUE, "s"),
    "bayes": ("penalty on the Bayes error", GREEN, "D"),
    "dp": ("clipping and noise, local DP", VERMILION, "X"),
}
NOISES = {"bayes_rmse": "same noise", "relative": "noise in proportion"}


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    return {"overview.svg": overview(found.tables["problems"], config["gain"])}


def overview(table: pd.DataFrame, gain: float) -> Figure:
    """Left: accuracy against the error of an attacker with a prior, a pale mark per seed and means with their 95%
    intervals. Right: the penalised network's error over the plain one's of the same seed; dotted: `gain`."""
    style()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4), layout="constrained", width_ratios=[1.2, 1])
    means = joint.networks(table)
    for method, (label, colour, marker) in METHODS.items():
        its = means[means.method == method]
        if not len(its):
            continue
        left.plot(its.bayes_rmse, its.accuracy, marker=marker, color=colour, ls="none", ms=5, mew=0, alpha=0.3)
        for number, (_, rows) in enumerate(its.groupby("weight")):
            x, y = estimates.geometric_mean(rows.bayes_rmse), estimates.mean(rows.accuracy)
            bars = left.errorbar(x.value, y.value, _bar(y), _bar(x), color=colour, marker=marker, ms=8, lw=1.4)
            bars.set_label("" if number else label)
    left.set(xscale="log", xlabel="expected RMSE of an attacker with a prior", ylabel="accuracy on held-out digits")
    left.set_title("Accuracy and error overlap")
    left.legend(fontsize="small")
    ratios(right, table, gain)
    for ax in (left, right):
        readable_ticks(ax)
    return figure


def ratios(ax: Axes, table: pd.DataFrame, gain: float) -> None:
    ax.axvline(1, color=LINE, lw=1)
    ax.axvline(gain, color=INK, lw=1, ls=":")
    ticks: list[str] = []
    for method, its in joint.effects(table).items():
        pairs, (label, colour, marker) = joint.learnt(joint.paired(table, method)), METHODS[method]
        for name, noise in NOISES.items():
            height, ratio = -len(ticks), pairs[name] / pairs[f"{name}_plain"]
            ticks.append(f"{label},\n{noise}")
            places = height + 0.18 * np.linspace(-1, 1, len(ratio))
            ax.scatter(ratio, places, color=colour, marker=marker, s=16, alpha=0.35, lw=0)
            ax.errorbar(its[name].value, height, xerr=_bar(its[name]), color=colour, marker=marker, ms=7, lw=1.5)
    ax.set_yticks([-row for row in range(len(ticks))], ticks)
    ax.set(xscale="log", xlabel="penalised / plain error, same seed")
    ax.set_title("Same noise: the gain is unclear")


def _bar(estimate: Estimate) -> list[list[float]]:
    """The interval as an error bar; none where it is unbounded."""
    low, high = estimate.interval
    ends = (estimate.value - low, high - estimate.value)
    return [[end if np.isfinite(end) else 0.0] for end in ends]
