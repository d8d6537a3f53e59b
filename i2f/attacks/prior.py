"""What an attacker may believe about images before seeing a gradient: their range, and that neighbours are alike."""

from collections.abc import Callable

import torch
from torch import Tensor

BOX = (0.0, 1.0)  # pixels
SMOOTHING = 1e-3  # β, in pixels: differences far above it cost |t|, those far below t²/2β


def total_variation(x: Tensor) -> Tensor:
    """TV(x) = mean φ(Δ_h x) + mean φ(Δ_w x) over neighbouring pixels, φ(t) = √(t² + β²) − β; (n, C, H, W) -> scalar.

    Anisotropic, and smoothed so that it has the derivatives that a second-order attack needs.
    """
    return sum((torch.hypot(d, d.new_tensor(SMOOTHING)) - SMOOTHING).mean() for d in _differences(x))


def lagged_curvature(x: Tensor) -> Callable[[Tensor], Tensor]:
    """v ↦ K v, with K = Σ Dᵀ diag(1/√((Dx)² + β²)) D / count over both differences D: (..., d_x) -> (..., d_x).

    It stands in for ∇²TV: positive semi-definite, K x = ∇TV(x), and never flatter than TV is (lagged diffusivity,
    Vogel and Oman 1996), where Newton's own matrix promises too much.
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
