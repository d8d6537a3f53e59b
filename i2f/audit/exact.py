"""An audit from the whole spectrum of J Jᵀ: every attacker of the linearised problem."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from i2f.audit.attackers import behind_mask, clamped_square, error_variances, prior_square, rounding
from i2f.audit.needed import variance_for
from i2f.audit.reservations import reservations
from i2f.audit.sample import Sample, psnr, rms, smallest
from i2f.audit.shared import Question, Shared, share
from i2f.core import spectrum
from i2f.core.jacobian import GradientJacobian

HEAD = 40  # eigenvalues of a spectrum that a sample keeps, evenly spaced over its ranks


@dataclass(frozen=True)
class Visible:
    """The part of J Jᵀ = U Λ Uᵀ that an attacker may see.

    all: every λ, (d_x,), descending. rank: of J Jᵀ. values: the visible λ > 0, (r,). vectors: their U, (d_x, r).
    """

    all: Tensor
    rank: int
    values: Tensor
    vectors: Tensor

    @property
    def regular(self) -> bool:
        """Whether J Jᵀ has no null space. Where it has one, only a prior or an attack says anything about it."""
        return len(self.values) == len(self.all)

    @property
    def unseen(self) -> Tensor:
        """The share of each entry of the input that lies in the null space, (d_x,)."""
        squares = self.vectors.square().sum(1)
        return torch.zeros_like(squares) if self.regular else 1 - squares


def visible(J: GradientJacobian) -> Visible:
    """What an attacker may see; where J is less precise than float64, also what may be rounding error, at the largest λ
    that it can have.

    Raises: ValueError where J = 0.
    """
    values, vectors = spectrum.decompose(J)
    rank = spectrum.rank(J)
    if rank == 0:
        raise ValueError("J = 0 at this input: its gradient does not react to it, and first order has nothing to say")
    count = rank if J.dtype == torch.float64 else int((values > rounding(J) * values[0]).sum())
    shown = values[:count].clamp_min(spectrum.zero_level(J) * float(values[0]))
    return Visible(values, rank, shown, vectors[:, :count])


@dataclass(frozen=True)
class Estimates:
    """Squared errors of the attackers, (d_x,) each, over the entries of all samples behind a gradient.

    moved: the displacement predicted for the δ that was drawn (Eq. 4). predicted: E[moved²] where the defence is noise
    (`random`), moved² where it is not. prior: the linear Bayes error; None without noise of known variance. hidden: the
    share that the coordinates kept by pruning do not show. mask_rank: the rank of J on them. bound: I_lb/√d_x.
    """

    moved: Tensor
    predicted: Tensor
    prior: Tensor | None
    hidden: Tensor | None
    mask_rank: int | None
    bound: float

    @property
    def random(self) -> bool:
        return self.prior is not None


def estimates(shared: Shared, seen: Visible) -> Estimates:
    J, U, rank = shared.J, seen.vectors, seen.rank
    product = J.matvec(shared.seen / J.unit).double() / J.unit  # J δ/unit²
    variances = error_variances(J, shared.question.defense, seen.values)
    moved = U[:, :rank] @ (U[:, :rank].T @ product / (seen.values[:rank] / J.unit**2))
    prior = None
    if variances is not None:
        prior = prior_square(U.square(), variances, seen.unseen, shared.question.tau)
    kept = shared.kept()
    mask_rank, hidden = (None, None) if kept is None else behind_mask(J, kept)
    return Estimates(
        moved=moved,
        predicted=moved.square() if variances is None else U.square() @ variances,
        prior=prior,
        hidden=hidden,
        mask_rank=mask_rank,
        bound=float(product.norm()) / float(seen.all[0] / J.unit**2) / J.shape[0] ** 0.5,
    )


def samples(J: GradientJacobian, question: Question, indices: Sequence[int]) -> list[Sample]:
    """The samples behind one gradient.

    Raises: ValueError where J = 0.
    """
    seen = visible(J)
    shared = share(J, question, indices)
    found = estimates(shared, seen)
    return [_sample(k, shared, seen, found) for k in range(len(indices))]


def _sample(k: int, shared: Shared, seen: Visible, found: Estimates) -> Sample:
    J, question, part, truth = shared.J, shared.question, shared.part(k), shared.truth(k)
    drawn = truth + found.moved[part]
    clamped = (drawn.clamp(0, 1) - truth).square()
    predicted = rms(found.predicted[part])
    boxed = rms(clamped_square(truth, found.predicted[part].sqrt()) if found.random else clamped)
    prior = math.nan if found.prior is None else rms(found.prior[part])
    masked = None if found.hidden is None else question.tau * float(found.hidden[part].mean()) ** 0.5
    attacked = shared.attacked(k)
    unbounded = (predicted, boxed) if seen.regular else ()
    needed, most = variance_for(question.target_mse, truth, seen.vectors[part], seen.values, question.tau, seen.regular)
    sample = Sample(
        index=shared.indices[k],
        y=shared.labels[k],
        gradient_norm=shared.gradient_norm,
        d_x=shared.d_x,
        rank=seen.rank,
        lambda_max=float(seen.all[0]),
        lambda_min=float(seen.all[seen.rank - 1]),
        spectrum=_head(seen.all),
        bound=found.bound,
        predicted=predicted,
        boxed=boxed,
        prior=prior,
        masked=masked,
        judged=smallest(*unbounded, prior, masked, attacked.get("attacked")),
        drawn_rmse=rms(found.moved[part].square()),
        drawn_psnr=psnr(rms(clamped)),
        needed=needed,
        label=shared.read[k],
        image=J.x[k].float().cpu(),
        drawn=drawn.view(J.x.shape[1:]).float().cpu(),
        **attacked,
    )
    return replace(sample, reservations=reservations(sample, shared, most, found.mask_rank))


def _head(values: Tensor) -> list[float]:
    """λ at evenly spaced ranks, from the largest to the smallest."""
    places = torch.linspace(0, len(values) - 1, min(HEAD, len(values))).round().long().to(values.device)
    return values[places].tolist()
