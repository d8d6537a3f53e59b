"""Eigenvalues and eigenvectors of J Jᵀ; singular vectors of J."""

import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from i2f._torch.operations import ordinary
from i2f.core import checks, linalg
from i2f.core.jacobian import GradientJacobian
from i2f.core.lanczos import Lanczos


class LambdaMax(NamedTuple):
    """λ_max(J Jᵀ), the products spent on it, whether the tolerance was met, and the residual over the value."""

    value: float
    products: int
    converged: bool
    residual: float


class Spectrum(NamedTuple):
    """Eigenpairs of J Jᵀ, λ descending: values (k,), vectors (d_x, k) with orthonormal columns."""

    values: Tensor
    vectors: Tensor


def operator_at(J: GradientJacobian) -> GradientJacobian:
    """J, if it is one.

    Raises: TypeError for something else, such as a model; ValueError where λ leaves float64.
    """
    if not hasattr(J, "rmatvec"):
        raise TypeError(f"J is {type(J).__name__}; give an i2f.GradientJacobian(model, x, y)")
    if not 1e-140 <= J.unit <= 1e140:
        raise ValueError(f"J is of size {J.unit:.0e}, and λ, of its square, leaves float64: scale the loss")
    return J


def in_range(J: GradientJacobian, product: Tensor) -> Tensor:
    """A product with J, or a ValueError where it is not finite."""
    if not torch.isfinite(product).all():
        raise ValueError(f"J has a product that is not finite in {J.dtype}: scale the loss down, or use a wider dtype")
    return product


def gram_product(J: GradientJacobian) -> Callable[[Tensor], Tensor]:
    """v -> J Jᵀ v/u², u = `J.unit`: for v of order one neither Jᵀv nor the square of its size leaves the dtype's range.

    Raises: as `operator_at` and `in_range`.
    """
    operator_at(J)
    return lambda v: in_range(J, J.matvec(J.rmatvec(v) / J.unit) / J.unit)


@ordinary()
def lambda_max(J: GradientJacobian, tol: float = 1e-3, max_steps: int = 300) -> LambdaMax:
    """λ_max(J Jᵀ) by Lanczos in input space: two products a step, from a fixed random start.

    The rule: stop when r ≤ tol·θ, where θ is the largest Ritz value, which grows to λ_max from below, and
    r = ‖J Jᵀu − θu‖ the residual of its Ritz vector u. Then an eigenvalue lies within tol·θ of θ, and in practice θ
    itself is closer, by about r²/gap (Parlett, The Symmetric Eigenvalue Problem, 11.7). That the eigenvalue is the
    largest no finite number of products can prove; Lanczos from a random start finds the top of a spectrum first.
    """
    product, tol = gram_product(J), float(checks.at_least("tol", tol, 0.0))
    spent, process = J.products, Lanczos(product, random_start(J))
    top, residual = 0.0, math.inf
    while not process.exhausted and len(process) < max_steps and residual > tol:
        process.step()
        values, vectors = process.ritz()
        top = max(float(values[-1]), 0.0)
        residual = float(process.residuals(vectors)[-1]) / top if top > 0 else 0.0
    return LambdaMax(top * J.unit * J.unit, J.products - spent, residual <= tol, residual)


def random_start(J: GradientJacobian) -> Tensor:
    """A fixed draw from N(0, I), (d_x,): the same for every J of that size."""
    return torch.from_numpy(np.random.default_rng(0).standard_normal(J.shape[0])).to(J.x)


@ordinary()
def eigenpairs(J: GradientJacobian, k: int, which: str = "largest", tol: float = 1e-8) -> Spectrum:
    """`k` extremal eigenpairs of J Jᵀ through products alone; "smallest" costs many more products than "largest"."""
    operator_at(J)
    checks.one_of("which", which, ("largest", "smallest"))
    n = J.shape[0]
    if not 0 < k < n:
        raise ValueError(f"k={k} is out of range: J Jᵀ has {n} eigenpairs, ask for 1 to {n - 1} (or decompose(J))")
    values, vectors, converged = _arpack(J, k, "LA" if which == "largest" else "SA", tol)
    if not converged:
        raise ArithmeticError(f"ARPACK did not reach tol={tol:g} for the {k} {which} eigenpairs; use decompose(J)")
    order = np.argsort(-values)
    values = values[order].clip(min=0) * J.unit * J.unit
    return Spectrum(torch.from_numpy(values).to(J.device), torch.from_numpy(vectors[:, order]).to(J.device))


@ordinary()
def decompose(J: GradientJacobian) -> Spectrum:
    """Every eigenpair of J Jᵀ, from the Gram matrix in float64 (d_x products, then O(d_x³)); kept on J."""
    operator_at(J)
    if J.spectrum is None:
        values, vectors = torch.linalg.eigh(checks.finite("J Jᵀ", J.gram()))
        J.spectrum = Spectrum(values.flip(0).clamp_min(0), vectors.flip(1))
    return J.spectrum


@ordinary()
def right_singular_vector(J: GradientJacobian, index: int) -> Tensor:
    """The unit v_i = Jᵀu_i/√λ_i in parameter space, (d_θ,), λ descending; sign: its largest entry is positive."""
    spectrum, index = decompose(J), operator.index(index)
    if not 0 <= index < len(spectrum.values):
        raise ValueError(f"index={index} is out of range: J Jᵀ has eigenvalues 0 to {len(spectrum.values) - 1}")
    if float(spectrum.values[index]) <= zero_level(J) * float(spectrum.values[0]):
        raise ValueError(
            f"index={index} belongs to a zero eigenvalue (rank {rank(J)} of {J.shape[0]}): Jᵀu = 0 has no direction"
        )
    v = J.rmatvec(spectrum.vectors[:, index]) / J.unit
    v = v / linalg.norm(v)
    return v * torch.sign(v[v.abs().argmax()])


def rank(J: GradientJacobian) -> int:
    """How many eigenvalues of J Jᵀ stand above rounding."""
    values = decompose(J).values
    return int((values > zero_level(J) * values[0]).sum())


def zero_level(J: GradientJacobian) -> float:
    """λ/λ_max below which an eigenvalue is rounding: of the float64 Gram matrix, or of J's own precision."""
    return max(J.shape[0] * torch.finfo(torch.float64).eps, J.shape[1] * torch.finfo(J.dtype).eps ** 2)


def _arpack(J: GradientJacobian, k: int, which: str, tol: float) -> tuple[np.ndarray, np.ndarray, bool]:
    """Implicitly restarted Lanczos on J Jᵀ/J.unit²; `tol` is on the Ritz residual relative to the Ritz value."""
    n, product = J.shape[0], gram_product(J)

    def gram_times(v: np.ndarray) -> np.ndarray:
        vector = torch.from_numpy(np.ascontiguousarray(v.reshape(-1))).to(J.x)
        return product(vector).cpu().double().numpy()

    start = random_start(J).cpu().double().numpy()
    if not gram_times(start).any():
        raise ValueError("J Jᵀ is zero at this x: the gradient does not react to the input, every direction is an "
                         "eigenvector")  # fmt: skip
    operator = LinearOperator((n, n), matvec=gram_times, dtype=np.float64)
    try:
        values, vectors = eigsh(operator, k=k, which=which, tol=tol, v0=start)
    except ArpackNoConvergence as error:
        if len(error.eigenvalues) < k:
            raise ArithmeticError(f"ARPACK found none of the {k} eigenvalues to tol={tol:g}") from error
        return error.eigenvalues, error.eigenvectors, False
    return values, vectors, True
