"""The mask behind a global average pool, where the signal is known and the activations are not."""

import scipy.linalg
import torch
from torch import Tensor

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
