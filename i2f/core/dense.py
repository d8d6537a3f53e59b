"""J as a matrix, its Gram matrix, and the eigenpairs of that."""

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from i2f._fast.chain import chain_jacobian
from i2f.core.brief import brief
from i2f.core.gradient import GradientMap
from i2f.core.linearization import Linearization

CHUNK_BYTES = 32 * 2**20  # directions of input space pushed through the network at a time, as rows of J
BLOCK_ROWS = 256


class Spectrum(NamedTuple):
    """Eigenpairs of J Jᵀ, λ descending: values (k,), vectors (d_x, k) with orthonormal columns."""

    values: Tensor
    vectors: Tensor

    def __repr__(self) -> str:
        return brief(self)


def dense_jacobian(gmap: GradientMap, x: Tensor) -> Tensor:
    """J at `x`, (d_x, d_θ): the gradient's derivative along every direction of input space.

    By the layers' own rules where the network is a chain of known layers (`chain_jacobian`); otherwise by forward over
    reverse; by one backward pass per row where an operation of the network has no forward-mode or batching rule.
    """
    if gmap.plain:
        J = chain_jacobian(gmap.model, gmap.loss_of, x) if gmap.message is None else None
        if J is not None:
            return J
        try:
            return forward_over_reverse(gmap, x) if gmap.message is None else gmap.message.dense(gmap, x)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # the user's functions may raise anything under a transform
            pass
    at_x = Linearization(gmap, x)
    return torch.stack([at_x.rmatvec(e[0]) for e in unit_vectors(x, 1)])


def forward_over_reverse(gmap: GradientMap, x: Tensor, chunk: int | None = None) -> Tensor:
    """J at `x`, (d_x, d_θ), of any network: `chunk` directions at a time, which share each layer's work."""
    gradient = grad(gmap.value)

    def rows_of(directions: Tensor) -> Tensor:
        tangents = vmap(lambda e: jvp(lambda z: gradient(gmap.parameters, z), (x,), (e,))[1])(directions)
        return torch.cat([t.flatten(1) for t in tangents.values()], dim=1)

    J = x.new_empty(x.numel(), gmap.size)
    chunk = chunk or max(1, min(len(J), CHUNK_BYTES // (gmap.size * x.element_size())))
    with warnings.catch_warnings():
        # the first forward-mode derivative in a process loads PyTorch's own scripted rules
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
        for rows, directions in zip(J.split(chunk), unit_vectors(x, chunk), strict=True):
            rows.copy_(rows_of(directions.view(len(rows), *x.shape)))
    return J


def unit_vectors(x: Tensor, chunk: int) -> Iterator[Tensor]:
    """The identity of input space, `chunk` rows at a time, (rows, d_x)."""
    for start in range(0, x.numel(), chunk):
        e = x.new_zeros(min(chunk, x.numel() - start), x.numel())
        e.diagonal(start).fill_(1)
        yield e


def jacobian_gram(gmap: GradientMap, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """J Jᵀ at `x`, (d_x, d_x), accumulated in `dtype` (the model's own), by the fewest columns that have it."""
    single = gmap.plain and gmap.message is None
    J = chain_jacobian(gmap.model, gmap.loss_of, x, turned=True) if single else None
    if J is None:
        J = dense_jacobian(gmap, x)
    return outer_gram(J.to(dtype or J.dtype))


def outer_gram(rows: Tensor) -> Tensor:
    """A Aᵀ in the rows' own dtype; the blocks above the diagonal are mirrored from those below."""
    n = len(rows)
    gram = rows.new_empty(n, n)
    for top in range(0, n, BLOCK_ROWS):
        end = min(top + BLOCK_ROWS, n)
        block = rows[top:end] @ rows[:end].T
        gram[top:end, :end] = block
        gram[:top, top:end] = block[:, :top].T
    return gram
