"""Which part of a gradient an attacker trusts, and how much: the norm in which gradients are matched."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from i2f.core import checks

ORTHONORMAL = 1e-5  # largest entry of V Vᵀ − I: float32 leaves some 2e-6


@dataclass(frozen=True)
class LowRank:
    """The covariance  Σ = Vᵀ diag(s) V + floor·I:  noise in few directions, and equal noise in all.

    basis: V, (k, d_θ), orthonormal rows. variances: s, (k,), at least 0. floor: above 0, a variance.
    """

    basis: Tensor
    variances: Tensor
    floor: float

    def to(self, device: torch.device | str) -> "LowRank":
        return LowRank(self.basis.to(device), self.variances.to(device), self.floor)


class Match:
    """W in the objective ‖W(∇L(x) − g)‖²: W = Σ_KK^{-1/2} on the known coordinates K, zero on the others.

    Args:
        size: d_θ.
        mask: (d_θ,) booleans, True where the shared gradient is known to be exact (up to noise). A pruned gradient
            shows its own: `gradient != 0`. None: all are known.
        covariance: of the noise on the gradient, if it is known: (d_θ,) variances, (d_θ, d_θ), or a `LowRank`.
            Whitening by it makes the minimiser the maximum-likelihood one. None: equal and independent.

    Raises:
        ValueError: another shape; a mask without a known coordinate; a covariance that is not positive.
    """

    def __init__(self, size: int, mask: Tensor | None = None, covariance: Tensor | LowRank | None = None):
        self.known: Tensor | None = None  # indices of K
        self.scale: Tensor | None = None  # σ⁻¹ on K, or
        self.factor: Tensor | None = None  # the Cholesky factor of Σ_KK
        self.low_rank: tuple[Tensor, Tensor] | None = None  # (V, t): Vᵀ diag(t) V is added to diag(scale)
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != (size,):
                raise ValueError(
                    f"mask is {tuple(mask.shape)} of {mask.dtype}; give ({size},) booleans, True where the gradient "
                    f"is known to be exact (gradient != 0 for a pruned one)"
                )
            if not mask.any():
                raise ValueError("mask marks no coordinate of the gradient as known: nothing can be matched")
            self.known = mask.nonzero()[:, 0]
        if isinstance(covariance, LowRank):
            self._whiten_few(size, covariance)
        elif covariance is not None:
            self._whiten(size, covariance)

    def _whiten(self, size: int, covariance: Tensor) -> None:
        if covariance.shape not in ((size,), (size, size)):
            raise ValueError(
                f"covariance has shape {tuple(covariance.shape)}; give ({size},) variances or a ({size}, {size}) matrix"
            )
        checks.finite("covariance", covariance)
        rounding = torch.finfo(covariance.dtype).eps if covariance.is_floating_point() else 0.0
        covariance = covariance.double()  # it may lie outside of float32's range where its square root does not
        if covariance.ndim == 1:
            variances = self.select(covariance)
            if not (variances > 0).all():
                raise ValueError("covariance has variances ≤ 0; coordinates that are known exactly belong in `mask`")
            self.scale = variances.rsqrt()
            return
        matrix = covariance if self.known is None else covariance[self.known][:, self.known]
        unit = matrix / matrix.abs().max()
        self.factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) or not torch.allclose(unit, unit.mT, atol=64 * rounding):
            raise ValueError("covariance is not symmetric positive definite")

    def _whiten_few(self, size: int, covariance: LowRank) -> None:
        """Σ^{-1/2} = floor^{-1/2} I + Vᵀ diag((s + floor)^{-1/2} − floor^{-1/2}) V."""
        basis = checks.finite("covariance.basis", covariance.basis).double()
        variances = checks.finite("covariance.variances", covariance.variances).double()
        if basis.ndim != 2 or basis.shape[1] != size or variances.shape != basis.shape[:1]:
            raise ValueError(
                f"covariance has a basis of shape {tuple(basis.shape)} and variances {tuple(variances.shape)}; give "
                f"(k, {size}) and (k,)"
            )
        floor = basis.new_tensor(checks.at_least("covariance.floor", covariance.floor, 0.0))
        if not floor > 0 or not (variances >= 0).all():
            raise ValueError("covariance needs a floor > 0 and variances ≥ 0")
        if not torch.allclose(basis @ basis.T, torch.eye(len(basis)).to(basis), rtol=0, atol=ORTHONORMAL):
            raise ValueError("covariance.basis has rows that are not orthonormal")
        if self.known is not None:  # the rows on K are not orthonormal; Σ_KK has a basis of its own
            roots, basis = torch.linalg.svd(variances.sqrt()[:, None] * self.select(basis), full_matrices=False)[1:]
            variances = roots.square()
        self.scale = floor.rsqrt()
        self.low_rank = basis, (variances + floor).rsqrt() - self.scale

    def scaled(self, unit: float) -> "Match":
        """The same for residuals that are divided by `unit`: where a covariance is known, W v stays what it is."""
        other = copy.copy(self)
        other.scale = None if self.scale is None else self.scale * unit
        other.factor = None if self.factor is None else self.factor / unit
        other.low_rank = None if self.low_rank is None else (self.low_rank[0], self.low_rank[1] * unit)
        return other

    def to(self, device: torch.device, dtype: torch.dtype) -> "Match":
        """The same on another device and in another dtype."""
        other = copy.copy(self)
        other.known = None if self.known is None else self.known.to(device)
        other.scale = None if self.scale is None else self.scale.to(device, dtype)
        other.factor = None if self.factor is None else self.factor.to(device, dtype)
        if self.low_rank is not None:
            basis, weights = self.low_rank
            other.low_rank = basis.to(device, dtype), weights.to(device, dtype)
        return other

    @property
    def whitens(self) -> bool:
        """W v has no unit."""
        return self.scale is not None or self.factor is not None

    @property
    def plain(self) -> bool:
        """W is the identity."""
        return self.known is None and not self.whitens

    def __call__(self, v: Tensor) -> Tensor:
        """W v, (..., d_θ) -> (..., |K|): of a residual, or of every row of J."""
        v = self.select(v)
        if self.factor is not None:
            rows = torch.atleast_2d(v)
            half: Tensor = torch.linalg.solve_triangular(self.factor, rows.mT, upper=False)
            return half.mT.reshape(v.shape)
        return self._scaled(v)

    def adjoint(self, r: Tensor, size: int) -> Tensor:
        """Wᵀ r, (|K|,) -> (d_θ,)."""
        if self.factor is not None:
            r = torch.linalg.solve_triangular(self.factor.mT, r[:, None], upper=True)[:, 0]
        else:
            r = self._scaled(r)
        if self.known is None:
            return r
        return r.new_zeros(size).index_copy(0, self.known, r)

    def _scaled(self, v: Tensor) -> Tensor:
        """(diag(scale) + Vᵀ diag(t) V) v, which is its own adjoint."""
        out = v if self.scale is None else v * self.scale
        if self.low_rank is None:
            return out
        basis, weights = self.low_rank
        return out + (v @ basis.T * weights) @ basis

    def select(self, v: Tensor) -> Tensor:
        """The known coordinates of v, unweighted: (..., d_θ) -> (..., |K|)."""
        return v if self.known is None else v[..., self.known]
