"""How much isotropic noise it takes: the variance that leaves the judged attackers with a target error."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from i2f.audit.attackers import clamped_square
from i2f.core import checks

RUNS = 10  # evaluations of the Bayes error, each a quadrature, in the search by products
CLOSE = 1.01  # largest ratio of the RMSE left and the target RMSE at which the search ends
FAR = 10**0.1  # ratio of the MSE left and the target MSE, 1 dB, above which a variance is not an answer


def variance_for(
    mse: float, truth: Tensor, U: Tensor, values: Tensor, tau: float, regular: bool = True
) -> tuple[float, float]:
    """σ² of isotropic noise at which the best of the attackers considered is left with the mean squared error `mse`,
    and the largest RMSE that such noise can leave.

    The attackers are those of `judged`: the one with a prior, σ² Σ u²τ²/(σ² + λτ²) + τ²(1 − Σ u²), and, where J Jᵀ is
    regular, the one who knows the range (`clamped_square`). Both errors grow with σ²: bisection of log σ².

    Args: truth: (d,), in [0, 1]. U: (d, r), these entries of the eigenvectors of J Jᵀ. values: (r,), their λ > 0. tau:
    τ, the prior's standard deviation. regular: whether J Jᵀ has no null space.

    Returns: inf where no noise reaches the target; 0 where the null space of a singular J hides so much by itself.
    """
    checks.at_least("mse", mse, 0.0)
    squares = U.square()
    weights = squares.mean(0)
    unseen = 0.0 if regular else float(1 - weights.sum())
    inverse = squares @ (1 / values)

    def left(variance: float) -> float:
        prior = float((weights * variance * tau**2 / (variance + values * tau**2)).sum()) + unseen * tau**2
        return min(prior, float(clamped_square(truth, (variance * inverse).sqrt()).mean())) if regular else prior

    most = tau**2
    if regular:
        most = min(most, float((truth.square() + (1 - truth).square()).mean()) / 2)
    if mse >= most:
        return math.inf, math.sqrt(most)
    if left(0.0) >= mse:
        return 0.0, math.sqrt(most)
    return _bisected(left, mse, float(values.max()) * tau**2), math.sqrt(most)


def _bisected(left: Callable[[float], float], mse: float, start: float) -> float:
    """The smallest variance, to rounding, that leaves at least `mse`; inf where none is found."""
    low = high = start
    while left(low) >= mse:
        low /= 16
    while left(high) < mse and high < math.inf:
        high *= 16
    if math.isinf(high):
        return math.inf
    for _ in range(80):
        middle = math.sqrt(low) * math.sqrt(high)
        low, high = (middle, high) if left(middle) < mse else (low, middle)
    return high


@dataclass
class _Secant:
    """The secant rule for logit(MSE/τ²) = goal over log σ². Where all λ are equal this curve is a line of slope 1."""

    goal: float
    tau: float
    points: list[tuple[float, float]] = field(default_factory=list)

    def after(self, at: float, mse: float) -> float:
        """The log σ² to evaluate next, after `mse` was found at log σ² = `at`."""
        self.points.append((at, _logit(min(max(mse / self.tau**2, 1e-12), 1 - 1e-12))))
        slope = 1.0
        if len(self.points) > 1 and self.points[-1][0] != self.points[-2][0]:
            slope = (self.points[-1][1] - self.points[-2][1]) / (self.points[-1][0] - self.points[-2][0])
        return at + max(-30.0, min(30.0, (self.goal - self.points[-1][1]) / min(max(slope, 0.1), 1.0)))


def searched(
    mse: float,
    tau: float,
    bayes: Callable[[float], tuple[float, bool]],
    start: Callable[[], float],
    known: tuple[float, float] | None,
) -> tuple[float | None, str]:
    """σ² at which the Bayes error is the target `mse`, or up to `CLOSE`² more, and what is doubtful about it.

    Args: bayes: σ² -> the mean squared error, and whether its quadrature converged. known: a variance and the MSE that
    it leaves, to start from. start: a variance to start from without.

    Returns: inf for a target of τ² and more; None where `RUNS` evaluations did not suffice.
    """
    share = mse / tau**2
    if share >= 1:
        return math.inf, ""
    secant = _Secant(_logit(min(share * CLOSE, (1 + share) / 2)), tau)
    low, high, best = -math.inf, math.inf, None
    near = known is not None and known[1] > 0 and abs(math.log(known[1] / mse)) < 2
    at = secant.after(math.log(known[0]), known[1]) if known is not None and near else math.log(start())
    for _ in range(RUNS):
        found, converged = bayes(math.exp(at))
        if mse <= found <= CLOSE**2 * mse:
            return math.exp(at), "" if converged else "rests on a quadrature that did not converge"
        if found < mse:
            low = max(low, at)
        elif at < high:
            high, best = at, math.exp(at) if found <= FAR * mse else None
        at = secant.after(at, found)
        if not low < at < high:
            at = (low + high) / 2 if math.isfinite(low) and math.isfinite(high) else at
    return best, f"was not found to within {CLOSE - 1:.0%} of its RMSE"


def _logit(share: float) -> float:
    return math.log(share / (1 - share))
