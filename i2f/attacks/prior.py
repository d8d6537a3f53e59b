"""What an attacker may believe about images before seeing a gradient: their range, their mean, smoothness."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

BOX = (0.0, 1.0)  # pixels
TAU = 0.25  # τ, in pixels: the standard deviation of a pixel around its mean, for an attacker with a Gaussian prior
SMOOTHING = 1e-3  # β, in pixels: differences t far above it cost |t|, those far below t²/2β


class Prior(NamedTuple):
    """The penalty  tv · TV(x) + ridge · ‖x − mean‖²  that is added to an attack's distance; zero weights: none.

    ridge: ε = σ²/τ² for noise of variance σ² on the gradient and pixels N(mean, τ²I), which makes the minimiser of
    ‖∇L(x) − g‖² + ε‖x − mean‖² the most probable image (MAP); `TAU` is this project's τ. mean: (n, ...) or a scalar.
    """

    tv: float
    ridge: float
    mean: Tensor

    @property
    def active(self) -> bool:
        return bool(self.tv or self.ridge)

    def scaled(self, unit: float) -> "Prior":
        """The same prior for the distance ‖(∇L − g)/unit‖²."""
        return self._replace(tv=self.tv / unit / unit, ridge=self.ridge / unit / unit)

    def penalty(self, x: Tensor) -> Tensor:
        """(n, ...) -> scalar."""
        value = self.ridge * (x - self.mean).square().sum()
        return value + self.tv * total_variation(x) if self.tv else value

    def curvature(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """v ↦ (½ tv K + ridge I) v: half the penalty's Hessian, TV's part by `lagged_curvature`. (..., d_x) -> same."""
        if not self.tv:
            return lambda v: self.ridge * v
        smooth = lagged_curvature(x)
        return lambda v: 0.5 * self.tv * smooth(v) + self.ridge * v


def total_variation(x: Tensor) -> Tensor:
    """TV(x) = mean φ(Δ_h x) + mean φ(Δ_w x) over neighbouring pixels, φ(t) = √(t² + β²) − β; (n, C, H, W) -> scalar.

    Anisotropic, and smoothed so that it has the derivatives that a second-order attack needs.
    """
    tall, wide = ((torch.hypot(d, d.new_tensor(SMOOTHING)) - SMOOTHING).mean() for d in _differences(x))
    return tall + wide


def lagged_curvature(x: Tensor) -> Callable[[Tensor], Tensor]:
    """v ↦ K v, with K = Σ Dᵀ diag(1/√((Dx)² + β²)) D / count over both differences D: (..., d_x) -> (..., d_x).

    It stands in for ∇²TV: positive semi-definite, K x = ∇TV(x), and never flatter than TV is (lagged diffusivity,
    Vogel and Oman 1996), where Newton's own matrix predicts too large a decrease.
    """
    weights = [1 / torch.hypot(d, d.new_tensor(SMOOTHING)) / d.numel() for d in _differences(x)]

    def product(v: Tensor) -> Tensor:
        tall, wide = (w * d for w, d in zip(weights, _differences(v.reshape(*v.shape[:-1], *x.shape)), strict=True))
        out = v.new_zeros(*v.shape[:-1], *x.shape)
        out[..., 1:, :] += tall
        out[..., :-1, :] -= tall
        out[..., 1:] += wide
        out[..., :-1] -= wide
        return out.flatten(-x.ndim)

    return product


def _differences(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]
