"""`audit`: before a gradient leaves, how much of each input it would give away, and what is not known about that.

An audit never says "safe". It states what the attackers of this project would recover to first order, in units of the
range of the inputs, and where the first order is unreliable.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2f._torch.modules import unwrapped
from i2f._torch.operations import ordinary
from i2f.attacks.prior import TAU
from i2f.audit import exact as from_spectrum
from i2f.audit import products
from i2f.audit.defense import Defense, parse
from i2f.audit.operators import Operators, in_units, precision
from i2f.audit.result import Audit
from i2f.audit.sample import Sample
from i2f.audit.shared import Question
from i2f.core import checks, metrics
from i2f.core.gradient import Loss
from i2f.core.message import LocalSteps
from i2f.core.metrics import UNIT, Range
from i2f.core.progress import bar
from i2f.core.targets import as_labels

METHODS = {None: "auto", True: "dense", False: "matrix-free"}  # `exact` -> the method of GradientJacobian


@ordinary()
def audit(
    model: nn.Module,
    x: Tensor | np.ndarray,
    y: Tensor,
    defense: str | Defense = "none",
    *,
    loss: Loss = F.cross_entropy,
    message: LocalSteps | None = None,
    range: Range | None = None,
    exact: bool | None = None,
    together: bool = False,
    target_psnr: float = 15.0,
    attack: bool = False,
    attack_steps: int = 50,
    tau: float = TAU,
    seed: int = 0,
    progress: bool | str = False,
) -> Audit:
    """What a gradient of `model` at `x` would give away under a defence: a `Sample` for each input.

    Args:
        model: in evaluation mode. x: (n, ...). y: (n,), or what `loss` takes. loss: (output, y) -> scalar.
        message: what is sent in the gradient's place, θ₀ − θ_K after local steps (`LocalSteps`): the defence changes
            that, and the attackers know its schedule.
        defense: "none", "gaussian:1e-3", "relative:0.1", "dp:1.0:0.5", "prune:0.9", "designed:0.1", …: `defense.KINDS`.
        range: (low, high), the smallest and largest value that an input can have: numbers, tensors that broadcast to an
            input, or one number per channel. None: [0, 1]. Errors are in units of high − low, and the attackers know
            the range; for inputs standardised by a mean m and deviation s it is ((0 − m)/s, (1 − m)/s).
        exact: True: the whole spectrum of J Jᵀ, d_x products per gradient. False: products alone, which give the bound
            and, for noise, the Bayes error. None: exact where J takes at most 2 GiB.
        together: one gradient of the mean loss over all n samples, with a J of n·d_x rows; otherwise each sample alone.
        target_psnr: in dB: the PSNR for which the variance that is needed is reported.
        attack: also run Gauss–Newton, for at most attack_steps steps, and on a network with kinks the recursive attack;
            the smaller of their errors takes part in `judged`.
        tau: τ, the standard deviation of a pixel for the attacker with a prior, in units of the range.
        seed: of the noise drawn here, and of the attack. Noise that is sent needs another one.

    Computed in float64 where J fits in 2 GiB, whatever the model's precision; otherwise a reservation says so.

    Raises: ValueError for bad input, as `GradientJacobian` and `defense.parse`; for x outside the range; for a defence
    that an audit cannot judge; for J = 0. TypeError for a model, labels or a defence of another kind.
    """
    x, y = _batch(x, y)
    units, model = metrics.units(UNIT if range is None else range, tuple(x.shape[1:])), unwrapped(model)
    u = units.within("x", x)
    size = 1 if message is None else message.batch_size or 1
    if size > 1 and not together:
        alone = f"message has batches of {size} images, and each sample is audited alone"
        raise ValueError(f"{alone}: give together=True (--together)")
    steps = checks.whole("attack_steps", attack_steps, 1) if attack else None
    question = Question(_judgeable(defense, together and len(x) > 1), target_psnr, tau, seed, steps, precision(model))
    operators = Operators(in_units(model, units), loss, METHODS[exact], message)
    samples: list[Sample] = []
    with bar(total=len(x), description="audit", shown=progress) as shown:
        for group in _groups(len(x), together):
            J = operators.at(u[group], y[group])
            samples += (from_spectrum if J.is_dense else products).samples(J, question, group)
            shown.update(len(group))
    ends = (units.low.tolist(), (units.low + units.span).tolist())
    return Audit(samples, str(question.defense), target_psnr, together, J.is_dense, J.shape[1], ends, message)


def _batch(x: Tensor | np.ndarray, y: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and labels as tensors of one length."""
    x, y = torch.from_numpy(x) if isinstance(x, np.ndarray) else x, as_labels(y, torch.float64)
    checks.images_and_labels(x, y)
    return x, y


def _judgeable(defense: str | Defense, several: bool) -> Defense:
    """The defence, if an audit can judge it. several: whether more than one sample is behind a gradient, in which
    case clipping would have to be done to each sample's own gradient."""
    found = parse(defense) if isinstance(defense, str) else defense
    if not isinstance(found, Defense):
        raise TypeError(f"defense is {type(defense).__name__}; give its text, such as 'gaussian:1e-3', or a Defense")
    if found.refusal:
        raise ValueError(f"defense={str(found)!r} cannot be audited: {found.refusal}")
    if several and found.clips:
        raise ValueError(
            f"defense={str(found)!r} clips each sample's own gradient, and together=True audits their mean: audit each "
            "alone"
        )
    return found


def _groups(count: int, together: bool) -> list[list[int]]:
    """The numbers of the samples behind each gradient."""
    return [list(range(count))] if together else [[i] for i in range(count)]
