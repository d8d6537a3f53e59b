"""The verdicts of all claims."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from i2f.paper.claims import Claim
from i2f.paper.figures.style import BLUE, VERMILION, style

COLOURS = {
    "holds": BLUE,
    "inconclusive": "#BBBBBB",
    "fails": VERMILION,
    "not run": "#E8E8E8",
}


def bars(found: Sequence[Claim]) -> Axes:
    """One bar per experiment, one colour per verdict."""
    style()
    experiment = [c.id.split("-")[0].replace("_", " ") for c in found]
    counts = pd.crosstab(pd.Categorical(experiment, list(dict.fromkeys(experiment))), [c.verdict for c in found])
    _, ax = plt.subplots(figsize=(7, 0.6 + 0.36 * len(counts)), layout="constrained")
    left = pd.Series(0, index=counts.index)
    for name, colour in COLOURS.items():
        if name in counts:
            ax.barh(counts.index.astype(str), counts[name], left=left, color=colour, label=name, height=0.7)
            left = left + counts[name]
    ax.set(xlabel="claims")
    ax.invert_yaxis()
    ax.legend(fontsize="small", ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    return ax
