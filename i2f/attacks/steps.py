"""Steps of the second-order attack: (J Jᵀ [+ S] + μI) s = b at one iterate after another."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from i2f.attacks.point import Point
from i2f.attacks.prior import BOX
from i2f.attacks.problem import Problem
from i2f.core.dense import dense_jacobian, jacobian_gram, outer_gram
from i2f.core.jacobian import DENSE_BYTES
from i2f.core.linalg import Solution, minimize_in_box, solve_cg, solve_factored

CG_TOLERANCE = 1e-3  # on a step, in the norm of its preconditioned residual
STALE_SHARE = 48  # past d_x/48 steps with the Gram matrix of an earlier iterate, a new one is the faster way
CG_STEPS_FRESH = 100
FACTOR_RANGE = 30.0  # how far μ may move before the Gram matrix is factored anew
MOST_SHIFTS = 40  # fourfold each: from rounding to far beyond the largest eigenvalue


class Gram(NamedTuple):
    """size · matrix, in float32, the largest diagonal entry of `matrix` one: no scale of J under- or overflows."""

    matrix: Tensor
    size: float


class Factor(NamedTuple):
    """The Cholesky factor of (Gram + μI)/size on the free pixels (None: on all); None where there is none."""

    mu: float
    free: Tensor | None
    lower: Tensor | None

    def serves(self, mu: float, free: Tensor | None) -> bool:
        """Whether it is near enough to precondition a solve with another μ."""
        ours = self.free
        same = ours is free if ours is None or free is None else torch.equal(ours, free)
        return same and 1 / FACTOR_RANGE <= mu / self.mu <= FACTOR_RANGE


class FirstGram:
    """The Gram matrix at the start of the last problem. A problem with the same start and labels uses it too; the count
    of evaluations does not show that, so that it is the same as if each problem were alone."""

    def __init__(self) -> None:
        self.last: tuple[Problem, Gram | None] | None = None

    def at(self, problem: Problem, compute: Callable[[], Gram | None]) -> Gram | None:
        if self.last is None or not _share_start(problem, self.last[0]):
            self.last = problem, compute()
        owner, gram = self.last
        if gram is None or owner is problem:
            return gram
        return gram._replace(size=gram.size * (owner.gmap.unit / problem.gmap.unit) ** 2)


def _share_start(problem: Problem, last: Problem) -> bool:
    if not all(p.match.plain and not p.prior.active for p in (last, problem)):
        return False
    ours, theirs = problem.gmap.y, last.gmap.y
    same = ours is theirs or (torch.is_tensor(ours) and torch.is_tensor(theirs) and torch.equal(ours, theirs))
    near = 2.0**-64 <= last.gmap.unit / problem.gmap.unit <= 2.0**64
    return same and near and torch.equal(problem.start, last.start)


class StepSolver:
    """Conjugate gradients on exact products, preconditioned by a float32 Cholesky factor of H (`Point`).

    The factor may be rough, the step is not: so one Gram matrix serves as many iterates as it can. There is none
    where J would not fit. With a box, the step is the model's minimiser inside it.
    """

    def __init__(self, problem: Problem, first: FirstGram):
        self.problem, self.first = problem, first
        self.exact, self.rough = problem.gmap, problem.gmap.cast(torch.float32)
        self.match, self.box = problem.match, problem.box
        self.centre: Point | None = None  # where the Gram matrix was taken
        self.gram: Gram | None = None
        self.factor: Factor | None = None
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

    def correct(self, point: Point, candidate: Point, s: Tensor, mu: float, newton: bool) -> None:
        """No correction: a new step costs little more where J fits in memory."""

    @staticmethod
    def fits(problem: Problem) -> bool:
        """Whether J, in float32, takes no more than `DENSE_BYTES`."""
        return problem.start.numel() * problem.gmap.size * torch.finfo(torch.float32).bits // 8 <= DENSE_BYTES

    def _model_step(self, point: Point, b: Tensor, mu: float, newton: bool, steps: int) -> tuple[Solution, bool]:
        def product(with_term: bool, v: Tensor) -> Tensor:
            self.products += 2 + with_term
            return point.half_hessian(v, with_term)

        if newton:
            solution = self._minimize(partial(product, True), point, b, mu, steps)
            if not solution.indefinite:
                return solution, True
        return self._minimize(partial(product, False), point, b, mu, steps), False

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
        """H in float32; in the model's precision where its loss holds tensors of that, or where float32 under- or
        overflows; None where that does too."""
        x, gram = point.x.to(self.rough.dtype), None
        try:
            if self.match.plain:
                gram = jacobian_gram(self.rough, x)
            else:
                gram = outer_gram(self.match.to(x.device, x.dtype)(dense_jacobian(self.rough, x)))
        except RuntimeError:
            if self.rough is self.exact:
                raise
        if gram is not None:
            if point.prior.active:
                gram += point.prior_curvature(torch.eye(len(gram), dtype=point.x.dtype).to(point.x)).to(gram)
            size, info = float(gram.diagonal().max()), torch.finfo(gram.dtype)
            if info.tiny / info.eps < size and torch.isfinite(gram).all():
                return Gram((gram / size).float(), size)
        if self.rough is self.exact:
            return None
        self.rough = self.exact
        return self._rough_gram(point)

    def _preconditioner(self, mu: float, free: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """(Gram + μI)⁻¹ on the free pixels, zero on the others."""
        gram = self.gram
        if gram is None:
            return lambda r: r
        if self.factor is None or not self.factor.serves(mu, free):
            self.factor = Factor(mu, free, cholesky(gram, mu, free))
        lower = self.factor.lower
        if lower is None:
            return lambda r: r

        def apply(r: Tensor) -> Tensor:
            size = float(r.norm()) or 1.0  # keeps tiny residuals within float32's range
            inner = (r if free is None else r[free]) / size
            z = solve_factored(lower, inner.float()).to(r.dtype) * (size / gram.size)
            return z if free is None else torch.zeros_like(r).masked_scatter(free, z)

        return apply


def cholesky(gram: Gram, mu: float, free: Tensor | None = None) -> Tensor | None:
    """The factor of (Gram + μI)/size on the free pixels; None where no shift makes it positive definite (NaN)."""
    matrix = gram.matrix if free is None else gram.matrix[free][:, free]
    shift = mu / gram.size
    for _ in range(MOST_SHIFTS):  # rounding may have made the float32 matrix indefinite
        shifted = matrix.clone()
        shifted.diagonal().add_(min(shift, 1e30))
        lower, failed = torch.linalg.cholesky_ex(shifted)
        if not int(failed):
            return torch.as_tensor(lower)
        shift = 4 * shift + torch.finfo(torch.float32).eps
    return None
