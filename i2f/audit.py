"""Before a gradient leaves: how much of each input it would give away, and what is not known about that.

An audit never says "safe". It says what attackers of this project would recover to first order, in the unit of the
input, and where the first order ends.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2f import checks, metrics, spectrum, trace
from i2f.attacks import invert, recover_labels
from i2f.defense import Defense, parse
from i2f.defense import trace as frobenius
from i2f.gradient import Loss
from i2f.influence import lower_bound
from i2f.jacobian import GradientJacobian
from i2f.progress import bar

LINEAR = 0.1  # a predicted RMSE up to which the first order is taken at its word; beyond, it is said to have ended
HEAD = 40  # eigenvalues kept of a spectrum, evenly spread over its ranks
SPREAD = 0.25  # τ: the deviation of a pixel that an attacker with a prior expects
LEVELS = (  # judged RMSE up to which -> what it is called
    (0.05, "gives the input away"),
    (0.15, "gives much of the input away"),
    (math.inf, "blurs the input for these attackers; what others could do is not known"),
)


@dataclass(frozen=True)
class Sample:
    """What one input's gradient gives away; errors are RMSE per entry of the input.

    predicted: of an attacker without bounds, I²F's mean over the noise, or I²F itself where the defence is no noise.
    boxed: of one who also knows that pixels lie in [0, 1]. prior: of one who expects pixels of deviation τ (the linear
    Bayes error). masked: of one who reads the mask off a pruned gradient, and is left with the prior where the kept
    coordinates do not reach. judged: the smallest of these. bound: I_lb.
    psnr: of `boxed`, in dB. drawn_rmse, drawn_psnr: Eq. 4 for the perturbation drawn here, which an attack on it should
    leave. label: read off the shared gradient? None where it cannot be. attacked: what a real attack
    left, if asked for. needed: the noise variance whose `boxed` error is the target PSNR's. reservations: what is not
    known.
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
    psnr: float
    drawn_rmse: float
    drawn_psnr: float
    needed: float | None
    label: bool | None
    attacked: float | None = None
    attacked_psnr: float | None = None
    attacked_reason: str = ""
    reservations: list[str] = field(default_factory=list)
    image: Tensor | None = field(default=None, repr=False)
    drawn: Tensor | None = field(default=None, repr=False)
    recovered: Tensor | None = field(default=None, repr=False)

    @property
    def verdict(self) -> str:
        if math.isnan(self.judged):
            return "not known"
        return next(words for level, words in LEVELS if self.judged <= level)


@dataclass(frozen=True)
class Audit:
    """Samples and what was asked: defense, in text; target_psnr; together: one gradient of all; exact: spectra, or
    products alone."""

    samples: list[Sample]
    defense: str
    target_psnr: float
    together: bool
    exact: bool
    d_theta: int

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def table(self) -> pd.DataFrame:
        """A row a sample, without pictures and spectra."""
        return pd.DataFrame([{**_plain(s), "verdict": s.verdict, "reservations": "; ".join(s.reservations)}
                             for s in self.samples]).drop(columns="spectrum")  # fmt: skip

    def json(self) -> str:
        """Everything but the pictures; what is not a number is null."""
        rows = [_finite({**_plain(s), "verdict": s.verdict}) for s in self.samples]
        record = {"defense": self.defense, "target_psnr": self.target_psnr, "one gradient of all": self.together,
                  "exact": self.exact, "d_theta": self.d_theta, "samples": rows}  # fmt: skip
        return json.dumps(record, indent=2, ensure_ascii=False) + "\n"

    def passes(self, min_rmse: float) -> bool:
        """Whether no sample's judged error is below `min_rmse`; what is not known does not pass."""
        return all(s.judged >= min_rmse for s in self.samples)

    def html(self, title: str = "What this gradient gives away") -> str:
        """A report of its own, pictures included: `i2f.report`."""
        from i2f import report

        return report.page(self, title)


