"""What an attacker is given and what an attack gives back."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from i2f.gradient import GradientMap

Callback = Callable[[int, Tensor, float, int], None]


@dataclass(frozen=True)
class Problem:
    """Find x with ∇_θ L(x, θ) = target. Holds all that the attacker knows, and never the truth."""

    gmap: GradientMap
    target: Tensor
    start: Tensor
    steps: int
    callback: Callback | None = None
    progress: bool = False
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", float(self.target.norm()) or 1.0)

    @property
    def matched(self) -> float:
        """The relative residual at which the gradient counts as matched: 64 units of rounding."""
        return 64 * torch.finfo(self.target.dtype).eps

    def report(self, step: int, x: Tensor, loss: float, evaluations: int) -> None:
        if self.callback is not None:
            self.callback(step, x.detach().clone(), loss, evaluations)

    def finish(self, x: Tensor, loss: float, steps: int, evaluations: int, converged: bool, reason: str):
        """The result for the best iterate `x`, whose objective ‖∇L(x) − g‖² is `loss`."""
        return Reconstruction(
            x.detach(), loss, math.sqrt(max(loss, 0.0)) / self.scale, steps, evaluations, converged, reason
        )


@dataclass(frozen=True)
class Reconstruction:
    """What an attack recovered.

    x: (n, ...), in pixels. loss: ‖∇L(x̂) − g‖². relative_residual: ‖∇L(x̂) − g‖/‖g‖: was the gradient matched?
    steps: taken. evaluations: gradient-evaluation equivalents, where one ∇_θL and one product with J or Jᵀ count one
    each and a formed J counts d_x. converged: x is stationary. reason: why the attack stopped.
    """

    x: Tensor
    loss: float
    relative_residual: float
    steps: int
    evaluations: int
    converged: bool
    reason: str
