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
from i2f.audit.operators import Operators, in_units
from i2f.audit.result import Audit
from i2f.audit.sample import Sample
from i2f.audit.shared import Question
from i2f.core import checks, metrics
from i2f.core.gradient import Loss
from i2f.core.metrics import UNIT, Range
from i2f.core.progress import bar
from i2f.core.targets import as_labels


@ordinary()
def audit(
    model: nn.Module,
    x: Tensor | np.ndarray,
    y: Tensor,
    defense: str | Defense = "none",
    *,
    loss: Loss = F.cross_entropy,
    range: Range | None = None,
    exact: bool | None = None,
    together: bool = False,
    target_psnr: float = 15.0,
    attack: bool = False,
    attack_steps: int = 50,
    tau: float = TAU,
    seed: int = 0,
    progress: bool = False,
) -> Audit:
    """What a gradient of `model` at `x` would give away under a defence.

    To first order, isotropic noise of variance σ² leaves an attacker with N(x₀, C), C = σ²(J Jᵀ)⁻¹. `predicted` is
    √(tr C/d_x); `boxed` the error of that estimate clamped to the range, in closed form per pixel; `prior` is
    √(σ² tr((J Jᵀ + εI)⁻¹)/d_x) with ε = σ²/τ². See `Sample` for all of them.

    Args:
        model: in evaluation mode. x: (n, ...). y: (n,), or what `loss` takes. loss: (output, y) -> scalar.
        range: (low, high), the smallest and largest value that an input can have: numbers, tensors that broadcast to an
            input, or one number per channel. None: [0, 1]. Errors are in units of high − low, and the attackers know
            the range; for inputs standardised by a mean m and deviation s it is ((0 − m)/s, (1 − m)/s).
        defense: "none", "gaussian:1e-3", "relative:0.1", "dp:1.0:0.5", "prune:0.9", "designed:0.1", …: `defense.KINDS`.
        exact: True: the whole spectrum of J Jᵀ, d_x products per gradient. False: products alone, which give the bound
            and, for noise, the Bayes error. None: exact where J takes at most 2 GiB.
        together: one gradient of the mean loss over all n samples, with a J of n·d_x rows; otherwise each sample alone.
        target_psnr: in dB: the PSNR for which the variance that is needed is reported.
        attack: also run Gauss–Newton, for at most attack_steps steps; its error then takes part in `judged`.
        tau: τ, the standard deviation of a pixel for the attacker with a prior, in units of the range.
        seed: of the noise drawn here, and of the attack. Noise that is sent needs another one.

    Computed in float64 where J fits in 2 GiB, whatever the model's precision; otherwise a reservation says so.

    Raises: ValueError for bad input, as `GradientJacobian` and `defense.parse`; for x outside the range; for a defence
    that an audit cannot judge; for clipping of several samples behind one gradient, which clips each before the mean;
    for J = 0. TypeError for a model, labels or a defence of another kind.
    """
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(x)
    y = as_labels(y, torch.float64)
    checks.images_and_labels(x, y)
    checks.at_least("tau", tau, 1e-6)
    checks.at_least("target_psnr", target_psnr, 1e-6)
    defended = _judgeable(defense, together and len(x) > 1)
    units = metrics.units(UNIT if range is None else range, tuple(x.shape[1:]))
    u, model = units.within("x", x), unwrapped(model)
    given = next((p.dtype for p in model.parameters() if p.requires_grad), torch.float64)
    question = Question(defended, target_psnr, tau, seed, attack_steps if attack else None, given)
    method = "auto" if exact is None else "dense" if exact else "matrix-free"
    operators = Operators(in_units(model, units), loss, method)
    samples: list[Sample] = []
    dense, d_theta = bool(exact), 0
    with bar(total=len(x), description="audit", shown=progress) as shown:
        for group in _groups(len(x), together):
            J = operators.at(u[group], y[group])
            dense, d_theta = J.is_dense, J.shape[1]
            samples += (from_spectrum if dense else products).samples(J, question, group)
            shown.update(len(group))
    ends = (units.low.tolist(), (units.low + units.span).tolist())
    return Audit(samples, str(defended), target_psnr, together, dense, d_theta, ends)


def _judgeable(defense: str | Defense, several: bool) -> Defense:
    """The defence, if an audit can judge it. several: more than one sample behind a gradient."""
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
