"""Traces of functions of J Jᵀ from products alone, with an error bar: sums over a spectrum that is out of reach.

tr f(J Jᵀ) = E[zᵀ f(J Jᵀ) z] for random signs z (Hutchinson 1989), and zᵀ f(J Jᵀ) z is a Gauss quadrature whose nodes
and weights are the eigenpairs of the Lanczos tridiagonal matrix that starts at z (Golub and Meurant 1994; Ubaru, Chen
and Saad 2017, "stochastic Lanczos quadrature"). Where the derivatives of f alternate in sign, as those of 1/(λ + ε) do,
it is a lower bound, and the Gauss–Radau rule with a node at λ = 0 an upper one: their distance bounds the error.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from i2f import checks, spectrum
from i2f.jacobian import GradientJacobian
from i2f.lanczos import Lanczos
from i2f.operations import ordinary

LOOK = 4  # Lanczos steps from one look at the quadrature to the next


@dataclass(frozen=True)
class Trace:
    """An estimate of a trace.

    value: the mean over probes. low, high: its 95% interval over the probes' draw, by Student's t. probes, products:
    what it took. converged: every probe's quadrature settled within the tolerance, and the products' rounding moves it
    by less; otherwise the value leans to that of a spectrum without its small eigenvalues, or rests on digits that J's
    dtype does not have (float32: from ε ≈ 1e-5·λ_max down).
    """

    value: float
    low: float
    high: float
    probes: int
    products: int
    converged: bool


def expected_square(
    J: GradientJacobian, variance: float, damping: float, probes: int = 8, tol: float = 1e-2, max_steps: int = 200,
    seed: int = 0,
) -> Trace:  # fmt: skip
    """E[I²] = σ² Σ λ/(λ + ε)² for δ ~ N(0, σ²I): `influence.expected_square` without a spectrum. Squared pixels.

    Args:
        variance: σ². damping: ε > 0, in units of λ. probes: random vectors, at least 2. tol: relative, at which a
            probe's quadrature counts as settled. max_steps: of Lanczos a probe, two products each; it needs some
            √(λ_max/ε) of them, and keeps as many vectors of input space. seed: of the probes.

    Raises: ValueError for bad input.
    """

    def f(values: np.ndarray, eps: float) -> np.ndarray:  # λ/(λ + ε)² as a difference of completely monotone functions
        return np.stack([1 / (values + eps), -eps / (values + eps) ** 2])

    return _scaled(J, variance, damping, f, probes, tol, max_steps, seed)


def bayes_error(
    J: GradientJacobian, variance: float, damping: float, probes: int = 8, tol: float = 1e-2, max_steps: int = 200,
    seed: int = 0,
) -> Trace:  # fmt: skip
    """σ² Σ 1/(λ + ε), the expected squared error of an attacker who knows σ² and that pixels are N(m, τ²), ε = σ²/τ².

    Squared pixels; divide by d_x for the MSE. Arguments and errors: as for `expected_square`.
    """
    return _scaled(J, variance, damping, lambda values, eps: 1 / (values + eps), probes, tol, max_steps, seed)


def _scaled(
    J: GradientJacobian, variance: float, damping: float, f: Callable[[np.ndarray, float], np.ndarray], probes: int,
    tol: float, max_steps: int, seed: int,
) -> Trace:  # fmt: skip
    """σ² tr f(J Jᵀ, ε) for an f of degree −1, in units of J."""
    spectrum.operator_at(J)
    variance, damping = float(checks.at_least("variance", variance, 0.0)), float(damping)
    if not 0 < damping < math.inf:
        raise ValueError(f"damping={damping} is out of range: it must be positive and finite, since small eigenvalues "
                         "decide an undamped trace, and products alone do not find them")  # fmt: skip
    damping, variance = (number / J.unit / J.unit for number in (damping, variance))
    found = _estimate(J, lambda values: f(values, damping), probes, tol, max_steps, seed)
    value, low, high = (variance * number for number in (found.value, found.low, found.high))
    return Trace(value, low, high, found.probes, found.products, found.converged)


def estimate(
    J: GradientJacobian, f: Callable[[np.ndarray], np.ndarray], probes: int = 8, tol: float = 1e-2,
    max_steps: int = 200, seed: int = 0,
) -> Trace:  # fmt: skip
    """tr f(J Jᵀ), f a function of eigenvalues, smooth on [0, λ_max]. Arguments: as for `expected_square`.

    f may return several rows, which are summed: `converged` is a proof where each one is, up to its sign, completely
    monotone, and an estimate for any other f.
    """
    spectrum.operator_at(J)
    return _estimate(J, lambda values: f(values * J.unit * J.unit), probes, tol, max_steps, seed)


@ordinary()
def _estimate(
    J: GradientJacobian, f: Callable[[np.ndarray], np.ndarray], probes: int, tol: float, max_steps: int, seed: int
) -> Trace:
    """tr f(J Jᵀ/u²), u = `J.unit`."""
    for name, number, least in (("probes", probes, 2), ("max_steps", max_steps, 1)):
        if number < least:
            raise ValueError(f"{name}={number} is out of range: give at least {least}")
    spent, rng = J.products, np.random.default_rng(seed)
    signs = [torch.from_numpy(rng.choice([-1.0, 1.0], J.shape[0])).to(J.x) for _ in range(probes)]
    values, settled = [], True
    for at in range(0, probes, J.chunk):
        for quadrature in _quadratures(J, signs[at : at + J.chunk], f, tol, max_steps):
            values.append(quadrature.value)
            settled &= quadrature.settled
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(probes)
    half = float(stdtrit(probes - 1, 0.975)) * spread
    return Trace(mean, mean - half, mean + half, probes, J.products - spent, settled)


@dataclass
class _Quadrature:
    """zᵀ f(J Jᵀ/u²) z by Lanczos from z, as it stands; `settled`: within the tolerance."""

    process: Lanczos
    value: float = math.inf
    settled: bool = False

    def look(self, f: Callable[[np.ndarray], np.ndarray], tol: float) -> None:
        process = self.process
        nodes, weights = process.quadrature()
        parts = np.atleast_2d(f(nodes)) @ weights
        others, their = process.quadrature(node=0.0)
        apart = abs(np.atleast_2d(f(others)) @ their - parts).sum()
        moved = abs(np.atleast_2d(f(nodes + process.rounding) - f(nodes))).sum(axis=0) @ weights
        self.value = float(parts.sum())
        self.settled = bool(max(apart, moved) <= tol * abs(self.value))


def _quadratures(
    J: GradientJacobian, signs: list[Tensor], f: Callable[[np.ndarray], np.ndarray], tol: float, max_steps: int
) -> list[_Quadrature]:
    """One for each z, side by side: a step is one pair of products with all that have not settled."""
    apply = spectrum.gram_product(J)
    found = [_Quadrature(Lanczos(apply, z)) for z in signs]
    for step in range(1, max_steps + 1):
        left = [one for one in found if not one.settled and not one.process.exhausted]
        if not left:
            break
        products = apply(torch.stack([one.process.front for one in left]))
        for one, product in zip(left, products, strict=True):
            one.process.advance(product)
            if step % LOOK == 0 or one.process.exhausted or step == max_steps:
                one.look(f, tol)
    return found
