"""Checks of arguments: each message names the argument, what is wrong with it, and what is accepted."""

import difflib
import hashlib
import operator
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_CARRIED = Path(__file__).resolve().parents[1] / "bundle"
# The bundled images and texts: what a wheel carries, or data/ of a checkout. DATA.md shows where each comes from.
BUNDLE = _CARRIED if _CARRIED.is_dir() else _CARRIED.parents[1] / "data"


def one_of(name: str, value: str, options: Iterable[str]) -> str:
    """`value` if it is among `options`; otherwise a ValueError that lists the near matches."""
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
    if not torch.is_tensor(value):
        raise TypeError(f"{name} is {type(value).__name__}; give a flat ({size},) tensor")
    allowed = (1, 2) if batch else (1,)
    if value.ndim not in allowed or value.shape[-1] != size:
        found = f"{name} has shape {tuple(value.shape)}, with {value.numel()} entries"
        stack = f" or a (k, {size}) stack of them" if batch else ""
        raise ValueError(f"{found}; {space} has {size}: give a flat ({size},) tensor{stack}")
    value = finite(name, value)
    return value.clone() if value.is_inference() and not torch.is_inference_mode_enabled() else value


def at_least(name: str, value: float, bound: float) -> float:
    """`value` as a Python number, if it is a finite one and no smaller than `bound`."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} is {type(value).__name__}; it must be one number") from None
    if not bound <= number < float("inf"):
        raise ValueError(f"{name}={number} is out of range: it must be a finite number, at least {bound}")
    return number


def whole(name: str, value: Any, least: int | None = None) -> int:
    """`value` as a Python integer, if it is one (NumPy's too) and no smaller than `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {type(value).__name__}; give an integer") from None
    if least is not None and number < least:
        raise ValueError(f"{name}={number} is out of range: give at least {least}")
    return number


def images_and_labels(x: Tensor, y: Tensor) -> None:
    """`x` is a finite floating-point batch and `y` has one label per image."""
    images("x", x)
    one_label_each(x, y)


def images(name: str, x: Tensor) -> None:
    """`x` is a finite floating-point batch."""
    if not torch.is_tensor(x) or not x.is_floating_point() or x.ndim < 2 or len(x) == 0:
        shape = tuple(x.shape) if torch.is_tensor(x) else type(x).__name__
        dtype = f" of {x.dtype}" if torch.is_tensor(x) else ""
        raise ValueError(f"{name} is {shape}{dtype}; it must be a floating-point batch (n, ...), as data.load gives")
    finite(name, x)


def one_label_each(x: Tensor, y: Any) -> None:
    if not torch.is_tensor(y) or y.ndim == 0 or len(y) != len(x):
        n = len(y) if torch.is_tensor(y) and y.ndim else "no batch dimension"
        raise ValueError(f"x has {len(x)} images and y has {n}; both need the same n (use x[:1], y[:1] for one)")


def verified(path: Path, checksum: str) -> Path:
    """The path, if the file has this SHA-256; otherwise a FileNotFoundError or OSError that names the remedy."""
    cure = "`dvc checkout --force data.dvc` (after `dvc pull data.dvc`) brings it back, or `make repro` does"
    if path.parent == _CARRIED:
        cure = "install i2f again"
    if not path.exists():
        raise FileNotFoundError(f"data file {path} is missing: {cure}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != checksum:
        raise OSError(f"data file {path} is truncated or altered (SHA-256 {found[:12]}…, not {checksum[:12]}…): {cure}")
    return path


def deterministic(model: nn.Module) -> None:
    """No layer's output depends on chance, or on the other images of the batch, while J is computed."""
    for path, module in model.named_modules():
        if not module.training:
            continue
        hooks = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
        kind, why = type(module).__name__, ""
        if kind == "_SpectralNorm" or "SpectralNorm" in hooks:
            kind, why = "spectral norm", "it changes with every pass"
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            why = "it would mix the images of a batch and change its statistics"
        elif isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            why = "its gradient is random"
        if why:
            where = path or "the model"
            raise ValueError(f"model: {where} ({kind}) is in training mode: {why}; call model.eval() first")


def repeatable(first: Tensor, second: Tensor) -> None:
    """Two results of a model at one input are the same, or differ by rounding, which raises a warning."""
    if torch.equal(first, second) or not (torch.isfinite(first).all() and torch.isfinite(second).all()):
        return
    apart = float((first - second).abs().max() / first.abs().max().clamp_min(torch.finfo(first.dtype).tiny))
    if apart > ROUNDING * torch.finfo(first.dtype).eps:
        raise ValueError(f"model is random: two passes over the same x differ by {apart:.1g}; {FOLLOWS}")
    cause = "model runs on kernels that are not deterministic (torch.use_deterministic_algorithms(True) names them)"
    warnings.warn(f"{cause}: two passes over the same x differ by {apart:.1g}", stacklevel=3)


FOLLOWS = "dropout by torch.nn.functional ignores model.eval() unless it is called with training=self.training"
CONSTANT = "loss depends neither on x nor on θ: its gradient gives nothing away"
NO_J = "∂²L/∂x∂θ is zero: loss must depend on x and on θ, and on both together"
DRAWS = f"model is random: its forward draws numbers; {FOLLOWS}"
ROUNDING = 1e3  # units of it within which two passes count as the same computation in another order


def not_differentiable(model: nn.Module, error: Exception, order: str = "second") -> Exception:
    """The exception for a derivative (or a product with J) that fails: a ValueError that names the cause, or a
    MemoryError."""
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
        return MemoryError(f"products with J ran out of memory ({error}): set method='recompute', or fewer images")
    if "modified by an inplace operation" in str(error):
        names = [path or "the model" for path, m in model.named_modules() if getattr(m, "inplace", False)]
        where = f"; these say inplace=True: {', '.join(names)}" if names else ""
        return ValueError(f"model: an in-place operation overwrites what a second derivative needs{where} ({error})")
    return ValueError(f"model or loss has an operation without a {order} derivative, which J = ∂²L/∂x∂θ needs: {error}")
