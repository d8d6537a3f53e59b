"""Defences by name: what is done to a gradient before it leaves, and what noise a knowing attacker is left with."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from i2f.core import checks, perturb, streams
from i2f.core.jacobian import GradientJacobian


class Kind(NamedTuple):
    """values: what a defence of this kind is told, in words. delta: (J, values, seed) -> δ, (d_θ,).

    variance: (gradient, values) -> σ² of its isotropic noise, once what the attacker can undo (a scale) is undone; None
    where it is not isotropic noise.
    """

    values: tuple[str, ...]
    delta: Callable[[GradientJacobian, tuple[float, ...], int], Tensor]
    variance: Callable[[Tensor, tuple[float, ...]], float] | None = None


def _scaled(gradient: Tensor, values: tuple[float, ...]) -> float:
    """DP-SGD's noise, seen on a gradient that is scaled back to its own length: an attacker may know or guess it."""
    norm, multiplier = values
    return (multiplier * max(norm, _norm(gradient))) ** 2


def _norm(gradient: Tensor) -> float:
    """‖g‖, summed in float64: squares of entries below 1e-20 are zero in float32, above 1e19 infinite."""
    return float(gradient.double().norm())


KINDS = {
    "none": Kind((), lambda J, v, seed: torch.zeros_like(J.gradient), lambda g, v: 0.0),
    "gaussian": Kind(("variance",), lambda J, v, seed: perturb.gaussian(J.gradient, *v, seed), lambda g, v: v[0]),
    "laplace": Kind(  # a likelihood attacker is left with half of its variance: its Fisher information is 2/σ²
        ("variance",), lambda J, v, seed: perturb.laplace(J.gradient, *v, seed), lambda g, v: v[0] / 2
    ),
    "relative": Kind(
        ("noise norm / gradient norm",),
        lambda J, v, seed: perturb.gaussian(J.gradient, _relative(J.gradient, v), seed),
        lambda g, v: _relative(g, v),
    ),
    "dp": Kind(("clipping norm", "noise multiplier"), lambda J, v, seed: perturb.dp(J.gradient, *v, seed), _scaled),
    "clip": Kind(("clipping norm",), lambda J, v, seed: perturb.clip(J.gradient, *v), lambda g, v: 0.0),
    "prune": Kind(("ratio",), lambda J, v, seed: perturb.prune(J.gradient, *v)),
    "quantize": Kind(("bits",), lambda J, v, seed: perturb.quantize(J.gradient, int(v[0]))),
    "designed": Kind(
        ("noise norm / gradient norm",), lambda J, v, seed: designed(J, (v[0] * _norm(J.gradient)) ** 2, seed)
    ),
}


def _relative(gradient: Tensor, values: tuple[float, ...]) -> float:
    return (values[0] * _norm(gradient)) ** 2 / gradient.numel()


@dataclass(frozen=True)
class Defense:
    """A defence and its values. `parse` makes one from its text."""

    name: str
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        kind = KINDS[checks.one_of("defense", self.name, KINDS)]
        if len(self.values) != len(kind.values):
            form = ":".join([self.name, *(f"<{value}>" for value in kind.values)])
            raise ValueError(f"defense={str(self)!r} has {len(self.values)} values: give {form}")
        for value in self.values:
            checks.at_least(f"a value of defense={str(self)!r}", value, 0.0)
        if self.name == "quantize" and self.values[0] != int(self.values[0]):
            raise ValueError(f"defense={str(self)!r}: bits are a whole number")

    def __str__(self) -> str:
        return self.name + "".join(f":{value:g}" for value in self.values)

    def delta(self, J: GradientJacobian, seed: int = 0) -> Tensor:
        """What it adds to the gradient, (d_θ,)."""
        return KINDS[self.name].delta(J, self.values, seed)

    def undone(self, J: GradientJacobian, delta: Tensor) -> Tensor:
        """δ as a knowing attacker sees it, who scales a clipped gradient back to its own length; else δ itself."""
        if self.name not in ("dp", "clip"):
            return delta
        scale = max(1.0, _norm(J.gradient) / self.values[0])
        return (scale * (J.gradient.double() + delta) - J.gradient).to(delta)

    def variance(self, J: GradientJacobian) -> float | None:
        """σ² of isotropic noise as a knowing attacker sees it; None where it is of another kind."""
        rule = KINDS[self.name].variance
        return None if rule is None else rule(J.gradient, self.values)

    def on_input(self, J: GradientJacobian) -> float | None:
        """c, the variance of noise on the input whose gradient is sent; None for every other kind."""
        return per_direction(J, (self.values[0] * _norm(J.gradient)) ** 2) if self.name == "designed" else None


