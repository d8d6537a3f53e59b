"""The attacks by name, with the settings that each is published with."""

import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from i2f.attacks.descent import MakeOptimizer, Recipe, descend
from i2f.attacks.gauss_newton import gauss_newton
from i2f.attacks.problem import Problem, Reconstruction
from i2f.attacks.recursive import recursive
from i2f.core import checks


def dgl(
    problems: Sequence[Problem], lr: float = 0.1, optimizer: MakeOptimizer = torch.optim.Adam, l1: float = 0.0
) -> list[Reconstruction]:
    """Adam on ‖∇_θ L(x) − g‖²: deep gradient leakage as the I²F paper runs it (24,000 steps, lr 0.1, start N(0, 1)).

    With the label read off the last layer's gradient instead of given, this is iDLG (Zhao et al. 2020). With the term
    l1 · ‖∇_θ L(x) − g‖₁ it is TAG, the attack on texts (Deng et al. 2021), with one weight for all layers.
    """
    return descend(problems, Recipe(optimizer, lr, l1=checks.at_least("l1", l1, 0.0)))


def dlg(
    problems: Sequence[Problem], lr: float = 1.0, optimizer: MakeOptimizer = torch.optim.LBFGS
) -> list[Reconstruction]:
    """L-BFGS on the same objective, over x and a soft label softmax(z) together (Zhu et al. 2019: 300 outer steps of
    up to 20 inner ones each, lr 1, no line search). Where labels are given, over x alone.
    """
    return descend(problems, Recipe(optimizer, lr))


def gs(
    problems: Sequence[Problem], lr: float = 0.1, optimizer: MakeOptimizer = torch.optim.Adam, signed: bool = True
) -> list[Reconstruction]:
    """Adam on the sign of the gradient of 1 − cos(∇_θ L(x), g) + tv · TV(x), pixels projected on [0, 1], lr tenfold
    lower after 3/8, 5/8 and 7/8 of the steps (Geiping et al. 2020; tv 0 as in the I²F paper's code).
    """
    return descend(problems, Recipe(optimizer, lr, cosine=True, signed=signed, drops=(3 / 8, 5 / 8, 7 / 8)))


class Method(NamedTuple):
    """An attack, and its published settings.

    box: pixels stay in [0, 1]. soft_labels: labels that are not given are optimised, not read off the gradient.
    together: takes many problems in one pass. cosine: its distance has no unit. layered: it reads the network layer by
    layer, and refuses those that it does not know.
    """

    run: Callable[..., list[Reconstruction]]
    steps: int
    start: str
    box: bool = False
    soft_labels: bool = False
    together: bool = True
    cosine: bool = False
    layered: bool = False

    @property
    def options(self) -> list[str]:
        """The names of its own options."""
        return [name for name in inspect.signature(self.run).parameters if name != "problems"]


METHODS = {
    "gauss-newton": Method(gauss_newton, 50, "gray", together=False),
    "recursive": Method(recursive, 200, "gray", together=False, layered=True),
    "dgl": Method(dgl, 24_000, "normal"),
    "dlg": Method(dlg, 300, "normal", soft_labels=True, together=False),
    "idlg": Method(dgl, 24_000, "normal"),
    "gs": Method(gs, 24_000, "normal", box=True, cosine=True),
}
GENERAL = tuple(name for name, method in METHODS.items() if not method.layered)  # those that take any network
