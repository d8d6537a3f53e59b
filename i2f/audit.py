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
from i2f.defense import Defense, parse, per_direction
from i2f.gradient import Loss, graph_nodes
from i2f.influence import lower_bound
from i2f.jacobian import GradientJacobian
from i2f.progress import bar

LINEAR = 0.1  # a predicted RMSE up to which the first order is taken at its word; beyond, it is said to have ended
HEAD = 40  # eigenvalues kept of a spectrum, evenly spread over its ranks
SPREAD = 0.25  # τ: the deviation of a pixel that an attacker with a prior expects
LEVELS = (  # judged RMSE, over the input's scale, up to which -> what it is called
    (0.05, "gives the input away"),
    (0.15, "gives much of the input away"),
    (math.inf, "blurs the input for these attackers; what others could do is not known"),
)
KINKS = (  # in the names of autograd's nodes
    "relu", "hardtanh", "hardswish", "hardsigmoid", "maxpool", "maxbackward", "minbackward", "amax", "amin", "maximum",
    "minimum", "where", "abs", "clamp", "threshold", "shrink",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """What one input's gradient gives away; errors are RMSE per entry of the input.

    scale: 1 for pixels in [0, 1]; for inputs without a box their own deviation, which errors are compared with. The
    attackers know model, label and defence. predicted: one without bounds, I²F's mean over the noise, or I²F itself
    where the defence is no noise. boxed: one who also knows the box. prior: one who expects entries of deviation
    τ·scale (the linear Bayes error). masked: one who reads the mask off a pruned gradient, and is left with the prior
    where the kept coordinates do not reach. attacked: Gauss–Newton, if asked for, clamped to the box. judged: the
    smallest of these; NaN: not known. psnr: of `judged`, in dB, for pixels. bound: I_lb. drawn_rmse, drawn_psnr: Eq. 4
    for the perturbation drawn here, which the unbounded attack on it should leave. label: read off the shared gradient?
    None where it cannot be. needed: the variance of Gaussian noise whose `boxed` error has the target PSNR.
    reservations: what is not known.
    """

    index: int
    y: Any
    gradient_norm: float
    d_x: int
    scale: float
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

    @property
    def psnr(self) -> float:
        return _psnr(self.judged) if self.scale == 1 else math.nan

    @property
    def attacked_psnr(self) -> float | None:
        return None if self.attacked is None else _psnr(self.attacked) if self.scale == 1 else math.nan

    @property
    def beyond(self) -> bool:
        """Whether what is judged stands on a first order that has ended, and on no attack."""
        return self.attacked is None and not self.predicted <= LINEAR * self.scale

    @property
    def verdict(self) -> str:
        if math.isnan(self.judged):
            return "not known"
        return next(words for level, words in LEVELS if self.judged <= level * self.scale)


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

    @property
    def beyond(self) -> int:
        """How many samples are judged beyond the first order, without an attack."""
        return sum(sample.beyond for sample in self.samples)

    def table(self) -> pd.DataFrame:
        """A row a sample, without pictures and spectra."""
        rows = [{**_plain(s), "reservations": "; ".join(s.reservations)} for s in self.samples]
        return pd.DataFrame(rows).drop(columns="spectrum")

    def json(self) -> str:
        """Everything but the pictures; what is not a number is null."""
        record = {
            "defense": self.defense, "target_psnr": self.target_psnr, "one gradient of all": self.together,
            "exact": self.exact, "d_theta": self.d_theta, "samples": [_finite(_plain(s)) for s in self.samples],
        }  # fmt: skip
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
        model: in evaluation mode. x: (n, ...) pixels in [0, 1]; values outside are taken for an input without a box.
            y: (n,). loss: (output, y) -> scalar.
        defense: "none", "gaussian:1e-3", "relative:0.1", "dp:1.0:0.5", "prune:0.9", "designed:0.1", …: `defense.KINDS`.
        exact: with the whole spectrum of J Jᵀ, d_x products a sample; False: by products alone, the bound and, for
            noise, the Bayes error. None: exact where J takes no more than 2 GiB.
        together: one gradient of the mean loss over all n, so one J of n·d_x rows; otherwise each sample alone.
        target_psnr: in dB, for which the noise that is needed is given. attack: also run Gauss–Newton, attack_steps of
            it, which then takes part in the judgement. spread: τ of the attacker with a prior, over the input's scale.
        seed: of the noise drawn here, and of the attack: give real noise another.

    In the linear picture an attacker is left with N(x₀, C), C = σ²(J Jᵀ)⁻¹ for isotropic noise. `boxed` is the error of
    that, clamped to the box, a closed form a pixel; `prior` is √(σ² tr((J Jᵀ + (σ²/τ²)I)⁻¹)/d_x).

    Raises: ValueError for bad input, as `GradientJacobian` and `defense.parse` say it; for clipping of several samples
    behind one gradient, which is done to each before the mean; for J = 0.
    """
    defended = parse(defense) if isinstance(defense, str) else defense
    checks.images_and_labels(x, y)
    checks.at_least("spread", spread, 1e-6)
    checks.at_least("target_psnr", target_psnr, 1e-6)
    if together and len(x) > 1 and defended.name in ("dp", "clip"):
        raise ValueError(f"defense={str(defended)!r} clips each sample's own gradient, and together=True audits their "
                         "mean: audit each alone")  # fmt: skip
    groups = [list(range(len(x)))] if together else [[i] for i in range(len(x))]
    ask = _Ask(defended, target_psnr, spread, seed, attack, attack_steps, bool(x.min() >= 0 and x.max() <= 1))
    method = "auto" if exact is None else "dense" if exact else "matrix-free"
    samples: list[Sample] = []
    size, whole = 0, bool(exact)
    with bar(total=len(x), description="audit", shown=progress) as shown:
        for group in groups:
            J = GradientJacobian(model, x[group], y[group], loss, method=method)
            whole, size = J.is_dense, J.shape[1]
            samples += (_exact if whole else _by_products)(J, ask, group)
            shown.update(len(group))
    return Audit(samples, str(defended), target_psnr, together, whole, size)


@dataclass(frozen=True)
class _Ask:
    """What an audit is asked; box: the input lies in [0, 1]."""

    defense: Defense
    target: float
    spread: float
    seed: int
    attack: bool
    steps: int
    box: bool

    def scale(self, x: Tensor) -> float:
        return 1.0 if self.box else float(x.double().std(correction=0)) or 1.0


def _exact(J: GradientJacobian, ask: _Ask, group: Sequence[int]) -> list[Sample]:
    """From the spectrum J Jᵀ = U Λ Uᵀ of a group behind one gradient; a sample's share are its rows of U."""
    values, vectors = spectrum.decompose(J)
    rank, count = spectrum.rank(J), len(J.x)
    if rank == 0:
        raise ValueError("J = 0 at this input: its gradient does not react to it, and first order has nothing to say")
    lit, U = values[:rank], vectors[:, :rank]
    sent = ask.defense.delta(J, ask.seed + group[0])
    delta = ask.defense.undone(J, sent)
    along = _variances(J, ask.defense, lit)  # of the attacker's estimate, along each of U; None: no noise
    moved = U @ (U.T @ J.matvec(delta).double() / lit)  # Eq. 4 for this δ
    drawn = J.x.double().reshape(-1) + moved
    predicted = moved.square() if along is None else U.square() @ along
    scale = ask.scale(J.x)
    tau = ask.spread * scale
    prior = None
    if along is not None:
        unseen = tau**2 * (1 - U.square().sum(1)) if rank < len(values) else 0.0  # the null space is the prior's
        prior = U.square() @ (along * tau**2 / (along + tau**2)) + unseen
    masked = _masked_rank(J, sent) if ask.defense.name == "prune" else None
    common = _common(J, ask, sent, delta)
    samples, pixels, shape = [], J.shape[0] // count, J.x.shape[1:]
    for k, index in enumerate(group):
        part = slice(k * pixels, (k + 1) * pixels)
        truth = J.x[k].double().reshape(-1)
        rmse = _rms(predicted[part])
        seen = drawn[part].clamp(0, 1) if ask.box else drawn[part]
        boxed = rmse
        if ask.box:
            boxed = _rms((seen - truth).square() if along is None else clamped_square(truth, predicted[part].sqrt()))
        expected = math.nan if prior is None else _rms(prior[part])
        left = None if masked is None else tau * (1 - masked / len(values)) ** 0.5
        found = common.attack(k, truth)
        # where J is singular, only a prior or an attack says anything about what the gradient does not show
        errors = [rmse, boxed, expected, left] if rank == len(values) else [expected, left]
        needed = None
        if rank == len(values):
            inverse = U[part].square() @ (1 / lit)
            needed = variance_for((scale * 10 ** (-ask.target / 20)) ** 2, truth, inverse, ask.box)
        samples.append(Sample(
            index=index, y=_plain_label(J.map.y, k), gradient_norm=float(J.gradient.norm()), d_x=pixels, scale=scale,
            rank=rank, lambda_max=float(values[0]), lambda_min=float(lit[-1]), spectrum=_head(values),
            bound=float(J.matvec(delta).norm() / values[0]) / J.shape[0] ** 0.5, predicted=rmse, boxed=boxed,
            prior=expected, masked=left, judged=_least(*errors, found.get("attacked")),
            drawn_rmse=_rms(moved[part].square()), drawn_psnr=_psnr(_rms((seen - truth).square()) / scale),
            needed=needed, label=common.labels[k],
            reservations=_reservations(J, ask, rmse, scale, common.labels[k], common.kinked, rank, masked),
            image=J.x[k].cpu(), drawn=drawn[part].view(shape).float().cpu(), **found,
        ))  # fmt: skip
    return samples


def _by_products(J: GradientJacobian, ask: _Ask, group: Sequence[int]) -> list[Sample]:
    """Where no spectrum is within reach: the bound, and for isotropic noise the Bayes error, of which the lower end of
    its interval is judged. Of several samples behind one gradient it is their mean."""
    sent = ask.defense.delta(J, ask.seed + group[0])
    delta = ask.defense.undone(J, sent)
    bound = lower_bound(J, delta, tol=1e-2)
    variance, scale = ask.defense.variance(J), ask.scale(J.x)
    tau = ask.spread * scale
    why = ["J Jᵀ was not formed: no rank and no I²F; whether the first order holds so far out is not known"]
    if len(group) > 1:
        why.append(f"a mean over the {len(group)} samples behind this gradient: one of them may be less protected")
    if not bound.converged:
        why.append("λ_max did not converge")
    prior = math.nan
    if ask.defense.name == "designed":
        c = per_direction(J, _energy(J, ask.defense))
        prior = math.sqrt(c * tau**2 / (c + tau**2))
    elif variance == 0:
        prior = 0.0
    elif variance is not None:
        found = trace.bayes_error(J, variance, variance / tau**2, probes=3, tol=0.05, max_steps=60, seed=ask.seed)
        prior = math.sqrt(max(found.low, 0.0) / J.shape[0])
        if not found.converged:
            why.append("the Bayes error's quadrature did not settle")
    common = _common(J, ask, sent, delta)
    samples = []
    for k, index in enumerate(group):
        attack = common.attack(k, J.x[k].double().reshape(-1))
        reservations = _reservations(J, ask, 0.0, scale, common.labels[k], common.kinked)
        samples.append(Sample(
            index=index, y=_plain_label(J.map.y, k), gradient_norm=float(J.gradient.norm()),
            d_x=J.shape[0] // len(J.x), scale=scale, rank=None, lambda_max=bound.lambda_max, lambda_min=None,
            spectrum=[], bound=bound.rmse, predicted=math.nan, boxed=math.nan, prior=prior, masked=None,
            judged=_least(prior, attack.get("attacked")), drawn_rmse=math.nan, drawn_psnr=math.nan, needed=None,
            label=common.labels[k], reservations=[*why, *reservations], image=J.x[k].cpu(), **attack,
        ))  # fmt: skip
    return samples


def _variances(J: GradientJacobian, defense: Defense, lit: Tensor) -> Tensor | None:
    """Of an unbounded attacker's estimate, along each eigenvector of J Jᵀ; None where the defence is no noise."""
    if defense.name == "designed":
        return per_direction(J, _energy(J, defense)) * torch.ones_like(lit)
    variance = defense.variance(J)
    return None if variance is None else variance / lit


def _energy(J: GradientJacobian, defense: Defense) -> float:
    return (defense.values[0] * float(J.gradient.norm())) ** 2


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


def _masked_rank(J: GradientJacobian, sent: Tensor) -> int:
    """The rank of J on the coordinates that pruning kept: d_x where who reads the mask recovers everything."""
    kept = J.dense()[:, (J.gradient + sent) != 0].double()
    values = torch.linalg.eigvalsh(kept @ kept.T)
    return int((values > spectrum.zero_level(J) * values[-1]).sum())


@dataclass(frozen=True)
class _Common:
    """What is found once for all samples behind a gradient: labels, and the attack's images and its end."""

    labels: list[bool | None]
    kinked: bool
    images: Tensor | None
    reason: str
    box: bool

    def attack(self, k: int, truth: Tensor) -> dict[str, Any]:
        if self.images is None:
            return {}
        x = self.images[k].double().reshape(-1)
        clamped = x.clamp(0, 1) if self.box else x
        return {"attacked": _rms((clamped - truth).square()), "attacked_rmse": _rms((x - truth).square()),
                "attacked_reason": self.reason, "recovered": self.images[k].float().cpu()}  # fmt: skip


def _common(J: GradientJacobian, ask: _Ask, sent: Tensor, delta: Tensor) -> _Common:
    labels, kinked = _labels(J, sent), _kinked(J)
    if not ask.attack:
        return _Common(labels, kinked, None, "", ask.box)
    mask = (J.gradient + sent) != 0 if ask.defense.name == "prune" else None
    found = invert(J.map.model, J.gradient + delta, J.map.y, J.x.shape, loss=J.map.loss, mask=mask, seed=ask.seed,
                   steps=ask.steps)  # fmt: skip
    x = found.x.to(J.x)
    return _Common(labels, kinked, metrics.assign(x, J.x) if len(x) > 1 else x, found.reason, ask.box)


def _kinked(J: GradientJacobian) -> bool:
    """Whether the way from x to the output passes an operation with a kink, module or function."""
    with torch.enable_grad():
        output = J.map.output(J.map.parameters, J.x.clone().requires_grad_())
    names = [node.name().lower() for node in graph_nodes([output.grad_fn])]
    return any(kink in name for name in names for kink in KINKS)


def _labels(J: GradientJacobian, sent: Tensor) -> list[bool | None]:
    """Whether each label is read off the shared gradient; None where this network's last layer does not show labels."""
    try:
        found = recover_labels(J.map, J.gradient + sent, tuple(J.x.shape)).tolist()
    except ValueError:
        return [None] * len(J.x)
    answers = []
    for label in J.map.y.tolist():
        answers.append(label in found)
        if label in found:
            found.remove(label)
    return answers


def _reservations(
    J: GradientJacobian, ask: _Ask, rmse: float, scale: float, label: bool | None, kinked: bool,
    rank: int | None = None, masked: int | None = None,
) -> list[str]:  # fmt: skip
    found = []
    name = ask.defense.name
    if rmse > LINEAR * scale and name != "designed":
        found.append(f"the predicted RMSE of {rmse:.2g} lies beyond the first order, which ends near "
                     f"{LINEAR * scale:.2g}: the true error may be smaller or larger")  # fmt: skip
    if rank is not None and rank < J.shape[0]:
        found.append(f"J Jᵀ has rank {rank} of {J.shape[0]}: what the other directions hide, the gradient does not "
                     "show to first order, and a prior or a second gradient may")  # fmt: skip
    if masked is not None:
        full = "recovers everything" if masked == J.shape[0] else f"has {masked} of {J.shape[0]} directions left"
        found.append(f"who reads the mask off the zeros {full}; that the others are small is not used")
    if name == "quantize":
        found.append("rounding is no noise: who searches among the inputs that round so may know more")
    if label is not True:
        found.append(
            "the label is taken as known, and was not read off this gradient: an attacker may have to guess it"
        )
    if 10 ** (-ask.target / 20) > LINEAR:
        found.append(f"the noise needed for {ask.target:g} dB lies beyond the first order: what it leaves may be less")
    if kinked:
        found.append("the network has kinks (ReLU, max pooling, …): J holds between them, and says nothing beyond")
    return found


def _head(values: Tensor) -> list[float]:
    """λ at evenly spread ranks, from the largest to the smallest."""
    places = torch.linspace(0, len(values) - 1, min(HEAD, len(values))).round().long().to(values.device)
    return values[places].tolist()


def _least(*errors: float | None) -> float:
    return min((e for e in errors if e is not None and not math.isnan(e)), default=math.nan)


def _rms(square: Tensor) -> float:
    return float(square.mean().sqrt())


def _psnr(rmse: float) -> float:
    """In dB, for values in [0, 1]; infinite without an error."""
    return math.nan if math.isnan(rmse) else math.inf if rmse == 0 else -20 * math.log10(rmse)


def _plain_label(y: Tensor, k: int) -> Any:
    return y[k].item() if y[k].ndim == 0 else y[k].tolist()


def _plain(sample: Sample) -> dict[str, Any]:
    pictures = ("image", "drawn", "recovered")
    derived = ("psnr", "attacked_psnr", "beyond", "verdict")
    return {k: v for k, v in asdict(sample).items() if k not in pictures} | {k: getattr(sample, k) for k in derived}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
