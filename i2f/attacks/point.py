"""One iterate of a second-order attack: its objective, and products with its derivatives."""

import math

import torch
from torch import Tensor

from i2f.attacks.prior import BOX
from i2f.attacks.problem import Problem
from i2f.core.linearization import Linearization, graph_nodes


class Order:
    """Whether the network has the third derivative that S needs; known once it has been asked for."""

    third, looked = True, False

    def look_at(self, slope: Tensor) -> None:
        """Once: a slope whose graph ends at an operation that forbids a further derivative, which would be left out."""
        if self.third and not self.looked:
            ends = graph_nodes([slope.grad_fn])
            self.looked, self.third = True, all(node.name() != "torch::autograd::Error" for node in ends)

    def lacks_third(self, error: RuntimeError) -> None:
        """Records that it has none; raises the error where it has another cause."""
        if not self.third or isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise error
        self.third = False


class Point(Linearization):
    """An iterate x: its residual r = W(∇L(x) − g), its objective f = ‖r‖² + penalty(x), and products with the two
    parts of half its Hessian,

        ½ ∇²f = H + S,    H = J WᵀW Jᵀ + C,    S = Σ_k r_k ∇²r_k + (½ ∇²penalty − C).

    H is Gauss–Newton's matrix, C the prior's curvature (`Prior.curvature`), S the second-order term.

    order: what is known of the network's third derivative, shared by the points of one attack.
    """

    def __init__(self, problem: Problem, x: Tensor, order: Order | None = None):
        super().__init__(problem.gmap, x)
        self.problem, self.match, self.prior = problem, problem.match, problem.prior
        self.order = order or Order()
        self.residual = self.match(self.gradient - problem.target)
        self.misfit = float(self.residual.double().square().sum())
        self.objective = self.misfit + (float(self.prior.penalty(self.x)) if self.prior.active else 0.0)
        if not math.isfinite(self.objective):
            self.objective = math.inf
        self.prior_curvature = self.prior.curvature(self.x)  # v ↦ C v
        self._half_misfit: Tensor | None = None  # half the gradients, with their graphs
        self._half_penalty: Tensor | None = None

    def at(self, s: Tensor) -> "Point":
        """The point a step away; rounding does not carry it out of the box."""
        x = self.x + s.view_as(self.x)
        return Point(self.problem, x.clamp(*BOX) if self.problem.box else x, self.order)

    def slope(self) -> Tensor:
        """½ ∇f = J Wᵀ r + ½ ∇penalty, (d_x,)."""
        out = _flat(self._misfit_slope())
        return out + _flat(self._prior_slope()) if self.prior.active else out

    def _misfit_slope(self) -> Tensor:
        """J Wᵀ r in x's shape, with its graph where the network has a third derivative."""
        if self._half_misfit is None:
            weights = self.match.adjoint(self.residual, self.gradient.numel())
            try:
                self._half_misfit = self._backward(weights, create_graph=self.order.third)
                self.order.look_at(self._half_misfit)
            except RuntimeError as error:
                self.order.lacks_third(error)
                self._half_misfit = self._backward(weights)
        return self._half_misfit

    def _prior_slope(self) -> Tensor:
        """½ ∇penalty in x's shape, with its graph."""
        if self._half_penalty is None:
            with torch.enable_grad():
                half = 0.5 * self.prior.penalty(self._x)
                self._half_penalty = torch.autograd.grad(half, self._x, create_graph=True)[0]
        return self._half_penalty

    def rmatvec(self, v: Tensor) -> Tensor:
        """W Jᵀ v, (d_x,) -> (|K|,)."""
        return self.match(super().rmatvec(v))

    def curvature(self, direction: Tensor) -> float:
        """vᵀH v along a unit vector v."""
        v = (direction.double() / direction.double().norm()).to(direction)
        out = float(self.rmatvec(v).double().square().sum())
        return out + float(v @ self.prior_curvature(v)) if self.prior.active else out

    def half_hessian(self, v: Tensor, newton: bool = False) -> Tensor:
        """H v, in two products; with `newton` (H + S) v, in three."""
        out = self.matvec(self.match.adjoint(self.rmatvec(v), self.gradient.numel()))
        out = out + self.prior_curvature(v) if self.prior.active else out
        return out + self.second_order_term(v) if newton else out

    def second_order_term(self, v: Tensor) -> Tensor:
        """S v; of a network without a third derivative, the prior's part alone."""
        halves = [self._misfit_slope()] if self.order.third else []
        halves = [*halves, self._prior_slope()] if self.prior.active else halves
        halves = [half for half in halves if half.requires_grad]
        weights = [v.view_as(self._x)] * len(halves)
        out = torch.zeros_like(v)
        try:
            if halves:
                (out,) = torch.autograd.grad(halves, self._x, weights, retain_graph=True, materialize_grads=True)
        except RuntimeError as error:
            self.order.lacks_third(error)
            return self.second_order_term(v)
        out = out.reshape(-1)
        return out - self.prior_curvature(v) if self.prior.active else out

    def model_slope(self, candidate: "Point", s: Tensor, newton: bool) -> Tensor:
        """½ ∇f at the candidate x + s, with J [and S] as they are at x: J Wᵀ r(x + s) [+ S s]. What remains of it after
        a step that solves the model's equation is due to r's curvature along s."""
        out = self.matvec(self.match.adjoint(candidate.residual, self.gradient.numel()))
        if self.prior.active:
            out = out + _flat(self._prior_slope()) + self.prior_curvature(s)
        return out + self.second_order_term(s) if newton else out

    def predicted_decrease(self, s: Tensor) -> tuple[float, float]:
        """The decrease of f along a step s by Gauss–Newton's model, −2 sᵀ(½ ∇f) − sᵀH s, and by the full quadratic
        one, which subtracts sᵀS s."""
        Js = self.rmatvec(s)
        linear = -float((2 * self.residual + Js) @ Js)
        if self.prior.active:
            linear -= float(s @ (2 * _flat(self._prior_slope()) + self.prior_curvature(s)))
        return linear, linear - float(s @ self.second_order_term(s))

    def at_a_minimum(self) -> bool:
        """Whether f has no slope: in the box, none along which a pixel could move."""
        slope = self.slope().view_as(self.x)
        if self.problem.box:
            slope = slope[~((self.x <= BOX[0]) & (slope > 0) | (self.x >= BOX[1]) & (slope < 0))]
        return not float(slope.double().norm())


def _flat(slope: Tensor) -> Tensor:
    return slope.detach().reshape(-1)
