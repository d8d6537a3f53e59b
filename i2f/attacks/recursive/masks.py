"""Which units of a ReLU are open: decided by what each unit's own value and the gradient below it say."""

import math

import torch
from torch import Tensor
from torch.special import log_ndtr

from i2f.attacks.recursive.graph import Node
from i2f.attacks.recursive.systems import patches


def of_values(value: Tensor, spread: Tensor, slope: float) -> Tensor:
    """log p(value | open) − log p(value | closed) for values measured with standard deviation `spread`.

    Open units are taken as uniform on [0, B], B the largest value; closed ones as zero, or, behind a LeakyReLU, as
    uniform on [−slope·B, 0]: what is left is the sign.
    """
    z = (value / spread).clamp(-1e8, 1e8)
    largest = value.abs().max().clamp(min=torch.finfo(value.dtype).tiny)
    if slope:
        found: Tensor = log_ndtr(z) - log_ndtr(-z) + math.log(slope)
    else:
        found = log_ndtr(z) - (largest / spread).log() + z.square() / 2 + 0.5 * math.log(2 * math.pi)
    return found


def of_signals(ratio: Tensor, spread: Tensor, slope: float | Tensor) -> Tensor:
    """The same for the ratio of the signal that the weight gradient shows to that of an open unit: 1, or `slope`."""
    spread = spread.clamp(min=1e-8)  # rounding
    return (ratio - (1 + slope) / 2) * (1 - slope) / spread.square()


def shown(conv: Node, G: Tensor, full: Tensor, value: Tensor, sigma: float, slope: float) -> Tensor | None:
    """Scores of the units above a convolution whose input is `value`, from its weight gradient: G_o = Σ_p δ_o(p)
    patch(p) has fewer unknowns δ_o than equations. None where it has not."""
    A, G = patches(value, conv.module), G.flatten(1)
    if A.shape[1] > A.shape[0]:
        return None
    inverse = torch.linalg.inv(A.T @ A)
    measured = (G @ A) @ inverse
    measured = measured + ((G - measured @ A.T) @ A) @ inverse
    wide, free = full.reshape(measured.shape), A.shape[0] - A.shape[1]
    left = (G - measured @ A.T).square().sum(1) / max(free, 1)  # also what an error of `value` leaves
    spread = left.sqrt().clamp(min=sigma)[:, None] * inverse.diagonal().sqrt()
    score = of_signals(measured / wide, spread / wide.abs(), slope)
    return score.reshape(full.shape)


def opened(score: Tensor, slope: float | Tensor) -> Tensor:
    """A ReLU's derivative where positive scores are those of open units."""
    return (score > 0).to(score.dtype) * (1 - slope) + slope
