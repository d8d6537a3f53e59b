"""Every noise and defence by its name: what it adds to a gradient, and what it leaves to an attacker who knows it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from i2f.audit import noise
from i2f.audit.noise import averaged, designed
from i2f.core import checks, linalg, perturb, spectrum
from i2f.core.jacobian import GradientJacobian

__all__ = ["KINDS", "Defense", "Kind", "averaged", "designed", "parse"]

Values = tuple[float, ...]
RELATIVE = ("noise norm / gradient norm",)
ONE_DIRECTION = "an attacker who projects its one direction out of the gradient sees the rest without noise"
ROW_SPACE = (
    "outside the row space of J the gradient carries no noise, and an attacker who knows the covariance gains from the "
    "second-order term there"
)


@dataclass(frozen=True)
class Kind:
    """A kind of defence.

    values: the names of its values. whole: whether the first of them is a whole number.
    delta: (J, values, seed) -> δ, (d_θ,).
    variance: (gradient, values) -> σ² of its isotropic noise, as seen by an attacker who scales a clipped gradient back
        to its own length; None where the noise is not isotropic.
    shares: (λ, E‖δ‖²) -> s_i, the variances along the right singular vectors of J, λ descending; None where they do not
        follow J.
    refusal: why an audit cannot judge it; empty where it can.
    """

    values: tuple[str, ...]
    delta: Callable[[GradientJacobian, Values, int | None], Tensor]
    variance: Callable[[Tensor, Values], float] | None = None
    shares: Callable[[Tensor, float], Tensor] | None = None
    refusal: str = ""
    whole: bool = False


def _energy(gradient: Tensor, values: Values) -> float:
    """E‖δ‖² of noise whose norm is given relative to the gradient's."""
    return (values[0] * linalg.norm(gradient)) ** 2


def _relative(gradient: Tensor, values: Values) -> float:
    return _energy(gradient, values) / gradient.numel()


def _scaled_back(gradient: Tensor, values: Values) -> float:
    """σ² of DP-SGD's noise once the clipped gradient is scaled back to its own length, which an attacker may guess."""
    norm, multiplier = values
    return (multiplier * max(norm, linalg.norm(gradient))) ** 2


def _in_row_space(shares: Callable[[Tensor, float], Tensor]) -> Kind:
    """Gaussian noise in the row space of J."""

    def delta(J: GradientJacobian, values: Values, seed: int | None) -> Tensor:
        spread = shares(spectrum.decompose(J).values, _energy(J.gradient, values))
        return noise.in_row_space(J, spread, seed)

    return Kind(RELATIVE, delta, shares=shares, refusal=ROW_SPACE)


KINDS = {
    "none": Kind((), lambda J, v, seed: torch.zeros_like(J.gradient), lambda g, v: 0.0),
    "gaussian": Kind(("variance",), lambda J, v, seed: perturb.gaussian(J.gradient, v[0], seed), lambda g, v: v[0]),
    # a maximum-likelihood attacker is left with half of the variance: the Fisher information of Laplace noise is 2/σ²
    "laplace": Kind(("variance",), lambda J, v, seed: perturb.laplace(J.gradient, v[0], seed), lambda g, v: v[0] / 2),
    "relative": Kind(
        RELATIVE, lambda J, v, seed: perturb.gaussian(J.gradient, _relative(J.gradient, v), seed), _relative
    ),
    "dp": Kind(
        ("clipping norm", "noise multiplier"),
        lambda J, v, seed: perturb.dp(J.gradient, v[0], v[1], seed),
        _scaled_back,
    ),
    "clip": Kind(("clipping norm",), lambda J, v, seed: perturb.clip(J.gradient, v[0]), lambda g, v: 0.0),
    "prune": Kind(("ratio",), lambda J, v, seed: perturb.prune(J.gradient, v[0])),
    "quantize": Kind(("bits",), lambda J, v, seed: perturb.quantize(J.gradient, int(v[0])), whole=True),
    "designed": Kind(RELATIVE, lambda J, v, seed: designed(J, _energy(J.gradient, v), seed), shares=noise.proportional),
    "row-space": _in_row_space(noise.constant),
    "linear": _in_row_space(noise.proportional),
    "averaged": _in_row_space(averaged),
    "eigenvector": Kind(
        ("index", "norm"),
        lambda J, v, seed: perturb.eigenvector(J, int(v[0]), v[1]),
        refusal=ONE_DIRECTION,
        whole=True,
    ),
}


