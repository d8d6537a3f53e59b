"""The perfect attacker: second order on the residual r(x) = W(∇_θ L(x) − g), to machine precision."""

import math
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from i2f.attacks.krylov import KrylovSolver
from i2f.attacks.point import Point
from i2f.attacks.problem import EXPLODED, Problem, Reconstruction, Stop
from i2f.attacks.steps import FirstGram, StepSolver
from i2f.core.progress import bar

INITIAL_MU = 1e-4  # μ at the first step, and
MAX_MU = 1e10  # μ at which an attack is given up; both in units of the curvature along the first gradient
MIN_MU = 1e-40  # where μ stays as long as all goes well, in the same units
SUFFICIENT_GAIN = 1e-4  # a step is accepted for this share of the predicted decrease
STRAIGHT = 0.9  # gain ratio from which a step needs no correction
MOST_CORRECTIONS = 3
STATIONARY = 1e-14  # no step is predicted to gain more than this share of the objective


class Solver(Protocol):
    """Solves (H [+ S] + μI) s = b at an iterate (`Point`). products: with J or Jᵀ, spent so far."""

    products: int

    def solve(self, point: Point, b: Tensor, mu: float, newton: bool) -> tuple[Tensor, bool]:
        """s, (d_x,), and whether S took part: only where `newton` asks for it."""

    def correct(self, point: Point, candidate: Point, s: Tensor, mu: float, newton: bool) -> Tensor | None:
        """What to add to the step s from the point to the candidate, (d_x,); None: a solver without corrections."""


def gauss_newton(problems: Sequence[Problem]) -> list[Reconstruction]:
    """Levenberg–Marquardt with gain-ratio control of μ (Marquardt 1963; Nielsen 1999).

    A step solves  (J Jᵀ + μI) s = −J r,  Gauss–Newton's equation in input space. Where noise leaves a residual that
    no image explains, that converges slowly. So the second-order term S = Σ_k r_k ∇²r_k, which Gauss–Newton drops from
    the Hessian, joins the matrix whenever the model with S predicted the last change of the objective better than the
    one without (as in NL2SOL, Dennis, Gay and Welsch 1981). Then convergence is quadratic for a noisy gradient too.

    Where the network has no third derivative, which S needs, the steps are Gauss–Newton's own, and the reason says so.
    With a box, a step minimises the same model among the images in [0, 1]. A prior's gradient joins the right side, its
    curvature the matrix. Steps are solved by `StepSolver`, or by `KrylovSolver` for networks whose J is too large to
    form, which also corrects a step that the objective's curvature spoils. A step is accepted on its gain ratio, actual
    over predicted decrease, so the last iterate is the best.

    Stops when the gradient is matched, when the model predicts no further decrease (stationary), when no μ gives
    a decrease (stalled), or after the budget of steps. Problems are attacked one after another.
    """
    found: list[Reconstruction] = []
    first = FirstGram()
    for problem in problems:
        if found and found[-1].reason.startswith("interrupted"):
            stop = Stop("interrupted before its first step", failed=True)
            found.append(problem.finish(problem.start, math.inf, 0, 0, stop))
        else:
            found.append(_Attack(problem, first).run())
    return found


