"""A first image for a layer that has too few equations: statistical linearisation of the ReLUs below them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from i2f.attacks.recursive.features import Features, Known, Modes, Values, squares
from i2f.attacks.recursive.graph import Graph, apply
from i2f.attacks.recursive.tangent import Tangent

LARGEST = 1200  # most unknowns of x: matrices of that size are factored
DEVIATION, RANGE = 0.5, 2.0  # the prior of a pixel around the start, and how far neighbours agree, in pixels
SHRINK = 0.3  # a unit's uncertainty falls by no more than this in one step: the linearisation is no proof
FIRST = 2  # steps that are taken as they come
SCALES, FRACTIONS = (0.3, 1.0, 3.0), (1.0, 0.4)  # of the uncertainty and of the step, tried in every later one
ENOUGH = 0.99  # a step must bring the misfit below this share
STEPS = 12
JITTER = 1e-8  # of the matrices' diagonal, against rounding
SURE = 10.0  # standard deviations from which a unit counts as open


@dataclass
class Layer:
    """B a = y for a = relu(A x + b), n = len(x) unknowns: A (units, n), b (units,), and B in two parts.

    V (k, H·W), Y (C, k): what the modes of a system say of each channel's H·W units. rows (m, units), right (m,):
    further equations.
    """

    A: Tensor
    b: Tensor
    V: Tensor
    Y: Tensor
    rows: Tensor
    right: Tensor
    slope: float = 0.0

    def update(self, x: Tensor, spread: Tensor, prior: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior mean of x, and the standard deviations of the units' values, (units,).

        Each ReLU is replaced by its best linear fit where the unit's value is N(A x + b, spread²): slope Φ, and what
        the line leaves out as a variance. So an uncertain unit's equations count less, and certain ones are exact.
        """
        channels, k = self.Y.shape
        fitted, slope, variance = relu_moments(self.A @ x + self.b, spread, self.slope)
        A = slope[:, None] * self.A
        rest = (fitted - A @ x).reshape(channels, -1)
        by_channel = variance.reshape(channels, -1)
        J = torch.cat(
            [torch.einsum("kq,cqn->ckn", self.V, A.reshape(channels, -1, len(x))).flatten(0, 1), self.rows @ A]
        )
        r = torch.cat([(self.Y - rest @ self.V.T).flatten(), self.right - self.rows @ rest.flatten()])
        M = torch.zeros(len(r), len(r), dtype=r.dtype)
        rows = self.rows.reshape(len(self.rows), channels, self.V.shape[1])
        for c in range(channels):
            block, weighed = slice(c * k, (c + 1) * k), self.V * by_channel[c]
            M[block, block] = weighed @ self.V.T
            M[block, channels * k :] = weighed @ rows[:, c].T
        M[channels * k :, : channels * k] = M[: channels * k, channels * k :].T
        M[channels * k :, channels * k :] = (self.rows * variance) @ self.rows.T
        M.diagonal().add_(JITTER * M.diagonal().mean())
        factor = torch.linalg.cholesky(M)
        J = torch.linalg.solve_triangular(factor, J, upper=False)
        r = torch.linalg.solve_triangular(factor, r[:, None], upper=False)
        H = torch.linalg.cholesky(J.T @ J + prior)
        found = torch.cholesky_solve(J.T @ r + (prior @ mean)[:, None], H)[:, 0]
        half = torch.linalg.solve_triangular(H, self.A.T, upper=False)
        return found, half.square().sum(0).sqrt()


def relu_moments(u: Tensor, s: Tensor, leak: float) -> tuple[Tensor, Tensor, Tensor]:
    """For z ~ N(u, s²) and f(z) = leak·z + (1 − leak)·relu(z): the mean of f, the slope of its best linear fit in z,
    and the variance that is left."""
    t = (u / s).clamp(-38, 38)
    Phi, phi = torch.special.ndtr(t), torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi)
    mean = s * (phi + t * Phi)
    second = s.square() * ((t.square() + 1) * Phi + t * phi)
    left = (second - mean.square() - (s * Phi).square()).clamp(min=0)
    return leak * u + (1 - leak) * mean, leak + (1 - leak) * Phi, (1 - leak) ** 2 * left


