"""What an attack is given and what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from i2f.attacks.match import Match
from i2f.attacks.prior import Prior
from i2f.core.brief import brief
from i2f.core.gradient import GradientMap

EXPLODED = 1e6  # a pixel beyond this is no image on its way to [0, 1]
MATCHED = 1e-3  # relative residual of `Reconstruction.matched`


class Iterate(NamedTuple):
    """Where an attack is: the argument of a callback.

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


class Stop(NamedTuple):
    """Why an attack ended. converged: at a stationary point. failed: its last iterate is of no use."""

    reason: str
    converged: bool = False
    failed: bool = False


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
        matched: the relative residual is at most 10⁻³ (or the tolerance). A stationary x need not match: noise leaves
            a residual that no image explains. Of "recursive": at most three times the noise that it measured, too,
            since behind ReLUs wrong images can have residuals of 10⁻⁶.
        failed: it diverged (NaN, or pixels beyond 10⁶) or never began; x is its best iterate before that.
        y: (n,) the labels it used or found. restart: which one gave x. layers: of "recursive", what each layer gave,
            from the last to where it stopped (`recursive.Layer`).
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
    matched: bool = False
    layers: tuple[Any, ...] = ()

    __repr__ = brief


@dataclass(frozen=True)
class Problem:
    """Find x with ∇_θ L(x, θ) = target. Holds all that the attacker knows, and never the truth.

    gmap: the model and the labels (None: unknown, and optimised from `label_logits`). target: the shared gradient,
    (d_θ,). start: (n, ...). match: which coordinates count, and how much. prior: the penalty on images. box: pixels
    stay in [0, 1]. tolerance: the relative residual at which the gradient counts as matched.

    Everything is in units in which the target is of order one, a power of two (`gmap.unit`), so that no scale of the
    loss under- or overflows. unit: what one unit of the residual W(∇L − g) is to the user; a loss of f here is
    f · unit² there. It is 1 where W whitens, and for the cosine distance.
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
    progress: bool | str = False
    unit: float = 1.0

    @cached_property
    def scale(self) -> float:
        """‖W g‖, or 1 where that is zero."""
        return float(self.match(self.target).double().norm()) or 1.0

    def loss(self, value: float) -> float:
        """An objective in the user's units."""
        return value * self.unit * self.unit

    def report(self, step: int, x: Tensor, loss: float, evaluations: int) -> None:
        """Calls the callback."""
        if self.callback is not None:
            self.callback(Iterate(self.index, self.restart, step, x.detach().clone(), self.loss(loss), evaluations))

    def matched(self, distance: float, goal: float, what: str = "gradient") -> Stop | None:
        """An end, if the gradient is matched: of an attack with a prior, a matched gradient is not yet the minimum."""
        if self.prior.active or not distance <= goal:
            return None
        how = ", weighed by the covariance," if self.match.whitens else ""
        return Stop(f"matched the {what}{how} to the tolerance", converged=True)

    def finish(
        self, x: Tensor, loss: float, steps: int, evaluations: int, stop: Stop, logits: Tensor | None = None
    ) -> Reconstruction:
        """The result for the best iterate `x`. Its residual is computed anew, without weights."""
        gradient = self.gmap(x.detach(), None if logits is None else logits.softmax(-1)).double()
        known = self.match.select(self.target).double()
        residual = float((self.match.select(gradient) - known).norm()) / (float(known.norm()) or 1.0)
        return Reconstruction(
            x=x.detach(),
            loss=self.loss(loss),
            relative_residual=residual,
            steps=steps,
            evaluations=evaluations,
            converged=stop.converged,
            reason=stop.reason,
            failed=stop.failed,
            y=self.gmap.y if logits is None else logits.argmax(-1),
            matched=residual <= max(self.tolerance, MATCHED),
        )