def audit(
    model: nn.Module, x: Tensor, y: Tensor, defense: str | Defense = "none", *, loss: Loss = F.cross_entropy,
    exact: bool | None = None, together: bool = False, target_psnr: float = 15.0, attack: bool = False,
    attack_steps: int = 50, spread: float = SPREAD, seed: int = 0, progress: bool = False,
) -> Audit:  # fmt: skip
    """What a gradient of `model` at `x` would give away under a defence.

    Args:
        model: in evaluation mode. x: (n, ...) in [0, 1], or any input without a box if its values leave that range.
            y: (n,). loss: (output, y) -> scalar.
        defense: "none", "gaussian:1e-3", "relative:0.1", "dp:1.0:0.5", "prune:0.9", "designed:0.1", …: `defense.KINDS`.
        exact: with the whole spectrum of J Jᵀ, d_x products a sample; False: by products alone, the bound and, for
            noise, the Bayes error. None: exact where J takes no more than 2 GiB.
        together: one gradient of the mean loss over all n, so one J of n·d_x rows; otherwise each sample alone.
        target_psnr: in dB, for which the noise that is needed is given. attack: also run Gauss–Newton, attack_steps of
            it. spread: τ of the attacker with a prior. seed: of the noise, the draw, and the attack.

    In the linear picture an attacker is left with N(x₀, C), C = σ²(J Jᵀ)⁻¹ for isotropic noise. `boxed` is the error of
    that, clamped to the box, a closed form a pixel; `prior` is √(σ² tr((J Jᵀ + (σ²/τ²)I)⁻¹)/d_x).

    Raises: ValueError for bad input, as `GradientJacobian` and `defense.parse` say it.
    """
    defended = parse(defense) if isinstance(defense, str) else defense
    checks.images_and_labels(x, y)
    checks.at_least("spread", spread, 1e-6)
    groups = [list(range(len(x)))] if together else [[i] for i in range(len(x))]
    boxed = bool(x.min() >= 0 and x.max() <= 1)
    samples: list[Sample] = []
    size, whole = 0, exact
    with bar(total=len(x), description="audit", shown=progress) as shown:
        for group in groups:
            J = GradientJacobian(model, x[group], y[group], loss, method="auto" if exact is None else
                                 "dense" if exact else "matrix-free")  # fmt: skip
            whole, size = J.is_dense, J.shape[1]
            measure = _exact if whole else _by_products
            samples += measure(J, defended, group, target_psnr, spread, seed, attack, attack_steps, boxed)
            shown.update(len(group))
    return Audit(samples, str(defended), target_psnr, together, bool(whole), size)


def _exact(
    J: GradientJacobian, defense: Defense, group: Sequence[int], target: float, spread: float, seed: int,
    attack: bool, steps: int, box: bool,
) -> list[Sample]:  # fmt: skip
    """From the spectrum J Jᵀ = U Λ Uᵀ of a group behind one gradient; a sample's share are its rows of U."""
    values, vectors = spectrum.decompose(J)
    rank, count = spectrum.rank(J), len(J.x)
    lit, U = values[:rank], vectors[:, :rank]
    delta = defense.undone(J, defense.delta(J, seed + group[0]))
    variance = defense.variance(J)
    moved = U @ (U.T @ J.matvec(delta).double() / lit)  # Eq. 4 for this δ
    if defense.name == "designed":
        energy = (defense.values[0] * float(J.gradient.norm())) ** 2
        along = energy / frobenius(J) * torch.ones_like(lit)  # the variance in each direction of the input
    elif variance is not None:
        along = variance / lit
    else:
        along = None  # no noise: δ is what it is
    hidden = spread**2 * (1 - U.square().sum(1)) if rank < len(values) else 0.0  # what the null space leaves to a prior
    drawn = J.x.double().reshape(-1) + moved
    predicted = moved.square() if along is None else U.square() @ along
    prior = None if along is None else U.square() @ (along * spread**2 / (along + spread**2)) + hidden
    masked = _masked_rank(J, delta) if defense.name == "prune" else None
    found = _attacked(J, delta, seed, steps) if attack else None
    labels = _labels(J, delta)
    pixels, shape = J.shape[0] // count, J.x.shape[1:]
    samples = []
    for k, index in enumerate(group):
        part = slice(k * pixels, (k + 1) * pixels)
        truth = J.x[k].double().reshape(-1)
        rmse = float(predicted[part].mean().sqrt())
        seen = drawn[part].clamp(0, 1) if box else drawn[part]
        clamped = rmse
        if box:
            clamped = _rms((seen - truth).square() if along is None else clamped_square(truth, predicted[part].sqrt()))
        expected = math.nan if prior is None else float(prior[part].mean().sqrt())
        unseen = None if masked is None else spread * (1 - masked / len(values)) ** 0.5
        # where J is singular, only a prior says anything about what the gradient does not show
        errors = [rmse, clamped, expected, unseen] if rank == len(values) else [expected, unseen]
        known = [error for error in errors if error is not None and not math.isnan(error)]
        judged = min(known, default=math.nan)
        inverse = U[part].square() @ (1 / lit)
        needed = None
        if rank == len(values):
            needed = variance_for(10 ** (-target / 10), truth, inverse, box)
        samples.append(Sample(
            index=index, y=_plain_label(J.map.y, k), gradient_norm=float(J.gradient.norm()), d_x=pixels,
            rank=rank, lambda_max=float(values[0]), lambda_min=float(lit[-1]), spectrum=_head(values),
            bound=float(J.matvec(delta).norm() / values[0]) / J.shape[0] ** 0.5, predicted=rmse, boxed=clamped,
            prior=expected, masked=unseen, judged=judged,
            psnr=_psnr(clamped), drawn_rmse=_rms(moved[part].square()), drawn_psnr=_psnr(_rms((seen - truth).square())),
            needed=needed, label=labels[k], reservations=_reservations(J, rmse, rank, masked, defense),
            image=J.x[k].cpu(), drawn=drawn[part].view(shape).float().cpu(), **_attack_of(found, k, truth),
        ))  # fmt: skip
    return samples


