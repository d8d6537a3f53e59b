"""Audits and attacks: the PSNR predicted and measured, requested and measured."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from i2f.paper.experiments.audited import PREDICTED, SUGGESTED
from i2f.paper.figures.style import BLUE, INK, LINE, marks, style
from i2f.paper.results import Config, Results


def published(found: Results, config: Config) -> dict[str, Figure]:
    """The figures of a run, by file name."""
    return {"overview.svg": overview(found.tables["problems"], config["within"])}


def overview(table: pd.DataFrame, within: float) -> Figure:
    """The PSNR after an attack against the predicted one (left), and less the requested one (right). within: how far
    above the target it may lie, in dB."""
    style()
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 4), layout="constrained")
    rows = table[table.part == PREDICTED]
    marks(left, rows.psnr, rows.attacked_psnr, rows.converged, BLUE, "o", alpha=0.6)
    low, high = min(left.get_xlim()[0], left.get_ylim()[0]), max(left.get_xlim()[1], left.get_ylim()[1])
    left.plot([low, high], [low, high], color=LINE, lw=1.2, zorder=1)
    left.set(xlabel="predicted PSNR, dB", ylabel="measured PSNR, dB")
    left.set_title("The audit predicts the attack")
    targets = table[table.part == SUGGESTED].groupby("asked")
    for place, (target, rows) in enumerate(targets):
        above = rows.attacked_psnr - target
        spread = place + np.linspace(-0.3, 0.3, len(above))
        marks(right, spread, above, rows.converged, BLUE, "o", alpha=0.6)
        right.hlines(above.median(), place - 0.35, place + 0.35, color=INK, lw=1.6, zorder=4)
    right.axhline(0, color=LINE, lw=1.2, zorder=1)
    right.axhline(within, color=INK, lw=1, ls=":", zorder=1)
    right.set_xticks(range(len(targets)), [f"{target:g}" for target in targets.groups])
    right.set(xlabel="requested PSNR, dB", ylabel="measured − requested PSNR, dB")
    right.set_title("Above the dotted line: too little noise")
    return figure
