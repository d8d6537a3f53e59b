"""Gradient inversion: find the input behind a gradient. One signature, one result, whatever the method."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from i2f._torch.operations import ordinary
from i2f.attacks.first_order import dgl, dlg, gs
from i2f.attacks.gauss_newton import gauss_newton
from i2f.attacks.labels import recover_labels
from i2f.attacks.problem import Callback, Iterate, Problem, Reconstruction
from i2f.attacks.setup import STARTS, make_problems, whole
from i2f.core import checks
from i2f.core.gradient import GradientMap, Loss

Array = Tensor | np.ndarray | Sequence[float]
Gradient = Array | Sequence[Tensor] | Mapping[str, Tensor]

__all__ = ["METHODS", "STARTS", "Iterate", "Reconstruction", "invert", "invert_many", "recover_labels"]


class Method(NamedTuple):
    """An attack, with the settings that it is published with.

    box: pixels stay in [0, 1]. soft_labels: labels that are not given are optimised, not read off the gradient.
    together: takes many problems in one pass. cosine: its distance has no unit.
    """

    run: Callable[..., list[Reconstruction]]
    steps: int
    start: str
    box: bool = False
    soft_labels: bool = False
    together: bool = True
    cosine: bool = False


METHODS = {
    "gauss-newton": Method(gauss_newton, 50, "gray", together=False),
    "dgl": Method(dgl, 24_000, "normal"),
    "dlg": Method(dlg, 300, "normal", soft_labels=True, together=False),
    "idlg": Method(dgl, 24_000, "normal"),
    "gs": Method(gs, 24_000, "normal", box=True, cosine=True),
}


def invert(
    model: nn.Module,
    gradient: Gradient,
    y: Array | None,
    shape: Sequence[int],
    *,
    method: str = "gauss-newton",
    loss: Loss = F.cross_entropy,
    mask: Array | None = None,
    covariance: Array | None = None,
    box: bool | None = None,
    tv: float = 0.0,
    ridge: float = 0.0,
    mean: float | Array = 0.5,
    start: str | Array | None = None,
    restarts: int = 1,
    seed: int = 0,
    steps: int | None = None,
    tolerance: float | None = None,
    progress: bool = False,
    callback: Callback | None = None,
    **options: Any,
) -> Reconstruction:
    """DGL:  G_r(g) = argmin_x ‖∇_θ L(x, θ) − g‖².

    The arguments are all that the attacker knows; the private input is not among them. Tensors may be NumPy arrays or
    lists of numbers. No answer depends on the scale of the loss, where `ridge`, `tv`, `l1` and `covariance` follow it.

    Args (the threat model):
        model: as shared, in evaluation mode, normalisation included as its first layer. loss: (output, y) -> scalar,
            with its reduction. gradient: what was sent, perturbed or not: flat (d_θ,), a list of one tensor a
            parameter, or a dictionary by parameter name (`GradientMap.flat`).
        y: the labels, (n,), or probabilities, (n, classes); None where they are unknown: "dlg" then optimises them,
            every other method reads them off the last layer's gradient (`recover_labels`). "idlg" always does.
        shape: of the input, (n, C, H, W): n images behind one gradient are n·C·H·W unknowns.
        mask: (d_θ,) booleans: the coordinates of the gradient that are known to be exact; the others are not matched.
            `gradient != 0` for a pruned gradient. covariance: of known noise, (d_θ,) variances or (d_θ, d_θ), beside
            which the penalties below are weights on a distance without unit; otherwise on ‖∇L − g‖².
        box: pixels lie in [0, 1], enforced inside every step; None: as published ("gs" alone). tv: weight of the total
            variation (mean absolute difference of neighbours, smoothed at 10⁻³). ridge, mean: a Gaussian prior, the
            penalty ridge · ‖x − mean‖²; with ε = σ²/τ² for noise of variance σ² and pixels N(mean, τ²) this is the MAP
            attacker (1/τ² where `covariance` holds the σ²). mean: a number, or (n, C, H, W).

    Args (the attack):
        method: a key of `METHODS`. "gauss-newton": second order, to machine precision. "dgl": Adam, the paper's.
            "dlg": L-BFGS. "idlg": dgl without labels. "gs": cosine distance, signed gradients.
        start: "gray" 0.5 + 0.1·N(0, 1), "uniform" U(0, 1), "normal" N(0, 1), or a tensor; None: as published.
        restarts: attacks from so many starts; the one with the lowest objective of its own counts.
        seed: of the starts; the same for every dtype and device. steps: budget of each; None: as published.
        tolerance: the relative residual at which the gradient counts as matched; None: 64 units of rounding.
        progress: show a bar. callback: called with an `Iterate` at every iterate.
        options: of the method. "dgl", "idlg", "gs", "dlg": lr, optimizer (a torch class, or any function of
            (parameters, lr=...)), which sees the objective in units of ‖g‖²; "gs": signed; "dgl", "idlg": l1, the
            weight of TAG's ‖·‖₁.

    Returns: a `Reconstruction`; after Ctrl-C the best so far. Raises: ValueError or TypeError for bad input, before
    any work.
    """
    return invert_many(
        model, [gradient], None if y is None else [y], shape, method=method, loss=loss, mask=mask,
        covariance=covariance, box=box, tv=tv, ridge=ridge, mean=mean, start=start,
        restarts=restarts, seed=seed, steps=steps, tolerance=tolerance, progress=progress, callback=callback,
        **options,
    )[0]  # fmt: skip


def invert_many(
    model: nn.Module,
    gradients: Array | Sequence[Gradient],
    y: Array | Sequence[Array] | None,
    shape: Sequence[int],
    *,
    method: str = "gauss-newton",
    loss: Loss = F.cross_entropy,
    mask: Array | None = None,
    covariance: Array | None = None,
    box: bool | None = None,
    tv: float = 0.0,
    ridge: float = 0.0,
    mean: float | Array = 0.5,
    start: str | Array | None = None,
    restarts: int = 1,
    seed: int | Sequence[int] = 0,
    steps: int | None = None,
    tolerance: float | None = None,
    progress: bool = False,
    callback: Callback | None = None,
    **options: Any,
) -> list[Reconstruction]:
    """Independent problems that share a model: each gradient is inverted by itself, as `invert` does.

    First-order methods push all problems through the network together, in one vectorised pass a step; the others take
    one after another. Each problem stops by itself, and its result does not depend on its neighbours beyond rounding.
    One that diverges comes back with `failed` and a reason; the others go on.

    Args:
        gradients: (P, d_θ), or a sequence of P gradients, each as in `invert`. y: (P, n), a sequence of P labels each
            as in `invert`, or None. shape: of one problem's input, (n, C, H, W).
        mask: (d_θ,), or (P, d_θ), one each. start: as in `invert`, or (P, n, C, H, W). seed: one for all (they start
            alike), or one each. Everything else: as in `invert`, the same for all.
    """
    chosen = METHODS[checks.one_of("method", method, METHODS)]
    _check_options(method, options)
    steps, restarts = chosen.steps if steps is None else whole("steps", steps), whole("restarts", restarts)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback is {type(callback).__name__}; give a function of an Iterate")
    if method == "idlg" and y is not None:
        raise ValueError("idlg reads the labels off the gradient: give y=None, or method='dgl' for known labels")
    with ordinary():
        rounds = make_problems(
            GradientMap(model, None, loss), gradients, y, shape, mask=mask, covariance=covariance,
            start=chosen.start if start is None else start, restarts=restarts, seed=seed,
            box=chosen.box if box is None else box, tv=tv, ridge=ridge, mean=mean,
            soft_labels=y is None and chosen.soft_labels, cosine=chosen.cosine,
            steps=steps, tolerance=tolerance, callback=callback, progress=progress,
        )  # fmt: skip
        if chosen.together:
            found = chosen.run([problem for one_round in rounds for problem in one_round], **options)
            return [_best(found[i :: len(rounds[0])]) for i in range(len(rounds[0]))]
        return _in_rounds(chosen, rounds, options)


def _in_rounds(method: Method, rounds: Sequence[Sequence[Problem]], options: dict[str, Any]) -> list[Reconstruction]:
    """One start of all problems after another; a problem whose gradient is matched needs no further one."""
    tries: list[list[Reconstruction]] = [[] for _ in rounds[0]]
    for one_round in rounds:
        left = [p for p in one_round if not (tries[p.index] and tries[p.index][-1].reason.startswith(ENDED))]
        for problem, found in zip(left, method.run(left, **options) if left else [], strict=True):
            tries[problem.index].append(found)
    return [_best(found) for found in tries]


ENDED = ("matched", "interrupted")


def _best(found: Sequence[Reconstruction]) -> Reconstruction:
    """The restart with the lowest objective of its own; what it cost is what all of them cost."""
    best = min(range(len(found)), key=lambda i: found[i].loss if math.isfinite(found[i].loss) else math.inf)
    return replace(found[best], evaluations=sum(f.evaluations for f in found), restart=best)


def _check_options(method: str, options: dict[str, Any]) -> None:
    own = [name for name in inspect.signature(METHODS[method].run).parameters if name != "problems"]
    common = [name for name, p in inspect.signature(invert).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in own:
            try:
                checks.one_of("option", option, own + common)
            except ValueError as error:
                raise TypeError(f"method {method!r}: {error}") from None
            raise TypeError(f"option {option!r} is given twice")