def _by_products(
    J: GradientJacobian, defense: Defense, group: Sequence[int], target: float, spread: float, seed: int,
    attack: bool, steps: int, box: bool,
) -> list[Sample]:  # fmt: skip
    """Where no spectrum is within reach: the bound, and for isotropic noise the Bayes error with its own interval."""
    delta = defense.undone(J, defense.delta(J, seed + group[0]))
    bound = lower_bound(J, delta, tol=1e-2)
    variance = defense.variance(J)
    why = ["J Jᵀ was not formed: no exact prediction, no rank; the bound lies far below the error as a rule"]
    prior = math.nan
    if defense.name == "designed":
        c = (defense.values[0] * float(J.gradient.norm())) ** 2 / frobenius(J)
        prior = math.sqrt(c * spread**2 / (c + spread**2))
    elif variance:
        found = trace.bayes_error(J, variance, variance / spread**2, probes=2, tol=0.05, max_steps=60, seed=seed)
        prior = math.sqrt(max(found.value, 0.0) / J.shape[0])
        if not found.converged:
            why.append("the Bayes error's quadrature did not settle")
    found = _attacked(J, delta, seed, steps) if attack else None
    labels = _labels(J, delta)
    return [
        Sample(
            index=index, y=_plain_label(J.map.y, k), gradient_norm=float(J.gradient.norm()),
            d_x=J.shape[0] // len(J.x), rank=None, lambda_max=bound.lambda_max, lambda_min=None, spectrum=[],
            bound=bound.rmse, predicted=math.nan, boxed=math.nan, prior=prior, masked=None,
            judged=prior if variance or defense.name == "designed" else 0.0 if variance == 0 else math.nan,
            psnr=_psnr(prior), drawn_rmse=math.nan, drawn_psnr=math.nan, needed=None, label=labels[k],
            reservations=[*why, *_kinks(J), *(["λ_max did not converge"] * (not bound.converged))],
            image=J.x[k].cpu(), **_attack_of(found, k, J.x[k].double().reshape(-1)),
        )
        for k, index in enumerate(group)
    ]  # fmt: skip


def clamped_square(truth: Tensor, deviation: Tensor) -> Tensor:
    """E[(clamp(x + s z, 0, 1) − x)²] for z ~ N(0, 1), entry by entry: what is left of an error s for an attacker who
    knows that pixels lie in [0, 1].

    With a = −x/s, b = (1−x)/s:  s²[Φ(b) − Φ(a) − bφ(b) + aφ(a)] + x²Φ(a) + (1−x)²(1 − Φ(b)).
    """
    s = deviation.clamp_min(1e-300)
    a, b = -truth / s, (1 - truth) / s
    inside = torch.special.ndtr(b) - torch.special.ndtr(a) - _weighted(b) + _weighted(a)
    low, high = truth.square() * torch.special.ndtr(a), (1 - truth).square() * torch.special.ndtr(-b)
    return s.square() * inside + low + high


def _weighted(t: Tensor) -> Tensor:
    """t φ(t), zero far out."""
    t = t.clamp(-40, 40)
    return t * torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi)


