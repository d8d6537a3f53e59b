"""Steps of the second-order attack: (J Jᵀ [+ S] + μI) s = b at one iterate after another."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from i2f.attacks.prior import BOX
from i2f.attacks.problem import Problem
from i2f.core.dense import dense_jacobian, jacobian_gram, outer_gram
from i2f.core.jacobian import DENSE_BYTES
from i2f.core.linalg import Solution, minimize_in_box, solve_cg, solve_factored

if TYPE_CHECKING:
    from i2f.attacks.gauss_newton import Point

CG_TOLERANCE = 1e-3  # on a step, in the norm of its preconditioned residual
STALE_SHARE = 48  # past d_x/48 steps with the Gram matrix of an earlier iterate, a new one is the faster way
CG_STEPS_FRESH = 100
FACTOR_RANGE = 30.0  # how far μ may move before the Gram matrix is factored anew
MOST_SHIFTS = 40  # fourfold each: from rounding to far beyond the largest eigenvalue


class Gram(NamedTuple):
    """size · matrix, in float32, the largest diagonal entry of `matrix` one: no scale of J under- or overflows."""

    matrix: Tensor
    size: float


class FirstGram:
    """The Gram matrix at the start of the last problem, where a neighbour that starts there too, with the same labels,
    needs no other. In the count of evaluations it is that neighbour's own all the same, as if it were alone."""

    def __init__(self) -> None:
        self.problem: Problem | None = None
        self.gram: Gram | None = None

    def at(self, problem: Problem, compute: Callable[[], Gram | None]) -> Gram | None:
        if not self._serves(problem):
            self.problem, self.gram = problem, compute()
        if self.gram is None or self.problem is problem:
            return self.gram
        return self.gram._replace(size=self.gram.size * (self.problem.gmap.unit / problem.gmap.unit) ** 2)

    def _serves(self, problem: Problem) -> bool:
        last = self.problem
        if last is None or not all(p.match.plain and not p.prior.active for p in (last, problem)):
            return False
        ours, theirs = problem.gmap.y, last.gmap.y
        same = ours is theirs or (torch.is_tensor(ours) and torch.is_tensor(theirs) and torch.equal(ours, theirs))
        near = 2.0**-64 <= last.gmap.unit / problem.gmap.unit <= 2.0**64
        return same and near and torch.equal(problem.start, last.start)


