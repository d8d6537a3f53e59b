"""The Lanczos process: a symmetric matrix that is only ever applied, as a small tridiagonal one."""

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from i2f.core import linalg

BREAKDOWN = 0.75  # an off-diagonal entry below this power of the rounding unit, of the largest, ends the Krylov space
GROWTH = 32  # rows by which the basis grows


class Lanczos:
    """A Q = Q T + β q eᵀ: the rows of `basis` Q are orthonormal and span {b, A b, A² b, …}, T is tridiagonal.

    Every new vector is made orthogonal to all before it, twice, so that T has no spurious copies of eigenvalues; k
    steps keep k vectors. One process solves for every shift: `solve` costs no product.

    Args:
        A: v -> A v, symmetric, (n,) -> (n,). b: (n,), not zero.
        semidefinite: A is known to be, so that a negative Ritz value is rounding, and counts as zero in `solve`.

    exhausted: no further step is possible. broken: a product was not finite, and its step is left out.

    Source: Golub and Van Loan, Matrix Computations, chapter 10; Paige and Saunders 1975 for `solve`.
    """

    def __init__(self, A: Callable[[Tensor], Tensor], b: Tensor, semidefinite: bool = False):
        self.A, self.norm, self.semidefinite = A, linalg.norm(b), semidefinite
        self._basis = b.new_empty(GROWTH, len(b))
        self._basis[0] = b / self.norm
        self.diagonal: list[float] = []
        self.off_diagonal: list[float] = []
        self.exhausted = self.broken = False

    def __len__(self) -> int:
        return len(self.diagonal)

    @property
    def basis(self) -> Tensor:
        """(k, n)."""
        return self._basis[: len(self)]

    @property
    def front(self) -> Tensor:
        """The vector that A is applied to next, (n,)."""
        return self._basis[len(self)]

    def step(self) -> None:
        """One application of A."""
        self.advance(self.A(self.front))

    def advance(self, w: Tensor) -> None:
        """A step whose product w = A `front` is computed by the caller: for several processes at once."""
        k = len(self)
        if not torch.isfinite(w).all():
            self.exhausted = self.broken = True
            return
        self.diagonal.append(linalg.dot(w, self._basis[k]))
        for _ in range(2):  # the second pass removes the rounding of the first
            w = w - self.basis.T @ (self.basis @ w)
        beta = linalg.norm(w)
        self.off_diagonal.append(beta)
        negligible = self.rounding * torch.finfo(w.dtype).eps ** (BREAKDOWN - 1)
        self.exhausted = beta <= negligible or k + 1 == len(w)
        if self.exhausted:
            return
        if k + 1 == len(self._basis):
            self._basis = torch.cat([self._basis, w.new_empty(max(GROWTH, k), len(w))])
        self._basis[k + 1] = w / beta

    @property
    def rounding(self) -> float:
        """The rounding of a product with A, from the largest number in T: no Ritz value is known better."""
        return torch.finfo(self._basis.dtype).eps * max(map(abs, (*self.diagonal, *self.off_diagonal)))

    def first(self, steps: int) -> "Lanczos":
        """The process as it was after so many steps."""
        other = copy.copy(self)
        other.diagonal, other.off_diagonal = self.diagonal[:steps], self.off_diagonal[:steps]
        other.exhausted = self.exhausted and steps >= len(self)
        return other

    def ritz(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues of T, ascending, and its eigenvectors as columns; Qᵀ carries them to those of A."""
        values, vectors = eigh_tridiagonal(np.array(self.diagonal), np.array(self.off_diagonal[:-1]))
        return values, vectors

    def quadrature(self, node: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Nodes, clipped at 0, and weights of Σ w f(θ) ≈ bᵀ f(A) b, A semidefinite: the Gauss rule, or the Gauss–Radau
        rule with a `node` that is at most λ_min (Golub 1973)."""
        diagonal, off = np.array(self.diagonal), np.array(self.off_diagonal)
        if node is not None and off[-1] > 0:  # the Gauss rule is exact where the Krylov space has ended
            node -= self.rounding  # keeps T − node·I positive definite where a Ritz value is zero to rounding
            values, vectors = self.ritz()
            inverse = float(vectors[-1] ** 2 @ (1 / (values.clip(min=0) - node)))
            diagonal, off = np.append(diagonal, node + off[-1] ** 2 * inverse), np.append(off, 0.0)
        nodes, vectors = eigh_tridiagonal(diagonal, off[:-1])
        return nodes.clip(min=0), (self.norm * vectors[0]) ** 2

    def residuals(self, vectors: np.ndarray) -> np.ndarray:
        """‖A u − θ u‖ of the Ritz vectors u = Qᵀ s: β times the last entry of s."""
        found: np.ndarray = self.off_diagonal[-1] * np.abs(vectors[-1])
        return found

    def solve(self, shift: float) -> tuple[Tensor, float, bool]:
        """u = Qᵀ (T + εI)⁻¹ ‖b‖ e₁, the residual ‖(A + εI)u − b‖/‖b‖, and whether T + εI is positive definite.

        Where it is not, or where no step could be taken, u is zero and the residual infinite.
        """
        unsolved = torch.zeros_like(self._basis[0]), math.inf, False
        if not len(self):
            return unsolved
        values, vectors = self.ritz()
        if self.semidefinite:
            values = values.clip(min=0)
        if values[0] + shift <= 0:
            return unsolved
        y = vectors @ (self.norm * vectors[0] / (values + shift))
        left = self.off_diagonal[-1] * abs(y[-1]) / self.norm
        return self.basis.T @ torch.from_numpy(y).to(self._basis), left, True