def variance_for(mse: float, truth: Tensor, inverse: Tensor, box: bool = True) -> float:
    """σ² of isotropic noise that leaves an attacker the mean squared error `mse`; inverse: the diagonal of (J Jᵀ)⁻¹.

    Without the box, σ² = mse·d_x/tr((J Jᵀ)⁻¹); with it the same, and then the root of the clamped error, which grows
    with σ. Infinite where no noise leaves so much to one who knows the box.
    """
    checks.at_least("mse", mse, 0.0)
    start = mse / float(inverse.mean())
    if not box:
        return start

    def left(variance: float) -> float:
        return float(clamped_square(truth, (variance * inverse).sqrt()).mean())

    low, high = start, start
    while left(high) < mse:
        low, high = high, high * 4
        if high > start * 1e12:
            return math.inf
    for _ in range(80):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if left(middle) < mse else (low, middle)
    return math.sqrt(low * high)


def _masked_rank(J: GradientJacobian, delta: Tensor) -> int:
    """The rank of J on the coordinates that pruning kept: d_x where who reads the mask recovers everything."""
    kept = J.dense()[:, (J.gradient + delta) != 0].double()
    values = torch.linalg.eigvalsh(kept @ kept.T)
    return int((values > spectrum.zero_level(J) * values[-1]).sum())


def _labels(J: GradientJacobian, delta: Tensor) -> list[bool | None]:
    """Whether each label is read off the shared gradient; None where this network's last layer does not show labels."""
    try:
        found = recover_labels(J.map, J.gradient + delta, tuple(J.x.shape)).tolist()
    except ValueError:
        return [None] * len(J.x)
    answers = []
    for label in J.map.y.tolist():
        answers.append(label in found)
        if label in found:
            found.remove(label)
    return answers


def _attacked(J: GradientJacobian, delta: Tensor, seed: int, steps: int) -> Any:
    found = invert(J.map.model, J.gradient + delta, J.map.y, J.x.shape, loss=J.map.loss, seed=seed, steps=steps)
    return metrics.assign(found.x.to(J.x), J.x) if len(J.x) > 1 else found.x.to(J.x), found.reason


def _attack_of(found: Any, k: int, truth: Tensor) -> dict[str, Any]:
    if found is None:
        return {}
    x = found[0][k].double().reshape(-1)
    return {
        "attacked": _rms((x - truth).square()), "attacked_psnr": _psnr(_rms((x.clamp(0, 1) - truth).square())),
        "attacked_reason": found[1], "recovered": found[0][k].float().cpu(),
    }  # fmt: skip


def _reservations(J: GradientJacobian, rmse: float, rank: int, masked: int | None, defense: Defense) -> list[str]:
    found = []
    if rmse > LINEAR:
        found.append(f"the predicted RMSE of {rmse:.2g} lies beyond the first order, which ends near {LINEAR:g}: the "
                     "true error may be smaller or larger")  # fmt: skip
    if rank < J.shape[0]:
        found.append(f"J Jᵀ has rank {rank} of {J.shape[0]}: what the other directions hide, the gradient does not "
                     "show to first order, and a prior or a second gradient may")  # fmt: skip
    if masked is not None:
        full = "recovers everything" if masked == J.shape[0] else f"has {masked} of {J.shape[0]} directions left"
        found.append(f"who reads the mask off the zeros {full}")
    if defense.name == "designed":
        found.append("its covariance depends on the private input: who is told it learns J, and with it more")
    if defense.name == "quantize":
        found.append("rounding is no noise: who searches among the inputs that round so may know more")
    return found + _kinks(J)


def _kinks(J: GradientJacobian) -> list[str]:
    kinks = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.MaxPool2d)
    if not any(isinstance(module, kinks) for module in J.map.model.modules()):
        return []
    return ["the network has kinks (ReLU, max pooling): J holds between them, and says nothing beyond"]


def _head(values: Tensor) -> list[float]:
    """λ at evenly spread ranks, from the largest to the smallest."""
    places = torch.linspace(0, len(values) - 1, min(HEAD, len(values))).round().long().to(values.device)
    return values[places].tolist()


def _rms(square: Tensor) -> float:
    return float(square.mean().sqrt())


def _psnr(rmse: float) -> float:
    """In dB, for values in [0, 1]; infinite without an error."""
    return math.nan if math.isnan(rmse) else math.inf if rmse == 0 else -20 * math.log10(rmse)


def _plain_label(y: Tensor, k: int) -> Any:
    return y[k].item() if y[k].ndim == 0 else y[k].tolist()


def _plain(sample: Sample) -> dict[str, Any]:
    pictures = ("image", "drawn", "recovered")
    return {k: v for k, v in asdict(sample).items() if k not in pictures}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
