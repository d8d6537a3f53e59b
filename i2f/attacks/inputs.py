"""The arguments of `invert` as tensors and numbers. An error names the argument, what was wrong, and what to give."""

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from i2f.core import checks
from i2f.core.gradient import GradientMap, Loss


def tensor(name: str, value: Any, wanted: str) -> Tensor:
    """`value` as a tensor: arrays and lists too."""
    if torch.is_tensor(value):
        return value.detach()
    try:
        return torch.from_numpy(np.array(value, order="C"))
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {type(value).__name__}; give {wanted}") from None


def sizes(shape: Any, tv: float) -> tuple[int, ...]:
    """`shape` as (n, ...), and (n, C, H, W) where a total variation is asked for."""
    wanted = "give (n, ...), (1, C, H, W) for one image"
    try:
        found = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise TypeError(f"shape={shape!r} is no sequence of whole numbers: {wanted}") from None
    if len(found) < 2 or min(found) < 1:
        raise ValueError(f"shape={found} has no batch dimension: {wanted}")
    if checks.at_least("tv", tv, 0.0) and len(found) != 4:
        raise ValueError(f"tv={tv} needs images, shape (n, C, H, W); this shape is {found}")
    return found


def gradients(gmap: GradientMap, given: Any) -> list[Tensor]:
    """Each problem's gradient, (d_θ,), in float64, where no norm of a float32 or bfloat16 one under- or overflows."""
    wanted = f"give a (P, {gmap.size}) stack, or a list of P gradients"
    if isinstance(given, (Tensor, np.ndarray)):
        given = given[None] if given.ndim == 1 else given
        if given.ndim != 2:
            raise ValueError(f"gradients has shape {tuple(given.shape)}; {wanted}")
    elif not isinstance(given, (list, tuple)):
        raise TypeError(f"gradients is {type(given).__name__}; {wanted}")
    if not len(given):
        raise ValueError("gradients is empty: give at least one")
    names = ["gradient"] if len(given) == 1 else [f"gradients[{i}]" for i in range(len(given))]
    limit = torch.finfo(gmap.dtype).max
    sent = []
    for name, gradient in zip(names, given, strict=True):
        one = gmap.flat(name, gradient, batch=False).detach().to(gmap.device).double()
        largest = float(one.abs().max())
        if largest > limit:
            beyond = f"entries up to {largest:.1g}, beyond {gmap.dtype}"
            raise ValueError(f"{name} has {beyond}: scale the loss down, or use a wider dtype")
        sent.append(one)
    return sent


def image(name: str, value: Any, shape: tuple[int, ...]) -> Tensor:
    """`value` if it is a number, or can be read as an image of that shape."""
    found = tensor(name, value, f"a number, or an image of shape {shape}")
    try:
        torch.broadcast_to(found, shape)
    except RuntimeError:
        given = f"{name} has shape {tuple(found.shape)} and shape is {shape}"
        raise ValueError(f"{given}: give a number or an image of that shape") from None
    return checks.finite(name, found).clone()  # a caller's inference mode marks its tensors


def one_each(name: str, value: Any, count: int) -> list[Any]:
    """`value` as a list of `count` entries: its own, or an integer for all."""
    if not getattr(value, "ndim", 0) and hasattr(value, "__index__"):
        return [operator.index(value)] * count
    if isinstance(value, str) or not hasattr(value, "__len__"):
        raise TypeError(f"{name} is {type(value).__name__}; give an integer, or one for each gradient")
    values = list(value)
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} gradients: give one each, or one for all")
    return values


def labels(y: Any, count: int, shape: tuple[int, ...]) -> list[Any]:
    """The labels of each problem, shape[0] of them, in whatever form the loss takes."""
    if not isinstance(y, (Tensor, np.ndarray, list, tuple)):
        raise TypeError(f"y is {type(y).__name__}; give a label for each image, ({shape[0]},), or None")
    each = list(y) if not isinstance(y, Tensor) or y.ndim else [y]
    for own in each if len(each) == count else [y]:
        found = tuple(own.shape) if torch.is_tensor(own) else np.shape(own)
        if len(each) != count or (found and found[0] != shape[0]) or (not found and hasattr(own, "shape")):
            raise ValueError(
                f"shape={shape} says {shape[0]} images behind one gradient and y has {found}: give a label for each, "
                f"({shape[0]},), or None where they are unknown"
            )
    return each


def takes_probabilities(loss: Loss, output: Any, shape: tuple[int, ...]) -> None:
    """ValueError where the loss does not take class probabilities as its second argument."""
    what = "dlg without labels optimises class probabilities"
    if not torch.is_tensor(output) or output.ndim != 2 or len(output) != shape[0]:
        raise ValueError(f"{what}, and this model's output is not of shape (n, classes); give y")
    try:
        if loss(output, output.softmax(-1)).ndim == 0:
            return
    except (RuntimeError, IndexError, TypeError, ValueError):
        pass
    raise ValueError(f"{what}, which this loss does not take; give y")
