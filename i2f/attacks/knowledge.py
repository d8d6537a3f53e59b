"""What the attacker knows and believes, and how it searches: the keywords of `invert`, with their defaults."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from i2f.attacks.match import LowRank
from i2f.attacks.problem import Callback
from i2f.core.gradient import Loss
from i2f.core.message import LocalSteps

Array = Tensor | np.ndarray | Sequence[float]
Gradient = Array | Sequence[Tensor] | Mapping[str, Tensor]


@dataclass(frozen=True)
class Knowledge:
    """What the attacker knows of the loss and the noise and believes about images. See `invert`."""

    loss: Loss = F.cross_entropy
    mask: Array | None = None
    covariance: Array | LowRank | None = None
    box: bool | None = None
    tv: float = 0.0
    ridge: float = 0.0
    mean: float | Array = 0.5
    message: LocalSteps | None = None


@dataclass(frozen=True)
class Search:
    """How the attacker searches. See `invert`; options: those of the method."""

    method: str = "gauss-newton"
    start: str | Array | None = None
    restarts: int = 1
    seed: int | Sequence[int] = 0
    steps: int | None = None
    tolerance: float | None = None
    progress: bool | str = False
    callback: Callback | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


class Keywords(TypedDict, total=False):
    """The keywords of `invert` and `invert_many`: the fields of `Knowledge` and `Search`, and the methods' options."""

    loss: Loss
    mask: Array | None
    covariance: Array | LowRank | None
    box: bool | None
    tv: float
    ridge: float
    mean: float | Array
    message: LocalSteps | None
    method: str
    start: str | Array | None
    restarts: int
    seed: int | Sequence[int]
    steps: int | None
    tolerance: float | None
    progress: bool | str
    callback: Callback | None
    lr: float
    optimizer: Callable[..., torch.optim.Optimizer]
    signed: bool
    l1: float
    polish: bool


KNOWN = {f.name: f for f in fields(Knowledge)}
SEARCHED = {f.name: f for f in fields(Search) if f.name != "options"}
Function = TypeVar("Function", bound=Callable[..., Any])


def understood(given: dict[str, Any]) -> tuple[Knowledge, Search]:
    """The keywords of `invert`; what is neither knowledge nor search is an option of the method."""
    own = {name: value for name, value in given.items() if name not in KNOWN | SEARCHED}
    knowledge = Knowledge(**{name: given[name] for name in KNOWN if name in given})
    return knowledge, Search(**{name: given[name] for name in SEARCHED if name in given}, options=own)


def with_keywords(function: Function) -> Function:
    """The function, whose signature shows each keyword with its default."""
    signature, keyword = inspect.signature(function), inspect.Parameter.KEYWORD_ONLY
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    for name, f in (KNOWN | SEARCHED).items():
        own.append(inspect.Parameter(name, keyword, default=f.default, annotation=f.type))
    own.append(inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD))
    vars(function)["__signature__"] = signature.replace(parameters=own)
    return function