@dataclass(frozen=True)
class Defense:
    """A defence and its values, such as `Defense("gaussian", (1e-3,))`. `parse` makes one from its text.

    Raises: ValueError for an unknown name, or values that are missing, too many, negative or not finite.
    """

    name: str
    values: Values = ()

    def __post_init__(self) -> None:
        kind = KINDS[checks.one_of("defense", self.name, KINDS)]
        if len(self.values) != len(kind.values):
            raise ValueError(f"defense={str(self)!r} has {len(self.values)} values: give {_form(self.name)}")
        for value in self.values:
            checks.at_least(f"a value of defense={str(self)!r}", value, 0.0)
        if kind.whole and self.values[0] != int(self.values[0]):
            raise ValueError(f"defense={str(self)!r}: {kind.values[0]} must be a whole number")

    def __str__(self) -> str:
        return self.name + "".join(f":{value:g}" for value in self.values)

    @property
    def clips(self) -> bool:
        """Whether it scales the gradient down, which an attacker undoes."""
        return self.name in ("dp", "clip")

    @property
    def refusal(self) -> str:
        """Why an audit cannot judge it; empty where it can."""
        return KINDS[self.name].refusal

    def delta(self, J: GradientJacobian, seed: int | None = 0) -> Tensor:
        """δ, what it adds to the gradient, (d_θ,)."""
        return KINDS[self.name].delta(J, self.values, seed)

    def undone(self, J: GradientJacobian, delta: Tensor) -> Tensor:
        """δ as seen by an attacker who scales a clipped gradient back to its own length; otherwise δ itself."""
        if not self.clips:
            return delta
        scale = max(1.0, linalg.norm(J.gradient) / self.values[0])
        return (scale * (J.gradient.double() + delta) - J.gradient).to(delta)

    def variance(self, J: GradientJacobian) -> float | None:
        """σ² of isotropic noise, as that attacker sees it; None where it is not isotropic."""
        rule = KINDS[self.name].variance
        return None if rule is None else rule(J.gradient, self.values)

    def variances(self, J: GradientJacobian) -> Tensor:
        """s_i, the variance of the noise along each right singular vector of J, (d_x,), λ descending.

        Raises: ValueError for a defence that adds no noise of known covariance.
        """
        shares, variance = KINDS[self.name].shares, self.variance(J)
        if shares is not None:
            return shares(spectrum.decompose(J).values, _energy(J.gradient, self.values))
        if variance is None:
            raise ValueError(f"defense={str(self)!r} adds no noise of known covariance")
        return torch.full_like(spectrum.decompose(J).values, variance)

    def input_variance(self, J: GradientJacobian) -> float | None:
        """c, the variance of the noise on the input whose gradient "designed" sends; None for every other kind."""
        return noise.input_variance(J, _energy(J.gradient, self.values)) if self.name == "designed" else None


def parse(text: str) -> Defense:
    """A defence from "name:value[:value]": "none", "gaussian:1e-3", "relative:0.1", "dp:1.0:0.5", "prune:0.9", ….

    Raises: ValueError as `Defense`, and for values that are not numbers.
    """
    name, *words = text.split(":")
    checks.one_of("defense", name, KINDS)
    if len(words) != len(KINDS[name].values):
        raise ValueError(f"defense={text!r} has {len(words)} values: give {_form(name)}")
    try:
        values = tuple(float(word) for word in words)
    except ValueError:
        raise ValueError(f"defense={text!r} has a value that is no number: give {_form(name)}") from None
    return Defense(name, values)


def _form(name: str) -> str:
    """How a defence of this name is written."""
    return ":".join([name, *(f"<{value}>" for value in KINDS[name].values)])
