"""The attacks by name, with the settings that each is published with."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

from i2f.attacks.first_order import dgl, dlg, gs
from i2f.attacks.gauss_newton import gauss_newton
from i2f.attacks.problem import Reconstruction


class Method(NamedTuple):
    """An attack, and its published settings.

    box: pixels stay in [0, 1]. soft_labels: labels that are not given are optimised, not read off the gradient.
    together: takes many problems in one pass. cosine: its distance has no unit.
    """

    run: Callable[..., list[Reconstruction]]
    steps: int
    start: str
    box: bool = False
    soft_labels: bool = False
    together: bool = True
    cosine: bool = False

    @property
    def options(self) -> list[str]:
        """The names of its own options."""
        return [name for name in inspect.signature(self.run).parameters if name != "problems"]


METHODS = {
    "gauss-newton": Method(gauss_newton, 50, "gray", together=False),
    "dgl": Method(dgl, 24_000, "normal"),
    "dlg": Method(dlg, 300, "normal", soft_labels=True, together=False),
    "idlg": Method(dgl, 24_000, "normal"),
    "gs": Method(gs, 24_000, "normal", box=True, cosine=True),
}
