"""How the claims came out."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from i2f.paper.claims import Claim
from i2f.paper.figures.style import style

COLOURS = {
    "holds": "#0072B2", "holds except when": "#009E73", "holds only when": "#56B4E9", "inconclusive": "#BBBBBB",
    "fails": "#D55E00",
}  # fmt: skip


def bars(found: Sequence[Claim]) -> Axes:
    """A bar an experiment, a colour a verdict."""
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
    ax.legend(fontsize="small", ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1))
    return ax
