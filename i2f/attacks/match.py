"""Which part of a gradient an attacker trusts, and how much: the norm in which gradients are matched."""

import copy

import torch
from torch import Tensor

from i2f.core import checks


class Match:
    """W in the objective ‖W(∇L(x) − g)‖²: W = Σ_KK^{-1/2} on the known coordinates K, zero on the others.

    Args:
        size: d_θ.
        mask: (d_θ,) booleans, True where the shared gradient is known to be exact (up to noise). A pruned gradient
            shows its own: `gradient != 0`. None: all are known.
        covariance: of the noise on the gradient, if it is known: (d_θ,) variances, or (d_θ, d_θ). Whitening by it
            makes the minimiser the maximum-likelihood one. None: equal and independent.

    Raises:
        ValueError: another shape; a mask that knows nothing; a covariance that is not positive.
    """

    def __init__(self, size: int, mask: Tensor | None = None, covariance: Tensor | None = None):
        self.known: Tensor | None = None  # indices of K
        self.scale: Tensor | None = None  # σ⁻¹ on K, or
        self.factor: Tensor | None = None  # the Cholesky factor of Σ_KK
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != (size,):
                raise ValueError(
                    f"mask is {tuple(mask.shape)} of {mask.dtype}; give ({size},) booleans, True where the gradient "
                    f"is known to be exact (gradient != 0 for a pruned one)"
                )
            if not mask.any():
                raise ValueError("mask knows no coordinate of the gradient: nothing can be matched")
            self.known = mask.nonzero()[:, 0]
        if covariance is not None:
            self._whiten(size, covariance)

    def _whiten(self, size: int, covariance: Tensor) -> None:
        if covariance.shape not in ((size,), (size, size)):
            raise ValueError(
                f"covariance has shape {tuple(covariance.shape)}; give ({size},) variances or a ({size}, {size}) matrix"
            )
        checks.finite("covariance", covariance)
        rounding = torch.finfo(covariance.dtype).eps if covariance.is_floating_point() else 0.0
        covariance = covariance.double()  # its square root may lie within float32's range where it does not itself
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

    def scaled(self, unit: float) -> "Match":
        """The same for residuals that are divided by `unit`: where a covariance is known, W v stays what it is."""
        other = copy.copy(self)
        other.scale = None if self.scale is None else self.scale * unit
        other.factor = None if self.factor is None else self.factor / unit
        return other

    def to(self, like: Tensor) -> "Match":
        """The same in the dtype and on the device of `like`."""
        other = copy.copy(self)
        other.known = None if self.known is None else self.known.to(like.device)
        other.scale = None if self.scale is None else self.scale.to(like)
        other.factor = None if self.factor is None else self.factor.to(like)
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
        if self.scale is not None:
            return v * self.scale
        if self.factor is not None:
            rows = torch.atleast_2d(v)
            return torch.linalg.solve_triangular(self.factor, rows.mT, upper=False).mT.reshape(v.shape)
        return v

    def adjoint(self, r: Tensor, size: int) -> Tensor:
        """Wᵀ r, (|K|,) -> (d_θ,)."""
        if self.scale is not None:
            r = r * self.scale
        if self.factor is not None:
            r = torch.linalg.solve_triangular(self.factor.mT, r[:, None], upper=True)[:, 0]
        if self.known is None:
            return r
        return r.new_zeros(size).index_copy(0, self.known, r)

    def select(self, v: Tensor) -> Tensor:
        """The known coordinates of v, unweighted: (..., d_θ) -> (..., |K|)."""
        return v if self.known is None else v[..., self.known]
