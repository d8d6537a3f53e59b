"""Solvers for (A + εI) u = b, A symmetric positive semi-definite, given as a matrix or a matvec."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from i2f.core.brief import brief

POWER_STEPS = 8
MARGIN = 10  # a random start misses a λ_min so many times smaller with probability < 1e-5, n ≤ 1e5 (`solve_dense`)


class Solution(NamedTuple):
    """u, the true relative residual ‖(A + εI)u − b‖/‖b‖, whether the solve succeeded, and why it stopped.

    indefinite: conjugate gradients met a direction in which A + εI does not curve upwards.
    """

    u: Tensor
    residual: float
    converged: bool
    reason: str
    indefinite: bool = False

    def __repr__(self) -> str:
        return brief(self)


def power_of_two(size: float) -> float:
    """The largest power of two that is at most `size`, 1 for a size of 0: a unit by which division rounds nothing."""
    return math.ldexp(1.0, math.frexp(size)[1] - 1) if size else 1.0


def unit_of(v: Tensor) -> float:
    """The power of two of v's largest entry: v/unit and its square are of order one, however large or small v is."""
    return power_of_two(float(v.abs().max())) if v.numel() else 1.0


def wide(v: Tensor) -> Tensor:
    """v in float64, where no square of a float32 number overflows; unchanged on MPS, which lacks float64."""
    return v if v.device.type == "mps" else v.double()


def norm(v: Tensor) -> float:
    """‖v‖, accumulated in float64."""
    return float(wide(v).norm())


def dot(v: Tensor, w: Tensor) -> float:
    """vᵀw, accumulated in float64."""
    return float(wide(v) @ wide(w))


def solve_dense(A: Tensor, b: Tensor, damping: float = 0.0, rtol: float = 1e-13) -> Solution:
    """Cholesky where A + εI is well posed; otherwise the pseudo-inverse's answer, with the rank in `reason`.

    Args:
        A: (n, n), float64. b: (n,). rtol: eigenvalues below rtol·λ_max count as zero.

    Cholesky is trusted where λ_min, estimated by inverse iteration from a random start, is above MARGIN·rtol·‖A + εI‖,
    in the Frobenius norm, an upper bound of λ_max. That estimate is MARGIN times too large with probability below
    0.82·√n·MARGIN^(½ − POWER_STEPS) (Kuczyński and Woźniakowski 1992). In all other cases eigenvalues decide.
    """
    top, unit = power_of_two(float(A.diagonal().max()) + damping), unit_of(b)
    shifted, b = A / top, b / unit
    shifted.diagonal().add_(damping / top)

    def solution(u: Tensor, converged: bool, reason: str) -> Solution:
        return Solution(u * (unit / top), norm(shifted @ u - b) / (norm(b) or 1.0), converged, reason)

    factor, info = torch.linalg.cholesky_ex(shifted)
    if int(info) == 0 and smallest_eigenvalue(factor) > MARGIN * rtol * float(shifted.norm()):
        return solution(solve_factored(factor, b), True, "solved by Cholesky")
    eigenvalues, vectors = torch.linalg.eigh(shifted)
    kept = eigenvalues > rtol * eigenvalues[-1]
    rank, n = int(kept.sum()), len(b)
    u = vectors[:, kept] @ ((vectors[:, kept].T @ b) / eigenvalues[kept])
    if rank == n:  # too close to singular for Cholesky, not for eigenvectors
        return solution(u, True, "solved by eigendecomposition")
    blind = f"this is the pseudo-inverse's answer, blind to {n - rank} directions of input space"
    return solution(u, False, f"singular: rank {rank} of {n}; {blind}. A damping > 0 says how far those may move")