def layer(graph: Graph, known: Sequence[Known]) -> Layer | None:
    """The equations of `known` as those of one layer of ReLUs, or None where they are not of that form."""
    modes = next((k for k in known if isinstance(k, Modes)), None)
    if modes is None or len(modes.systems) > 1 or graph.nodes[modes.name].kind != "relu":
        return None
    node = graph.nodes[modes.name]
    below = graph.needed(list(node.inputs))
    n = torch.Size(below[0].shape).numel()
    if n > LARGEST or any(other.kind in ("relu", "max") for other in below):
        return None
    zero = graph.values(torch.zeros(below[0].shape, dtype=torch.float64), node.name)
    one = torch.eye(n, dtype=torch.float64).reshape(n, *below[0].shape)
    A = Tangent(graph, list(node.inputs), zero)(one)[node.inputs[0]].flatten(1).T
    system = modes.systems[0]
    rows, right = [torch.zeros(0, len(A), dtype=A.dtype)], [torch.zeros(0, dtype=A.dtype)]
    for k in known:
        if isinstance(k, Values) and (found := _open_equations(graph, k, node.name)):
            rows.append(found[0])
            right.append(found[1])
    Y = (system.V @ system.solution).T
    return Layer(A, zero[node.inputs[0]].flatten(), system.V, Y, torch.cat(rows), torch.cat(right), node.slope)


def _open_equations(graph: Graph, known: Values, source: str) -> tuple[Tensor, Tensor] | None:
    """Where a ReLU is open (a LeakyReLU, everywhere) its value is affine in the activations at `source`: the equations,
    or None where more than one convolution, with its BatchNorm, lies between."""
    path, name = [], graph.nodes[known.name].inputs[0]
    while name != source:
        path.append(graph.nodes[name])
        if path[-1].kind not in ("conv", "scale"):
            return None
        name = path[-1].inputs[0]
    shape = graph.nodes[source].shape
    units = torch.Size(shape).numel()
    basis = torch.cat([torch.zeros(1, units, dtype=torch.float64), torch.eye(units, dtype=torch.float64)])
    images = basis.reshape(-1, *shape)
    for node in reversed(path):
        images = apply(node, [images])
    flat = images.flatten(1)
    value, slope = known.value.flatten(), graph.nodes[known.name].slope
    value, sure = torch.where(value < 0, value / (slope or 1.0), value), value > SURE * known.spread.flatten()
    if slope:
        sure |= value < -SURE * known.spread.flatten() / slope
    return (flat[1:] - flat[0]).T[sure], (value - flat[0])[sure]


def first_image(graph: Graph, asked: Features, start: Tensor) -> Tensor:
    """The start, or, where the equations are those of one layer of ReLUs, an image that nearly obeys them.

    Iterated statistical linearisation (García-Fernández, Svensson, Morelande and Särkkä 2015): x has a Gaussian prior
    around the start, smooth over neighbours; each step linearises the ReLUs over the posterior before. Where the
    posterior is too sure of itself, uncertainties that are larger or smaller are tried, and that with the smallest
    misfit of the features, which is continuous in x, is taken.
    """
    equations = layer(graph, asked.known)
    if equations is None:
        return start
    mean, prior = start.flatten(), torch.linalg.inv(smooth(start.shape))
    x, misfit = mean, math.inf
    spread = (equations.A @ smooth(start.shape) * equations.A).sum(1).sqrt()
    for step in range(STEPS):
        tried = []
        for scale in SCALES if step >= FIRST else (1.0,):
            try:
                found, narrow = equations.update(x, scale * spread, prior, mean)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # so certain that it is singular to rounding
                continue
            for fraction in FRACTIONS:
                there = x + fraction * (found - x)
                new = squares(asked.at(there.reshape(start.shape))[1])
                tried.append((new, there, torch.maximum(narrow, SHRINK * scale * spread)))
        best = min(tried, key=lambda t: t[0], default=(math.nan, x, spread))
        if not best[0] <= ENOUGH * misfit:
            break
        misfit, x, spread = best
    return x.reshape(start.shape)


def smooth(shape: torch.Size) -> Tensor:
    """τ² exp(−d/ℓ) between pixels of a channel at a distance of d."""
    channels, height, width = shape
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
    one = DEVIATION**2 * torch.exp(-torch.cdist(places, places) / RANGE)
    whole: Tensor = torch.block_diag(*[one] * channels)
    return whole
