"""The power of two that a loss is divided by, so that nothing under- or overflows."""

import math

import torch
from torch import Tensor


def loss_unit(gradient: Tensor) -> float:
    """The power of two that the loss is divided by: 1, or near ‖gradient‖ where that is far from one (beyond 2^±20).

    Raises: ValueError for a gradient too small for its dtype to hold with all its digits.
    """
    largest, info = float(gradient.abs().max()), torch.finfo(gradient.dtype)
    if 0 < largest < info.tiny / info.eps:
        small = f"the gradient's largest entry is {largest:.1g}, too small for {gradient.dtype}"
        raise ValueError(f"{small}: scale the loss up, or use a wider dtype")
    size = float(gradient.double().norm())
    return 1.0 if 2**-20 <= size <= 2**20 or size == 0 else 2.0 ** round(math.log2(size))


def times(unit: float, value: Tensor) -> Tensor:
    return value if unit == 1 else value * unit
