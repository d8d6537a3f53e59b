"""Bad input, said plainly: which argument, what was wrong with it, what would do."""

import difflib
import hashlib
import warnings
from collections.abc import Iterable
from pathlib import Path

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
    if not torch.is_tensor(value):
        raise TypeError(f"{name} is {type(value).__name__}; give a flat ({size},) tensor")
    allowed = (1, 2) if batch else (1,)
    if value.ndim not in allowed or value.shape[-1] != size:
        stack = f" or a (k, {size}) stack of them" if batch else ""
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, with {value.numel()} entries; "
            f"{space} has {size}: give a flat ({size},) tensor{stack}"
        )
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


def images_and_labels(x: Tensor, y: Tensor) -> None:
    """`x` is a finite floating-point batch and `y` has one label an image."""
    images("x", x)
    one_label_each(x, y)


def images(name: str, x: Tensor) -> None:
    """`x` is a finite floating-point batch."""
    if not torch.is_tensor(x) or not x.is_floating_point() or x.ndim < 2 or len(x) == 0:
        shape = tuple(x.shape) if torch.is_tensor(x) else type(x).__name__
        dtype = f" of {x.dtype}" if torch.is_tensor(x) else ""
        raise ValueError(f"{name} is {shape}{dtype}; it must be a floating-point batch (n, ...), as data.load gives")
    finite(name, x)


def one_label_each(x: Tensor, y: Tensor) -> None:
    if not torch.is_tensor(y) or y.ndim == 0 or len(y) != len(x):
        n = len(y) if torch.is_tensor(y) and y.ndim else "no batch dimension"
        raise ValueError(f"x has {len(x)} images and y has {n}; both need the same n (use x[:1], y[:1] for one)")


def verified(path: Path, checksum: str) -> Path:
    """The path, if the file there is what it was (SHA-256); FileNotFoundError or OSError otherwise, with the cure."""
    cure = "`dvc checkout --force data.dvc` (after `dvc pull data.dvc`) brings it back, or `make repro` does"
    if not path.exists():
        raise FileNotFoundError(f"data file {path} is missing: `dvc pull data.dvc` brings it, and `make repro` does so")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != checksum:
        raise OSError(f"data file {path} is truncated or altered (SHA-256 {found[:12]}…, not {checksum[:12]}…): {cure}")
    return path


def deterministic(model: nn.Module) -> None:
    """No layer whose answer depends on chance, or on the other images of the batch, while J is taken."""
    for path, module in model.named_modules():
        if not module.training:
            continue
        kind = type(module).__name__
        hooks = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
        if kind == "_SpectralNorm" or "SpectralNorm" in hooks:
            raise ValueError(f"model: {path or 'the model'} (spectral norm) is in training mode: it changes with every "
                             "pass; call model.eval() first")  # fmt: skip
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


def repeatable(first: Tensor, second: Tensor) -> None:
    """Two outputs of a model at one input are the same, or differ by rounding, of which a warning is given."""
    if torch.equal(first, second) or not (torch.isfinite(first).all() and torch.isfinite(second).all()):
        return
    apart = float((first - second).abs().max() / first.abs().max().clamp_min(torch.finfo(first.dtype).tiny))
    if apart > ROUNDING * torch.finfo(first.dtype).eps:
        raise ValueError(f"model is random: two passes over the same x differ by {apart:.1g}; {FOLLOWS}")
    warnings.warn(
        f"model runs on kernels that are not deterministic: two passes over the same x differ by {apart:.1g}; "
        f"torch.use_deterministic_algorithms(True) names them",
        stacklevel=3,
    )


FOLLOWS = "dropout by torch.nn.functional follows no model.eval() unless it is told training=self.training"
DRAWS = f"model is random: its forward draws numbers; {FOLLOWS}"
ROUNDING = 1e3  # units of it within which two passes count as the same computation in another order


def not_differentiable(model: nn.Module, error: Exception, order: str = "second") -> Exception:
    """What to raise where a derivative (or a product with J) fails: a ValueError that names the cause, or a
    MemoryError."""
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
        return MemoryError(f"products with J ran out of memory ({error}): set method='recompute', or fewer images")
    if "modified by an inplace operation" in str(error):
        names = [path or "the model" for path, m in model.named_modules() if getattr(m, "inplace", False)]
        where = f"; these say inplace=True: {', '.join(names)}" if names else ""
        return ValueError(f"model: an in-place operation overwrites what a second derivative needs{where} ({error})")
    return ValueError(f"model or loss has an operation without a {order} derivative, which J = ∂²L/∂x∂θ needs: {error}")