class _Attack:
    def __init__(self, problem: Problem, first: FirstGram):
        self.problem = problem
        dense = problem.box or StepSolver.fits(problem)
        self.solver: Solver = StepSolver(problem, first) if dense else KrylovSolver()
        self.point = Point(problem, problem.start)
        self.step, self.evaluations = 0, 1
        self.stop: Stop | None = None
        self.mu = self.ceiling = 0.0
        self.growth, self.newton = 2.0, False

    def run(self) -> Reconstruction:
        problem = self.problem
        if not math.isfinite(problem.loss(self.point.objective)):
            reason = "failed: the gradient at the start is NaN or infinite; give another start or seed"
            return self.finish(Stop(reason, failed=True))
        self.report()
        with bar(total=problem.steps, description="gauss-newton", shown=problem.progress) as progress:
            try:
                while self.stop is None and self.step < problem.steps:
                    self.advance()
                    progress.update()
                    progress.set_postfix_str(f"objective {self.point.objective:.1e}")
            except KeyboardInterrupt:
                self.stop = Stop(f"interrupted after {self.step} steps")
        return self.finish(self.stop or Stop(f"used its {problem.steps} steps"))

    def advance(self) -> None:
        """One step, or a reason to stop."""
        point = self.point
        slope = point.slope()
        if point.at_a_minimum():
            self.stop = Stop("stationary: the objective's gradient vanishes here", converged=True)
            return
        if not self.mu:
            curvature = point.curvature(slope)
            if not 0 < curvature < math.inf:
                self.stop = Stop(f"stalled: the curvature at the start is {curvature:g} in units of the gradient")
                return
            self.mu, self.ceiling = INITIAL_MU * curvature, MAX_MU * curvature
            self.evaluations += 1
        self.evaluations += 1
        while not self.attempt(slope):
            self.mu, self.growth = self.mu * self.growth, self.growth * 2
            if not self.mu <= self.ceiling:
                self.stop = Stop("stalled: no step of any length decreases the objective")
                return

    def attempt(self, slope: Tensor) -> bool:
        """Solves one step at μ; False where it gains too little."""
        point = self.point
        s, newton = self.solver.solve(point, -slope, self.mu, self.newton)
        candidate = point.at(s)
        linear, quadratic = point.predicted_decrease(s)
        predicted = (quadratic if newton else linear) if s.any() else -math.inf
        actual = point.objective - candidate.objective
        self.newton = abs(actual - quadratic) < abs(actual - linear)
        self.evaluations += 3
        gain = actual / predicted if predicted > 0 else -math.inf
        if predicted > 0:
            gain, candidate = self.corrected(s, newton, predicted, gain, candidate)
        if 0 <= predicted <= STATIONARY * point.objective:
            self.stop = Stop("stationary: the model promises no further decrease", converged=True)
            return True
        if not gain > SUFFICIENT_GAIN:
            return False
        self.point, self.step = candidate, self.step + 1
        self.mu = max(self.mu * max(0.1, 1 - (2 * gain - 1) ** 3), self.ceiling * (MIN_MU / MAX_MU))
        self.growth = 2.0
        self.report()
        return True

    def corrected(
        self, s: Tensor, newton: bool, predicted: float, gain: float, candidate: Point
    ) -> tuple[float, Point]:
        """Gain ratio and candidate after corrections of the step s, as long as each of them pays."""
        size = float(s.norm())
        for _ in range(MOST_CORRECTIONS):
            if gain >= STRAIGHT or not math.isfinite(candidate.objective):
                break
            correction = self.solver.correct(self.point, candidate, s, self.mu, newton)
            if correction is None or not float(correction.norm()) <= size:
                break
            s = s + correction
            corrected = self.point.at(s)
            self.evaluations += 1
            if not corrected.objective < candidate.objective:
                break
            candidate, gain = corrected, (self.point.objective - corrected.objective) / predicted
        return gain, candidate

    def report(self) -> None:
        point, spent = self.point, self.evaluations + self.solver.products
        self.problem.report(self.step, point.x, point.objective, spent)
        self.stop = self.problem.matched(math.sqrt(point.misfit), self.problem.tolerance * self.problem.scale)

    def finish(self, stop: Stop) -> Reconstruction:
        point = self.point
        if not float(point.x.abs().max()) <= EXPLODED:
            stop = Stop(f"failed: pixels beyond {EXPLODED:g} at step {self.step}", failed=True)
        if not point.order.third:
            note = "; without the second-order term, as the network has no third derivative"
            stop = stop._replace(reason=stop.reason + note)
        spent = self.evaluations + self.solver.products
        return self.problem.finish(point.x, point.objective, self.step, spent, stop)
