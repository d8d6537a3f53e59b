"""Noise whose covariance follows J = U Λ^½ Vᵀ: more of it where the gradient shows the input most sharply."""

import math

import torch
from torch import Tensor

from i2f.attacks.prior import TAU
from i2f.core import checks, spectrum, streams
from i2f.core.jacobian import GradientJacobian

PROBES = 16  # random signs of an estimated ‖J‖²_F


def designed(J: GradientJacobian, energy: float, seed: int | None = None) -> Tensor:
    """The gradient at a noisy input in place of the input's own:  δ = g(x + √c z) − g(x), z ~ N(0, I),
    c = energy/tr(J Jᵀ), so that E‖δ‖² = `energy` to first order.

    To first order δ = √c Jᵀz. Noise of covariance V S Vᵀ leaves an attacker who knows it with the error covariance
    U Λ^-½ S Λ^-½ Uᵀ. Among all S with tr S = energy, the smallest eigenvalue of that is largest at S = cΛ, where all
    its eigenvalues are c: the noise has covariance c JᵀJ, and every direction of the input has the error c.

    Noise drawn as √c J(x)ᵀz would not protect against an attacker who knows the method and fits g(x) + J(x)ᵀw to the
    gradient in x and w together. The gradient at x + √c z does, at any size of c: it is a function of x + √c z alone.

    Returns: (d_θ,). Raises: ValueError where J = 0.
    """
    checks.at_least("energy", energy, 0.0)
    z = input_noise(J, seed).to(J.x)
    return J.map(J.x + math.sqrt(input_variance(J, energy)) * z) - J.gradient


def input_noise(J: GradientJacobian, seed: int | None) -> Tensor:
    """z ~ N(0, I) of the input's shape, in float64: the draw of `designed`."""
    return torch.randn(J.x.shape, generator=streams.generator("designed", seed), dtype=torch.float64)


def input_variance(J: GradientJacobian, energy: float) -> float:
    """c = energy/tr(J Jᵀ): the variance of noise on the input that changes the gradient by `energy` = E‖δ‖²."""
    total = squared_norm(J)
    if total <= 0:
        raise ValueError("J = 0 at this input: its gradient does not react to it, and there is nothing to design")
    return energy / total


def squared_norm(J: GradientJacobian) -> float:
    """‖J‖²_F = tr(J Jᵀ): exact where J is formed, otherwise estimated with random signs, one product each.

    Source: Hutchinson (1989).
    """
    if J.is_dense:
        return float(J.gram().diagonal().sum())
    signs = torch.randint(0, 2, (PROBES, J.shape[0]), generator=streams.generator("trace", 0)).to(J.x) * 2 - 1
    return float(J.rmatvec(signs).double().square().sum()) / PROBES


def in_row_space(J: GradientJacobian, shares: Tensor, seed: int | None) -> Tensor:
    """δ = V (√s ∘ z), z ~ N(0, I): noise of variance s_i along the right singular vector v_i of J, (d_θ,).

    Args: shares: s, (d_x,), λ descending. The draw z depends on the seed alone, so that covariances can be compared
    pairwise.
    """
    values, vectors = spectrum.decompose(J)
    z = torch.randn(len(values), generator=streams.generator("row-space", seed), dtype=torch.float64).to(values)
    along = torch.where(values > 0, shares.sqrt() * z / values.sqrt(), 0.0)
    return J.rmatvec((vectors @ along).to(J.x))


def constant(values: Tensor, energy: float) -> Tensor:
    """s_i = energy/d_x: the same variance along every right singular vector. values: λ, (d_x,)."""
    return torch.full_like(values, energy / len(values))


def proportional(values: Tensor, energy: float) -> Tensor:
    """s_i = energy λ_i/Σ λ: the same error in every direction of the input. values: λ, (d_x,)."""
    return energy * values / values.sum()


def averaged(values: Tensor, energy: float, tau: float = TAU) -> Tensor:
    """The variances s_i along the right singular vectors, Σ s_i = `energy`, that leave the largest mean squared error
    to an attacker who knows them and has the prior N(m, τ²I) on the input.

    That error is Σ s_i τ²/(λ_i τ² + s_i), concave in s. At its maximum every s_i > 0 has the same derivative:

        s_i = τ² max(0, √(λ_i/ν) − λ_i),  with ν such that Σ s_i = energy; directions with λ_i ≥ 1/ν get none.

    Args: values: λ > 0 of J Jᵀ. The k smallest share the energy, with 1/√ν = (energy/τ² + Σ λ_i)/Σ √λ_i over them,
    where k is the largest number for which the last of them gets any.

    Raises: ValueError for eigenvalues or τ that are not positive, or a negative energy.
    """
    values = values.double()
    checks.at_least("energy", energy, 0.0)
    if not 0 < tau < math.inf:
        raise ValueError(f"tau={tau} is out of range: τ must be positive and finite")
    if not (values > 0).all():
        raise ValueError("values holds eigenvalues that are not positive: give those above rounding (spectrum.rank)")
    rising = values.sort().values
    levels = (energy / tau**2 + rising.cumsum(0)) / rising.sqrt().cumsum(0)  # 1/√ν if the first k share it
    level = levels[int((levels > rising.sqrt()).sum().clamp_min(1)) - 1]
    shares = (values.sqrt() * level - values).clamp_min(0)
    total = float(shares.sum())
    return shares * (energy / total) if total > 0 else shares
