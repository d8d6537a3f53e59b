"""A photograph coming back, the law behind kinks, and what each layer gave."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from i2f.paper import data
from i2f.paper.figures.style import AMBER, BLUE, GREEN, LINE, diagonal, marks, pictures, style
from i2f.paper.results import Config, Results

LOOKS = ((BLUE, "o"), (AMBER, "D"), (GREEN, "s"))  # by level of the noise


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    table = found.tables["problems"]
    return {
        "coming_back.png": coming_back(found),
        "overview.svg": overview(table, config),
        "layers.svg": layers(table, config["law"]),
    }


def coming_back(found: Results) -> Figure:
    """By network: images with the activations of each resolution that the recursion has reached, what it ends at, and
    the private image."""
    table = found.tables["problems"].reset_index(drop=True)
    lines = []
    for network, its in table[table.stages].groupby("network", sort=False):
        row = its.iloc[0]
        truth = data.load(row.dataset, 1, int(row.image), split=row.split)[0][0].numpy()
        stages = [stage / 255 for stage in found.arrays["stage_images"][its.index[0]]]
        captions = [f"resolution {k + 1}" for k in range(len(stages))]
        final = found.arrays["recovered"][its.index[0]] / 255
        lines.append((str(network), [*stages, final, truth], [*captions, f"recovered, MSE {row.mse:.0e}", "private"]))
    return pictures(lines)


def overview(table: pd.DataFrame, config: Config) -> Figure:
    """Left: measured against predicted RMSE under noise. Right: units across their kink, by the noise in units of the
    first kink."""
    style()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.0, 4.2), layout="constrained")
    noisy = table[table.level > 0]
    for (level, its), (colour, marker) in zip(noisy.groupby("level"), LOOKS, strict=False):
        marks(left, its.predicted_rmse, its.rmse, its.converged.eq(True), colour, marker, alpha=0.7)
        left.scatter([], [], color=colour, marker=marker, s=26, label=f"{level:.2g} times the first kink")
        marks(right, its.image, its.crossed, its.converged.eq(True), colour, marker, alpha=0.7)
    left.set(xscale="log", yscale="log", xlabel="predicted RMSE per pixel (I²F)", ylabel="measured RMSE per pixel")
    if len(noisy):
        diagonal(left)
    right.set_yscale("symlog", linthresh=1)
    right.axhline(0, color=LINE, lw=1.2, zorder=1)
    right.set(xlabel="image", ylabel="units across their kink")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    return figure


def layers(table: pd.DataFrame, network: str) -> Figure:
    """The share of unknowns that each layer's equations determine, from the last layer down, of one image."""
    style()
    figure, ax = plt.subplots(figsize=(10.0, 3.4), layout="constrained")
    its = table[(table.network == network) & (table.level == 0)]
    found = json.loads(its.iloc[0].layers) if len(its) else []
    shares = [rank / unknowns for _, rank, unknowns, _ in found]
    ax.bar(np.arange(len(found)), shares, color=[BLUE if share == 1 else AMBER for share in shares])
    for place, (_, rank, unknowns, _) in enumerate(found):
        ax.annotate(f"{rank:,}\nof {unknowns:,}", (place, 0.02), ha="center", va="bottom", fontsize=7, color="white")
    names = [name.strip("_").removeprefix("1_") for name, *_ in found]
    ax.set_xticks(np.arange(len(found)), names, rotation=40, ha="right", fontsize="small")
    ax.set(ylabel="share determined", ylim=(0, 1.05))
    return figure
