"""From what an attacker knows to problems that an attack can run: every check is made here, before any work."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from i2f.attacks import inputs
from i2f.attacks.knowledge import KNOWN, SEARCHED, Knowledge, Search
from i2f.attacks.labels import recover_labels
from i2f.attacks.match import LowRank, Match
from i2f.attacks.methods import METHODS, Method
from i2f.attacks.prior import BOX, Prior
from i2f.attacks.problem import Problem
from i2f.core import checks, streams, targets
from i2f.core.examination import check
from i2f.core.gradient import GradientMap
from i2f.core.linearization import Linearization
from i2f.core.trust import trusted

# name -> the start's draw from independent N(0, 1) entries, in pixels
STARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "gray": lambda noise: 0.5 + 0.1 * noise,
    "uniform": lambda noise: torch.special.ndtr(noise),  # U(0, 1)
    "normal": lambda noise: noise,
}


def make_problems(
    model: nn.Module, gradients: Any, y: Any, shape: Sequence[int], knowledge: Knowledge, search: Search
) -> tuple[Method, list[list[Problem]]]:
    """The method, and a list of P problems for each restart; the arguments of `invert_many`.

    Raises: ValueError or TypeError with the argument's name, what was wrong with it, and what to give instead.
    """
    method = _method(search, y)
    steps = method.steps if search.steps is None else checks.whole("steps", search.steps, 1)
    restarts = checks.whole("restarts", search.restarts, 1)
    gmap = GradientMap(model, None, knowledge.loss)
    shape = inputs.sizes(shape, knowledge.tv)
    if knowledge.message is not None:
        knowledge.message.batches(shape[0])  # raises where the schedule does not fit
        if method.layered:
            raise ValueError(f"method {search.method!r} reads one gradient, not several steps: give 'gauss-newton'")
    sent = inputs.gradients(gmap, gradients)
    seeds = inputs.one_each("seed", search.seed, len(sent))
    starts = _starts(method.start if search.start is None else search.start, seeds, shape, restarts)
    box = method.box if knowledge.box is None else knowledge.box
    starts = (starts.clamp(*BOX) if box else starts).to(gmap.device, gmap.dtype)
    ridge, mean = checks.at_least("ridge", knowledge.ridge, 0.0), inputs.image("mean", knowledge.mean, shape)
    prior = Prior(knowledge.tv, ridge, mean.to(starts))
    rounding = 64 * torch.finfo(gmap.dtype).eps
    tolerance = rounding if search.tolerance is None else checks.at_least("tolerance", search.tolerance, 0.0)
    matches, units = _matches(gmap, sent, knowledge)
    probe = STARTS["gray"](torch.randn(shape, generator=streams.generator("probe", 0), dtype=torch.float64)).to(starts)
    output = check(gmap, probe, f"shape={shape}")
    logits: Tensor | None = None
    if method.soft_labels and y is None:
        inputs.takes_probabilities(gmap.loss, output, shape)
        maps, logits = [gmap] * len(sent), _draws("labels", seeds, output.shape, restarts).to(output)
        _differentiable(gmap.relabel(output.detach().softmax(-1)).scaled(units[0]), probe)
    else:
        if y is None:
            y = [_read(gmap.sending(knowledge.message), gradient, shape) for gradient in sent]
        maps = _labelled(gmap, len(sent), y, probe)
        _differentiable(maps[0].scaled(units[0]), probe)
    maps = [gmap.sending(knowledge.message) for gmap in maps]

    def problem(i: int, k: int) -> Problem:
        unit = 1.0 if method.cosine or matches[i].whitens else units[i]
        return Problem(
            gmap=maps[i].scaled(units[i]),
            target=(sent[i] / units[i]).to(gmap.dtype),
            start=starts[i, k],
            steps=steps,
            tolerance=tolerance,
            match=matches[i],
            prior=prior.scaled(unit),
            box=box,
            label_logits=None if logits is None else logits[i, k],
            index=i,
            restart=k,
            callback=search.callback,
            progress=search.progress,
            unit=unit,
        )

    return method, [[problem(i, k) for i in range(len(sent))] for k in range(restarts)]


def _method(search: Search, y: Any) -> Method:
    """The method, which has the options and takes what is known of the labels."""
    method = METHODS[checks.one_of("method", search.method, METHODS)]
    for option in [name for name in search.options if name not in method.options]:
        try:
            checks.one_of("option", option, [*method.options, *KNOWN, *SEARCHED])
        except ValueError as error:
            raise TypeError(f"method {search.method!r}: {error}") from None
    if search.callback is not None and not callable(search.callback):
        raise TypeError(f"callback is {type(search.callback).__name__}; give a function of an Iterate")
    if search.method == "idlg" and y is not None:
        raise ValueError("idlg reads the labels off the gradient: give y=None, or method='dgl' for known labels")
    return method


def _matches(gmap: GradientMap, sent: Sequence[Tensor], knowledge: Knowledge) -> tuple[list[Match], list[float]]:
    """Of each problem, which coordinates count and how much, in the unit of its gradient; and that unit."""
    covariance: Any = knowledge.covariance
    if isinstance(covariance, LowRank):
        basis = inputs.tensor("covariance.basis", covariance.basis, f"(k, {gmap.size}) orthonormal rows")
        variances = inputs.tensor("covariance.variances", covariance.variances, "(k,) variances")
        covariance = LowRank(basis, variances, covariance.floor)
    elif covariance is not None:
        covariance = inputs.tensor("covariance", covariance, f"({gmap.size},) variances or a matrix")
    covariance = None if covariance is None else covariance.to(gmap.device)
    masks: list[Tensor | None] = [None]
    if knowledge.mask is not None:
        mask = inputs.tensor("mask", knowledge.mask, f"({gmap.size},) booleans").to(gmap.device)
        masks = inputs.one_each("mask", mask, len(sent)) if mask.ndim == 2 else [mask]
    given = [Match(gmap.size, mask, covariance) for mask in masks]
    given = given if len(given) == len(sent) else given * len(sent)
    units = [_unit(gmap, match.select(gradient)) for match, gradient in zip(given, sent, strict=True)]

    @cache  # problems share a large covariance
    def scaled(match: Match, unit: float) -> Match:
        return match.scaled(unit).to(gmap.device, gmap.dtype)

    return [scaled(match, unit) for match, unit in zip(given, units, strict=True)], units


def _unit(gmap: GradientMap, known: Tensor) -> float:
    """The power of two nearest to the norm of the gradient's known part, within the range of the model's dtype."""
    info, largest = torch.finfo(gmap.dtype), float(known.abs().max())
    if not largest:
        raise ValueError("gradient is zero in every known coordinate: it says nothing about x, and nothing is matched")
    if largest < info.tiny:
        lost = f"{gmap.dtype} has lost the digits of such numbers"
        raise ValueError(
            f"gradient has no entry above {largest:.1g}, and {lost}: scale the loss up, or use a wider dtype"
        )
    exponent = round(math.log2(largest) + math.log2(float((known / largest).norm())))
    bound = round(-math.log2(info.tiny))
    return math.ldexp(1.0, max(-bound, min(exponent, bound)))


def _draws(name: str, seeds: Sequence[int], shape: Sequence[int], restarts: int) -> Tensor:
    """N(0, 1), (P, restarts, *shape). A restart's draw does not depend on how many follow it."""
    generators = [streams.generator(name, seed) for seed in seeds]
    each = [[torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(restarts)] for g in generators]
    return torch.stack([torch.stack(draws) for draws in each])