def solve_factored(factor: Tensor, b: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ b, (n,): for one right side two triangular solves take a tenth of `torch.cholesky_solve`'s time."""
    half = torch.linalg.solve_triangular(factor, b[:, None], upper=False)
    solution: Tensor = torch.linalg.solve_triangular(factor.T, half, upper=True)
    return solution[:, 0]


def smallest_eigenvalue(factor: Tensor) -> float:
    """The smallest eigenvalue of L Lᵀ, from above, by a few steps of inverse iteration from a fixed random start: one
    that follows a pattern may be orthogonal to the eigenvector."""
    v = torch.randn(len(factor), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(factor)
    growth = 0.0
    for _ in range(POWER_STEPS):
        v = solve_factored(factor, v / v.norm())
        growth = float(v.norm())
        if not torch.isfinite(v).all():
            return 0.0
    return 1 / growth


def solve_cg(
    A: Callable[[Tensor], Tensor],
    b: Tensor,
    damping: float = 0.0,
    rtol: float = 1e-8,
    max_steps: int = 1000,
    precondition: Callable[[Tensor], Tensor] = lambda r: r,
) -> Solution:
    """Preconditioned conjugate gradients: one application of A per step, and one more for the true residual.

    Args:
        A: v -> A v. b: (n,). precondition: r -> M⁻¹r with M near A + εI.
        rtol: on √(rᵀM⁻¹r) relative to its value at u = 0; without a preconditioner that is ‖r‖/‖b‖.
    """
    unit = unit_of(b)
    b = b / unit
    u, r, step, reason, indefinite = torch.zeros_like(b), b.clone(), 0, "", False
    p = z = precondition(r)
    rz = dot(r, z)
    goal = rtol**2 * rz
    while rz > goal:
        if step == max_steps:
            reason = f"stopped at {max_steps} steps above the tolerance {rtol:g}"
            break
        Ap = A(p) + damping * p
        curvature = dot(p, Ap)
        if not math.isfinite(curvature):
            reason = "stopped: a product with A is not finite"
            break
        if curvature <= 0:
            reason, indefinite = "stopped: A + εI is singular or indefinite to working precision", True
            break
        alpha = rz / curvature
        u, r, step = u + alpha * p, r - alpha * Ap, step + 1
        z = precondition(r)
        rz, previous = dot(r, z), rz
        p = z + (rz / previous) * p
    r = b - A(u) - damping * u  # the recurrence and the truth drift apart by rounding
    converged = dot(r, precondition(r)) <= 100 * goal
    residual = norm(r) / (norm(b) or 1.0)
    if converged:
        reason = f"converged in {step} steps"
    elif not math.isfinite(residual):
        reason = "stopped: a product with A is not finite"
    elif not reason:
        reason = f"stopped by rounding: true residual {residual:.1e}, asked for {rtol:g}"
    return Solution(u * unit, residual, converged, reason, indefinite)


def minimize_in_box(
    A: Callable[[Tensor], Tensor],
    b: Tensor,
    lower: Tensor,
    upper: Tensor,
    free_step: Callable[[Tensor, Tensor], Solution],
    rtol: float = 1e-8,
    max_rounds: int = 30,
) -> Solution:
    """argmin q(u) = ½ uᵀA u − bᵀu over lower ≤ u ≤ upper, A symmetric positive definite; lower ≤ 0 ≤ upper.

    Projected Newton (Bertsekas 1982): entries that sit on a bound and want to leave through it are held; the others
    take the unconstrained step, which is projected into the box and shortened until q decreases enough.

    Args:
        free_step: (free, r) -> solution of A_FF d = r on the entries where `free`, zero on the others.
        rtol: a round that lowers q by less than rtol² of the decrease so far is the last.

    `residual` is the projected gradient's norm over its value at u = 0.
    """
    u, descent = torch.zeros_like(b), b
    free = _free(u, b, lower, upper)
    first, total, reason = norm(b[free]) or 1.0, 0.0, f"stopped after {max_rounds} rounds above the tolerance"
    converged = False
    for number in range(1, max_rounds + 1):
        if not descent[free].any():
            converged, reason = True, f"converged in {number - 1} rounds"
            break
        step = free_step(free, torch.where(free, descent, 0.0))
        if step.indefinite:
            return step._replace(u=u)
        length, gain, wanted = 1.0, -math.inf, 0.0
        while gain < 1e-4 * wanted or wanted <= 0:
            if length < 1e-6:
                return Solution(u, norm(descent[free]) / first, False, "stopped: no part of a step pays")
            move = torch.clamp(u + length * step.u, lower, upper) - u
            Am = A(move)
            wanted = dot(descent, move)
            gain = wanted - 0.5 * dot(move, Am)
            if not math.isfinite(gain):
                return Solution(u, norm(descent[free]) / first, False, "stopped: a product with A is not finite")
            length /= 2
        whole = torch.equal(move, step.u)
        u, descent, total = torch.clamp(u + move, lower, upper), descent - Am, total + gain
        held, free = free, _free(u, descent, lower, upper)
        if gain <= rtol**2 * total or (whole and torch.equal(held, free)):
            converged, reason = True, f"converged in {number} rounds"
            break
    return Solution(u, norm(descent[free]) / first, converged, reason)


def _free(u: Tensor, descent: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The entries that do not sit on a bound through which they want to leave."""
    return ~((u <= lower) & (descent < 0) | (u >= upper) & (descent > 0))
