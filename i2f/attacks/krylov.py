"""Steps of the second-order attack where no Gram matrix fits in memory: Lanczos on exact products."""

from functools import partial

from torch import Tensor

from i2f.attacks.point import Point
from i2f.core.lanczos import Lanczos

FORCING = 0.1  # residual of a step: closer solves gain less than the next iterate (Dembo, Eisenstat, Steihaug 1982)
MOST_STEPS = 100  # of Lanczos at an iterate


class KrylovSolver:
    """(H [+ S] + μI) s = b in the Krylov space of b; H and S as in `Point`.

    One space serves every μ that is tried at an iterate: a larger μ costs no product. It also serves to `correct` a
    step, since the directions of largest curvature, which spoil a step most, are those that the space finds first.
    Where there is no step (a product that is not finite), s is zero.
    """

    def __init__(self) -> None:
        self.point: Point | None = None
        self.processes: dict[bool, Lanczos] = {}  # with S, or without
        self.products = 0

    def solve(self, point: Point, b: Tensor, mu: float, newton: bool) -> tuple[Tensor, bool]:
        """s, and whether S took part: where it makes the matrix indefinite, Gauss–Newton's own step is taken."""
        if self.point is not point:
            self.point, self.processes = point, {}
        if newton:
            s, definite = self._solve(point, b, mu, True)
            if definite:
                return s, True
        return self._solve(point, b, mu, False)[0], False

    def correct(self, point: Point, candidate: Point, s: Tensor, mu: float, newton: bool) -> Tensor:
        """The correction c of a step s to the candidate x + s,  −(H [+ S] + μI)⁻¹(½∇f(x + s) + μs), with f's slope as
        `Point.model_slope` has it, as far as the space reaches. It is the geodesic acceleration of Transtrum and Sethna
        (2012), from the residual at x + s instead of a second derivative."""
        process = self.processes[newton]
        self.products += 1 + newton
        slope = point.model_slope(candidate, s, newton)
        values, vectors = process.ritz()
        along = vectors.T @ (process.basis @ (slope + mu * s)).cpu().double().numpy()
        c = vectors @ (along / ((values if newton else values.clip(min=0)) + mu))
        return -process.basis.T @ process.basis.new_tensor(c)

    def _solve(self, point: Point, b: Tensor, mu: float, newton: bool) -> tuple[Tensor, bool]:
        if newton not in self.processes:
            product = partial(self._product, point, newton)
            self.processes[newton] = Lanczos(product, b, semidefinite=not newton)
        process = self.processes[newton]
        if not len(process):
            process.step()
        s, residual, definite = process.solve(mu)
        while definite and residual > FORCING and len(process) < MOST_STEPS and not process.exhausted:
            process.step()
            s, residual, definite = process.solve(mu)
        return s, definite

    def _product(self, point: Point, newton: bool, v: Tensor) -> Tensor:
        self.products += 2 + newton
        return point.half_hessian(v, newton)
