"""Before a gradient leaves: how much of each input it would give away, and what is not known about that.

An audit never says "safe". It says what attackers of this project would recover to first order, in units of the range
that inputs can have, and where the first order ends.
"""

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2f._torch.modules import unwrapped
from i2f._torch.normalize import Normalize
from i2f._torch.operations import ordinary
from i2f.attacks import invert, recover_labels
from i2f.attacks.prior import TAU
from i2f.audit.defense import Defense, parse
from i2f.audit.noise import input_noise, squared_norm
from i2f.core import checks, linalg, metrics, spectrum, trace
from i2f.core.gradient import GradientMap, Loss
from i2f.core.influence import lower_bound
from i2f.core.jacobian import DENSE_BYTES, GradientJacobian
from i2f.core.linearization import graph_nodes
from i2f.core.metrics import UNIT, Range
from i2f.core.progress import bar
from i2f.core.targets import as_labels

LINEAR = 0.1  # a predicted RMSE up to which the first order is taken at its word; beyond, it is said to have ended
HEAD = 40  # eigenvalues kept of a spectrum, evenly spread over its ranks
MEAN = 0.5  # of a pixel, for an attacker with a prior
SMALL = 1_000_000  # parameters up to which products are cheap, and taken in float64
LEVELS = (  # judged RMSE up to which -> what it is called
    (0.05, "gives the input away"),
    (0.15, "gives much of the input away"),
    (math.inf, "blurs the input for these attackers; what others could do is not known"),
)
KINKS = (  # in the names of autograd's nodes
    "relu", "hardtanh", "hardswish", "hardsigmoid", "maxpool", "maxbackward", "minbackward", "amax", "amin", "maximum",
    "minimum", "where", "abs", "clamp", "threshold", "shrink", "round", "floor", "ceil", "trunc", "signbackward",
    "topk", "sort", "median", "kthvalue", "cummax", "cummin", "smoothl1", "huber", "margin",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """What one input's gradient gives away; errors are RMSE per entry of the input, in units of its range. Those under
    noise are expectations: what one draw leaves may be less.

    The attackers know model, label and defence. predicted: RMSE of an attacker without bounds, from I²F's mean over the
    noise, or I²F itself where the defence is no noise. boxed: of one who also knows the range. prior: of one who
    expects entries of deviation τ (the linear Bayes error). masked: of one who reads the mask off a pruned gradient,
    and is left with the prior where the kept coordinates do not reach. attacked: of Gauss–Newton, if asked for, clamped
    to the range. judged: the smallest of these; NaN: not known. psnr: of `judged`, in dB. bound: I_lb.

    drawn: the reconstruction predicted for the perturbation drawn here, of the attacker without bounds (Eq. 4), or of
    the one with a prior where J Jᵀ was not formed; drawn_rmse as it is, drawn_psnr clamped to the range. label: read
    off the shared gradient? None where it cannot be, or is no class. needed: the variance of isotropic Gaussian noise
    at which `judged`, without an attack, has the target PSNR; inf where none reaches it; None: not found.
    reservations: what is not known. image, drawn, recovered: (…), in units of the range.
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

    @property
    def psnr(self) -> float:
        return _psnr(self.judged)

    @property
    def attacked_psnr(self) -> float | None:
        return None if self.attacked is None else _psnr(self.attacked)

    @property
    def beyond(self) -> bool:
        """Whether what is judged stands on a first order that has ended, and on no attack."""
        return self.attacked is None and not self.predicted <= LINEAR

    @property
    def verdict(self) -> str:
        if math.isnan(self.judged):
            return "not known"
        return next(words for level, words in LEVELS if self.judged <= level)


@dataclass(frozen=True)
class Audit:
    """Samples and what was asked: defense, in text; target_psnr; together: one gradient of all; exact: spectra, or
    products alone; range: (low, high) of the inputs, numbers or nested lists."""

    samples: list[Sample]
    defense: str
    target_psnr: float
    together: bool
    exact: bool
    d_theta: int
    range: tuple[Any, Any] = UNIT

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
            "exact": self.exact, "d_theta": self.d_theta, "range": self.range,
            "samples": [_finite(_plain(s)) for s in self.samples],
        }  # fmt: skip
        return json.dumps(record, indent=2, ensure_ascii=False) + "\n"

    def passes(self, min_rmse: float) -> bool:
        """Whether no sample's judged error is below `min_rmse`; what is not known does not pass."""
        return all(s.judged >= min_rmse for s in self.samples)

    def html(self, title: str = "What this gradient gives away") -> str:
        """A report of its own, pictures included: `i2f.report`."""
        from i2f.audit import report

        return report.page(self, title)


@ordinary()
def audit(
    model: nn.Module, x: Tensor, y: Tensor, defense: str | Defense = "none", *, loss: Loss = F.cross_entropy,
    range: Range | None = None, exact: bool | None = None, together: bool = False, target_psnr: float = 15.0,
    attack: bool = False, attack_steps: int = 50, tau: float = TAU, seed: int = 0, progress: bool = False,
) -> Audit:  # fmt: skip
    """What a gradient of `model` at `x` would give away under a defence.

    Args:
        model: in evaluation mode. x: (n, ...). y: (n,), or what `loss` takes. loss: (output, y) -> scalar.
        range: (low, high), the smallest and largest value that an input can have: numbers, tensors that broadcast to an
            input, or one number a channel. None: [0, 1]. Every error is in units of high − low, and the attackers know
            the range; for inputs standardised by a mean m and deviation s it is ((0 − m)/s, (1 − m)/s).
        defense: "none", "gaussian:1e-3", "relative:0.1", "dp:1.0:0.5", "prune:0.9", "designed:0.1", …: `defense.KINDS`.
        exact: with the whole spectrum of J Jᵀ, d_x products a sample; False: by products alone, the bound and, for
            noise, the Bayes error. None: exact where J takes no more than 2 GiB.
        together: one gradient of the mean loss over all n, so one J of n·d_x rows; otherwise each sample alone.
        target_psnr: in dB, for which the noise that is needed is given. attack: also run Gauss–Newton, attack_steps of
            it, which then takes part in the judgement. tau: τ of the attacker with a prior, in units of the range.
        seed: of the noise drawn here, and of the attack: give real noise another.

    In the linear picture an attacker is left with N(x₀, C), C = σ²(J Jᵀ)⁻¹ for isotropic noise. `boxed` is the error of
    that, clamped to the range, a closed form a pixel; `prior` is √(σ² tr((J Jᵀ + (σ²/τ²)I)⁻¹)/d_x).

    Computed in float64 where J fits in 2 GiB, whatever the model's precision; otherwise a reservation says so.

    Raises: ValueError for bad input, as `GradientJacobian` and `defense.parse` say it; for x outside the range; for
    clipping of several samples behind one gradient, which is done to each before the mean; for J = 0. TypeError for a
    model, labels or a defence of another kind.
    """
    defended = parse(defense) if isinstance(defense, str) else defense
    if not isinstance(defended, Defense):
        raise TypeError(f"defense is {type(defense).__name__}; give its text, such as 'gaussian:1e-3', or a Defense")
    if defended.refusal:
        raise ValueError(f"defense={str(defended)!r} cannot be audited: {defended.refusal}")
    x, y = torch.from_numpy(x) if isinstance(x, np.ndarray) else x, as_labels(y, torch.float64)
    checks.images_and_labels(x, y)
    checks.at_least("tau", tau, 1e-6)
    checks.at_least("target_psnr", target_psnr, 1e-6)
    units = metrics.units(UNIT if range is None else range, tuple(x.shape[1:]))
    u = units.within("x", x)
    if together and len(x) > 1 and defended.name in ("dp", "clip"):
        raise ValueError(f"defense={str(defended)!r} clips each sample's own gradient, and together=True audits their "
                         "mean: audit each alone")  # fmt: skip
    groups = [list(_range(len(x)))] if together else [[i] for i in _range(len(x))]
    method = "auto" if exact is None else "dense" if exact else "matrix-free"
    model = unwrapped(model)
    given = next((p.dtype for p in model.parameters() if p.requires_grad), torch.float64)
    ask = _Ask(defended, target_psnr, tau, seed, attack, attack_steps, given)
    build = _Builder(_in_units(model, units), loss, method)
    samples: list[Sample] = []
    size, whole = 0, bool(exact)
    with bar(total=len(x), description="audit", shown=progress) as shown:
        for group in groups:
            J = build(u[group], y[group])
            whole, size = J.is_dense, J.shape[1]
            samples += (_exact if whole else _by_products)(J, ask, group)
            shown.update(len(group))
    ends = units.low, units.low + units.span
    return Audit(samples, str(defended), target_psnr, together, whole, size, tuple(end.tolist() for end in ends))


_range = range  # the built-in: `range` is an argument here


def _in_units(model: nn.Module, units: metrics.Units) -> nn.Module:
    """A model of unit pixels u = (x − low)/span: a first layer low + span·u, which has no parameters, before it."""
    if units.plain:
        return model
    like = next(model.parameters(), units.low)
    dtype = torch.promote_types(like.dtype, torch.float32)
    first = Normalize((0.0,), (1.0,))
    first.mean, first.std = -units.low / units.span, 1 / units.span
    return nn.Sequential(first.to(like.device, dtype), model)


@dataclass
class _Builder:
    """Builds J of a group, in float64 where that fits and the model computes in it."""

    model: nn.Module
    loss: Loss
    method: str
    wide: GradientMap | None = None
    narrow: bool = False

    def __call__(self, u: Tensor, y: Tensor) -> GradientJacobian:
        if self.wide is not None:
            return GradientJacobian(self.wide.model, u, y, self.wide.loss, self.method)
        with warnings.catch_warnings():  # a reservation says the precision
            warnings.filterwarnings("ignore", message="model has parameters in")
            J = GradientJacobian(self.model, u, y, self.loss, self.method)
        if self.narrow or J.dtype == torch.float64 or not self._fits(J):
            return J
        try:
            wide = J.map.cast(torch.float64)
            if wide.dtype == torch.float64:
                J = GradientJacobian(wide.model, u, wide.y, wide.loss, self.method)
                self.wide = wide
        except (ValueError, TypeError, RuntimeError, MemoryError):  # tensors of its own precision in model or loss
            self.narrow = True
        return J

    def _fits(self, J: GradientJacobian) -> bool:
        """Whether J fits so; or products alone will do, and the network is small."""
        need = 8 * J.shape[0] * J.shape[1]
        products = self.method != "dense" and need > 2 * DENSE_BYTES and J.shape[1] <= SMALL
        return J.device.type != "mps" and (need <= DENSE_BYTES or products)


@dataclass(frozen=True)
class _Ask:
    """What an audit is asked. given: the precision of the model's weights."""

    defense: Defense
    target: float
    tau: float
    seed: int
    attack: bool
    steps: int
    given: torch.dtype

    @property
    def mse(self) -> float:
        """The target, in squared units of the range."""
        return 10 ** (-self.target / 10)


def _exact(J: GradientJacobian, ask: _Ask, group: Sequence[int]) -> list[Sample]:
    """From the spectrum J Jᵀ = U Λ Uᵀ of a group behind one gradient; a sample's share are its rows of U."""
    values, vectors = spectrum.decompose(J)
    rank, count = spectrum.rank(J), len(J.x)
    if rank == 0:
        raise ValueError("J = 0 at this input: its gradient does not react to it, and first order has nothing to say")
    seen = rank
    if J.dtype != torch.float64:  # what may be rounding may also be seen: taken at the largest λ that it can have
        seen = int((values > _nothing(J) * values[0]).sum())
    lit, U = values[:seen].clamp_min(spectrum.zero_level(J) * float(values[0])), vectors[:, :seen]
    sent = ask.defense.delta(J, ask.seed + group[0])
    delta = ask.defense.undone(J, sent)
    pulled = J.matvec(delta / J.unit).double() / J.unit  # J δ/unit²
    along = _variances(J, ask.defense, lit)  # of the attacker's estimate, along each of U; None: no noise
    moved = U[:, :rank] @ (U[:, :rank].T @ pulled / (lit[:rank] / J.unit**2))  # Eq. 4 for this δ
    drawn = J.x.double().reshape(-1) + moved
    predicted = moved.square() if along is None else U.square() @ along
    tau = ask.tau
    prior = None
    if along is not None:
        unseen = tau**2 * (1 - U.square().sum(1)) if seen < len(values) else 0.0  # the null space is the prior's
        prior = U.square() @ (along * tau**2 / (along + tau**2)) + unseen
    masked, hidden = _masked(J, sent) if ask.defense.name == "prune" else (None, None)
    common = _common(J, ask, sent, delta)
    bound = float(pulled.norm()) / float(values[0] / J.unit**2) / J.shape[0] ** 0.5
    samples, pixels, shape = [], J.shape[0] // count, J.x.shape[1:]
    for k, index in enumerate(group):
        part = slice(k * pixels, (k + 1) * pixels)
        truth = J.x[k].double().reshape(-1)
        rmse = _rms(predicted[part])
        clamped = (drawn[part].clamp(0, 1) - truth).square()
        boxed = _rms(clamped if along is None else clamped_square(truth, predicted[part].sqrt()))
        expected = math.nan if prior is None else _rms(prior[part])
        left = None if hidden is None else tau * float(hidden[part].mean()) ** 0.5
        found = common.attack(k, truth)
        # where J is singular, only a prior or an attack says anything about what the gradient does not show
        errors = [rmse, boxed, expected, left] if seen == len(values) else [expected, left]
        judged = _least(*errors, found.get("attacked"))
        needed, most = variance_for(ask.mse, truth, U[part], lit, tau, seen == len(values))
        samples.append(Sample(
            index=index, y=common.shown[k], gradient_norm=float(J.gradient.double().norm()), d_x=pixels,
            rank=rank, lambda_max=float(values[0]), lambda_min=float(values[rank - 1]), spectrum=_head(values),
            bound=bound, predicted=rmse, boxed=boxed, prior=expected, masked=left, judged=judged,
            drawn_rmse=_rms(moved[part].square()), drawn_psnr=_psnr(_rms(clamped)), needed=needed,
            label=common.labels[k],
            reservations=_reservations(J, ask, common, k, judged, bound, needed, most, rmse, rank, masked),
            image=J.x[k].float().cpu(), drawn=drawn[part].view(shape).float().cpu(), **found,
        ))  # fmt: skip
    return samples


def _by_products(J: GradientJacobian, ask: _Ask, group: Sequence[int]) -> list[Sample]:
    """Where no spectrum is within reach: the bound, and for isotropic noise the Bayes error, of which the lower end of
    its interval is judged. Of several samples behind one gradient it is their mean."""
    sent = ask.defense.delta(J, ask.seed + group[0])
    delta = ask.defense.undone(J, sent)
    bound = lower_bound(J, delta, tol=1e-2)
    variance, c, tau = ask.defense.variance(J), ask.defense.input_variance(J), ask.tau
    why = ["J Jᵀ was not formed: no rank and no I²F; whether the first order holds so far out is not known"]
    if len(group) > 1:
        why.append(f"a mean over the {len(group)} samples behind this gradient: one of them may be less protected")
    if not bound.converged:
        why.append("λ_max did not converge")
    errors = trace.BayesError(J, probes=3, tol=0.05, max_steps=LANCZOS, seed=ask.seed)
    prior = math.nan
    if c is not None:
        prior = math.sqrt(c * tau**2 / (c + tau**2))
    elif variance == 0:
        prior = 0.0
    elif variance is not None:
        mse, settled = _bayes(errors, variance, ask)
        prior = math.sqrt(mse)
        if not settled:
            why.append("the Bayes error's quadrature did not settle")
    drawn, solved = _drawn(J, ask, variance, c, delta, ask.seed + group[0])
    if not solved:
        why.append("the predicted reconstruction did not converge")
    needed, doubt = _variance_by_products(J, errors, ask, variance, prior)
    if doubt:
        why.append(f"the noise needed for {ask.target:g} dB {doubt}")
    common = _common(J, ask, sent, delta)
    samples = []
    for k, index in enumerate(group):
        truth = J.x[k].double()
        attack = common.attack(k, truth.reshape(-1))
        judged = _least(prior, attack.get("attacked"))
        picture = None if drawn is None else drawn[k].double()
        reservations = _reservations(J, ask, common, k, judged, bound.rmse, needed, tau)
        samples.append(Sample(
            index=index, y=common.shown[k], gradient_norm=float(J.gradient.double().norm()),
            d_x=J.shape[0] // len(J.x), rank=None, lambda_max=bound.lambda_max, lambda_min=None,
            spectrum=[], bound=bound.rmse, predicted=math.nan, boxed=math.nan, prior=prior, masked=None,
            judged=judged, drawn_rmse=math.nan if picture is None else _rms((picture - truth).square()),
            drawn_psnr=math.nan if picture is None else _psnr(_rms((picture.clamp(0, 1) - truth).square())),
            needed=needed, label=common.labels[k], reservations=[*why, *reservations], image=J.x[k].float().cpu(),
            drawn=None if picture is None else picture.float().cpu(), **attack,
        ))  # fmt: skip
    return samples


def _bayes(errors: trace.BayesError, variance: float, ask: _Ask) -> tuple[float, bool]:
    """The lower end of the Bayes error's interval as an MSE, and whether its quadrature settled."""
    found = errors(variance, variance / ask.tau**2)
    return max(found.low, 0.0) / errors.J.shape[0], found.converged


def _variance_by_products(
    J: GradientJacobian, errors: trace.BayesError, ask: _Ask, known: float | None, prior: float
) -> tuple[float | None, str]:
    """σ² at which `_bayes` gives the target, or a little more, and what is doubtful about it. By the secant rule in its
    logit over log σ², which is a line of slope 1 where all λ are equal. known, prior: a variance and its error, to
    start from. inf: beyond τ; None: not found in `RUNS` runs."""
    share = ask.mse / ask.tau**2
    if share >= 1:
        return math.inf, ""
    goal, low, high, best = _logit(min(share * CLOSE, (1 + share) / 2)), -math.inf, math.inf, None
    points: list[tuple[float, float]] = []

    def add(at: float, mse: float) -> float:
        """Where to look next."""
        points.append((at, _logit(min(max(mse / ask.tau**2, 1e-12), 1 - 1e-12))))
        slope = 1.0
        if len(points) > 1 and points[-1][0] != points[-2][0]:
            slope = (points[-1][1] - points[-2][1]) / (points[-1][0] - points[-2][0])
        return at + max(-30.0, min(30.0, (goal - points[-1][1]) / min(max(slope, 0.1), 1.0)))

    near = known and prior > 0 and abs(math.log(prior**2 / ask.mse)) < 2  # from far below a step costs many products
    start = add(math.log(known), prior**2) if near else None
    at = math.log(ask.mse * squared_norm(J) / J.shape[0]) if start is None else start
    for _ in _range(RUNS):
        mse, settled = _bayes(errors, math.exp(at), ask)
        if ask.mse <= mse <= CLOSE**2 * ask.mse:
            return math.exp(at), "" if settled else "stands on a quadrature that did not settle"
        if mse < ask.mse:
            low = max(low, at)
        elif at < high:
            high, best = at, math.exp(at) if mse <= FAR * ask.mse else None
        at = add(at, mse)
        if not low < at < high:
            at = (low + high) / 2 if math.isfinite(low) and math.isfinite(high) else at
    return best, f"was not found to within {CLOSE - 1:.0%} of its RMSE"


LANCZOS = 60  # steps, two products each, of a quadrature's probe and of a large network's conjugate gradients
RUNS = 10  # of the quadrature, to find the noise that is needed
CLOSE = 1.01  # of the target RMSE, by which the noise that is found may leave more
FAR = 10**0.1  # of the target MSE, a dB, beyond which what was found is no answer


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def _drawn(
    J: GradientJacobian, ask: _Ask, variance: float | None, c: float | None, delta: Tensor, seed: int
) -> tuple[Tensor | None, bool]:
    """The reconstruction that the attacker with a prior makes of this δ, as a batch like x, and whether it converged:

    x₀ + (J Jᵀ + εI)⁻¹(J δ + ε(m − x₀)), ε = σ²/τ². None where the defence is no such noise.
    """
    if c is not None:  # what is sent is the gradient of x₀ + √c z
        kept = ask.tau**2 / (c + ask.tau**2)
        return kept * (J.x + math.sqrt(c) * input_noise(J, seed).to(J.x)) + (1 - kept) * MEAN, True
    if not variance:
        return (None if variance is None else J.x), True
    damping = variance / J.unit**2 / ask.tau**2
    b = J.matvec(delta / J.unit) / J.unit + damping * (MEAN - J.x.reshape(-1))
    steps = LANCZOS if J.shape[1] > SMALL else 5 * LANCZOS
    found = linalg.solve_cg(lambda v: J.matvec(J.rmatvec(v) / J.unit) / J.unit, b, damping, 1e-3, steps)
    return J.x + found.u.view_as(J.x), found.converged


def _variances(J: GradientJacobian, defense: Defense, lit: Tensor) -> Tensor | None:
    """Of an unbounded attacker's estimate, along each eigenvector of J Jᵀ; None where the defence is no noise."""
    c, variance = defense.input_variance(J), defense.variance(J)
    return c * torch.ones_like(lit) if c is not None else None if variance is None else variance / lit


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


def variance_for(
    mse: float, truth: Tensor, U: Tensor, values: Tensor, tau: float, regular: bool = True
) -> tuple[float, float]:
    """σ² of isotropic noise at which the best of the attackers considered is left with the mean squared error `mse`,
    and the largest RMSE that such noise can leave.

    Args: truth: (d,), in [0, 1]. U: (d, r), these entries of the eigenvectors of J Jᵀ. values: (r,), their λ > 0.
    tau: τ of the attacker with a prior. regular: J Jᵀ has no null space.

    The attackers are those of `judged`: the one with a prior, σ² Σ u²τ²/(σ² + λτ²) + τ²(1 − Σ u²), and, where J Jᵀ is
    regular, the one who knows the range (`clamped_square`). Both errors grow with σ²: bisection of log σ². inf where no
    noise reaches it; 0 where a singular J hides so much by itself.
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
    low = high = float(values.max()) * tau**2
    while left(low) >= mse:
        low /= 16
    while left(high) < mse and high < math.inf:
        high *= 16
    if math.isinf(high):
        return math.inf, math.sqrt(most)
    for _ in _range(80):
        middle = math.sqrt(low) * math.sqrt(high)
        low, high = (middle, high) if left(middle) < mse else (low, middle)
    return high, math.sqrt(most)


def _nothing(J: GradientJacobian) -> float:
    """λ/λ_max below which an eigenvalue is zero in the float64 Gram matrix, whatever J's own precision."""
    return J.shape[0] * torch.finfo(torch.float64).eps


def _masked(J: GradientJacobian, sent: Tensor) -> tuple[int, Tensor]:
    """The rank of J on the coordinates that pruning kept, d_x where who reads the mask recovers everything; and the
    share of each entry of the input that they do not show, (d_x,)."""
    kept = J.dense()[:, (J.gradient + sent) != 0].double() / J.unit
    values, vectors = torch.linalg.eigh(kept @ kept.T)
    shown = values > _nothing(J) * values[-1]
    if shown.all():
        return len(values), torch.zeros_like(values)
    return int(shown.sum()), (1 - vectors[:, shown].square().sum(1)).clamp_min(0)


@dataclass(frozen=True)
class _Common:
    """What is found once for all samples behind a gradient: labels as they are shown and whether they are read off,
    whether the network has kinks, the attack's images and its end."""

    shown: list[Any]
    labels: list[bool | None]
    kinked: bool
    images: Tensor | None = None
    reason: str = ""

    def attack(self, k: int, truth: Tensor) -> dict[str, Any]:
        if self.images is None:
            return {}
        x = self.images[k].double().reshape(-1)
        return {"attacked": _rms((x.clamp(0, 1) - truth).square()), "attacked_rmse": _rms((x - truth).square()),
                "attacked_reason": self.reason, "recovered": self.images[k].float().cpu()}  # fmt: skip


def _common(J: GradientJacobian, ask: _Ask, sent: Tensor, delta: Tensor) -> _Common:
    y = J.map.y
    classes = _classes(y)
    shown = [y[k].tolist() if one is None else one for k, one in enumerate(classes)]
    common = _Common(shown, _labels(J, sent, classes), _kinked(J))
    if not ask.attack:
        return common
    mask = (J.gradient + sent) != 0 if ask.defense.name == "prune" else None
    found = invert(J.map.model, J.gradient + delta, y, J.x.shape, loss=J.map.loss, mask=mask, seed=ask.seed,
                   steps=ask.steps)  # fmt: skip
    x = found.x.to(J.x)
    return replace(common, images=metrics.assign(x, J.x) if len(x) > 1 else x, reason=found.reason)


def _kinked(J: GradientJacobian) -> bool:
    """Whether the way from x to the loss passes an operation with a kink, module or function."""
    with torch.enable_grad():
        value = J.map.value(J.map.parameters, J.x.clone().requires_grad_())
    names = [node.name().lower().replace("softmax", "") for node in graph_nodes([value.grad_fn])]
    return any(kink in name for name in names for kink in KINKS)


def _classes(y: Tensor) -> list[int | None]:
    """Each label as a class: a whole number, (n,) or (n, 1), or a one-hot row; None for one that is no class."""
    if y.ndim == 2 and y.shape[1] > 1:
        one_hot = ((y == 0) | (y == 1)).all(1) & ((y == 1).sum(1) == 1)
        return [int(row.argmax()) if one else None for row, one in zip(y.int(), one_hot.tolist(), strict=True)]
    if y.numel() != len(y):
        return [None] * len(y)
    return [int(c) if c >= 0 and c == int(c) else None for c in y.reshape(-1).tolist()]


def _labels(J: GradientJacobian, sent: Tensor, classes: list[int | None]) -> list[bool | None]:
    """Whether each class is read off the shared gradient; None where it is none, or this network does not show it."""
    try:
        if None in classes:
            return [None] * len(classes)
        found = recover_labels(J.map, J.gradient + sent, tuple(J.x.shape)).tolist()
    except (ValueError, TypeError, AttributeError, RuntimeError, LookupError):  # an output or a loss of another form
        return [None] * len(classes)
    answers: list[bool | None] = []
    for label in classes:
        answers.append(label in found)
        if label in found:
            found.remove(label)
    return answers


def _reservations(
    J: GradientJacobian, ask: _Ask, common: _Common, k: int, judged: float, bound: float, needed: float | None,
    most: float, rmse: float = 0.0, rank: int | None = None, masked: int | None = None,
) -> list[str]:  # fmt: skip
    """most: the largest RMSE that isotropic noise can leave. The others: as in `Sample`, and what `_exact` knows."""
    found = []
    name = ask.defense.name
    if rmse > LINEAR and name != "designed":
        found.append(f"the predicted RMSE of {rmse:.2g} lies beyond the first order, which ends near {LINEAR:.2g}: the "
                     "true error may be smaller or larger")  # fmt: skip
    if rank is not None and rank < J.shape[0]:
        found.append(f"J Jᵀ has rank {rank} of {J.shape[0]}: what the other directions hide, the gradient does not "
                     "show to first order, and a prior or a second gradient may")  # fmt: skip
    if bound > judged:
        found.append(f"the lower bound I_lb = {bound:.2g} lies above the judged {judged:.2g}: it bounds attackers "
                     "without range and prior, and the judged one has them")  # fmt: skip
    if masked is not None:
        full = "recovers everything" if masked == J.shape[0] else f"has {masked} of {J.shape[0]} directions left"
        found.append(f"who reads the mask off the zeros {full}; that the others are small is not used")
    if name == "quantize":
        found.append("rounding is no noise: who searches among the inputs that round so may know more")
    if common.labels[k] is not True:
        found.append(
            "the label is taken as known, and was not read off this gradient: an attacker may have to guess it"
        )
    if needed is not None and math.isinf(needed):
        found.append(f"no isotropic noise reaches {ask.target:g} dB: an attacker who ignores the gradient is left with "
                     f"{most:.3g} ({_psnr(most):.3g} dB), where the prior's deviation is τ = {ask.tau:g} "
                     f"({_psnr(ask.tau):.3g} dB)")  # fmt: skip
    elif needed and math.sqrt(ask.mse) > LINEAR:
        found.append(f"the noise needed for {ask.target:g} dB lies beyond the first order: what it leaves may be less")
    if common.kinked:
        found.append("the network has kinks (ReLU, max pooling, …): J holds between them, and says nothing beyond")
    if J.dtype != torch.float64:
        uncertain = f": λ below {spectrum.zero_level(J):.1g} of the largest may be rounding, and is taken at that level"
        found.append(f"computed in {_name(J.dtype)}{'' if rank is None else uncertain}")
    if ask.given not in (torch.float32, torch.float64):
        found.append(f"the model's {_name(ask.given)} weights were audited in {_name(J.dtype)}: the rounding of a "
                     "gradient that is computed in less is not counted as protection")  # fmt: skip
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _head(values: Tensor) -> list[float]:
    """λ at evenly spread ranks, from the largest to the smallest."""
    places = torch.linspace(0, len(values) - 1, min(HEAD, len(values))).round().long().to(values.device)
    return values[places].tolist()


def _least(*errors: float | None) -> float:
    return min((e for e in errors if e is not None and not math.isnan(e)), default=math.nan)


def _rms(square: Tensor) -> float:
    return float(square.mean().sqrt())


def _psnr(rmse: float) -> float:
    """In dB, for an RMSE in units of the range; infinite without an error."""
    return math.nan if math.isnan(rmse) else math.inf if rmse == 0 else -20 * math.log10(rmse)


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
