"""The perfect attacker: second order on the residual r(x) = W(∇_θ L(x) − g), to machine precision."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from i2f.attacks.krylov import KrylovSolver
from i2f.attacks.prior import BOX
from i2f.attacks.problem import EXPLODED, Problem, Reconstruction
from i2f.attacks.steps import FirstGram, StepSolver
from i2f.core.linearization import Linearization, graph_nodes
from i2f.core.progress import bar

INITIAL_DAMPING = 1e-4  # μ at the first step, and
MAX_DAMPING = 1e10  # μ at which an attack is given up; both in units of the curvature along the first gradient
SUFFICIENT_GAIN = 1e-4  # a step is accepted for this share of the decrease that the model promised
STRAIGHT = 0.9  # gain ratio from which a step needs no correction
MOST_CORRECTIONS = 3
MIN_DAMPING = 1e-40  # where μ stays as long as all goes well, in the same units
STATIONARY = 1e-14  # no step promises more than this share of the objective: nothing left to gain


def gauss_newton(problems: Sequence[Problem]) -> list[Reconstruction]:
    """Levenberg–Marquardt with gain-ratio control of the damping μ (Marquardt 1963; Nielsen 1999).

    A step solves  (J Jᵀ + μI) s = −J r,  Gauss–Newton's equation in input space. Where noise leaves a residual that
    no image explains, that converges slowly; so the part of the Hessian that it drops, S = Σ_k r_k ∇²r_k, joins the
    matrix whenever the model with S foretold the last change of the objective better than the one without (as in
    NL2SOL, Dennis, Gay and Welsch 1981). Then convergence is quadratic for a noisy gradient too.

    Where the network has no third derivative, which S needs, the steps are Gauss–Newton's own, and the reason says so.
    With a box, a step minimises the same model among the images in [0, 1]. A prior's gradient joins the
    right side, its curvature the matrix. How steps are solved: `StepSolver`, or `KrylovSolver` for networks whose J is
    too large to form, where a step that the objective's curvature spoils is also corrected. A step is taken on its gain
    ratio, actual over promised decrease, so the last iterate is the best.

    Stops when the gradient is matched, when the model promises no further decrease (stationary), when no damping gives
    a decrease (stalled), or after the budget of steps. Problems are attacked one after another.
    """
    found: list[Reconstruction] = []
    first = FirstGram()
    for problem in problems:
        if found and found[-1].reason.startswith("interrupted"):
            reason = "interrupted before its first step"
            found.append(problem.finish(problem.start, math.inf, 0, 0, reason, failed=True))
        else:
            found.append(_Attack(problem, first).run())
    return found


class _Attack:
    def __init__(self, problem: Problem, first: FirstGram):
        self.problem = problem
        self.solver = StepSolver(problem, first) if problem.box or StepSolver.fits(problem) else KrylovSolver()
        self.point = Point(problem, problem.start)
        self.step, self.evaluations, self.reason = 0, 1, ""
        self.mu = self.ceiling = 0.0
        self.growth, self.newton = 2.0, False

    def run(self) -> Reconstruction:
        problem = self.problem
        if not math.isfinite(problem.loss(self.point.objective)):
            return self.finish("failed: the gradient at the start is NaN or infinite; give another start or seed")
        self.report()
        with bar(total=problem.steps, description="gauss-newton", shown=problem.progress) as progress:
            try:
                while not self.reason and self.step < problem.steps:
                    self.advance()
                    progress.update()
                    progress.set_postfix_str(f"objective {self.point.objective:.1e}")
            except KeyboardInterrupt:
                self.reason = f"interrupted after {self.step} steps"
        return self.finish(self.reason or f"used its {problem.steps} steps")

    def advance(self) -> None:
        """One step, or a reason to stop."""
        point = self.point
        slope = point.slope()
        self.reason = point.finished()
        if self.reason:
            return
        if not self.mu:
            curvature = point.curvature(slope)
            if not 0 < curvature < math.inf:
                self.reason = f"stalled: the curvature at the start is {curvature:g} in units of the gradient"
                return
            self.mu, self.ceiling = INITIAL_DAMPING * curvature, MAX_DAMPING * curvature
            self.evaluations += 1
        self.evaluations += 1
        while not self.reason:
            s, newton = self.solver.solve(point, -slope, self.mu, self.newton)
            candidate = point.at(s)
            linear, quadratic = point.promise(s)
            promised = (quadratic if newton else linear) if s.any() else -math.inf
            actual = point.objective - candidate.objective
            self.newton = abs(actual - quadratic) < abs(actual - linear)
            self.evaluations += 3
            gain = actual / promised if promised > 0 else -math.inf
            if promised > 0 and self.solver.corrects:
                gain, candidate = self.corrected(s, newton, promised, gain, candidate)
            if 0 <= promised <= STATIONARY * point.objective:
                self.reason = "stationary: the model promises no further decrease"
            elif gain > SUFFICIENT_GAIN:
                self.point, self.step = candidate, self.step + 1
                self.mu = max(self.mu * max(0.1, 1 - (2 * gain - 1) ** 3), self.ceiling * (MIN_DAMPING / MAX_DAMPING))
                self.growth = 2.0
                self.report()
                return
            else:
                self.mu, self.growth = self.mu * self.growth, self.growth * 2
                if not self.mu <= self.ceiling:
                    self.reason = "stalled: no step of any length decreases the objective"

    def corrected(
        self, s: Tensor, newton: bool, promised: float, gain: float, candidate: "Point"
    ) -> tuple[float, "Point"]:
        """The step s followed back into the valley that it left, as long as that gains: gain ratio, and point."""
        size = float(s.norm())
        for _ in range(MOST_CORRECTIONS):
            if gain >= STRAIGHT or not math.isfinite(candidate.objective):
                break
            correction = self.solver.correct(self.point.chord(candidate, s, newton), s, self.mu, newton)
            self.evaluations += 1 + newton
            if not float(correction.norm()) <= size:
                break
            s = s + correction
            corrected = self.point.at(s)
            self.evaluations += 1
            if not corrected.objective < candidate.objective:
                break
            candidate, gain = corrected, (self.point.objective - corrected.objective) / promised
        return gain, candidate

    def report(self) -> None:
        spent = self.evaluations + self.solver.products
        self.problem.report(self.step, self.point.x, self.point.objective, spent)
        self.reason = self.point.matched()

    def finish(self, reason: str) -> Reconstruction:
        failed = reason.startswith("failed")
        if not float(self.point.x.abs().max()) <= EXPLODED:
            failed, reason = True, f"failed: pixels beyond {EXPLODED:g} at step {self.step}"
        if not self.point.order.third:
            reason += "; without the second-order term, as the network has no third derivative"
        return self.problem.finish(
            self.point.x, self.point.objective, self.step, self.evaluations + self.solver.products, reason,
            converged=reason.startswith(("matched", "stationary")), failed=failed,
        )  # fmt: skip


class Point(Linearization):
    """One iterate: its residual r, its objective f = ‖r‖² + penalty(x), and products with J Wᵀ there. order: what the
    network is known to have, shared by the points of one attack."""

    def __init__(self, problem: Problem, x: Tensor, order: "Order | None" = None):
        super().__init__(problem.gmap, x)
        self.problem, self.match, self.prior = problem, problem.match, problem.prior
        self.order = order or Order()
        self.residual = self.match(self.gradient - problem.target)
        self.misfit = float(self.residual.double().square().sum())
        self.objective = self.misfit + (float(self.prior.penalty(self.x)) if self.prior.active else 0.0)
        if not math.isfinite(self.objective):
            self.objective = math.inf
        self.belief = self.prior.curvature(self.x) if self.prior.active else None
        self._half_misfit: Tensor | None = None  # half the gradients, with their graphs
        self._half_penalty: Tensor | None = None

    def at(self, s: Tensor) -> "Point":
        """The point a step away; rounding does not carry it out of the box."""
        x = self.x + s.view_as(self.x)
        return Point(self.problem, x.clamp(*BOX) if self.problem.box else x, self.order)

    def slope(self) -> Tensor:
        """½ ∇f = J Wᵀ r + ½ ∇penalty; its own graph is kept for `bend`."""
        if self._half_misfit is None:
            weights = self.match.adjoint(self.residual, self.gradient.numel())
            try:
                self._half_misfit = self._backward(weights, create_graph=self.order.third)
                self.order.look_at(self._half_misfit)
            except RuntimeError as error:
                self.order.lacks_third(error)
                self._half_misfit = self._backward(weights)
            if self.prior.active:
                with torch.enable_grad():
                    half = 0.5 * self.prior.penalty(self._x)
                    self._half_penalty = torch.autograd.grad(half, self._x, create_graph=True)[0]
        out = self._half_misfit.detach().reshape(-1)
        return out + self._pull() if self.prior.active else out

    def _pull(self) -> Tensor:
        """½ ∇penalty, (d_x,)."""
        return self._half_penalty.detach().reshape(-1)

    def curvature(self, direction: Tensor) -> float:
        """vᵀ(J WᵀW Jᵀ + the prior's curvature)v along a unit vector v."""
        v = (direction.double() / direction.double().norm()).to(direction)
        out = float(self.rmatvec(v).double().square().sum())
        return out if self.belief is None else out + float(v @ self.belief(v))

    def chord(self, candidate: "Point", s: Tensor, newton: bool) -> Tensor:
        """½ ∇f at the candidate x + s as it would be if J [and S] had stayed as they are here: J Wᵀ r(x + s) [+ S s].
        What is left of it at a step that solves the model is due to r's curvature along s."""
        out = self.matvec(self.match.adjoint(candidate.residual, self.gradient.numel()))
        if self.prior.active:
            out = out + self._pull() + self.belief(s)  # as the model has it: `bend` adds what it lacks
        return out + self.bend(s) if newton else out

    def rmatvec(self, v: Tensor) -> Tensor:
        """W Jᵀ v, (d_x,) -> (|K|,)."""
        return self.match(super().rmatvec(v))

    def curve(self, v: Tensor, newton: bool = False) -> Tensor:
        """J WᵀW Jᵀ v and the prior's curvature, Gauss–Newton's half of the Hessian, in two products; with S v, the rest
        of it (`bend`), in three."""
        out = self.matvec(self.match.adjoint(self.rmatvec(v), self.gradient.numel()))
        out = out if self.belief is None else out + self.belief(v)
        return out + self.bend(v) if newton else out

    def bend(self, v: Tensor) -> Tensor:
        """What `curve` leaves out of half the objective's Hessian: S v, and what the prior's stand-in lacks. Without
        S where the network has no third derivative."""
        halves = [self._half_misfit] if self.order.third else []
        halves = [h for h in (*halves, self._half_penalty) if h is not None and h.requires_grad]
        try:
            out = torch.autograd.grad(
                halves, self._x, [v.view_as(self._x)] * len(halves), retain_graph=True, materialize_grads=True
            )[0].reshape(-1) if halves else torch.zeros_like(v)  # fmt: skip
        except RuntimeError as error:
            self.order.lacks_third(error)
            return self.bend(v)
        return out if self.belief is None else out - self.belief(v)

    def promise(self, s: Tensor) -> tuple[float, float]:
        """The decrease of f that a step s promises by Gauss–Newton's model, and by the full quadratic one."""
        Js = self.rmatvec(s)
        linear = -float((2 * self.residual + Js) @ Js)
        if self.belief is not None:
            linear -= float(s @ (2 * self._pull() + self.belief(s)))
        return linear, linear - float(s @ self.bend(s))

    def matched(self) -> str:
        """With a prior, a matched gradient is not yet the minimum."""
        near = not self.prior.active and math.sqrt(self.misfit) <= self.problem.tolerance * self.problem.scale
        how = ", weighed by the covariance," if self.problem.match.whitens else ""
        return f"matched the gradient{how} to the tolerance" if near else ""

    def finished(self) -> str:
        """Why no step leads further down from here, if none does."""
        slope = self.slope().view_as(self.x)
        if self.problem.box:
            slope = slope[~((self.x <= BOX[0]) & (slope > 0) | (self.x >= BOX[1]) & (slope < 0))]
        return "" if float(slope.double().norm()) else "stationary: the objective's gradient vanishes here"


class Order:
    """Whether the network has the third derivative that S needs; known once it has been asked for."""

    third, looked = True, False

    def look_at(self, slope: Tensor) -> None:
        """Once: a slope whose graph ends at an operation that forbids a further derivative, which would be left out."""
        if self.third and not self.looked:
            ends = graph_nodes([slope.grad_fn])
            self.looked, self.third = True, all(node.name() != "torch::autograd::Error" for node in ends)

    def lacks_third(self, error: RuntimeError) -> None:
        """Says so; raises the error where it has another cause."""
        if not self.third or isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise error
        self.third = False