def parse(text: str) -> Defense:
    """A defence from "name:value[:value]": "none", "gaussian:1e-3", "relative:0.1", "dp:1.0:0.5", "prune:0.9", ….

    Raises: ValueError for an unknown name, or values that are missing, too many, or no numbers.
    """
    name, *words = text.split(":")
    kind = KINDS[checks.one_of("defense", name, KINDS)]
    form = ":".join([name, *(f"<{value}>" for value in kind.values)])
    if len(words) != len(kind.values):
        raise ValueError(f"defense={text!r} has {len(words)} values: give {form}")
    try:
        values = tuple(float(word) for word in words)
    except ValueError:
        raise ValueError(f"defense={text!r} has a value that is no number: give {form}") from None
    return Defense(name, values)


def designed(J: GradientJacobian, energy: float, seed: int | None = None) -> Tensor:
    """The gradient of the input with noise on it in place of the input's own:  δ = g(x + √c z) − g(x), z ~ N(0, I),
    c = energy/tr(J Jᵀ), so that E‖δ‖² = `energy` to first order.

    There δ = √c Jᵀz. Noise of covariance Σ = V S Vᵀ in the row space of J = U Λ^½ Vᵀ leaves an attacker who whitens by
    it the error covariance U Λ^-½ S Λ^-½ Uᵀ. Of all S with tr S = energy, its smallest eigenvalue is largest where all
    are equal, at S = cΛ, so at Σ = c JᵀJ: then every direction of the input has the error c.

    Drawn as √c J(x)ᵀz it would be broken by whoever knows the method, who fits g(x) + J(x)ᵀw to it in x and w together.
    As a gradient at x + √c z it cannot be: no attacker learns more of x than x + √c z tells, at any size of c.

    Raises: ValueError where J = 0.
    """
    checks.at_least("energy", energy, 0.0)
    z = on_input(J, seed).to(J.x)
    return J.map(J.x + math.sqrt(per_direction(J, energy)) * z) - J.gradient


def on_input(J: GradientJacobian, seed: int | None) -> Tensor:
    """z ~ N(0, I) of the input's shape, float64: the draw of `designed`."""
    return torch.randn(J.x.shape, generator=streams.generator("designed", seed), dtype=torch.float64)


def per_direction(J: GradientJacobian, energy: float) -> float:
    """c = energy/tr(J Jᵀ): the variance that noise on the input has, whose gradient noise has this energy."""
    total = trace(J)
    if total <= 0:
        raise ValueError("J = 0 at this input: its gradient does not react to it, and there is nothing to design")
    return energy / total


PROBES = 16


def trace(J: GradientJacobian) -> float:
    """tr(J Jᵀ) = ‖J‖²_F: of a formed J exactly, otherwise by random signs (Hutchinson 1989), one product each."""
    if J.is_dense:
        return float(J.gram().diagonal().sum())
    signs = torch.randint(0, 2, (PROBES, J.shape[0]), generator=streams.generator("trace", 0)).to(J.x) * 2 - 1
    return float(J.rmatvec(signs).double().square().sum()) / PROBES


def averaged(values: Tensor, energy: float, spread: float) -> Tensor:
    """The variances s_i along the right singular vectors, Σ s_i = `energy`, that leave the largest mean error to an
    attacker who knows them and expects inputs of variance τ² = `spread`².

    Its error is Σ s_i τ²/(λ_i τ² + s_i), concave in s; where it is largest, every s_i > 0 has the same derivative:

        s_i = τ² max(0, √(λ_i/ν) − λ_i),  ν such that they sum to the energy: directions with λ_i ≥ 1/ν get none.

    Args: values: λ > 0 of J Jᵀ. The k smallest share it, with 1/√ν = (energy/τ² + Σ λ_i)/Σ √λ_i over them, where k is
    the largest for which the last of them gets any.

    Raises: ValueError for eigenvalues or a spread that are not positive, or a negative energy.
    """
    values = values.double()
    checks.at_least("energy", energy, 0.0)
    if not 0 < spread < math.inf:
        raise ValueError(f"spread={spread} is out of range: τ must be positive and finite")
    if not (values > 0).all():
        raise ValueError("values holds eigenvalues that are not positive: give those above rounding (spectrum.rank)")
    rising = values.sort().values
    levels = (energy / spread**2 + rising.cumsum(0)) / rising.sqrt().cumsum(0)  # 1/√ν if the first k share it
    level = levels[int((levels > rising.sqrt()).sum().clamp_min(1)) - 1]
    shares = (values.sqrt() * level - values).clamp_min(0)
    total = float(shares.sum())
    return shares * (energy / total) if total > 0 else shares
