"""Layers written out in elementary operations, which have every derivative.

PyTorch's layer norm and weight norm are wrong in the third derivative; its instance norm, and its batch norm by the
batch's own statistics, have no third derivative. Each function takes the arguments of the one that it replaces.
"""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    out = _standardized(input, tuple(range(-len(normalized_shape), 0)), eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _native_layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the mean, and one over the deviation."""
    axes = tuple(range(-len(normalized_shape), 0))
    mean = input.mean(axes, keepdim=True)
    inverse = ((input - mean).square().mean(axes, keepdim=True) + eps).rsqrt()
    return _layer_norm(input, normalized_shape, weight, bias, eps), mean, inverse


def _by_statistics(own: Callable[..., Tensor], flag: str, axes: tuple[int, ...]) -> Callable[..., Tensor]:
    """F.batch_norm or F.instance_norm, written out where the argument `flag` asks for the input's own statistics.

    They are taken over `axes` and those behind the channels. By stored statistics PyTorch's own has every derivative.
    """
    parameters = signature(own)

    def norm(*args: Any, **kwargs: Any) -> Tensor:
        given = parameters.bind(*args, **kwargs)
        given.apply_defaults()
        input, weight, bias, eps = (given.arguments[name] for name in ("input", "weight", "bias", "eps"))
        if not given.arguments[flag]:
            return own(*args, **kwargs)
        out = _standardized(input, (*axes, *range(2, input.ndim)), eps)
        channel = [-1] + [1] * (input.ndim - 2)
        out = out if weight is None else out * weight.view(channel)
        return out if bias is None else out + bias.view(channel)

    return norm


def _native(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With the arguments of torch.batch_norm and torch.instance_norm: weight and bias first, a cuDNN flag last."""

    def native(
        input: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any, *options: Any, **named: Any
    ) -> Tensor:
        named.pop("cudnn_enabled", None)
        return norm(input, running_mean, running_var, weight, bias, *options[:3], **named)

    return native


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v/‖v‖, the norm over every axis but `dim`."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _standardized(a: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    centred = a - a.mean(axes, keepdim=True)
    return centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()


_batch_norm = _by_statistics(F.batch_norm, "training", axes=(0,))
_instance_norm = _by_statistics(F.instance_norm, "use_input_stats", axes=())
REWRITTEN: dict[Callable[..., Any], Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    torch.native_layer_norm: _native_layer_norm,
    torch.batch_norm: _native(_batch_norm),
    torch.instance_norm: _native(_instance_norm),
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    torch._weight_norm: _weight_norm,
}


class Rewritten(TorchFunctionMode):
    """A context in which the layers of `REWRITTEN` are written out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return REWRITTEN.get(func, func)(*args, **(kwargs or {}))
