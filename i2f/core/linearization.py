"""The gradient g(x) = ∇_θ L(x, θ) at one x, and exact products with its Jacobian there."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from i2f.core.gradient import NO_J, SMALL, GradientMap, joined


class Linearization:
    """g(x) = ∇_θ L(x, θ) at one x, and exact products with its Jacobian there.

        J δ  = ∇_x ⟨∇_θ L, δ⟩      parameter space -> input space
        Jᵀ v = ∇_θ ⟨∇_x L, v⟩      input space -> parameter space

    Both gradients' graphs are kept, so that a product costs one backward pass through them. Where the network stops
    part of its gradient (`GradientMap.stops`), g is no gradient of L, and Jᵀ v = ∇_δ ⟨J δ, v⟩ takes its place. No
    checks: see `GradientJacobian`.
    """

    def __init__(self, gmap: GradientMap, x: Tensor, forward: Callable[[], None] = lambda: None):
        """forward: called once L's own graph stands, before the gradients'."""
        self.gmap, self.x = gmap, x.detach()
        self._theta = gmap.leaves()
        self._x = self.x.clone().requires_grad_()
        with torch.enable_grad():
            value = gmap.value(self._theta, self._x)
            forward()
            if not value.requires_grad:
                raise ValueError("loss depends neither on x nor on θ: its gradient gives nothing away")
            *by_theta, self._by_x = gmap.by_theta(value, [*self._theta.values(), self._x], create_graph=True)
        self.gradient = joined([g.detach() for g in by_theta])
        self._by_theta = [g if g.grad_fn is not None else None for g in by_theta]  # zeros may require a gradient
        self._by_delta: tuple[Tensor, Tensor] | None = None  # δ, and J δ with its graph

    def checked(self) -> "Linearization":
        """Itself, or a ValueError where no path leads from x to ∇_θ L, so that J = 0 at every x; a RuntimeError where
        a path ends at an operation that forbids a second derivative, which would be left out without a word."""
        nodes = graph_nodes([g.grad_fn for g in (*self._by_theta, self._by_x) if g is not None])
        names = {node.name() for node in nodes}
        if "torch::autograd::Error" in names:
            raise RuntimeError("an autograd.Function of the model is marked once_differentiable")
        if "torch::autograd::NotImplemented" in names:
            raise RuntimeError("an operation of PyTorch's")
        seen = graph_nodes([g.grad_fn for g in self._by_theta if g is not None])
        reaches = any(getattr(node, "variable", None) is self._x for node in seen)
        if not reaches or (self._by_x.grad_fn is None and not self.gmap.stops):
            raise ValueError(NO_J)
        if self.gradient.numel() + self.x.numel() <= SMALL:
            self.matvec(torch.zeros_like(self.gradient))  # raises where the second backward does
        return self

    @property
    def own_functions(self) -> set[str]:
        """The names of the autograd.Functions of the user's on the way: their backward may be anything."""
        nodes = graph_nodes([g.grad_fn for g in (*self._by_theta, self._by_x) if g is not None])
        names = {node.name() for node in nodes if isinstance(node, torch.autograd.function.BackwardCFunction)}
        return {name.removesuffix("Backward") for name in names} - {"_Hold"}

    def matvec(self, delta: Tensor) -> Tensor:
        """J δ, (d_θ,) -> (d_x,), or (k, d_θ) -> (k, d_x) in one pass."""
        many = delta.ndim == 2
        return self._backward(delta, is_grads_batched=many).reshape(*delta.shape[:-1], -1)

    def rmatvec(self, v: Tensor) -> Tensor:
        """Jᵀ v, (d_x,) -> (d_θ,), or (k, d_x) -> (k, d_θ) in one pass."""
        many, weights = v.ndim == 2, v.view(*v.shape[:-1], *self._x.shape)
        if self.gmap.stops:
            if self._by_delta is None:
                delta = torch.zeros_like(self.gradient).requires_grad_()
                self._by_delta = delta, self._backward(delta, create_graph=True)
            delta, product = self._by_delta
            return torch.autograd.grad(product, delta, weights, retain_graph=True, is_grads_batched=many)[0]
        leaves = list(self._theta.values())
        out = torch.autograd.grad(
            self._by_x, leaves, weights, retain_graph=True, allow_unused=True, is_grads_batched=many
        )
        out = [g.to_dense() if g is not None and g.is_sparse else g for g in out]
        parts = [p.new_zeros(*v.shape[:-1], p.numel()) if g is None else g.reshape(*v.shape[:-1], -1)
                 for p, g in zip(leaves, out, strict=True)]  # fmt: skip
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
    of each group anew: the memory of one group, for the time of about three gradients.

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
            if float((total - self.gradient).norm()) <= SAME * float(self.gradient.norm()):
                self.weights = weights
                return
        raise ValueError("the images cannot be taken one after another: their gradients, neither their mean nor their "
                         "sum, make that of all. A layer may mix them (BatchNorm by the batch's own statistics), or "
                         "the loss weigh them")  # fmt: skip

    @property
    def own_functions(self) -> set[str]:
        """Those of the first group."""
        return self._at(self.groups[0]).own_functions

    def checked(self) -> "Recomputation":
        """Itself; the first group is looked at."""
        self._at(self.groups[0]).checked()
        return self

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


