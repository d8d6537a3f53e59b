"""Labels in each usual form, and the value that a loss gives them."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

from i2f.core import checks

Loss = Callable[[Any, Any], Tensor]


def as_labels(y: Any, dtype: torch.dtype) -> Any:
    """`y` as the tensor that a loss takes: arrays and lists too; integers as int64, other numbers in `dtype`.

    Raises: TypeError for anything else; ValueError for NaN.
    """
    if y is None:
        return None
    if isinstance(y, (list, tuple, np.ndarray)):
        try:
            y = torch.as_tensor(np.asarray(y))
        except (TypeError, ValueError) as error:
            raise TypeError(f"y cannot be read as numbers ({error}); give a tensor of labels, (n,)") from None
    if not torch.is_tensor(y):
        raise TypeError(f"y is {type(y).__name__}; give the labels of the batch as a tensor, (n,): torch.tensor([7])")
    if y.is_floating_point():
        return checks.finite("y", y).detach().to(dtype, copy=True)
    return y.detach().to(torch.int64, copy=True)


def moved(loss: Loss, where: torch.dtype | str) -> Loss:
    """The loss with its own tensors (class weights) in another dtype or on another device."""
    if isinstance(loss, nn.Module):
        return copy.deepcopy(loss).to(where)
    if isinstance(loss, partial):
        args = [to(a, where) for a in loss.args]
        return partial(loss.func, *args, **{name: to(a, where) for name, a in loss.keywords.items()})
    return loss


def to(value: Any, where: torch.dtype | str) -> Any:
    """A tensor in another dtype, unless it holds integers, or on another device; anything else as it is."""
    moves = torch.is_tensor(value) and (value.is_floating_point() or not isinstance(where, torch.dtype))
    return value.to(where) if moves else value


def evaluate(loss: Loss, output: Any, y: Any) -> tuple[Tensor, Any]:
    """L at the model's output, a scalar with its graph, and the labels in the form that the loss accepts.

    A loss that refuses integer labels is offered them as (n,), and as numbers of the output's dtype (one-hot rows,
    binary targets).

    Raises: ValueError where the loss takes none of these, with its own message; for labels that are no class of the
    model; for a result that is no single number.
    """
    _classes_in_range(loss, output, y)
    refusal: Exception | None = None
    for form in _forms(output, y):
        try:
            value = loss(output, form)
            break
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a loss may raise anything
            refusal = refusal or error
    else:
        _classes_in_range(F.cross_entropy, output, y)  # of an unknown loss, the likeliest cause
        hint = "" if torch.is_tensor(output) else "; give loss=, a function of (what the model returns, y)"
        takes = f"loss failed on the model's output, {described(output)}, and y, {described(y)}"
        raise ValueError(f"{takes}: {type(refusal).__name__}: {refusal}{hint}") from refusal
    if not torch.is_tensor(value):
        raise ValueError(f"loss returned {type(value).__name__}; it must return a tensor with one number")
    if value.ndim != 0:
        raise ValueError(f"loss returned shape {tuple(value.shape)}; it must return one number (reduce it)")
    return value, form


def _forms(output: Any, y: Any) -> Iterator[Any]:
    yield y
    if not torch.is_tensor(y):
        return
    if y.is_floating_point():
        if y.ndim == 1 and torch.equal(y, y.round()):
            yield y.long()  # class numbers, as arrays have them
        return
    if y.ndim == 2 and y.shape[1] == 1:
        yield y[:, 0]
    first = next((t for t in tree_flatten(output)[0] if torch.is_tensor(t)), None)
    if first is not None and first.is_floating_point():
        yield y.to(first.dtype)
        if y.ndim == 1 and first.shape == (len(y), 1):
            yield y.to(first.dtype)[:, None]


def is_class_loss(loss: Loss) -> bool:
    """Whether integer labels are class numbers to it: PyTorch's cross-entropy or NLL."""
    named = getattr(loss, "func", loss)
    return named in (F.cross_entropy, F.nll_loss) or isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss))


def is_pytorchs(loss: Loss) -> bool:
    """Whether a loss is a function or module of PyTorch's."""
    return (getattr(loss, "__module__", None) or type(loss).__module__).startswith("torch.")


def ignored(loss: Loss) -> int:
    """The label that a class loss ignores."""
    return int(getattr(loss, "keywords", {}).get("ignore_index", getattr(loss, "ignore_index", -100)))


def _classes_in_range(loss: Loss, output: Any, y: Any) -> None:
    """Class numbers lie in [0, classes) or are ignored; not all are ignored."""
    if not is_class_loss(loss) or not torch.is_tensor(y) or not torch.is_tensor(output) or output.ndim != 2:
        return
    if y.is_floating_point() or y.shape not in ((len(output),), (len(output), 1)):
        return
    skip, classes = ignored(loss), output.shape[1]
    counted = y[y != skip]
    if not len(counted):
        raise ValueError(f"y holds {skip} alone, the label that the loss ignores: its gradient gives nothing away")
    if int(counted.min()) < 0 or int(counted.max()) >= classes:
        held = sorted(set(y.reshape(-1).tolist()))
        raise ValueError(f"y holds {held}; this model has {classes} classes: 0 to {classes - 1}")


def described(value: Any) -> str:
    """A tensor by shape and dtype, a dictionary by its keys, anything else by its type."""
    if torch.is_tensor(value):
        return f"{tuple(value.shape)} of {value.dtype}"
    if isinstance(value, dict):
        return f"{type(value).__name__} with {', '.join(map(str, value))}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__
