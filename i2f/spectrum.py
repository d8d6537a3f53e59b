"""Eigenvalues and eigenvectors of J Jᵀ; singular vectors of J."""

from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from i2f import checks
from i2f.jacobian import GradientJacobian


class LambdaMax(NamedTuple):
    """λ_max(J Jᵀ), the products spent on it, and whether the tolerance was met."""

    value: float
    products: int
    converged: bool


class Spectrum(NamedTuple):
    """Eigenpairs of J Jᵀ, λ descending: values (k,), vectors (d_x, k) with orthonormal columns."""

    values: Tensor
    vectors: Tensor


def lambda_max(J: GradientJacobian, tol: float = 1e-3) -> LambdaMax:
    """λ_max(J Jᵀ) by implicitly restarted Lanczos (ARPACK) in input space: two products a step.

    `tol` is relative, on the Ritz residual ‖J Jᵀu − λu‖ ≤ tol·λ; the value itself is then within tol·λ of an
    eigenvalue, and in practice closer to tol²·λ. The start vector is fixed, so that the answer is too.
    """
    spent = J.products
    values, _, converged = _arpack(J, k=1, which="LA", tol=tol)
    return LambdaMax(float(values[-1]), J.products - spent, converged)


def eigenpairs(J: GradientJacobian, k: int, which: str = "largest", tol: float = 1e-8) -> Spectrum:
    """`k` extremal eigenpairs of J Jᵀ through products alone; "smallest" costs many more products than "largest"."""
    checks.one_of("which", which, ("largest", "smallest"))
    n = J.shape[0]
    if not 0 < k < n:
        raise ValueError(f"k={k} is out of range: J Jᵀ has {n} eigenpairs, ask for 1 to {n - 1} (or decompose(J))")
    values, vectors, converged = _arpack(J, k, "LA" if which == "largest" else "SA", tol)
    if not converged:
        raise ArithmeticError(f"ARPACK did not reach tol={tol:g} for the {k} {which} eigenpairs; use decompose(J)")
    order = np.argsort(-values)
    return Spectrum(torch.from_numpy(values[order]).to(J.device), torch.from_numpy(vectors[:, order]).to(J.device))


def decompose(J: GradientJacobian) -> Spectrum:
    """Every eigenpair of J Jᵀ, from the Gram matrix in float64 (d_x products, then O(d_x³)); kept on J."""
    if J.spectrum is None:
        values, vectors = torch.linalg.eigh(J.gram())
        J.spectrum = Spectrum(values.flip(0).clamp_min(0), vectors.flip(1))
    return J.spectrum


def right_singular_vector(J: GradientJacobian, index: int) -> Tensor:
    """The unit v_i = Jᵀu_i/√λ_i in parameter space, (d_θ,), λ descending; sign: its largest entry is positive."""
    spectrum = decompose(J)
    if not 0 <= index < len(spectrum.values):
        raise ValueError(f"index={index} is out of range: J Jᵀ has eigenvalues 0 to {len(spectrum.values) - 1}")
    if float(spectrum.values[index]) <= zero_level(J) * float(spectrum.values[0]):
        raise ValueError(
            f"index={index} belongs to a zero eigenvalue (rank {rank(J)} of {J.shape[0]}): Jᵀu = 0 has no direction"
        )
    v = J.rmatvec(spectrum.vectors[:, index])
    v = v / v.norm()
    return v * torch.sign(v[v.abs().argmax()])


def rank(J: GradientJacobian) -> int:
    """How many eigenvalues of J Jᵀ stand above rounding."""
    values = decompose(J).values
    return int((values > zero_level(J) * values[0]).sum())


def zero_level(J: GradientJacobian) -> float:
    """λ/λ_max below which an eigenvalue is rounding: of the float64 Gram matrix, or of J's own precision."""
    return max(J.shape[0] * torch.finfo(torch.float64).eps, J.shape[1] * torch.finfo(J.dtype).eps ** 2)


def _arpack(J: GradientJacobian, k: int, which: str, tol: float) -> tuple[np.ndarray, np.ndarray, bool]:
    n = J.shape[0]

    def gram_times(v: np.ndarray) -> np.ndarray:
        vector = torch.from_numpy(np.ascontiguousarray(v.reshape(-1))).to(J.x)
        return J.matvec(J.rmatvec(vector)).double().cpu().numpy()

    if k == n:  # ARPACK finds fewer than all; this is d_x = 1
        values, vectors = np.linalg.eigh(np.stack([gram_times(e) for e in np.eye(n)]))
        return values, vectors, True
    start = np.random.default_rng(0).standard_normal(n)
    operator = LinearOperator((n, n), matvec=gram_times, dtype=np.float64)
    try:
        # for one pair ARPACK's own 20 vectors are too many: it looks at the residual only when it has them all
        values, vectors = eigsh(operator, k=k, which=which, tol=tol, v0=start, ncv=min(n, 8) if k == 1 else None)
    except ArpackNoConvergence as error:
        if len(error.eigenvalues) < k:
            raise ArithmeticError(f"ARPACK found none of the {k} eigenvalues to tol={tol:g}") from error
        return error.eigenvalues, error.eigenvectors, False
    return values, vectors, True
