"""Which units of a ReLU are open: decided by what each unit's own value and the gradient below it say."""

import math

import torch
from torch import Tensor
from torch.special import log_ndtr


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


def of_signals(ratio: Tensor, spread: Tensor, slope: float) -> Tensor:
    """The same for the ratio of the signal that the weight gradient shows to that of an open unit: 1, or `slope`."""
    spread = spread.clamp(min=1e-8)  # rounding
    return (ratio - (1 + slope) / 2) * (1 - slope) / spread.square()
