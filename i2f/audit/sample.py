"""What an audit finds for one input."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

FIRST_ORDER = 0.1  # the predicted RMSE above which a first-order prediction is reported as unreliable
LEVELS = (  # (RMSE, verdict): the verdict on a judged error is that of the first RMSE that it does not exceed
    (0.05, "gives the input away"),
    (0.15, "gives much of the input away"),
    (math.inf, "blurs the input for these attackers; what others could do is not known"),
)
PICTURES = ("image", "drawn", "recovered")


@dataclass(frozen=True)
class Sample:
    """What one input's gradient gives away. Errors are RMSE per entry of the input, in units of its range.

    Under noise an error is √E[squared error per entry]: a single draw may leave less. Every attacker knows the model,
    the label and the defence.

    Errors of attackers:
        predicted: without bounds, √(E[I²]/d_x), or I/√d_x where the defence is not random.
        boxed: who also knows the range of the input.
        prior: who has the prior N(m, τ²I) on the input: the linear Bayes error.
        masked: who reads the mask off a pruned gradient, and has the prior for what the kept coordinates do not show.
        attacked: of Gauss–Newton or the recursive attack, where they were run, clamped to the range; attacked_rmse: not
            clamped.
        judged: the smallest of these; NaN: not known. psnr: of `judged`, in dB.
        bound: I_lb/√d_x (Eq. 5).

    One draw of the defence:
        drawn: the reconstruction of the attacker without bounds (Eq. 4), or of the one with a prior where J Jᵀ was not
            formed. drawn_rmse: its error. drawn_psnr: of `drawn` clamped to the range, in dB.
        label: whether it is read off the shared gradient; None where it cannot be, or is not a class.

    Further:
        needed: the variance of isotropic Gaussian noise at which `judged`, without an attack, has the target PSNR; inf
            where no variance reaches it; None where it was not found.
        spectrum: λ of J Jᵀ at evenly spaced ranks, descending. rank, lambda_min: of J Jᵀ; None if it was not formed.
        reservations: what is not known about these numbers, in words.
        image, drawn, recovered: (…), in units of the range.
    """

    index: int
    y: Any
    gradient_norm: float
    d_x: int
    rank: int | None
    lambda_max: float
    lambda_min: float | None
    spectrum: list[float]
    bound: float
    predicted: float
    boxed: float
    prior: float
    masked: float | None
    judged: float
    drawn_rmse: float
    drawn_psnr: float
    needed: float | None
    label: bool | None
    attacked: float | None = None
    attacked_rmse: float | None = None
    attacked_reason: str = ""
    reservations: list[str] = field(default_factory=list)
    image: Tensor | None = field(default=None, repr=False)
    drawn: Tensor | None = field(default=None, repr=False)
    recovered: Tensor | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        known = f"judged={self.judged:.4g}, psnr={self.psnr:.1f}, verdict={self.verdict!r}"
        return f"Sample(index={self.index}, y={self.y!r}, {known}, needed={self.needed and f'{self.needed:.3g}'})"

    @property
    def psnr(self) -> float:
        return psnr(self.judged)

    @property
    def attacked_psnr(self) -> float | None:
        return None if self.attacked is None else psnr(self.attacked)

    @property
    def beyond_first_order(self) -> bool:
        """Whether `judged` rests on a first-order prediction that is unreliable, and on no attack."""
        return self.attacked is None and not self.predicted <= FIRST_ORDER

    @property
    def verdict(self) -> str:
        if math.isnan(self.judged):
            return "not known"
        return next(words for level, words in LEVELS if self.judged <= level)

    def record(self) -> dict[str, Any]:
        """Everything but the pictures, as plain values."""
        derived = ("psnr", "attacked_psnr", "beyond_first_order", "verdict")
        stored = {name: value for name, value in asdict(self).items() if name not in PICTURES}
        return stored | {name: getattr(self, name) for name in derived}


def psnr(rmse: float) -> float:
    """The PSNR in dB of an RMSE in units of the range; infinite without an error."""
    return math.nan if math.isnan(rmse) else math.inf if rmse == 0 else -20 * math.log10(rmse)


def rms(square: Tensor) -> float:
    """√mean of squared errors."""
    return float(square.mean().sqrt())


def smallest(*errors: float | None) -> float:
    """The smallest of the errors that are known; NaN where none is."""
    return min((e for e in errors if e is not None and not math.isnan(e)), default=math.nan)
