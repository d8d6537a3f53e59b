"""δ: what is added to a gradient before it is shared. Flat in, flat out; a gradient is never changed in place."""

import math

import torch
from torch import Tensor

from i2f import checks, spectrum
from i2f.jacobian import GradientJacobian


def gaussian(gradient: Tensor, variance: float, seed: int | None = None) -> Tensor:
    """δ ~ N(0, σ²I) of the gradient's shape, σ² = `variance`. A seed draws the same δ for every dtype and device."""
    scale = math.sqrt(_check(gradient, variance))
    return (scale * torch.randn(gradient.shape, generator=_generator(seed), dtype=torch.float64)).to(gradient)


def laplace(gradient: Tensor, variance: float, seed: int | None = None) -> Tensor:
    """Independent Laplace noise of variance σ² = `variance` (scale b = σ/√2) in every coordinate."""
    scale = math.sqrt(_check(gradient, variance) / 2)
    u = torch.rand(gradient.shape, generator=_generator(seed), dtype=torch.float64) - 0.5
    return (-scale * u.sign() * torch.log1p(-2 * u.abs())).to(gradient)


def prune(gradient: Tensor, ratio: float) -> Tensor:
    """Magnitude pruning as a perturbation: δ = −g on the floor(ratio·d_θ) smallest entries, 0 on the others.

    The shared gradient g + δ is then zero there: it shows its own mask. `ratio` is the share pruned, in [0, 1).
    """
    _check(gradient)
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio} is out of range: the share of entries pruned must be in [0, 1)")
    count = math.floor(ratio * gradient.numel() + 1e-9)  # 0.29 · 100 is 28.999… in binary
    pruned = torch.argsort(gradient.abs(), stable=True)[:count]
    delta = torch.zeros_like(gradient)
    delta[pruned] = -gradient[pruned]
    return delta


def clip(gradient: Tensor, norm: float) -> Tensor:
    """Scaling to the length C = `norm` of what is longer:  δ = (min(1, C/‖g‖) − 1)·g."""
    _check(gradient)
    if not 0 < norm < math.inf:
        raise ValueError(f"norm={norm} is out of range: the clipping norm must be positive and finite")
    return (min(1.0, norm / (float(gradient.norm()) or 1.0)) - 1) * gradient


def dp(gradient: Tensor, norm: float, multiplier: float, seed: int | None = None) -> Tensor:
    """DP-SGD's perturbation of one sample's gradient: clipped to C = `norm`, then noise of deviation `multiplier`·C in
    every coordinate (Abadi et al. 2016)."""
    checks.at_least("multiplier", multiplier, 0.0)
    return clip(gradient, norm) + gaussian(gradient, (multiplier * norm) ** 2, seed)


def quantize(gradient: Tensor, bits: int, seed: int | None = None) -> Tensor:
    """Rounding to 2^`bits` levels, evenly spread over [−max|g|, max|g|]: to the nearest; with a seed to one of the two
    neighbours at random, so that the mean is g (QSGD's rounding; Alistarh et al. 2017)."""
    _check(gradient)
    if not 1 <= bits <= 32:
        raise ValueError(f"bits={bits} is out of range: give 1 to 32")
    top = float(gradient.abs().max())
    if top == 0:
        return torch.zeros_like(gradient)
    step = 2 * top / (2**bits - 1)
    place = (gradient.double() + top) / step
    if seed is None:
        place = place.round()
    else:
        place = (place + torch.rand(gradient.shape, generator=_generator(seed), dtype=torch.float64).to(place)).floor()
    return (place.clamp(0, 2**bits - 1) * step - top - gradient.double()).to(gradient)


def eigenvector(
    J: GradientJacobian, index: int | None = None, norm: float = 1.0, eigenvalue: float | None = None
) -> Tensor:
    """δ = c·v, v the unit right singular vector of J number `index` (λ descending, largest entry of v positive).

    Instead of an index, `eigenvalue` takes the vector whose λ is nearest to it on a log scale. c = `norm` ≥ 0.
    I(δ) = c/√λ.
    """
    if (index is None) == (eigenvalue is None):
        raise ValueError("give one of index and eigenvalue: which eigenvector of J Jᵀ to follow")
    checks.at_least("norm", norm, 0.0)
    if eigenvalue is not None:
        if not 0 < eigenvalue < math.inf:
            raise ValueError(f"eigenvalue={eigenvalue} is out of range: it must be positive and finite")
        values = spectrum.decompose(J).values[: spectrum.rank(J)]
        index = int((values.log() - math.log(eigenvalue)).abs().argmin())
    return norm * spectrum.right_singular_vector(J, index)


def _check(gradient: Tensor, variance: float = 0.0) -> float:
    if gradient.ndim != 1:
        raise ValueError(f"gradient has shape {tuple(gradient.shape)}; give the flat (d_θ,) one, J.gradient")
    checks.finite("gradient", gradient)
    return checks.at_least("variance", variance, 0.0)


def _generator(seed: int | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator().manual_seed(seed)
