"""Eq. 4 and Eq. 5: how far a perturbed gradient moves the reconstruction, and a cheap lower bound."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from i2f._torch.operations import ordinary
from i2f.core import checks, linalg, spectrum
from i2f.core.brief import brief
from i2f.core.jacobian import GradientJacobian

Gradient = Tensor | np.ndarray | Sequence[Tensor] | dict[str, Tensor]  # in the forms of `GradientMap.flat`


@dataclass(frozen=True)
class Influence:
    """I²F of one perturbation.

    displacement: the predicted G_r(g₀ + δ) − x₀, (d_x,), in pixels. norm: I(δ), its L2 norm. rmse: norm/√d_x.
    residual: ‖(J Jᵀ + εI)d − Jδ‖/‖Jδ‖. products: applications of J and Jᵀ. converged, reason: of the solve.
    """

    displacement: Tensor
    norm: float
    rmse: float
    residual: float
    products: int
    converged: bool
    reason: str

    __repr__ = brief


@dataclass(frozen=True)
class LowerBound:
    """I_lb(δ). norm: L2, input units. rmse: norm/√d_x. lambda_max: of J Jᵀ. products, converged: of its search."""

    norm: float
    rmse: float
    lambda_max: float
    products: int
    converged: bool

    __repr__ = brief


@ordinary()
def influence(
    J: GradientJacobian, delta: Gradient, damping: float = 0.0, rtol: float = 1e-8, max_steps: int = 2000
) -> Influence:
    """The inversion influence function, Eq. 4:  I(δ) = ‖(J Jᵀ + εI)⁻¹ J δ‖.

    Args:
        J: at the private input. delta: (d_θ,) perturbation of the gradient, or a list or dictionary of its parts by
            parameter. damping: ε ≥ 0, in units of λ.
        rtol, max_steps: of conjugate gradients, used where J is matrix-free; a dense J is solved directly.

    A singular J Jᵀ with ε = 0 gives the pseudo-inverse's answer, `converged=False` and the rank in `reason` where J is
    dense; conjugate gradients find the same answer and cannot see the rank. J = 0 is never `converged`.

    Raises: TypeError for a J that is no GradientJacobian; ValueError for ε < 0, a delta that is not finite or not
    (d_θ,), or a J beyond the range of its dtype.
    """
    product, damping, delta, size = _problem(J, delta, damping)
    spent = J.products
    b = spectrum.in_range(J, J.matvec(delta) / J.unit)
    if J.is_dense:
        solution = linalg.solve_dense(J.gram(), b.double() * J.unit, damping, spectrum.zero_level(J))
    else:
        solution = linalg.solve_cg(product, b, damping / J.unit / J.unit, rtol, max_steps)
        size /= J.unit
    if not b.any() and delta.any() and not product(spectrum.random_start(J)).any():
        solution = solution._replace(converged=False, reason=f"singular: {BLIND}")
    norm = linalg.norm(solution.u) * size
    return Influence(
        displacement=(linalg.wide(solution.u) * size).to(J.dtype),
        norm=norm,
        rmse=norm / J.shape[0] ** 0.5,
        residual=solution.residual,
        products=J.products - spent,
        converged=solution.converged,
        reason=solution.reason,
    )


@ordinary()
def lower_bound(J: GradientJacobian, delta: Gradient, damping: float = 0.0, tol: float = 1e-3) -> LowerBound:
    """The lower bound, Eq. 5:  I_lb(δ) = ‖J δ‖ / (λ_max(J Jᵀ) + ε)  ≤  I(δ) at the same ε.

    Args:
        J, delta, damping: as for `influence`. tol: relative, on λ_max (see `spectrum.lambda_max`).

    λ_max is approached from below, so that the value may exceed the bound itself by the share `tol`. Never forms J.

    Raises: as `influence`; ValueError where J = 0 and ε = 0 (the bound is then 0/0).
    """
    _, damping, delta, size = _problem(J, delta, damping)
    spent = J.products
    top = spectrum.lambda_max(J, tol)
    if top.value + damping <= 0:
        raise ValueError(f"{BLIND}, and I_lb = 0/0 has no value")
    norm = linalg.norm(spectrum.in_range(J, J.matvec(delta) / J.unit)) * (size * J.unit / (top.value + damping))
    return LowerBound(norm, norm / J.shape[0] ** 0.5, top.value, J.products - spent, top.converged)


def _problem(
    J: GradientJacobian, delta: Gradient, damping: float
) -> tuple[Callable[[Tensor], Tensor], float, Tensor, float]:
    """v -> J Jᵀ v/u², ε, and δ as a vector of order one times its size; all checked."""
    product, damping = spectrum.gram_product(J), checks.at_least("damping", damping, 0.0)
    delta = J.map.flat("delta", delta, batch=False)
    size = linalg.unit_of(delta)
    return product, damping, delta / size, size


BLIND = "J Jᵀ is zero at this x: the gradient does not react to the input"


@ordinary()
def expected_square(J: GradientJacobian, variance: float, damping: float = 0.0) -> float:
    """E[I²] for δ ~ N(0, σ²I):  σ² Σ λ_i/(λ_i + ε)²;  undamped, σ² tr((J Jᵀ)⁻¹). Divide by d_x for the MSE.

    Directions whose λ is zero to rounding are left out, as in the pseudo-inverse.

    Raises: ValueError for bad input, or where J = 0, in which case no direction is left.
    """
    variance, damping = checks.at_least("variance", variance, 0.0), checks.at_least("damping", damping, 0.0)
    values = spectrum.decompose(J).values[: spectrum.rank(J)]
    if not len(values):
        raise ValueError(f"{BLIND}, and E[I²] has no value")
    values, damping, variance = values / J.unit / J.unit, damping / J.unit / J.unit, variance / J.unit / J.unit
    return variance * float(torch.sum(values / (values + damping) ** 2))
