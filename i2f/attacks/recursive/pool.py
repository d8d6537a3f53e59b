"""The mask behind a global average pool, where the signal is known and the activations are not."""

import math
from collections.abc import Mapping

import scipy.linalg
import torch
from torch import Tensor

from i2f.attacks.recursive.graph import Graph, Node
from i2f.attacks.recursive.masks import opened
from i2f.attacks.recursive.systems import NOISY

POSITIONS = 20  # most positions whose 2^P combinations are enumerated
CLEAR = 0.5  # the worst column is so much nearer to a binary vector than the best of the others
CHUNK = 1 << 14  # combinations that are tested together


def span(G: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The leading left singular vectors and values of G, up to `most`, by subspace iteration on a random sketch."""
    generator = torch.Generator().manual_seed(0)
    width = min(2 * most + 8, *G.shape)
    sketch = G @ torch.randn(G.shape[1], width, generator=generator, dtype=G.dtype)
    for _ in range(2):
        sketch = G @ (G.T @ torch.linalg.qr(sketch)[0])
    basis = torch.linalg.qr(sketch)[0]
    U, S, _ = torch.linalg.svd(basis.T @ G, full_matrices=False)
    return basis @ U[:, :most], S[:most]


def columns(U: Tensor) -> Tensor | None:
    """The P binary columns in the span of U, (rows, P), in no order, or None where there are not exactly P of them.

    With P rows R of U that determine the others, U = T U_R, they are those combinations z ∈ {0, 1}^P for which T z is
    binary: the P with the smallest root-mean-square distance, which must be far below that of the next.
    """
    rank = U.shape[1]
    if rank > POSITIONS:
        return None
    pivots = torch.from_numpy(scipy.linalg.qr(U.T.numpy(), pivoting=True, mode="economic")[2].copy()).long()
    T = U @ torch.linalg.inv(U[pivots[:rank]])
    best_z, best = torch.empty(0, rank, dtype=U.dtype), torch.empty(0, dtype=U.dtype)
    bits = torch.arange(rank)
    for some in torch.arange(1, 2**rank).split(CHUNK):
        z = ((some[:, None] >> bits) & 1).to(U.dtype)
        sums = z @ T.T
        distance = torch.minimum(sums.abs(), (sums - 1).abs()).square().mean(1).sqrt()
        best_z, best = torch.cat([best_z, z]), torch.cat([best, distance])
        keep = best.argsort()[: rank + 1]
        best_z, best = best_z[keep], best[keep]
    if len(best) > rank and not best[rank - 1] < CLEAR * best[rank]:
        return None
    found: Tensor = (T @ best_z[:rank].T).round()
    return found


def arrange(A: Tensor, height: int, width: int) -> Tensor:
    """The position, (P,), of each patch of A, (P, C, k, k), read off how neighbouring patches overlap (stride 1).

    The corner is the patch with the most empty border; every next one is that which agrees best with its left and upper
    neighbours.
    """
    left, right, top, bottom = A[:, :, :, :-1], A[:, :, :, 1:], A[:, :, :-1], A[:, :, 1:]

    def distances(one: Tensor, other: Tensor) -> Tensor:
        return torch.cdist(one.flatten(1), other.flatten(1))

    beside, below = distances(right, left), distances(bottom, top)  # [i, j]: j stands to the right of, or below, i
    border = A[:, :, :, 0].flatten(1).norm(dim=1) + A[:, :, 0].flatten(1).norm(dim=1)
    left_over = set(range(len(A)))
    grid: dict[tuple[int, int], int] = {}
    for y in range(height):
        for x in range(width):

            def cost(j: int, x: int = x, y: int = y) -> float:
                known = (float(beside[grid[y, x - 1], j]) if x else 0.0) + (
                    float(below[grid[y - 1, x], j]) if y else 0.0
                )
                return known if x or y else float(border[j])

            grid[y, x] = min(left_over, key=cost)
            left_over.remove(grid[y, x])
    place = torch.zeros(len(A), dtype=torch.long)
    for (y, x), i in grid.items():
        place[i] = y * width + x
    return place


def scores(graph: Graph, gradient: Mapping[str, Tensor], node: Node, signal: Tensor, noise: float) -> Tensor | str:
    """Scores of the units of the ReLU `node` behind a global average pool, (C, H, W); words where they are not found.

    signal: at the ReLU's value. noise: relative, of a tensor's entries.
    """
    positions, below = node.shape[1] * node.shape[2], graph.convolutions_below(node)
    if not below:
        return f"{node.name}: no convolution below the pool"
    conv, scale = below[0]
    full = (signal * scale).flatten(1)[:, :1]
    G = gradient[conv.names[0]].flatten(1)
    strong = full.abs()[:, 0] > 0.1 * full.abs().median()
    U, S = span(G[strong], positions)
    sigma = noise * G.norm() / math.sqrt(G.numel())
    level = 2 * sigma * (math.sqrt(len(G)) + math.sqrt(G.shape[1]))  # twice the largest singular value of the noise
    rank = int((level < S).sum())
    if rank < positions:
        return f"{node.name}: only {rank} of {positions} positions behind the pool can be told apart"
    found = columns(U / full[strong])
    if found is None:
        return f"{node.name}: the {positions} masks behind the pool are not found"
    A = torch.linalg.lstsq(found * full[strong], G[strong]).solution
    M = (G / full) @ A.T @ torch.linalg.inv(A @ A.T)
    place = places(graph, gradient, conv, (M > 0.5) * full, A, node.shape[1:], noise)
    if place is None:
        return f"{node.name}: behind 1×1 convolutions alone, the order of the positions is not known"
    score = torch.empty_like(M)
    score[:, place] = M - 0.5
    return score.reshape(node.shape)


def places(
    graph: Graph,
    gradient: Mapping[str, Tensor],
    conv: Node,
    signal: Tensor,
    A: Tensor,
    size: tuple[int, ...],
    noise: float,
) -> Tensor | None:
    """Where the patches A, (P, C·k·k), of a convolution's input stand in a map of that size, for the signal (O, P)
    at its output. The patches of a 1×1 convolution do not overlap: those of the convolution before it are found
    with the mask that they show."""
    while conv.module.kernel_size == (1, 1):
        above = graph.nodes[conv.inputs[0]]
        below = graph.convolutions_below(above) if above.kind == "relu" else []
        if not below or below[0][0].module.stride != (1, 1):
            return None
        gate = opened(A.T - (1e-3 if noise > NOISY else 1e-9) * A.abs().max(), above.slope)
        signal = conv.weight[:, :, 0, 0].T @ signal * gate
        conv, scale = below[0]
        signal = signal * scale[:, :, 0]
        A = torch.linalg.lstsq(signal, gradient[conv.names[0]].flatten(1)).solution
    return arrange(A.reshape(len(A), -1, *conv.module.kernel_size), *size)
