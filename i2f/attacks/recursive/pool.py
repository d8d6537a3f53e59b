"""What a convolution's weight gradient shows of its input without the signal, which a pool above hides."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn import functional as F

from i2f.attacks.recursive.graph import Graph, Node, apply
from i2f.attacks.recursive.systems import NOISY, padding, patches
from i2f.attacks.recursive.tangent import back_through, gate, maxima

CLEAR = 0.5  # the best direction is so much nearer to patches of a map than the next one
SIMPLE = 1e-9  # distance from one at which the next eigenvalue may be rounding error
RESTARTS = 300  # of the eigenvalues' search, at most
STRONG, CLEAN = 0.1, 1e-9  # share of the median signal from which an output channel is used, with noise and without
EVIDENT = 4  # one in so many units is closed for sure: those with the smallest signals
NONE_BELOW = "no convolution below the pool, or a grouped one"
SLACK = 0.3  # largest relative difference of a pool's known values from those of a map that is found


def span(G: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The leading right singular vectors, (k, columns), and values, (k,), of G, up to `most`, by subspace iteration on
    a random sketch."""
    generator = torch.Generator().manual_seed(0)
    width = min(2 * most + 8, *G.shape)
    sketch = torch.randn(width, G.shape[0], generator=generator, dtype=G.dtype) @ G
    for _ in range(2):
        sketch = (G.T @ torch.linalg.qr(G @ torch.linalg.qr(sketch.T)[0])[0]).T
    basis = torch.linalg.qr(sketch.T)[0]
    _, S, V = torch.linalg.svd(G @ basis, full_matrices=False)
    return (V @ basis.T)[:most], S[:most]


