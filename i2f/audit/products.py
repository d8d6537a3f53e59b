"""An audit by products with J alone, where its spectrum is out of reach: the bound, and the Bayes error under noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from i2f.audit.needed import searched
from i2f.audit.noise import input_noise, squared_norm
from i2f.audit.reservations import reservations
from i2f.audit.sample import Sample, psnr, rms, smallest
from i2f.audit.shared import Question, Shared, share
from i2f.core import linalg, trace
from i2f.core.influence import LowerBound, lower_bound
from i2f.core.jacobian import GradientJacobian

LANCZOS = 60  # steps, two products each, of a quadrature's probe and of a large network's conjugate gradients
SMALL = 1_000_000  # parameters up to which products are cheap
MEAN = 0.5  # of the input's entries, for the attacker with a prior


@dataclass(frozen=True)
class Found:
    """What products find for all samples behind a gradient: prior and needed as in `Sample`; drawn: (n, …)."""

    bound: LowerBound
    prior: float
    needed: float | None
    drawn: Tensor | None
    doubts: list[str]


@dataclass(frozen=True)
class Bayes:
    """The Bayes error of the attacker with a prior, as a function of the variance of isotropic noise."""

    errors: trace.BayesError
    tau: float

    def __call__(self, variance: float) -> tuple[float, bool]:
        """The lower end of the error's 95% interval, as an MSE, and whether its quadrature converged."""
        found = self.errors(variance, variance / self.tau**2)
        return max(found.low, 0.0) / self.errors.J.shape[0], found.converged


def samples(J: GradientJacobian, question: Question, indices: Sequence[int]) -> list[Sample]:
    """The samples behind one gradient. Where there are several, `prior` is a mean over them.

    Raises: ValueError where J = 0.
    """
    shared = share(J, question, indices)
    found = _found(shared)
    return [_sample(k, shared, found) for k in range(len(indices))]


def _found(shared: Shared) -> Found:
    J, question, target = shared.J, shared.question, shared.question.target_psnr
    bayes = Bayes(trace.BayesError(J, probes=3, tol=0.05, max_steps=LANCZOS, seed=question.seed), question.tau)
    bound = lower_bound(J, shared.seen, tol=1e-2)
    prior, converged = _prior(shared, bayes)
    drawn, solved = _drawn(shared)
    variance, n = question.defense.variance(J), len(shared.indices)
    known = (variance, prior**2) if variance else None

    def start() -> float:
        return question.target_mse * squared_norm(J) / J.shape[0]

    needed, doubt = searched(question.target_mse, question.tau, bayes, start, known)
    doubts = {
        "J Jᵀ was not formed: rank and I²F are not known, nor whether the first order holds": True,
        f"a mean over the {n} samples behind this gradient: a single one may be less protected": n > 1,
        "λ_max did not converge": not bound.converged,
        "the quadrature of the Bayes error did not converge": not converged,
        "the predicted reconstruction did not converge": not solved,
        f"the noise needed for {target:g} dB {doubt}": bool(doubt),
    }
    return Found(bound, prior, needed, drawn, [words for words, holds in doubts.items() if holds])


def _prior(shared: Shared, bayes: Bayes) -> tuple[float, bool]:
    """The RMSE of the attacker with a prior, NaN where the defence is not noise, and whether it converged."""
    defense, tau = shared.question.defense, shared.question.tau
    c, variance = defense.input_variance(shared.J), defense.variance(shared.J)
    if c is not None:
        return math.sqrt(c * tau**2 / (c + tau**2)), True
    if not variance:
        return (math.nan if variance is None else 0.0), True
    mse, converged = bayes(variance)
    return math.sqrt(mse), converged


def _drawn(shared: Shared) -> tuple[Tensor | None, bool]:
    """The reconstruction by the attacker with a prior N(m, τ²I) for the δ that was drawn, and whether it converged:

    x₀ + (J Jᵀ + εI)⁻¹(J δ + ε(m − x₀)), ε = σ²/τ². None where the defence is not noise.
    """
    J, tau, defense = shared.J, shared.question.tau, shared.question.defense
    c, variance = defense.input_variance(J), defense.variance(J)
    if c is not None:  # what is sent is the gradient at x₀ + √c z
        kept = tau**2 / (c + tau**2)
        z = input_noise(J, shared.question.seed + shared.indices[0]).to(J.x)
        return kept * (J.x + math.sqrt(c) * z) + (1 - kept) * MEAN, True
    if not variance:
        return (None if variance is None else J.x), True
    damping = variance / J.unit**2 / tau**2
    b = J.matvec(shared.seen / J.unit) / J.unit + damping * (MEAN - J.x.reshape(-1))
    steps = LANCZOS if J.shape[1] > SMALL else 5 * LANCZOS
    found = linalg.solve_cg(lambda v: J.matvec(J.rmatvec(v) / J.unit) / J.unit, b, damping, 1e-3, steps)
    return J.x + found.u.view_as(J.x), found.converged


def _sample(k: int, shared: Shared, found: Found) -> Sample:
    J, truth, attacked = shared.J, shared.J.x[k].double(), shared.attacked(k)
    drawn = None if found.drawn is None else found.drawn[k].double()
    sample = Sample(
        index=shared.indices[k],
        y=shared.labels[k],
        gradient_norm=shared.gradient_norm,
        d_x=shared.d_x,
        rank=None,
        lambda_max=found.bound.lambda_max,
        lambda_min=None,
        spectrum=[],
        bound=found.bound.rmse,
        predicted=math.nan,
        boxed=math.nan,
        prior=found.prior,
        masked=None,
        judged=smallest(found.prior, attacked.get("attacked")),
        drawn_rmse=math.nan if drawn is None else rms((drawn - truth).square()),
        drawn_psnr=math.nan if drawn is None else psnr(rms((drawn.clamp(0, 1) - truth).square())),
        needed=found.needed,
        label=shared.read[k],
        image=J.x[k].float().cpu(),
        drawn=None if drawn is None else drawn.float().cpu(),
        **attacked,
    )
    return replace(sample, reservations=[*found.doubts, *reservations(sample, shared, shared.question.tau)])
