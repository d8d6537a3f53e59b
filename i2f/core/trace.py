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

from i2f._torch.operations import ordinary
from i2f.core import checks, spectrum
from i2f.core.brief import brief
from i2f.core.jacobian import GradientJacobian
from i2f.core.lanczos import Lanczos

LOOK = 4  # Lanczos steps from one evaluation of the quadrature to the next


@dataclass(frozen=True)
class Trace:
    """An estimate of a trace.

    value: the mean over probes. low, high: its 95% interval over the probes' draw, by Student's t. probes, products:
    what it took. converged: every probe's quadrature is within the tolerance, and the products' rounding moves it by
    less. Otherwise the value is biased to that of a spectrum without its small eigenvalues, or depends on digits that
    J's dtype does not have (float32: from ε ≈ 1e-5·λ_max down).
    """

    value: float
    low: float
    high: float
    probes: int
    products: int
    converged: bool

    __repr__ = brief


def expected_square(
    J: GradientJacobian,
    variance: float,
    damping: float,
    probes: int = 8,
    tol: float = 1e-2,
    max_steps: int = 200,
    seed: int = 0,
) -> Trace:
    """E[I²] = σ² Σ λ/(λ + ε)² for δ ~ N(0, σ²I): `influence.expected_square` without a spectrum. Squared pixels.

    Args:
        variance: σ². damping: ε > 0, in units of λ. probes: random vectors, at least 2. tol: relative, at which a
            probe's quadrature has converged. max_steps: of Lanczos for each probe, two products each; it needs some
            √(λ_max/ε) of them, and keeps as many vectors of input space. seed: of the probes.

    Raises: ValueError for bad input.
    """

    def f(values: np.ndarray, eps: float) -> np.ndarray:  # λ/(λ + ε)² as a difference of completely monotone functions
        return np.stack([1 / (values + eps), -eps / (values + eps) ** 2])

    return _Probes(J, probes, tol, max_steps, seed)(f, variance, damping)


def bayes_error(
    J: GradientJacobian,
    variance: float,
    damping: float,
    probes: int = 8,
    tol: float = 1e-2,
    max_steps: int = 200,
    seed: int = 0,
) -> Trace:
    """σ² Σ 1/(λ + ε), the expected squared error of an attacker who knows σ² and that pixels are N(m, τ²), ε = σ²/τ².

    Squared pixels; divide by d_x for the MSE. Arguments and errors: as for `expected_square`.
    """
    return BayesError(J, probes, tol, max_steps, seed)(variance, damping)


class BayesError:
    """`bayes_error` as a function of the noise, at the cost of the smallest ε that is asked for.

    The probes' Lanczos processes do not depend on ε, and are kept. The answers do not depend on what was asked before.
    """

    def __init__(self, J: GradientJacobian, probes: int = 8, tol: float = 1e-2, max_steps: int = 200, seed: int = 0):
        self.J, self.probes = J, _Probes(J, probes, tol, max_steps, seed)

    def __call__(self, variance: float, damping: float) -> Trace:
        found: Trace = self.probes(lambda values, eps: 1 / (values + eps), variance, damping)
        return found


class _Probes:
    """σ² tr f(J Jᵀ, ε) from the same probes for every f, σ² and ε; f is of degree −1.

    f may return several rows, which are summed: `Trace.converged` is a proof where each one is, up to its sign,
    completely monotone.
    """

    @ordinary()
    def __init__(self, J: GradientJacobian, probes: int = 8, tol: float = 1e-2, max_steps: int = 200, seed: int = 0):
        checks.whole("probes", probes, 2)
        self.J, self.tol, self.max_steps = spectrum.operator_at(J), tol, checks.whole("max_steps", max_steps, 1)
        self.apply, rng = spectrum.gram_product(J), np.random.default_rng(seed)
        signs = [torch.from_numpy(rng.choice([-1.0, 1.0], J.shape[0])).to(J.x) for _ in range(probes)]
        self.processes = [Lanczos(self.apply, z) for z in signs]

    @ordinary()
    def __call__(self, f: Callable[[np.ndarray, float], np.ndarray], variance: float, damping: float) -> Trace:
        variance, damping = checks.at_least("variance", variance, 0.0), float(damping)
        if not 0 < damping < math.inf:
            why = "small eigenvalues decide an undamped trace, and products alone do not find them"
            raise ValueError(f"damping={damping} is out of range: it must be positive and finite, since {why}")
        damping, variance = (number / self.J.unit / self.J.unit for number in (damping, variance))
        spent, n = self.J.products, len(self.processes)
        found = [_Quadrature(process) for process in self.processes]
        for at in range(0, n, self.J.chunk):
            self._converge(found[at : at + self.J.chunk], lambda values: f(values, damping))
        values = [one.value for one in found]
        mean, spread = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(n)
        half = float(stdtrit(n - 1, 0.975)) * spread
        value, low, high = (variance * number for number in (mean, mean - half, mean + half))
        return Trace(value, low, high, n, self.J.products - spent, all(one.converged for one in found))

    def _converge(self, some: "list[_Quadrature]", f: Callable[[np.ndarray], np.ndarray]) -> None:
        """Side by side: a step is one pair of products with all that have not converged and lack it."""
        for step in range(1, self.max_steps + 1):
            left = [one for one in some if not one.converged and not one.ended(step)]
            if not left:
                break
            behind = [one.process for one in left if len(one.process) < step and not one.process.exhausted]
            if behind:
                products = self.apply(torch.stack([process.front for process in behind]))
                for process, product in zip(behind, products, strict=True):
                    process.advance(product)
            for one in left:
                if step % LOOK == 0 or one.ended(step + 1) or step == self.max_steps:
                    one.look(f, self.tol, step)


@dataclass
class _Quadrature:
    """zᵀ f(J Jᵀ/u²) z by Lanczos from z, u = `J.unit`; converged: within the tolerance."""

    process: Lanczos
    value: float = math.inf
    converged: bool = False

    def ended(self, step: int) -> bool:
        """Whether the process has no such step."""
        return self.process.exhausted and len(self.process) < step

    def look(self, f: Callable[[np.ndarray], np.ndarray], tol: float, step: int) -> None:
        """Evaluates the quadrature as it is after so many steps."""
        process = self.process.first(step)
        nodes, weights = process.quadrature()
        parts = np.atleast_2d(f(nodes)) @ weights
        others, their = process.quadrature(node=0.0)
        apart = abs(np.atleast_2d(f(others)) @ their - parts).sum()
        moved = abs(np.atleast_2d(f(nodes + process.rounding) - f(nodes))).sum(axis=0) @ weights
        self.value = float(parts.sum())
        self.converged = bool(max(apart, moved) <= tol * abs(self.value))