def _starts(start: Any, seeds: Sequence[int], shape: tuple[int, ...], restarts: int) -> Tensor:
    """(P, restarts, *shape)."""
    if isinstance(start, str):
        return STARTS[checks.one_of("start", start, STARTS)](_draws("start", seeds, shape, restarts))
    start = inputs.tensor("start", start, f"a name, {', '.join(map(repr, STARTS))}, or an image of shape {shape}")
    if restarts > 1:
        raise ValueError(f"restarts={restarts} from one given start would repeat one attack: name a random start")
    each = (len(seeds), *shape)
    if tuple(start.shape) not in (shape, each):
        raise ValueError(f"start has shape {tuple(start.shape)} and shape is {shape}; they must agree")
    return checks.finite("start", start).clone().expand(each)[:, None]


def _read(gmap: GradientMap, gradient: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The labels behind a gradient or an update.

    Raises: ValueError where they do not say which of them belong to which of the local steps.
    """
    found, n = recover_labels(gmap, gradient, shape), shape[0]
    if (
        gmap.message is not None
        and any(len(images) < n for images in gmap.message.batches(n))
        and len(set(found.tolist())) > 1
    ):
        raise ValueError(
            f"y=None: the labels read off, {found.tolist()}, do not say which of them belong to which batch; give y"
        )
    return found


def _labelled(gmap: GradientMap, count: int, y: Any, probe: Tensor) -> list[GradientMap]:
    """The map with each problem's labels."""
    shape = tuple(probe.shape)
    first, *others = inputs.labels(y, count, shape)
    maps = [gmap.relabel(first)]
    output = check(maps[0], probe, f"shape={shape}")
    for own in others:
        maps.append(maps[0].relabel(own))
        maps[-1].y = targets.evaluate(gmap.loss, output, maps[-1].y)[1]
    return maps


def _differentiable(gmap: GradientMap, x: Tensor) -> None:
    """Raises where J's construction would."""
    try:
        trusted(gmap, x, Linearization(gmap, x), lambda: Linearization(gmap, x))
    except RuntimeError as error:
        raise checks.not_differentiable(gmap.model, error) from error
