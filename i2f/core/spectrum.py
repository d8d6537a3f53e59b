"""Eigenvalues and eigenvectors of J Jᵀ; singular vectors of J."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from i2f._torch.operations import ordinary
from i2f.core import checks, linalg
from i2f.core.brief import brief
from i2f.core.dense import Spectrum
from i2f.core.jacobian import GradientJacobian
from i2f.core.lanczos import Lanczos

__all__ = ["LambdaMax", "Spectrum", "decompose", "lambda_max", "rank", "right_singular_vector", "zero_level"]


class LambdaMax(NamedTuple):
    """λ_max(J Jᵀ), the products spent on it, whether the tolerance was met, and the residual over the value."""

    value: float
    products: int
    converged: bool
    residual: float

    def __repr__(self) -> str:
        return brief(self)


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
    """λ_max(J Jᵀ) by Lanczos in input space: two products per step, from a fixed random start.

    The rule: stop when r ≤ tol·θ, where θ is the largest Ritz value, which grows to λ_max from below, and
    r = ‖J Jᵀu − θu‖ the residual of its Ritz vector u. Then an eigenvalue lies within tol·θ of θ, and in practice θ
    itself is closer, by about r²/gap (Parlett, The Symmetric Eigenvalue Problem, 11.7). That the eigenvalue is the
    largest no finite number of products can prove; Lanczos from a random start finds the top of a spectrum first.
    """
    product, tol = gram_product(J), checks.at_least("tol", tol, 0.0)
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
def decompose(J: GradientJacobian) -> Spectrum:
    """Every eigenpair of J Jᵀ, from the Gram matrix in float64 (d_x products, then O(d_x³)); J keeps them.

    Raises: as `operator_at`; ValueError where J Jᵀ is not finite; MemoryError where it does not fit.
    """
    return operator_at(J).eigh()


@ordinary()
def right_singular_vector(J: GradientJacobian, index: int) -> Tensor:
    """The unit v_i = Jᵀu_i/√λ_i in parameter space, (d_θ,), λ descending; sign: its largest entry is positive."""
    (values, vectors), index = decompose(J), checks.whole("index", index)
    if not 0 <= index < len(values):
        raise ValueError(f"index={index} is out of range: J Jᵀ has eigenvalues 0 to {len(values) - 1}")
    if index >= rank(J):
        zero = f"index={index} belongs to a zero eigenvalue (rank {rank(J)} of {J.shape[0]})"
        raise ValueError(f"{zero}: Jᵀu = 0 has no direction")
    v = J.rmatvec(vectors[:, index]) / J.unit
    v = v / linalg.norm(v)
    return v * torch.sign(v[v.abs().argmax()])


def rank(J: GradientJacobian) -> int:
    """How many eigenvalues of J Jᵀ are above rounding (`zero_level`)."""
    values = decompose(J).values
    return int((values > zero_level(J) * values[0]).sum())


def zero_level(J: GradientJacobian) -> float:
    """λ/λ_max up to which an eigenvalue is rounding, of the float64 Gram matrix or of J's own precision."""
    return max(J.shape[0] * torch.finfo(torch.float64).eps, J.shape[1] * torch.finfo(J.dtype).eps ** 2)
