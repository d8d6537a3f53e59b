"""The published first-order attacks, with their published settings."""

from collections.abc import Sequence

import torch

from i2f.attacks.descent import MakeOptimizer, Recipe, descend
from i2f.attacks.problem import Problem, Reconstruction
from i2f.core import checks


def dgl(
    problems: Sequence[Problem], lr: float = 0.1, optimizer: MakeOptimizer = torch.optim.Adam, l1: float = 0.0
) -> list[Reconstruction]:
    """Adam on ‖∇_θ L(x) − g‖²: deep gradient leakage as the I²F paper runs it (24,000 steps, lr 0.1, start N(0, 1)).

    With the label read off the last layer's gradient instead of given, this is iDLG (Zhao et al. 2020). With
    l1 · ‖∇_θ L(x) − g‖₁ beside the square it is TAG, the attack on texts (Deng et al. 2021), one weight for all layers.
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
