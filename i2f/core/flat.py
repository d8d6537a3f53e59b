"""A gradient by parameter, in each of its usual forms, and as one vector."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors one after another, flat."""
    return torch.cat([part.to_dense().reshape(-1) if part.is_sparse else part.reshape(-1) for part in parts])


def by_parameter(name: str, value: Any, names: Sequence[str], theta: dict[str, Tensor]) -> list[Tensor]:
    """A gradient as one tensor per trainable parameter, in their order, shapes and dtype.

    Args:
        name: of the argument, for messages. names: of all parameters, in their order. theta: the trainable ones.
        value: a list in the order of `names`, with or without the frozen ones, or a dictionary by name. None stands
            for zeros, as `p.grad` of an unused parameter.

    Raises: TypeError for anything else; ValueError for missing or unknown names, and other shapes.
    """
    if isinstance(value, Mapping):
        given = value.keys() - (set(names) - theta.keys())
        if given != theta.keys():
            missing, unknown = (", ".join(sorted(map(str, of))) for of in (theta.keys() - given, given - theta.keys()))
            found = f"missing {missing or 'none'}; unknown {unknown or 'none'}"
            raise ValueError(f"{name} does not have the model's trainable parameters: {found}")
        value = [value[key] for key in theta]
    if not isinstance(value, (list, tuple)):
        size = sum(p.numel() for p in theta.values())
        forms = f"a flat ({size},) tensor or array, or a list or dictionary of the parameters' gradients"
        raise TypeError(f"{name} is {type(value).__name__}; give {forms}")
    if len(value) == len(names):  # with the frozen ones
        value = [part for key, part in zip(names, value, strict=True) if key in theta]
    if len(value) != len(theta):
        found = f"{name} has {len(value)} entries; the model has {len(theta)} trainable parameters"
        raise ValueError(f"{found}: {', '.join(theta)}")
    parts = []
    for (key, p), part in zip(theta.items(), value, strict=True):
        part = torch.zeros_like(p) if part is None else torch.as_tensor(part)
        if part.shape != p.shape:
            raise ValueError(f"{name}: {key} has shape {tuple(part.shape)}; it must be {tuple(p.shape)}")
        parts.append(part.detach().to(p))
    return parts