def overlapping(V: Tensor, conv: Node, shape: tuple[int, ...]) -> Tensor | None:
    """The patches A, (P, C·K), of an input of that shape whose span is that of V's orthonormal rows, up to one factor
    for all; None where these do not determine them.

    A = W V, and neighbouring patches agree where they overlap: A = Π A, with Π the orthogonal projection onto the
    patches of maps (the mean over all copies of a pixel; zeros beyond the border). So W is the eigenvector of
    W ↦ (Π(W V)) Vᵀ for the eigenvalue one, which is simple where the patches tie all positions together.
    """
    number = len(V)

    def projected(w: np.ndarray) -> np.ndarray:
        A = torch.from_numpy(np.asarray(w)).reshape(number, number) @ V
        found: np.ndarray = (patches(folded(A, conv.module, shape), conv.module).T @ V.T).reshape(-1).numpy()
        return found

    if number < 2:
        return V
    operator = LinearOperator((number**2, number**2), matvec=projected, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(number**2)
    try:
        values, vectors = eigsh(operator, k=2, which="LA", v0=start, maxiter=RESTARTS)  # rising
    except ArpackNoConvergence:
        return None
    if not max(1 - values[1], SIMPLE) < CLEAR * (1 - values[0]):
        return None
    return torch.from_numpy(vectors[:, 1].copy()).reshape(number, number) @ V


def spanned(G: Tensor, positions: int, noise: float) -> tuple[Tensor | None, int]:
    """An orthonormal basis of the patches' span, (P, C·K), from G = D A, and G's rank; None where that is below P.

    noise: relative, of a tensor's entries."""
    V, S = span(G, positions)
    sigma = noise * G.norm() / math.sqrt(G.numel())
    level = 2 * sigma * (math.sqrt(len(G)) + math.sqrt(G.shape[1]))  # twice the largest singular value of the noise
    rank = int((level < S).sum())
    return (V if rank == positions else None), rank


def seen(conv: Node, graph: Graph, gradient: Mapping[str, Tensor], noise: float) -> tuple[Tensor, Tensor] | str:
    """The patches A, (P, C·K), of a convolution's input, and the signal D, (O, P), at its output, from G = D A alone:
    A up to a factor, and D up to its inverse. Words where they are not determined."""
    G, positions = gradient[conv.names[0]].flatten(1), conv.shape[1] * conv.shape[2]
    V, rank = spanned(G, positions, noise)
    if V is None:
        return f"{rank} of {positions} positions can be told apart"
    A = overlapping(V, conv, graph.nodes[conv.inputs[0]].shape)
    if A is None:
        return "the patches overlap too little to be put in order"
    return A, signals(G, A)


def signals(G: Tensor, A: Tensor) -> Tensor:
    """D, (O, P), the least-squares solution of D A = G."""
    found: Tensor = torch.linalg.lstsq(A.T, G.T).solution.T
    return found


def scores(graph: Graph, gradient: Mapping[str, Tensor], node: Node, signal: Tensor, noise: float) -> Tensor | str:
    """Scores of the units of the ReLU `node` behind a global average pool, (C, H, W); words where they are not found.

    The signal at the ReLU's value is known and the same at every position, so that the gradient of the convolution
    below is G = diag(δ) M A with the mask M that is sought: D = diag(δ) M is read off G (`seen`). Behind a 1×1
    convolution, whose patches do not overlap, A is found by what the convolution before it shows (`pointwise`).
    """
    below = graph.convolutions_below(node)
    if not below:
        return f"{node.name}: {NONE_BELOW}"
    if not 0 <= node.slope < 1:
        return f"{node.name}: the masks behind a pool are read of slopes from 0 to 1, and this one is {node.slope:g}"
    conv, scale = below[0]
    full = (signal * scale).flatten(1)[:, :1]
    G, positions = gradient[conv.names[0]].flatten(1), node.shape[1] * node.shape[2]
    strong = full[:, 0].abs() > (STRONG if noise > NOISY else CLEAN) * full.abs().median()
    V, rank = spanned(G[strong], positions, noise)
    if V is None:
        return f"{node.name}: only {rank} of {positions} positions behind the pool can be told apart"
    one = conv.module.kernel_size == (1, 1)
    shape = graph.nodes[conv.inputs[0]].shape
    A = pointwise(graph, gradient, conv, V, noise) if one else overlapping(V, conv, shape)
    if A is None:
        return f"{node.name}: the {len(V)} masks behind the pool are not found"
    M = unscaled(signals(G, A) / full, strong, node.slope)
    if not torch.isfinite(M[strong]).all():
        return f"{node.name}: the {len(V)} masks behind the pool are not found"
    A = torch.linalg.lstsq(M.round().clamp(0, 1)[strong] * full[strong], G[strong]).solution if not node.slope else A
    M = unscaled(signals(G, A) / full, strong, node.slope)
    return (M - (1 + node.slope) / 2).reshape(node.shape)


def unscaled(M: Tensor, rows: Tensor, slope: float) -> Tensor:
    """Columns of zeros (or `slope`) and ones, from their multiples; judged by some rows."""
    some = M[rows]
    rough = some.square().sum(0) / some.sum(0)
    upper = torch.where(some / rough > (1 + slope) / 2, some, torch.nan)
    return M / upper.nanmedian(0).values


def pointwise(graph: Graph, gradient: Mapping[str, Tensor], conv: Node, V: Tensor, noise: float) -> Tensor | None:
    """The inputs, (P, C), of a 1×1 convolution, each up to a factor, in the span of V's rows: those that are zero
    where the signal below shows that a unit is closed."""
    above = graph.nodes[conv.inputs[0]]
    below = graph.convolutions_below(above) if above.kind == "relu" else []
    if not below or above.slope or below[0][0].shape[1:] != conv.shape[1:]:
        return None
    found = seen(below[0][0], graph, gradient, noise)
    if isinstance(found, str):
        return None
    norms = found[1].norm(dim=1, keepdim=True)
    live = (norms > CLEAN * norms.max())[:, 0]
    size = torch.where(live[:, None], found[1].abs() / norms, torch.inf)
    closed = size.argsort(0)[: int(live.sum()) // EVIDENT]  # (closed, P)
    if len(closed) < len(V):
        return None
    rows = []
    for units in closed.T:
        _, S, W = torch.linalg.svd(V[:, units].T, full_matrices=False)
        if len(S) > 1 and not max(float(S[-1]), CLEAN * float(S[0])) < CLEAR * float(S[-2]):
            return None  # more than one input is zero there
        a = W[-1] @ V
        rows.append(a * a.sum().sign())
    return torch.stack(rows)


def below_maximum(
    graph: Graph, gradient: Mapping[str, Tensor], node: Node, signal: Tensor, known: Mapping[str, Tensor], noise: float
) -> tuple[Tensor, Tensor | None] | str:
    """The signal below a maximum pool, and the gates of a ReLU there, where the weight gradient of the convolution
    below shows that convolution's input, and so which units were taken; words where it does not.

    signal: at the pool `node`, whose units below have the same; it fixes the factor of what `seen` finds. known:
    values of the pool, or of the ReLU on it, which confirm it.
    """
    under = graph.nodes[node.inputs[0]]
    below = graph.convolutions_below(under if under.kind == "relu" else node)
    if not below:
        return f"{node.name}: {NONE_BELOW}"
    conv, scale = below[0]
    found = seen(conv, graph, gradient, noise)
    if isinstance(found, str):
        return f"{node.name}: below the pool {found}"
    A, D = found
    if under.kind == "relu":
        signal = signal * (next(iter(known.values())) > 0)
    sent = (signal * scale).flatten(1).sum(1)
    source = graph.nodes[conv.inputs[0]]
    values = {source.name: (D.sum(1) @ sent) / (sent @ sent) * folded(A, conv.module, source.shape)}
    for at in graph.nodes.values():
        if at.inputs and at.name not in values and all(name in values for name in at.inputs):
            values[at.name] = apply(at, [values[name] for name in at.inputs])
    for name, value in known.items():
        if name not in values or not float((values[name] - value).norm()) < SLACK * float(value.norm()):
            return f"{node.name}: what is found below the pool contradicts its values"
    back = back_through(node, signal, under.shape, signal, places=maxima(node, values[under.name]))
    return back, gate(under, values[under.inputs[0]]) if under.kind == "relu" else None


def folded(A: Tensor, module: nn.Conv2d, shape: tuple[int, ...]) -> Tensor:
    """The input of that shape whose patches are nearest to A, (P, C·K): the mean over all copies of a pixel."""
    options = (shape[1:], module.kernel_size, module.dilation, padding(module), module.stride)
    ones = patches(torch.ones(shape, dtype=A.dtype), module)
    found: Tensor = F.fold(A.T[None], *options)[0] / F.fold(ones[None], *options)[0].clamp(min=1)
    return found
