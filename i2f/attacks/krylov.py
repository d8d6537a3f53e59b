"""Steps of the second-order attack where no Gram matrix fits in memory: Lanczos on exact products."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from i2f.core.lanczos import Lanczos

if TYPE_CHECKING:
    from i2f.attacks.gauss_newton import Point

FORCING = 0.1  # residual of a step: closer solves buy less than the next point does (Dembo, Eisenstat, Steihaug 1982)
MOST_STEPS = 100  # of Lanczos a point


class KrylovSolver:
    """(J Jᵀ [+ S] + μI) s = b in the Krylov space of b.

    One space serves every μ that is tried at a point: a larger one costs no product. And it serves to `correct` a step:
    what bends the objective is what the space found first, the directions of largest curvature. Where there is no step
    (a product that is not finite), s is zero.
    """

    corrects = True

    def __init__(self) -> None:
        self.point: Point | None = None
        self.processes: dict[bool, Lanczos] = {}  # with S, or without
        self.products = 0

    def solve(self, point: Point, b: Tensor, mu: float, newton: bool) -> tuple[Tensor, bool]:
        """s, and whether S took part: where it makes the matrix indefinite, Gauss–Newton's own step is taken."""
        if self.point is not point:
            self.point, self.processes = point, {}
        if newton:
            s, definite = self._solve(b, mu, True)
            if definite:
                return s, True
        return self._solve(b, mu, False)[0], False

    def correct(self, chord: Tensor, s: Tensor, mu: float, newton: bool) -> Tensor:
        """The correction c of a step s:  −(A + μI)⁻¹(chord + μs), `Point.chord`, as far as the space reaches. It is the
        geodesic acceleration of Transtrum and Sethna (2012), from the residual at x + s instead of a second
        derivative."""
        process = self.processes[newton]
        values, vectors = process.ritz()
        along = vectors.T @ (process.basis @ (chord + mu * s)).cpu().double().numpy()
        c = vectors @ (along / ((values if newton else values.clip(min=0)) + mu))
        return -process.basis.T @ process.basis.new_tensor(c)

    def _solve(self, b: Tensor, mu: float, newton: bool) -> tuple[Tensor, bool]:
        if newton not in self.processes:
            self.processes[newton] = Lanczos(self._matrix(newton), b, semidefinite=not newton)
        process = self.processes[newton]
        if not len(process):
            process.step()
        s, residual, definite = process.solve(mu)
        while definite and residual > FORCING and len(process) < MOST_STEPS and not process.exhausted:
            process.step()
            s, residual, definite = process.solve(mu)
        return s, definite

    def _matrix(self, newton: bool) -> Callable[[Tensor], Tensor]:
        point = self.point

        def matrix(v: Tensor) -> Tensor:
            self.products += 2 + newton
            return point.curve(v, newton)

        return matrix
