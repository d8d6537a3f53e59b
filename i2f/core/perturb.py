"""δ: what is added to a gradient before it is shared. Flat in, flat out; a gradient is never changed in place.

A gradient is a flat tensor or array of floating-point numbers. δ has its dtype, and at least float32: half precision
loses small noise and cannot hold large noise. Draws come from `streams`, one stream per kind of noise: a seed gives the
same δ for every dtype and device.
"""

import math
from decimal import Decimal

import numpy as np
import torch
from torch import Tensor

from i2f.core import checks, linalg, spectrum, streams
from i2f.core.jacobian import GradientJacobian


def gaussian(gradient: Tensor | np.ndarray, variance: float, seed: int | None = None) -> Tensor:
    """δ ~ N(0, σ²I) of the gradient's shape, σ² = `variance`."""
    return _normal(_gradient(gradient), math.sqrt(checks.at_least("variance", variance, 0.0)), seed)


def laplace(gradient: Tensor | np.ndarray, variance: float, seed: int | None = None) -> Tensor:
    """Independent Laplace noise of variance σ² = `variance` (scale b = σ/√2) in every coordinate."""
    gradient, deviation = _gradient(gradient), math.sqrt(checks.at_least("variance", variance, 0.0))
    _in_range(gradient, deviation)
    u = _uniform(gradient, "laplace", seed).clamp_min(2.0**-53) - 0.5  # a draw of 0 would give δ = −∞
    return (-deviation / math.sqrt(2) * u.sign() * torch.log1p(-2 * u.abs())).to(gradient)


def prune(gradient: Tensor | np.ndarray, ratio: float) -> Tensor:
    """Magnitude pruning as a perturbation: δ = −g on the floor(ratio·d_θ) smallest entries, 0 on the others.

    The shared gradient g + δ is then zero there: it shows its own mask. `ratio` is the share pruned, in [0, 1).
    """
    gradient = _gradient(gradient)
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio} is out of range: the share of entries pruned must be in [0, 1)")
    count = math.floor(Decimal(repr(float(ratio))) * gradient.numel())  # 0.29 · 100 is 28.999… in binary
    pruned = torch.argsort(gradient.abs(), stable=True)[:count]
    delta = torch.zeros_like(gradient)
    delta[pruned] = -gradient[pruned]
    return delta


def clip(gradient: Tensor | np.ndarray, norm: float) -> Tensor:
    """Scaling a longer gradient to the length C = `norm`:  δ = (min(1, C/‖g‖) − 1)·g."""
    gradient = _gradient(gradient)
    if not 0 < norm < math.inf:
        raise ValueError(f"norm={norm} is out of range: the clipping norm must be positive and finite")
    unit = linalg.unit_of(gradient)
    share = float(norm) / unit / (linalg.norm(gradient / unit) or 1.0)  # C/‖g‖, whose squares no dtype need hold
    if share < 100 * torch.finfo(gradient.dtype).eps and gradient.any():
        raise ValueError(f"norm={norm} is {share:.0e} of the gradient's: g + δ would be rounding in {gradient.dtype}")
    return (min(1.0, share) - 1) * gradient


def dp(gradient: Tensor | np.ndarray, norm: float, multiplier: float, seed: int | None = None) -> Tensor:
    """DP-SGD's perturbation of one sample's gradient: clipped to C = `norm`, then noise of deviation `multiplier`·C in
    every coordinate (Abadi et al. 2016)."""
    clipped, multiplier = clip(gradient, norm), checks.at_least("multiplier", multiplier, 0.0)
    return clipped + _normal(clipped, multiplier * float(norm), seed)


def quantize(gradient: Tensor | np.ndarray, bits: int, seed: int | None = None) -> Tensor:
    """Rounding to 2^`bits` levels, evenly spread over [−max|g|, max|g|]: to the nearest; with a seed to one of the two
    neighbours at random, so that the mean is g (QSGD's rounding; Alistarh et al. 2017)."""
    gradient, bits = _gradient(gradient), checks.whole("bits", bits)
    if not 1 <= bits <= 32:
        raise ValueError(f"bits={bits} is out of range: give 1 to 32")
    levels: int = 2**bits
    top = float(gradient.abs().max())
    if top == 0:
        return torch.zeros_like(gradient)
    share = gradient.cpu().double() / top
    place = (share + 1) * ((levels - 1) / 2)
    place = place.round() if seed is None else (place + _uniform(gradient, "quantize", seed)).floor()
    return ((place.clamp(0, levels - 1) * (2 / (levels - 1)) - 1 - share) * top).to(gradient)


def eigenvector(
    J: GradientJacobian, index: int | None = None, norm: float = 1.0, eigenvalue: float | None = None
) -> Tensor:
    """δ = c·v, v the unit right singular vector of J number `index` (λ descending, largest entry of v positive).

    Instead of an index, `eigenvalue` takes the vector whose λ is nearest to it on a log scale. c = `norm` ≥ 0.
    I(δ) = c/√λ.
    """
    spectrum.operator_at(J)
    norm = checks.at_least("norm", norm, 0.0)
    if index is not None and eigenvalue is None:
        return norm * spectrum.right_singular_vector(J, index)
    if index is not None or eigenvalue is None:
        raise ValueError("give one of index and eigenvalue: which eigenvector of J Jᵀ to follow")
    if not 0 < eigenvalue < math.inf:
        raise ValueError(f"eigenvalue={eigenvalue} is out of range: it must be positive and finite")
    values = spectrum.decompose(J).values[: max(1, spectrum.rank(J))]
    nearest = int((values.log() - math.log(eigenvalue)).abs().argmin())
    return norm * spectrum.right_singular_vector(J, nearest)


def _gradient(gradient: Tensor | np.ndarray) -> Tensor:
    """The gradient as a flat, finite tensor without a graph, in float32 at least."""
    if isinstance(gradient, np.ndarray):
        gradient = torch.from_numpy(np.ascontiguousarray(gradient))
    if not torch.is_tensor(gradient) or not gradient.is_floating_point():
        kind = gradient.dtype if torch.is_tensor(gradient) else type(gradient).__name__
        raise TypeError(f"gradient is {kind}; give the flat floating-point tensor or array, J.gradient")
    if gradient.ndim != 1 or not len(gradient):
        raise ValueError(f"gradient has shape {tuple(gradient.shape)}; give the flat (d_θ,) one, J.gradient")
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return checks.finite("gradient", gradient.detach().to(wide))


def _normal(gradient: Tensor, deviation: float, seed: int | None) -> Tensor:
    """δ ~ N(0, deviation²·I)."""
    _in_range(gradient, deviation)
    draw = torch.randn(gradient.shape, generator=streams.generator("gaussian", seed), dtype=torch.float64)
    return (deviation * draw).to(gradient)


def _uniform(gradient: Tensor, name: str, seed: int | None) -> Tensor:
    """Draws from [0, 1), in float64 on the CPU."""
    return torch.rand(gradient.shape, generator=streams.generator(name, seed), dtype=torch.float64)


def _in_range(gradient: Tensor, deviation: float) -> None:
    """A ValueError for noise that the gradient's dtype would round to zero or to infinity."""
    limits = torch.finfo(gradient.dtype)
    if deviation and not limits.tiny <= deviation <= limits.max / 100:
        raise ValueError(f"noise of deviation {deviation:.0e} leaves {gradient.dtype}: give the gradient in float64")
