"""Results on one line: a tensor by its shape, a number to four digits."""

import dataclasses
from typing import Any

import torch
from torch import Tensor


def brief(result: Any) -> str:
    """The `repr` of a dataclass or named tuple, such as Influence(displacement=(784,), rmse=0.04818)."""
    if dataclasses.is_dataclass(result):
        names = [field.name for field in dataclasses.fields(result) if field.repr]
    else:
        names = list(result._fields)
    inside = ", ".join(f"{name}={_short(getattr(result, name))}" for name in names)
    return f"{type(result).__name__}({inside})"


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = "" if value.dtype == torch.float64 else f" {str(value.dtype).removeprefix('torch.')}"
        return f"{float(value):.4g}" if value.ndim == 0 and value.is_floating_point() else f"{tuple(value.shape)}{kind}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple) and len(value) > 3 and not hasattr(value, "_fields"):
        return f"{len(value)} × {type(value[0]).__name__}"
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return f"[{', '.join(map(_short, value))}]"
    return repr(value)