class StepSolver:
    """Conjugate gradients on exact products, preconditioned by a float32 Cholesky factor of J Jᵀ.

    The factor may be rough, the step is not: so one Gram matrix serves as many iterates as it can. There is none
    where J would not fit. With a box, the step is the model's minimiser inside it.
    """

    corrects = False

    def __init__(self, problem: Problem, first: FirstGram):
        self.problem, self.first = problem, first
        self.exact, self.rough = problem.gmap, problem.gmap.cast(torch.float32)
        self.match, self.box = problem.match, problem.box
        self.centre: Point | None = None  # where the Gram matrix was taken
        self.gram: Gram | None = None
        self.factor: tuple[float, Tensor | None, Tensor | None] | None = None  # μ, the free pixels, the factor
        self.products = 0

    def solve(self, point: Point, b: Tensor, mu: float, newton: bool) -> tuple[Tensor, bool]:
        """s, and whether S took part: where it makes the matrix indefinite, Gauss–Newton's own step is taken."""
        fresh = self.centre is point or not self.fits(self.problem)
        if not fresh and self.centre is not None:
            solution, newton = self._model_step(point, b, mu, newton, max(5, b.numel() // STALE_SHARE))
            if solution.converged:
                return solution.u, newton
        if not fresh:
            rough = partial(self._rough_gram, point)
            self.gram = rough() if self.centre is not None else self.first.at(self.problem, rough)
            self.centre, self.factor = point, None
            self.products += b.numel()
        solution, newton = self._model_step(point, b, mu, newton, CG_STEPS_FRESH)
        return solution.u, newton

    def _model_step(self, point: Point, b: Tensor, mu: float, newton: bool, steps: int) -> tuple[Solution, bool]:
        def matrix(with_bend: bool, v: Tensor) -> Tensor:
            self.products += 2 + with_bend
            return point.curve(v, with_bend)

        if newton:
            solution = self._minimize(partial(matrix, True), point, b, mu, steps)
            if not solution.indefinite:
                return solution, True
        return self._minimize(partial(matrix, False), point, b, mu, steps), False

    def _minimize(self, A: Callable[[Tensor], Tensor], point: Point, b: Tensor, mu: float, steps: int) -> Solution:
        if not self.box:
            return solve_cg(A, b, mu, CG_TOLERANCE, steps, self._preconditioner(mu))
        x = point.x.reshape(-1)

        def free_step(free: Tensor, rhs: Tensor) -> Solution:
            def restricted(v: Tensor) -> Tensor:
                return torch.where(free, A(v), 0.0)

            return solve_cg(restricted, rhs, mu, CG_TOLERANCE, steps, self._preconditioner(mu, free))

        return minimize_in_box(lambda v: A(v) + mu * v, b, BOX[0] - x, BOX[1] - x, free_step, CG_TOLERANCE)

    def _rough_gram(self, point: Point) -> Gram | None:
        """J WᵀW Jᵀ and the prior's curvature in float32; in the model's precision where its loss holds tensors of that,
        or where float32 under- or overflows; None where that does too."""
        x, gram = point.x.to(self.rough.dtype), None
        try:
            if self.match.plain:
                gram = jacobian_gram(self.rough, x)
            else:
                gram = outer_gram(self.match.to(x)(dense_jacobian(self.rough, x)))
        except RuntimeError:
            if self.rough is self.exact:
                raise
        if gram is not None:
            if point.belief is not None:
                gram += point.belief(torch.eye(len(gram), dtype=point.x.dtype).to(point.x)).to(gram)
            size, info = float(gram.diagonal().max()), torch.finfo(gram.dtype)
            if info.tiny / info.eps < size and torch.isfinite(gram).all():
                return Gram((gram / size).float(), size)
        if self.rough is self.exact:
            return None
        self.rough = self.exact
        return self._rough_gram(point)

    @staticmethod
    def fits(problem: Problem) -> bool:
        """Whether J, in float32, takes no more than `DENSE_BYTES`."""
        return problem.start.numel() * problem.gmap.size * torch.finfo(torch.float32).bits // 8 <= DENSE_BYTES

    def _preconditioner(self, mu: float, free: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """(Gram + μI)⁻¹ on the free pixels, zero on the others."""
        if self.gram is None:
            return lambda r: r
        if self.factor is None or not self._serves(mu, free):
            self.factor = (mu, free, self._cholesky(mu, free))
        factor = self.factor[2]
        if factor is None:
            return lambda r: r

        def apply(r: Tensor) -> Tensor:
            size = float(r.norm()) or 1.0  # keeps tiny residuals within float32's range
            inner = (r if free is None else r[free]) / size
            z = solve_factored(factor, inner.float()).to(r.dtype) * (size / self.gram.size)
            return z if free is None else torch.zeros_like(r).masked_scatter(free, z)

        return apply

    def _serves(self, mu: float, free: Tensor | None) -> bool:
        centre, pixels, _ = self.factor
        same = pixels is free if pixels is None or free is None else torch.equal(pixels, free)
        return same and 1 / FACTOR_RANGE <= mu / centre <= FACTOR_RANGE

    def _cholesky(self, mu: float, free: Tensor | None) -> Tensor | None:
        """Of (Gram + μI)/size; None where no shift makes it positive definite (NaN)."""
        gram = self.gram.matrix if free is None else self.gram.matrix[free][:, free]
        shift = mu / self.gram.size
        for _ in range(MOST_SHIFTS):  # rounding may have made the float32 matrix indefinite
            shifted = gram.clone()
            shifted.diagonal().add_(min(shift, 1e30))
            factor, info = torch.linalg.cholesky_ex(shifted)
            if not int(info):
                return factor
            shift = 4 * shift + torch.finfo(torch.float32).eps
        return None
