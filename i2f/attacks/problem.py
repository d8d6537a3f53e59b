"""What an attacker is given and what an attack gives back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from i2f.attacks.match import Match
from i2f.attacks.prior import Prior
from i2f.gradient import GradientMap

EXPLODED = 1e6  # a pixel beyond this is no image on its way to [0, 1]


class Iterate(NamedTuple):
    """Where an attack is: what a callback is told.

    problem, restart: numbers, from 0. x: (n, ...), a copy. loss: the attack's own objective there. evaluations: spent
    on this problem and restart so far.
    """

    problem: int
    restart: int
    step: int
    x: Tensor
    loss: float
    evaluations: int


Callback = Callable[[Iterate], None]


@dataclass(frozen=True)
class Problem:
    """Find x with ∇_θ L(x, θ) = target. Holds all that the attacker knows, and never the truth.

    gmap: the model and the labels (None: unknown, and optimised from `label_logits`). target: what was sent, (d_θ,).
    start: (n, ...). match: which coordinates count, and how much. prior: the penalty
    on images. box: pixels stay in [0, 1]. tolerance: the relative residual at which the gradient counts as matched.
    """

    gmap: GradientMap
    target: Tensor
    start: Tensor
    steps: int
    tolerance: float
    match: Match
    prior: Prior
    box: bool = False
    label_logits: Tensor | None = None
    index: int = 0
    restart: int = 0
    callback: Callback | None = None
    progress: bool = False
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", float(self.match(self.target).norm()) or 1.0)

    def report(self, step: int, x: Tensor, loss: float, evaluations: int) -> None:
        if self.callback is not None:
            self.callback(Iterate(self.index, self.restart, step, x.detach().clone(), loss, evaluations))

    def finish(
        self, x: Tensor, loss: float, steps: int, evaluations: int, reason: str,
        converged: bool = False, failed: bool = False, y: Tensor | None = None, soft: Tensor | None = None,
    ) -> "Reconstruction":  # fmt: skip
        """The result for the best iterate `x`. Its residual is taken afresh, in the gradient's own units."""
        gradient = self.gmap(x.detach(), soft)
        known = self.match.select(self.target)
        residual = float((self.match.select(gradient) - known).norm()) / (float(known.norm()) or 1.0)
        if not residual <= max(self.tolerance, NOT_MATCHED):
            reason += f"; the gradient is not matched, relative residual {residual:.2g}"
        return Reconstruction(
            x.detach(), loss, residual, steps, evaluations, converged, reason, failed, self.gmap.y if y is None else y
        )


NOT_MATCHED = 1e-3


@dataclass(frozen=True)
class Reconstruction:
    """What an attack recovered.

    Attributes:
        x: (n, ...), in pixels. Images behind one gradient come in no particular order.
        loss: the attack's own objective at x; ‖∇L(x) − g‖² unless it has a prior or another distance.
        relative_residual: ‖∇L(x) − g‖/‖g‖ over the coordinates that the attacker knows: was the gradient matched?
        steps: taken. evaluations: gradient-evaluation equivalents of all restarts, where one ∇_θL and one product
            with J or Jᵀ count one each and a formed J counts d_x.
        converged: x is stationary. reason: why the attack stopped.
        failed: it diverged (NaN, or pixels beyond 10⁶) or was never begun; x is its best iterate before that.
        y: (n,) the labels it used or found. restart: which one gave x.
    """

    x: Tensor
    loss: float
    relative_residual: float
    steps: int
    evaluations: int
    converged: bool
    reason: str
    failed: bool = False
    y: Tensor | None = None
    restart: int = 0