SAME = 1e-3  # relative, between two ways to sum a gradient in float32


def trusted(
    gmap: GradientMap,
    x: Tensor,
    at_x: Linearization | Recomputation,
    build: Callable[[], Linearization | Recomputation],
) -> Linearization | Recomputation:
    """`at_x`, or what `build` makes in its place, once its J is known to be the derivative of its gradient.

    Raises: ValueError, RuntimeError where it is not, or has no second derivative.
    """
    if gmap.stops and may_ignore_stops(gmap, x):
        at_x = build()
    confirm(gmap, x, at_x.checked())
    return at_x


def may_ignore_stops(gmap: GradientMap, x: Tensor) -> bool:
    """Whether what the network stops does not matter to J: a product with it and one without agree. Then the plain
    graphs, which are faster, are used from here on."""
    delta = torch.from_numpy(np.random.default_rng(1).standard_normal(gmap.size)).to(x)
    held = Linearization(gmap, x)
    gmap.hold(False)
    plain, v = Linearization(gmap, x), torch.ones_like(x).reshape(-1)
    if plain._by_x.grad_fn is not None and any(g is not None for g in plain._by_theta):
        found, wanted = plain.matvec(delta), held.matvec(delta)
        near = (1e-4 if x.dtype == torch.float32 else 1e-9) * float(wanted.norm())
        by_v = float(delta @ plain.rmatvec(v))
        size = float(wanted.norm()) * float(v.norm())
        if float((found - wanted).norm()) <= near and abs(by_v - float(wanted @ v)) <= 1e-4 * size:
            return True
    gmap.hold(True)
    return False


def confirm(gmap: GradientMap, x: Tensor, at_x: Linearization | Recomputation) -> None:
    """Where autograd cannot be taken at its word (an autograd.Function of the user's, a value that leaves PyTorch), Jᵀv
    is compared with central differences of the gradient along `DIRECTIONS` directions, in float64, and J with Jᵀ.

    Raises: ValueError where they differ.
    """
    doubt = [*sorted(gmap.escaping), *sorted(at_x.own_functions)]
    if not doubt:
        return
    draws = np.random.default_rng(1)
    vs = torch.from_numpy(draws.standard_normal((DIRECTIONS, x.numel()))).to(x.device)
    delta = torch.from_numpy(draws.standard_normal(gmap.size)).to(at_x.x)
    try:
        exact = at_x.gmap.cast(torch.float64)
        there = Linearization(exact, x.to(exact.dtype))
        wanted = [there.rmatvec(v.to(exact.dtype)) for v in vs]
    except Exception:  # what the user's own code does in float64 may be anything
        exact, wanted = at_x.gmap, [at_x.rmatvec(v.to(at_x.x)) for v in vs]
    along = at_x.rmatvec(vs[0].to(at_x.x))
    apart = abs(float(at_x.matvec(delta) @ vs[0].to(at_x.x) - delta @ along))
    agree = apart <= (1e-2 if x.dtype == torch.float32 else 1e-4) * float(along.norm() * delta.norm()) / gmap.size**0.5
    if not (agree and all(_differs_so(exact, x.to(exact.dtype), v, w) for v, w in zip(vs, wanted, strict=True))):
        raise ValueError("model or loss: its gradient depends on x in a way that autograd does not see; the cause may "
                         f"be {', '.join(doubt)}: use operations that autograd differentiates")  # fmt: skip


DIRECTIONS = 3  # a value that leaves PyTorch spoils one direction of J, which a single draw may miss


def _differs_so(gmap: GradientMap, x: Tensor, v: Tensor, wanted: Tensor) -> bool:
    """Whether Jᵀv is `wanted`, by central differences: at one step at least, since a kink between two points spoils the
    larger ones, and rounding the smaller."""
    steps, near = ((1e-4, 1e-5, 1e-6), 1e-3) if x.dtype == torch.float64 else ((1e-2, 1e-3), 0.1)
    step_along = v.to(x.dtype).view_as(x)
    for step in steps:
        found = (gmap(x + step * step_along) - gmap(x - step * step_along)) / (2 * step)
        if float((found - wanted).norm()) <= near * float(torch.maximum(wanted.norm(), found.norm())):
            return True
    return False
