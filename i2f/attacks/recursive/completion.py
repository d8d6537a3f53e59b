"""Activations that a layer's own gradient leaves open, from what the layers above say of them, and from their signs."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from i2f.attacks.recursive.graph import Graph, apply
from i2f.attacks.recursive.systems import System

SURE = 10.0  # standard deviations from which a unit counts as open
ROUNDS = 12  # of at most
PROJECTED, FREE = 250, 400  # projected gradients, and conjugate gradients on what lies inside the bounds
FACTORED = 4096  # most unknowns of equations without bounds that are factored
POWER = 20  # iterations for the largest eigenvalue
EXACT = 1e-13  # relative residual at which the bounded problem is solved
STALLED = 0.9  # a round must bring it below this share
ACCEPTED = 1e-10  # and up to which its solution is taken

Product = Callable[[Tensor], Tensor]


class Above:
    """The affine map from a node's value to the pre-activation of a ReLU above it, all other summands being known."""

    def __init__(self, graph: Graph, source: str, relu: str, values: Mapping[str, Tensor]):
        self.graph, self.source, self.values = graph, source, values
        self.top = graph.nodes[relu].inputs[0]
        self.input = torch.zeros(graph.nodes[source].shape, dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            self.output = self._value(self.top, self.input)

    def _value(self, name: str, a: Tensor) -> Tensor | None:
        node = self.graph.nodes[name]
        if name == self.source:
            return a
        if node.kind == "relu":
            return self.values.get(name)
        if node.kind not in ("conv", "scale", "add"):
            return None
        inputs = [self._value(i, a) for i in node.inputs]
        known = [i for i in inputs if i is not None]
        return apply(node, known) if len(known) == len(inputs) else None

    def __bool__(self) -> bool:
        return self.output is not None and self.output.requires_grad

    @property
    def zero(self) -> Tensor:
        """The pre-activation for a = 0."""
        return self._known.detach()

    @property
    def _known(self) -> Tensor:
        assert self.output is not None
        return self.output

    @property
    def skips(self) -> bool:
        """Whether it is a plus a constant: a skip connection around everything else."""
        node = self.graph.nodes[self.top]
        return node.kind == "add" and self.source in node.inputs

    def linear(self, a: Tensor) -> Tensor:
        found = self._value(self.top, a)
        assert found is not None
        return found - self.zero

    def transpose(self, v: Tensor) -> Tensor:
        return torch.autograd.grad(self._known, self.input, v, retain_graph=True)[0]


def complete(
    graph: Graph,
    name: str,
    systems: Sequence[System],
    above: Sequence[str],
    values: Mapping[str, Tensor],
    spreads: Mapping[str, Tensor],
) -> Tensor | None:
    """The value a of the ReLU `name`, (C, H, W), where its own systems are short of rank; None where it is not found.

    Least squares over the modes of the systems and over the open units of the ReLUs above, whose pre-activations are
    affine in a, between bounds: a ≥ 0, and around a skip connection  relu(a + c) = r  says that a = r − c where r is
    positive and a ≤ −c elsewhere. The many zeros of a make the bounded problem's solution unique where the equations
    alone are too few (non-negative least squares, Slawski and Hein 2013). A LeakyReLU has no such bounds; above it,
    every unit shows its pre-activation (R-GAP's weight constraints, Zhu and Blaschko 2021).
    """
    node = graph.nodes[name]
    shape, leaks = node.shape, node.kind != "relu" or node.slope > 0
    maps = {n: Above(graph, name, n, values) for n in above if n in values}
    upper = torch.full(shape, torch.inf, dtype=torch.float64)
    lower = -upper if leaks else torch.zeros(shape, dtype=torch.float64)
    equations: list[tuple[Above, Tensor, Tensor]] = []
    for n, m in maps.items():
        if not m:
            continue
        slope = graph.nodes[n].slope
        if slope:  # which can be inverted: every unit shows its pre-activation
            value = torch.where(values[n] < 0, values[n] / slope, values[n])
            equations.append((m, torch.ones_like(value), value - m.zero))
            continue
        open_ = values[n] > SURE * spreads[n]
        if m.skips:
            known = (values[n] - m.zero).clamp(min=0)
            lower, upper = (
                torch.where(open_, known, lower),
                torch.where(open_, known, torch.minimum(upper, (-m.zero).clamp(min=0))),
            )
        else:
            equations.append((m, open_.double(), values[n] - m.zero))
    if (leaks and not all(graph.nodes[n].slope for n in maps)) or not any(maps.values()):
        return None
    if leaks and math.prod(shape) <= FACTORED:
        return factored(systems, equations, shape)
    scales = [1 / largest(partial(_squared, m, o), shape) for m, o, _ in equations]

    def product(a: Tensor) -> Tensor:
        flat = a.flatten(1)
        found = torch.cat([(s.V.T @ (s.V @ flat[s.channels].T)).T for s in systems]).reshape(shape)
        for (m, o, _), scale in zip(equations, scales, strict=True):
            found = found + scale * _squared(m, o, a)
        return found

    right = torch.cat([(s.V.T @ (s.V @ s.solution)).T for s in systems]).reshape(shape)
    for (m, o, r), scale in zip(equations, scales, strict=True):
        right = right + scale * m.transpose(o * r)
    return bounded(product, right, lower, upper)


def factored(
    systems: Sequence[System], equations: Sequence[tuple[Above, Tensor, Tensor]], shape: tuple[int, ...]
) -> Tensor | None:
    """The solution of the same equations without bounds, by QR; None where they are too few or do not agree."""
    unit = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    rows, right = [], []
    for s in systems:
        rows.append(torch.einsum("kq,ncq->nck", s.V, unit.flatten(2)[:, s.channels]).flatten(1))
        right.append((s.V @ s.solution).T.flatten())
    for m, o, r in equations:
        moved = (m.linear(unit) * o).flatten(1)
        size = float(moved.square().sum(1).max().sqrt())
        rows, right = [*rows, moved / size], [*right, (o * r).flatten() / size]
    A, y = torch.cat(rows, 1).T, torch.cat(right)
    if len(A) < A.shape[1]:
        return None
    Q, R = torch.linalg.qr(A)
    pivots = R.diagonal().abs()
    a = torch.zeros_like(R[0])
    for _ in range(2):  # refined
        a = a + torch.linalg.solve_triangular(R, (Q.T @ (y - A @ a))[:, None], upper=True)[:, 0]
    found = bool(pivots.min() > EXACT * pivots.max()) and float((A @ a - y).norm()) < ACCEPTED * float(y.norm())
    return a.reshape(shape) if found else None


def _squared(m: Above, open_: Tensor, a: Tensor) -> Tensor:
    return m.transpose(open_ * m.linear(a))


def bounded(product: Product, b: Tensor, lower: Tensor, upper: Tensor) -> Tensor | None:
    """The minimiser of ½ aᵀHa − bᵀa between the bounds, where Ha = b there too; None where it is not reached.

    Accelerated projected gradients (Beck and Teboulle 2009, restarted) find which bounds hold, conjugate gradients the
    rest.
    """
    step = 1 / (1.02 * largest(product, b.shape))
    a, size, residual = torch.zeros_like(b).clamp(lower, upper), float(b.norm()), math.inf
    for _ in range(ROUNDS):
        ahead, t = a, 1.0
        for _ in range(PROJECTED):
            new = torch.minimum(torch.maximum(ahead - step * (product(ahead) - b), lower), upper)
            following = (1 + math.sqrt(1 + 4 * t * t)) / 2
            if float(((ahead - new) * (new - a)).sum()) > 0:
                ahead, t = new, 1.0
            else:
                ahead, t = new + (t - 1) / following * (new - a), following
            a = new
        free = ((a > lower) & (a < upper)).double()
        inside = a + conjugate(partial(_within, product, free), free * (b - product(a)))
        a = torch.minimum(torch.maximum(inside, lower), upper)
        before, residual = residual, float((product(a) - b).norm()) / size
        if residual < EXACT or residual > STALLED * before:
            break
    return a if residual < ACCEPTED else None


def _within(product: Product, free: Tensor, v: Tensor) -> Tensor:
    return free * product(v)


def conjugate(product: Product, b: Tensor) -> Tensor:
    """x with H x = b, nearly."""
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    rs = first = float(r.square().sum())
    for _ in range(FREE):
        if rs <= EXACT**2 * first:
            break
        q = product(p)
        alpha = rs / float((p * q).sum())
        x, r = x + alpha * p, r - alpha * q
        new = float(r.square().sum())
        p, rs = r + new / rs * p, new
    return x


def largest(product: Product, shape: Sequence[int]) -> float:
    """The largest eigenvalue of a symmetric product, from below."""
    t = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(POWER):
        t = product(t / t.norm())
    return float(t.norm())
