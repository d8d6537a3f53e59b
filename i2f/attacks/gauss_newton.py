"""The perfect attacker: second order on the residual r(x) = ∇_θ L(x) − g, to machine precision."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from i2f.attacks.problem import Problem, Reconstruction
from i2f.dense import dense_jacobian, outer_gram
from i2f.gradient import GradientMap, Linearization
from i2f.jacobian import DENSE_BYTES
from i2f.linalg import Solution, solve_cg
from i2f.progress import bar

INITIAL_DAMPING = 1e-4  # μ at the first step, and
MAX_DAMPING = 1e10  # μ at which an attack is given up; both in units of the curvature along the first gradient
SUFFICIENT_GAIN = 1e-4  # a step is accepted for this share of the decrease that the linear model promised
STATIONARY = 1e-14  # no step promises more than this share of the objective: nothing left to gain
CG_TOLERANCE = 1e-3  # on a step, in the norm of its preconditioned residual
CG_STEPS_STALE = 40  # with the Gram matrix of an earlier iterate; past this a new one is the cheaper way
CG_STEPS_FRESH = 100
FACTOR_RANGE = 30.0  # how far μ may move before the Gram matrix is factored anew


def gauss_newton(problem: Problem) -> Reconstruction:
    """Levenberg–Marquardt with gain-ratio control of the damping μ (Marquardt 1963; Nielsen 1999).

    A step solves  (J Jᵀ + μI) s = −J r,  Gauss–Newton's equation in input space. Where noise leaves a residual that
    no image explains, that converges slowly; so the part of the Hessian that it drops, S = Σ_k r_k ∇²g_k, joins the
    matrix whenever the model with S foretold the last change of ‖r‖² better than the one without (as in NL2SOL,
    Dennis, Gay and Welsch 1981). Then convergence is quadratic for a noisy gradient too.

    Solves are conjugate gradients on exact products, preconditioned by a float32 Cholesky factor of J Jᵀ: the factor
    may be rough, the step is not. A factor is kept while it serves; there is none where J would take more than
    `DENSE_BYTES`. A step is taken on its gain ratio, actual over promised decrease, so the last iterate is the best.

    Stops when the gradient is matched (`problem.matched`), when the model promises no further decrease
    (stationary), when no damping gives a decrease (stalled), or after `problem.steps` steps.
    """
    point = _Point(problem, problem.start).checked()
    if not math.isfinite(point.objective):
        raise ValueError("start: the gradient there is NaN or infinite; give another start or another seed")
    solver = _Solver(problem.gmap)
    step, reason, mu, growth = 0, "", None, 2.0
    evaluations, newton = 1, False
    problem.report(0, point.x, point.objective, evaluations)
    with bar(total=problem.steps, description="gauss-newton", shown=problem.progress) as progress:
        while not (reason := point.finished()) and step < problem.steps:
            slope = point.slope()
            if float(slope.norm()) == 0:
                reason = "stationary: J r = 0 here"
                break
            if mu is None:
                curvature = float(point.rmatvec(slope / slope.norm()).square().sum())
                mu, evaluations = INITIAL_DAMPING * curvature, evaluations + 1
            trial = None
            while trial is None and not reason:
                s, newton = solver.solve(point, -slope, mu, newton)
                Js = point.rmatvec(s)
                candidate = _Point(problem, point.x + s.view_as(point.x))
                actual = point.objective - candidate.objective
                linear = -float((2 * point.residual + Js) @ Js)  # what each model promised
                quadratic = linear - float(s @ point.bend(s))
                promised = quadratic if newton else linear
                evaluations += 3
                gain = actual / promised if promised > 0 else -math.inf
                if 0 <= promised <= STATIONARY * point.objective:
                    reason = "stationary: the model promises no further decrease"
                elif gain > SUFFICIENT_GAIN:
                    trial = candidate
                    mu *= max(0.1, 1 - (2 * gain - 1) ** 3)
                    growth = 2.0
                else:
                    mu, growth = mu * growth, growth * 2
                    if mu > MAX_DAMPING * curvature:
                        reason = "stalled: no step of any length decreases the objective"
                newton = abs(actual - quadratic) < abs(actual - linear)
            evaluations += 1
            if trial is None:
                break
            point, step = trial, step + 1
            problem.report(step, point.x, point.objective, evaluations + solver.products)
            progress.update()
            progress.set_postfix_str(f"residual {math.sqrt(point.objective) / problem.scale:.1e}")
    converged = not reason.startswith("stalled") and reason != ""
    reason = reason or f"used its {problem.steps} steps"
    return problem.finish(point.x, point.objective, step, evaluations + solver.products, converged, reason)


class _Point(Linearization):
    """One iterate: its residual, its objective ‖r‖², and products with J there."""

    def __init__(self, problem: Problem, x: Tensor):
        super().__init__(problem.gmap, x)
        self.goal = problem.matched * problem.scale
        self.residual = self.gradient - problem.target
        self._slope: Tensor | None = None
        square = float(self.residual @ self.residual)
        self.objective = square if math.isfinite(square) else math.inf

    def slope(self) -> Tensor:
        """J r, half the gradient of the objective; its own graph is kept for `bend`."""
        if self._slope is None:
            self._slope = self._backward(self.residual, create_graph=True)
        return self._slope.detach().reshape(-1)

    def bend(self, v: Tensor) -> Tensor:
        """S v with S = Σ_k r_k ∇²g_k, the part of half the objective's Hessian that Gauss–Newton leaves out."""
        out = torch.autograd.grad(self._slope, self._x, v.view_as(self._x), retain_graph=True, materialize_grads=True)
        return out[0].reshape(-1)

    def finished(self) -> str:
        return "matched the gradient to machine precision" if math.sqrt(self.objective) <= self.goal else ""


