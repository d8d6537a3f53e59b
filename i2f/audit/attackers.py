"""The attackers of the linearised problem, in closed form.

With J Jᵀ = U Λ Uᵀ, noise of variance s_i along the right singular vectors of J leaves an attacker without bounds with
N(x₀, C), C = U diag(s_i/λ_i) Uᵀ. Squared errors are per entry of the input, in squared units of its range.
"""

import math

import torch
from torch import Tensor

from i2f.audit.defense import Defense
from i2f.core.jacobian import GradientJacobian


def error_variances(J: GradientJacobian, defense: Defense, eigenvalues: Tensor) -> Tensor | None:
    """s_i/λ_i along the eigenvectors of these λ > 0, (r,); None where the defence is not noise."""
    c, variance = defense.input_variance(J), defense.variance(J)
    if c is not None:
        return c * torch.ones_like(eigenvalues)
    return None if variance is None else variance / eigenvalues


def prior_square(squares: Tensor, variances: Tensor, unseen: Tensor, tau: float) -> Tensor:
    """The linear Bayes error under the prior N(m, τ²I):  Σ_i u_i² v_i τ²/(v_i + τ²) + τ² unseen,  (d_x,).

    Args: squares: u_i² of each entry, (d_x, r). variances: v_i = s_i/λ_i, (r,). unseen: the share of each entry outside
    of these eigenvectors, 1 − Σ_i u_i², (d_x,).
    """
    found: Tensor = squares @ (variances * tau**2 / (variances + tau**2)) + tau**2 * unseen
    return found


def clamped_square(truth: Tensor, deviation: Tensor) -> Tensor:
    """E[(clamp(x + s z, 0, 1) − x)²] for z ~ N(0, 1), entry by entry: the squared error left to an attacker who knows
    that entries lie in [0, 1], of an estimate with standard deviation s.

    With a = −x/s, b = (1−x)/s:  s²[Φ(b) − Φ(a) − bφ(b) + aφ(a)] + x²Φ(a) + (1−x)²(1 − Φ(b)).
    """
    s = deviation.clamp_min(1e-300)
    a, b = -truth / s, (1 - truth) / s
    inside = torch.special.ndtr(b) - torch.special.ndtr(a) - _weighted(b) + _weighted(a)
    low, high = truth.square() * torch.special.ndtr(a), (1 - truth).square() * torch.special.ndtr(-b)
    square: Tensor = s.square() * inside + low + high
    return square


def _weighted(t: Tensor) -> Tensor:
    """t φ(t), zero far out."""
    t = t.clamp(-40, 40)
    return t * torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi)


def rounding(J: GradientJacobian) -> float:
    """λ/λ_max below which an eigenvalue of the float64 Gram matrix is rounding error, whatever the precision of J."""
    return J.shape[0] * torch.finfo(torch.float64).eps


def behind_mask(J: GradientJacobian, kept: Tensor) -> tuple[int, Tensor]:
    """The rank of J on the coordinates that pruning kept, and the share of each entry of the input that they do not
    show, (d_x,). An attacker who reads the mask recovers everything where that rank is d_x.

    kept: (d_θ,) booleans.
    """
    rows = J.dense()[:, kept].double() / J.unit
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    shown = values > rounding(J) * values[-1]
    if shown.all():
        return len(values), torch.zeros_like(values)
    return int(shown.sum()), (1 - vectors[:, shown].square().sum(1)).clamp_min(0)
