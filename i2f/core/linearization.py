"""The gradient g(x) = ∇_θ L(x, θ) at one x, and exact products with its Jacobian there."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from i2f.core import checks
from i2f.core.flat import joined
from i2f.core.gradient import GradientMap

SMALL_PROBLEM = 2**18  # entries of θ and x together up to which a trial run costs little
ROUNDING = 1e-3  # relative, between two ways to sum a gradient in float32


class Linearization:
    """g(x) = ∇_θ L(x, θ) at one x, and exact products with its Jacobian there.

        J δ  = ∇_x ⟨∇_θ L, δ⟩      parameter space -> input space
        Jᵀ v = ∇_θ ⟨∇_x L, v⟩      input space -> parameter space

    Both gradients' graphs are kept, so that a product costs one backward pass through them. Where g is no gradient of L
    (part of it is stopped, `GradientMap.stops`; several local steps), Jᵀ v = ∇_δ ⟨J δ, v⟩ takes its place. No checks:
    see `GradientJacobian`.
    """

    def __init__(self, gmap: GradientMap, x: Tensor, forward: Callable[[], None] = lambda: None):
        """forward: called once the graph of L is built, before those of the gradients."""
        self.gmap, self.x = gmap, x.detach()
        self._theta = gmap.leaves()
        self._x = self.x.clone().requires_grad_()
        self._by_x: Tensor | None = None
        with torch.enable_grad():
            if gmap.message is not None:
                by_theta = list(gmap.message.sent(gmap, self._theta, self._x, None, create_graph=True))
                forward()
            else:
                value = gmap.value(self._theta, self._x)
                forward()
                *by_theta, self._by_x = gmap.by_theta(value, [*self._theta.values(), self._x], create_graph=True)
        self._by_both = gmap.stops or gmap.message is not None
        self.gradient = joined([g.detach() for g in by_theta])
        self._by_theta = [g if g.grad_fn is not None else None for g in by_theta]  # zeros may require a gradient
        self._by_delta: tuple[Tensor, Tensor] | None = None  # δ, and J δ with its graph

    def part(self) -> Self:
        """What stands for the whole where its graph is examined: all of it."""
        return self

    @property
    def reacts(self) -> bool:
        """Whether both gradients have a graph; otherwise J = 0 at every x, or part of J is stopped."""
        by_x = self._by_x is None or self._by_x.grad_fn is not None
        return by_x and any(g is not None for g in self._by_theta)

    def check(self) -> None:
        """Raises: ValueError where no path leads from x to ∇_θ L, so that J = 0 at every x; RuntimeError where a path
        ends at an operation that forbids a second derivative, which autograd would leave out without an error."""
        names = {node.name() for node in self._nodes()}
        if "torch::autograd::Error" in names:
            raise RuntimeError("an autograd.Function of the model is marked once_differentiable")
        if "torch::autograd::NotImplemented" in names:
            raise RuntimeError("an operation of PyTorch's")
        behind = graph_nodes([g.grad_fn for g in self._by_theta if g is not None])
        reached = any(getattr(node, "variable", None) is self._x for node in behind)
        if not reached or not (self._by_both or self.reacts):
            raise ValueError(checks.NO_J)
        if self.gradient.numel() + self.x.numel() <= SMALL_PROBLEM:
            self.matvec(torch.zeros_like(self.gradient))  # raises where the second backward does

    @property
    def own_functions(self) -> set[str]:
        """The names of the user's autograd.Functions in the graphs: their backward may be anything."""
        kind: Any = torch.autograd.function.BackwardCFunction  # its stub lacks `name`
        names = {node.name() for node in self._nodes() if isinstance(node, kind)}
        return {name.removesuffix("Backward") for name in names} - {"_Hold"}

    def _nodes(self) -> set[Any]:
        return graph_nodes([g.grad_fn for g in (*self._by_theta, self._by_x) if g is not None])

    def matvec(self, delta: Tensor) -> Tensor:
        """J δ, (d_θ,) -> (d_x,), or (k, d_θ) -> (k, d_x) in one pass."""
        many = delta.ndim == 2
        return self._backward(delta, is_grads_batched=many).reshape(*delta.shape[:-1], -1)

    def rmatvec(self, v: Tensor) -> Tensor:
        """Jᵀ v, (d_x,) -> (d_θ,), or (k, d_x) -> (k, d_θ) in one pass."""
        many, weights = v.ndim == 2, v.view(*v.shape[:-1], *self._x.shape)
        if self._by_both:
            if self._by_delta is None:
                delta = torch.zeros_like(self.gradient).requires_grad_()
                self._by_delta = delta, self._backward(delta, create_graph=True)
            delta, product = self._by_delta
            return torch.autograd.grad(product, delta, weights, retain_graph=True, is_grads_batched=many)[0]
        leaves = list(self._theta.values())
        assert self._by_x is not None
        by_theta = torch.autograd.grad(
            self._by_x, leaves, weights, retain_graph=True, allow_unused=True, is_grads_batched=many
        )
        parts, batch = [], v.shape[:-1]
        for p, g in zip(leaves, by_theta, strict=True):
            g = g.to_dense() if g is not None and g.is_sparse else g
            parts.append(p.new_zeros(*batch, p.numel()) if g is None else g.reshape(*batch, -1))
        return torch.cat(parts, dim=-1)

    def _backward(self, delta: Tensor, **options: bool) -> Tensor:
        pairs = [(g, d) for g, d in zip(self._by_theta, self.gmap.split(delta), strict=True) if g is not None]
        gradients, weights = zip(*pairs, strict=True)
        return torch.autograd.grad(
            gradients, self._x, weights, retain_graph=True, allow_unused=True, materialize_grads=True, **options
        )[0]


