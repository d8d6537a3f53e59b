"""Eq. 4 and Eq. 5: how far a perturbed gradient moves the reconstruction, and a cheap lower bound."""

from dataclasses import dataclass

import torch
from torch import Tensor

from i2f import checks, linalg, spectrum
from i2f.jacobian import GradientJacobian


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


@dataclass(frozen=True)
class LowerBound:
    """I_lb(δ). norm: L2, input units. rmse: norm/√d_x. lambda_max: of J Jᵀ. products, converged: of its search."""

    norm: float
    rmse: float
    lambda_max: float
    products: int
    converged: bool


def influence(
    J: GradientJacobian, delta: Tensor, damping: float = 0.0, rtol: float = 1e-8, max_steps: int = 2000
) -> Influence:
    """The inversion influence function, Eq. 4:  I(δ) = ‖(J Jᵀ + εI)⁻¹ J δ‖.

    Args:
        J: at the private input. delta: (d_θ,) perturbation of the gradient. damping: ε ≥ 0, in units of λ.
        rtol, max_steps: of conjugate gradients, used where J is matrix-free; a dense J is solved directly.

    A singular J Jᵀ with ε = 0 gives the pseudo-inverse's answer, `converged=False` and the rank in `reason` where J is
    dense; conjugate gradients find the same answer and cannot see the rank.

    Raises: ValueError for ε < 0, or a delta that is not finite or not (d_θ,).
    """
    checks.at_least("damping", damping, 0.0)
    checks.flat("delta", delta, J.shape[1], "parameter space", batch=False)
    spent = J.products
    if J.is_dense:
        gram = J.gram()
        b = J.matvec(delta).double()
        solution = linalg.solve_dense(gram, b, damping, spectrum.zero_level(J))
    else:
        b = J.matvec(delta)
        solution = linalg.solve_cg(lambda v: J.matvec(J.rmatvec(v)), b, damping, rtol, max_steps)
    norm = float(solution.u.norm())
    return Influence(
        displacement=solution.u.to(J.dtype),
        norm=norm,
        rmse=norm / J.shape[0] ** 0.5,
        residual=solution.residual,
        products=J.products - spent,
        converged=solution.converged,
        reason=solution.reason,
    )


def lower_bound(J: GradientJacobian, delta: Tensor, damping: float = 0.0, tol: float = 1e-3) -> LowerBound:
    """The lower bound, Eq. 5:  I_lb(δ) = ‖J δ‖ / (λ_max(J Jᵀ) + ε)  ≤  I(δ) at the same ε.

    Args:
        J, delta, damping: as for `influence`. tol: relative, on λ_max (see `spectrum.lambda_max`).

    λ_max is approached from below, so that the value may exceed the bound itself by the share `tol`. Never forms J.

    Raises: ValueError for bad input, or where J = 0 (the bound is then 0/0).
    """
    checks.at_least("damping", damping, 0.0)
    checks.flat("delta", delta, J.shape[1], "parameter space", batch=False)
    spent = J.products
    top = spectrum.lambda_max(J, tol)
    if top.value + damping <= 0:
        raise ValueError("J Jᵀ is zero at this x: the gradient does not react to the input, I_lb = 0/0 has no value")
    norm = float(J.matvec(delta).norm()) / (top.value + damping)
    return LowerBound(norm, norm / J.shape[0] ** 0.5, top.value, J.products - spent, top.converged)


def expected_square(J: GradientJacobian, variance: float, damping: float = 0.0) -> float:
    """E[I²] for δ ~ N(0, σ²I):  σ² Σ λ_i/(λ_i + ε)²;  undamped, σ² tr((J Jᵀ)⁻¹). Divide by d_x for the MSE.

    Directions whose λ is zero to rounding are left out, as in the pseudo-inverse.
    """
    checks.at_least("variance", variance, 0.0)
    checks.at_least("damping", damping, 0.0)
    values = spectrum.decompose(J).values
    values = values[values > spectrum.zero_level(J) * values[0]]
    return variance * float(torch.sum(values / (values + damping) ** 2))
