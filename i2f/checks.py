"""Bad input, said plainly: which argument, what was wrong with it, what would do."""

import difflib
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def one_of(name: str, value: str, options: Iterable[str]) -> str:
    """`value` if it is among `options`; otherwise a ValueError that shows the near matches."""
    options = list(options)
    if value in options:
        return value
    near = difflib.get_close_matches(str(value).lower(), options, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(f"{name}={value!r} is unknown: {hint}choose from {', '.join(map(repr, options))}")


def finite(name: str, value: Tensor) -> Tensor:
    """`value` if every entry is a finite number."""
    if not torch.isfinite(value).all():
        bad = int((~torch.isfinite(value)).sum())
        raise ValueError(f"{name} has {bad} NaN or infinite entries of {value.numel()}; it must be finite")
    return value


def flat(name: str, value: Tensor, size: int, space: str, batch: bool = True) -> Tensor:
    """`value` if it is a finite vector of `size` entries, or (`batch`) a stack of such vectors as rows."""
    allowed = (1, 2) if batch else (1,)
    if value.ndim not in allowed or value.shape[-1] != size:
        stack = f" or a (k, {size}) stack of them" if batch else ""
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, with {value.numel()} entries; "
            f"{space} has {size}: give a flat ({size},) tensor{stack}"
        )
    return finite(name, value)


def at_least(name: str, value: float, bound: float) -> float:
    """`value` if it is a finite number and no smaller than `bound`."""
    if not bound <= value < float("inf"):
        raise ValueError(f"{name}={value} is out of range: it must be a finite number, at least {bound}")
    return value


def images_and_labels(x: Tensor, y: Tensor) -> None:
    """`x` is a finite floating-point batch and `y` has one label an image."""
    if not torch.is_tensor(x) or not x.is_floating_point() or x.ndim < 2 or len(x) == 0:
        shape = tuple(x.shape) if torch.is_tensor(x) else type(x).__name__
        dtype = f" of {x.dtype}" if torch.is_tensor(x) else ""
        raise ValueError(f"x is {shape}{dtype}; it must be a floating-point batch (n, ...), as data.load gives")
    finite("x", x)
    if not torch.is_tensor(y) or y.ndim == 0 or len(y) != len(x):
        n = len(y) if torch.is_tensor(y) and y.ndim else "no batch dimension"
        raise ValueError(f"x has {len(x)} images and y has {n}; both need the same n (use x[:1], y[:1] for one)")


def classes_in_range(y: Tensor, output: Tensor) -> None:
    """Integer labels lie in [0, number of outputs), when the output is one row of logits an image."""
    if y.is_floating_point() or y.ndim != 1 or output.ndim != 2:
        return
    classes = output.shape[1]
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise ValueError(f"y holds {sorted(set(y.tolist()))}; this model has {classes} classes: 0 to {classes - 1}")


def deterministic(model: nn.Module) -> None:
    """No layer whose answer depends on chance, or on the other images of the batch, while J is taken."""
    for path, module in model.named_modules():
        if not module.training:
            continue
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"model: {path or 'the model'} ({kind}) is in training mode: it would mix the images of a batch and "
                f"change its statistics; call model.eval() first"
            )
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ValueError(
                f"model: {path or 'the model'} ({kind}) is in training mode: its gradient is random; "
                f"call model.eval() first"
            )