class _Solver:
    """(J Jᵀ [+ S] + μI) s = b at one iterate after another; one Gram matrix preconditions as many as it serves."""

    def __init__(self, gmap: GradientMap):
        self.exact, self.rough = gmap, gmap.cast(torch.float32)
        self.centre: _Point | None = None  # where the Gram matrix was taken
        self.gram: Tensor | None = None
        self.factor: tuple[float, Tensor] | None = None
        self.products = 0

    def solve(self, point: _Point, b: Tensor, mu: float, newton: bool) -> tuple[Tensor, bool]:
        """s, and whether S took part: where it makes the matrix indefinite, Gauss–Newton's own step is taken."""
        fresh = self.centre is point or not self._fits(b)
        if not fresh and self.centre is not None:
            solution, newton = self._cg(point, b, mu, newton, CG_STEPS_STALE)
            if solution.converged:
                return solution.u, newton
        if not fresh:
            self.gram, self.centre, self.factor = self._rough_gram(point.x), point, None
            self.products += b.numel()
        solution, newton = self._cg(point, b, mu, newton, CG_STEPS_FRESH)
        return solution.u, newton

    def _rough_gram(self, x: Tensor) -> Tensor | None:
        """J Jᵀ in float32; in the model's precision where its loss holds tensors of that; None where it overflows."""
        try:
            gram = outer_gram(dense_jacobian(self.rough, x.to(self.rough.dtype)))
        except RuntimeError:
            if self.rough is self.exact:
                raise
            self.rough = self.exact
            return self._rough_gram(x)
        gram = gram.float()
        return gram if torch.isfinite(gram).all() else None

    def _fits(self, b: Tensor) -> bool:
        return b.numel() * self.rough.size * torch.finfo(torch.float32).bits // 8 <= DENSE_BYTES

    def _cg(self, point: _Point, b: Tensor, mu: float, newton: bool, max_steps: int) -> tuple[Solution, bool]:
        def gram_times(v: Tensor) -> Tensor:
            self.products += 2
            return point.matvec(point.rmatvec(v))

        def hessian_times(v: Tensor) -> Tensor:
            self.products += 1
            return gram_times(v) + point.bend(v)

        precondition = self._preconditioner(mu)
        if newton:
            solution = solve_cg(hessian_times, b, mu, CG_TOLERANCE, max_steps, precondition)
            if not solution.indefinite:
                return solution, True
        return solve_cg(gram_times, b, mu, CG_TOLERANCE, max_steps, precondition), False

    def _preconditioner(self, mu: float) -> Callable[[Tensor], Tensor]:
        if self.gram is None:
            return lambda r: r
        if self.factor is None or not 1 / FACTOR_RANGE <= mu / self.factor[0] <= FACTOR_RANGE:
            shift, info = mu, 1
            while info:  # rounding may have made the float32 matrix indefinite
                shifted = self.gram.clone()
                shifted.diagonal().add_(shift)
                factor, info = torch.linalg.cholesky_ex(shifted)
                shift = 4 * shift + torch.finfo(torch.float32).eps * float(self.gram.diagonal().max())
            self.factor = (mu, factor)
        factor = self.factor[1]

        def apply(r: Tensor) -> Tensor:
            size = r.norm() or 1.0  # keeps tiny residuals within float32's range
            z = torch.linalg.solve_triangular(factor, (r / size).float()[:, None], upper=False)
            return torch.linalg.solve_triangular(factor.T, z, upper=True)[:, 0].to(r.dtype) * size

        return apply
