"""Gradient inversion: find the input behind a gradient. One signature, one result, whatever the method."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

from torch import nn

from i2f._torch.operations import ordinary
from i2f.attacks.knowledge import Array, Gradient, Keywords, understood, with_keywords
from i2f.attacks.labels import recover_labels
from i2f.attacks.match import LowRank
from i2f.attacks.methods import GENERAL, METHODS, Method
from i2f.attacks.problem import Iterate, Problem, Reconstruction
from i2f.attacks.setup import STARTS, make_problems

__all__ = [
    "GENERAL",
    "METHODS",
    "STARTS",
    "Iterate",
    "LowRank",
    "Reconstruction",
    "invert",
    "invert_many",
    "recover_labels",
]

ENDED = ("matched", "interrupted")  # how a reason begins after which a problem needs no further restart


@with_keywords
def invert(
    model: nn.Module, gradient: Gradient, y: Array | None, shape: Sequence[int], **keywords: Unpack[Keywords]
) -> Reconstruction:
    """DGL:  G_r(g) = argmin_x ‖∇_θ L(x, θ) − g‖².

    The arguments are all that the attacker knows; the private input is not among them. Tensors may be NumPy arrays or
    lists of numbers. No result depends on the scale of the loss, provided that `ridge`, `tv`, `l1` and `covariance` are
    scaled with it.

    Args:
        model: as shared, in evaluation mode, normalisation included as its first layer.
        gradient: the shared one, perturbed or not: flat (d_θ,), a list with one tensor per parameter, or a dictionary
            by parameter name (`GradientMap.flat`).
        y: the labels, (n,), or probabilities, (n, classes); None where they are unknown: "dlg" then optimises them,
            every other method reads them off the last layer's gradient (`recover_labels`). "idlg" always does.
        shape: of the input, (n, C, H, W): n images behind one gradient are n·C·H·W unknowns.

    Keywords (what the attacker knows, `Knowledge`):
        loss: (output, y) -> scalar, with its reduction. Default: mean cross-entropy.
        mask: (d_θ,) booleans: the coordinates of the gradient that are known to be exact; the others are not matched.
            `gradient != 0` for a pruned gradient.
        covariance: of the noise, where it is known: (d_θ,) variances, (d_θ, d_θ), or a `LowRank`. The distance is then
            whitened and has no unit, and the penalties below are weights relative to it; otherwise, to ‖∇L − g‖².
        box: pixels lie in [0, 1], enforced inside every step; None: as published ("gs" alone).
        tv: weight of the total variation (mean absolute difference of neighbours, smoothed at 10⁻³).
        ridge, mean: a Gaussian prior, the penalty ridge · ‖x − mean‖². For noise of variance σ² and pixels N(mean, τ²),
            ridge = ε = σ²/τ² is the MAP attacker (1/τ² where `covariance` holds the σ²). mean: a number, or
            (n, C, H, W).
        message: `LocalSteps`, the client's schedule as far as the attacker knows it: `gradient` is then what K steps
            changed, θ₀ − θ_K. None: a gradient.

    Keywords (how it searches, `Search`):
        method: a key of `METHODS`. "gauss-newton": second order, to machine precision on smooth networks.
            "recursive": layer by layer, exact for networks with ReLUs that it can read. "dgl": Adam, the paper's.
            "dlg": L-BFGS. "idlg": dgl without labels. "gs": cosine distance, signed gradients.
        start: "gray" 0.5 + 0.1·N(0, 1), "uniform" U(0, 1), "normal" N(0, 1), or a tensor; None: as published.
        restarts: the number of starts; the result is that with the lowest objective.
        seed: of the starts; the same for every dtype and device.
        steps: budget of each start; None: as published.
        tolerance: the relative residual at which the gradient counts as matched; None: 64 units of rounding.
        progress: show a bar; "text" for a log. callback: called with an `Iterate` at every iterate.
        options: of the method. "dgl", "idlg", "gs", "dlg": lr, optimizer (a torch class, or any function of
            (parameters, lr=...)), which sees the objective in units of ‖g‖²; "gs": signed; "dgl", "idlg": l1, the
            weight of TAG's ‖·‖₁; "recursive": polish.

    Returns: a `Reconstruction`; after Ctrl-C the best so far. Raises: ValueError or TypeError for bad input, before
    any work.
    """
    return invert_many(model, [gradient], None if y is None else [y], shape, **keywords)[0]


@with_keywords
def invert_many(
    model: nn.Module,
    gradients: Array | Sequence[Gradient],
    y: Array | Sequence[Array] | None,
    shape: Sequence[int],
    **keywords: Unpack[Keywords],
) -> list[Reconstruction]:
    """Independent problems that share a model: each gradient is inverted by itself, as `invert` does.

    First-order methods push all problems through the network together, in one vectorised pass per step; the others take
    one after another. Each problem stops by itself, and its result does not depend on its neighbours beyond rounding.
    A problem that diverges comes back with `failed` and a reason; the others go on.

    Args:
        gradients: (P, d_θ), or a sequence of P gradients, each as in `invert`. y: (P, n), a sequence of P labels each
            as in `invert`, or None. shape: of one problem's input, (n, C, H, W).
        mask: (d_θ,), or (P, d_θ), one each. start: as in `invert`, or (P, n, C, H, W). seed: one for all (they start
            alike), or one each. Everything else: as in `invert`, the same for all.
    """
    knowledge, search = understood(dict(keywords))
    with ordinary():
        method, rounds = make_problems(model, gradients, y, shape, knowledge, search)
        if not method.together:
            return _in_rounds(method, rounds, search.options)
        found = method.run([problem for one_round in rounds for problem in one_round], **search.options)
        return [_best(found[i :: len(rounds[0])]) for i in range(len(rounds[0]))]


def _in_rounds(method: Method, rounds: Sequence[Sequence[Problem]], options: Mapping[str, Any]) -> list[Reconstruction]:
    """One start of all problems after another; a problem whose gradient is matched needs no further one."""
    tries: list[list[Reconstruction]] = [[] for _ in rounds[0]]
    for one_round in rounds:
        left = [p for p in one_round if not (tries[p.index] and tries[p.index][-1].reason.startswith(ENDED))]
        for problem, found in zip(left, method.run(left, **options) if left else [], strict=True):
            tries[problem.index].append(found)
    return [_best(found) for found in tries]


def _best(found: Sequence[Reconstruction]) -> Reconstruction:
    """The restart with the lowest objective, with the evaluations of all of them."""
    best = min(range(len(found)), key=lambda i: found[i].loss if math.isfinite(found[i].loss) else math.inf)
    return replace(found[best], evaluations=sum(f.evaluations for f in found), restart=best)