def graph_nodes(ends: list[Any]) -> set[Any]:
    """Every node of the autograd graphs that end there; `ends` is used up."""
    seen: set[Any] = set()
    while ends:
        node = ends.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ends.extend(following for following, _ in node.next_functions)
    return seen


class Recomputation:
    """The same products for n images behind one gradient, `group` of them at a time, with no graph kept.

    Where no image's output depends on another, J stacks the images' own Jacobians, each with its weight w in the loss
    (1/n for a mean, 1 for a sum):  J δ = [w₁ J₁ δ; …; w_n J_n δ],  Jᵀ v = Σ w_i J_iᵀ v_i. A product builds the graphs
    of each group again: the memory of one group, for the time of about three gradients.

    Raises: ValueError where the images' gradients do not add up to the whole one (BatchNorm by the batch's statistics).
    """

    def __init__(self, gmap: GradientMap, x: Tensor, group: int = 1):
        self.gmap, self.x = gmap, x.detach()
        n = len(x)
        self.groups = [slice(first, min(first + group, n)) for first in range(0, n, group)]
        self.gradient = gmap(self.x)
        choices = [(some.stop - some.start) / n for some in self.groups], [1.0] * len(self.groups)
        totals = [torch.zeros_like(self.gradient) for _ in choices]
        for number, some in enumerate(self.groups):
            own = self._map(some)(self.x[some])
            for total, weights in zip(totals, choices, strict=True):
                total += weights[number] * own
        for total, weights in zip(totals, choices, strict=True):
            if float((total - self.gradient).norm()) <= ROUNDING * float(self.gradient.norm()):
                self.weights = weights
                return
        raise ValueError(
            "the images cannot be taken one after another: neither the mean nor the sum of their gradients is that of "
            "all. A layer may mix them (BatchNorm by the batch's own statistics), or the loss weights them"
        )

    def part(self) -> Linearization:
        """What stands for the whole where its graph is examined: the first group."""
        return self._at(self.groups[0])

    def matvec(self, delta: Tensor) -> Tensor:
        """J δ, (d_θ,) -> (d_x,)."""
        parts = zip(self.weights, self.groups, strict=True)
        return torch.cat([w * self._at(some).matvec(delta) for w, some in parts])

    def rmatvec(self, v: Tensor) -> Tensor:
        """Jᵀ v, (d_x,) -> (d_θ,)."""
        v, total = v.view_as(self.x), torch.zeros_like(self.gradient)
        for w, some in zip(self.weights, self.groups, strict=True):
            total += w * self._at(some).rmatvec(v[some].reshape(-1))
        return total

    def _map(self, some: slice) -> GradientMap:
        return self.gmap.relabel(self.gmap.y[some])

    def _at(self, some: slice) -> Linearization:
        return Linearization(self._map(some), self.x[some])
