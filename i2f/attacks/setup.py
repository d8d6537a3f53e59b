"""From what an attacker knows to problems that an attack can run: every check is made here, before any work."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from i2f.attacks.labels import recover_labels
from i2f.attacks.match import Match
from i2f.attacks.prior import BOX, Prior
from i2f.attacks.problem import Callback, Problem
from i2f.core import checks, streams, targets
from i2f.core.gradient import GradientMap
from i2f.core.linearization import Linearization, trusted

# name -> the start's draw from independent N(0, 1) entries, in pixels
STARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "gray": lambda noise: 0.5 + 0.1 * noise,
    "uniform": lambda noise: torch.special.ndtr(noise),  # U(0, 1)
    "normal": lambda noise: noise,
}


def make_problems(
    gmap: GradientMap,
    gradients: Any,
    y: Any,
    shape: Sequence[int],
    *,
    mask: Any,
    covariance: Any,
    start: Any,
    restarts: int,
    seed: int | Sequence[int],
    box: bool,
    tv: float,
    ridge: float,
    mean: Any,
    soft_labels: bool,
    cosine: bool,
    steps: int,
    tolerance: float | None,
    callback: Callback | None,
    progress: bool,
) -> list[list[Problem]]:
    """A list of P problems for each restart. Arguments as those of `invert_many`; `gmap` has no labels yet.

    Raises: ValueError or TypeError naming the argument, what was wrong with it and what would do.
    """
    shape = _shape(shape, tv)
    sent = _gradients(gmap, gradients)
    count = len(sent)
    seeds = _one_each("seed", seed, count)
    starts = _starts(start, seeds, shape, restarts)
    if box:
        starts = starts.clamp(*BOX)
    starts = starts.to(gmap.device, gmap.dtype)
    prior = Prior(tv, checks.at_least("ridge", ridge, 0.0), _mean(mean, shape).to(starts))
    if tolerance is None:
        tolerance = 64 * torch.finfo(gmap.dtype).eps
    checks.at_least("tolerance", tolerance, 0.0)
    mask = None if mask is None else _tensor("mask", mask, f"({gmap.size},) booleans").to(gmap.device)
    if covariance is not None:
        covariance = _tensor("covariance", covariance, f"({gmap.size},) variances or a matrix").to(gmap.device)
    masks = [mask] * count if mask is None or mask.ndim != 2 else _one_each("mask", mask, count)
    matches = {id(m): Match(gmap.size, m, covariance) for m in masks}
    units = [_unit(gmap, matches[id(m)].select(g)) for m, g in zip(masks, sent, strict=True)]
    scaled = {(id(m), unit): matches[id(m)].scaled(unit).to(starts) for m, unit in zip(masks, units, strict=True)}
    maps, logits = _labelled(gmap, sent, y, shape, seeds if soft_labels else None, restarts, units)

    def problem(i: int, k: int) -> Problem:
        unit, match = units[i], scaled[id(masks[i]), units[i]]
        own = 1.0 if cosine or match.whitens else unit
        return Problem(
            maps[i].scaled(unit), (sent[i] / unit).to(gmap.dtype), starts[i, k], steps, tolerance, match,
            prior.scaled(own), box, logits[i][k], index=i, restart=k, callback=callback, progress=progress, unit=own,
        )  # fmt: skip

    return [[problem(i, k) for i in range(count)] for k in range(restarts)]


def _tensor(name: str, value: Any, wanted: str) -> Tensor:
    """`value` as a tensor: arrays and lists too."""
    if torch.is_tensor(value):
        return value.detach()
    try:
        return torch.from_numpy(np.array(value, order="C"))
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {type(value).__name__}; give {wanted}") from None


def whole(name: str, value: Any) -> int:
    """`value` if it is a whole number of at least 1."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {type(value).__name__}; give a whole number") from None
    if number < 1:
        raise ValueError(f"{name}={number} is out of range: give at least 1")
    return number


def _shape(shape: Any, tv: float) -> tuple[int, ...]:
    try:
        shape = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise TypeError(
            f"shape={shape!r} is no sequence of whole numbers: give (n, ...), (1, C, H, W) for one image"
        ) from None
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"shape={shape} has no batch dimension: give (n, ...), (1, C, H, W) for one image")
    if checks.at_least("tv", tv, 0.0) and len(shape) != 4:
        raise ValueError(f"tv={tv} needs images, shape (n, C, H, W); this shape is {shape}")
    return shape


def _gradients(gmap: GradientMap, gradients: Any) -> list[Tensor]:
    """Each problem's gradient, (d_θ,), in float64, where no norm of a float32 or bfloat16 one under- or overflows."""
    if isinstance(gradients, (Tensor, np.ndarray)):
        gradients = gradients[None] if gradients.ndim == 1 else gradients
        if gradients.ndim != 2:
            raise ValueError(f"gradients has shape {tuple(gradients.shape)}; give a (P, {gmap.size}) stack")
    elif not isinstance(gradients, (list, tuple)):
        raise TypeError(
            f"gradients is {type(gradients).__name__}; give a (P, {gmap.size}) stack, or a list of P gradients"
        )
    if not len(gradients):
        raise ValueError("gradients is empty: give at least one")
    names = ["gradient"] if len(gradients) == 1 else [f"gradients[{i}]" for i in range(len(gradients))]
    sent = []
    for name, gradient in zip(names, gradients, strict=True):
        one = gmap.flat(name, gradient, batch=False).detach().to(gmap.device).double()
        largest, info = float(one.abs().max()), torch.finfo(gmap.dtype)
        if largest > info.max:
            raise ValueError(f"{name} has entries up to {largest:.1g}, beyond {gmap.dtype}: scale the loss down, or "
                             "use a wider dtype")  # fmt: skip
        sent.append(one)
    return sent


def _unit(gmap: GradientMap, known: Tensor) -> float:
    """The power of two nearest to the norm of the gradient's known part, within the range of the model's dtype."""
    info, largest = torch.finfo(gmap.dtype), float(known.abs().max())
    if not largest:
        raise ValueError("gradient is zero in every known coordinate: it says nothing about x, and nothing is matched")
    if largest < info.tiny:
        raise ValueError(f"gradient has no entry above {largest:.1g}, and {gmap.dtype} has lost the digits of such "
                         "numbers: scale the loss up, or use a wider dtype")  # fmt: skip
    exponent = round(math.log2(largest) + math.log2(float((known / largest).norm())))
    bound = round(-math.log2(info.tiny))
    return 2.0 ** max(-bound, min(exponent, bound))


def _mean(mean: Any, shape: tuple[int, ...]) -> Tensor:
    mean = _tensor("mean", mean, f"a number, or an image of shape {shape}")
    try:
        torch.broadcast_to(mean, shape)
    except RuntimeError:
        raise ValueError(
            f"mean has shape {tuple(mean.shape)} and shape is {shape}: give a number or an image of that shape"
        ) from None
    return checks.finite("mean", mean).clone()  # a caller's inference mode marks its tensors


def _one_each(name: str, value: Any, count: int) -> list:
    if not getattr(value, "ndim", 0) and hasattr(value, "__index__"):
        return [operator.index(value)] * count
    if isinstance(value, str) or not hasattr(value, "__len__"):
        raise TypeError(f"{name} is {type(value).__name__}; give an integer, or one for each gradient")
    values = list(value)
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} gradients: give one each, or one for all")
    return values


def _starts(start: Any, seeds: Sequence[int], shape: tuple[int, ...], restarts: int) -> Tensor:
    """(P, restarts, *shape). A restart's draw does not depend on how many follow it."""
    if isinstance(start, str):
        noises = []
        for generator in (streams.generator("start", seed) for seed in seeds):
            noises.append([torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(restarts)])
        return STARTS[checks.one_of("start", start, STARTS)](torch.stack([torch.stack(each) for each in noises]))
    start = _tensor("start", start, f"a name, {', '.join(map(repr, STARTS))}, or an image of shape {shape}")
    if restarts > 1:
        raise ValueError(f"restarts={restarts} from one given start would repeat one attack: name a random start")
    each = (len(seeds), *shape)
    if tuple(start.shape) not in (shape, each):
        raise ValueError(f"start has shape {tuple(start.shape)} and shape is {shape}; they must agree")
    return checks.finite("start", start).clone().expand(each)[:, None]


def _labelled(
    gmap: GradientMap, sent: list[Tensor], y: Any, shape: tuple[int, ...], seeds: Sequence[int] | None, restarts: int,
    units: list[float],
) -> tuple[list[GradientMap], list]:  # fmt: skip
    """The map with each problem's labels, given or read off its gradient; with `seeds`, without labels, and the logits
    that soft ones start from, of every problem and restart. All that J's construction looks at is looked at here."""
    x = STARTS["gray"](torch.randn(shape, generator=streams.generator("probe", 0), dtype=torch.float64))
    x, what = x.to(gmap.device, gmap.dtype), f"shape={shape}"
    output = gmap.check(x, what)
    if seeds is not None:
        _takes_probabilities(gmap, output, shape)
        _differentiable(gmap.relabel(output.detach().softmax(-1)).scaled(units[0]), x)
        logits = []
        for generator in (streams.generator("labels", seed) for seed in seeds):
            draws = [torch.randn(output.shape, generator=generator, dtype=torch.float64) for _ in range(restarts)]
            logits.append([draw.to(output) for draw in draws])
        return [gmap] * len(sent), logits
    if y is None:
        y = [recover_labels(gmap, gradient, shape) for gradient in sent]
    first, *others = _each_label(y, len(sent), shape)
    labelled = gmap.relabel(first)
    output = labelled.check(x, what)
    _differentiable(labelled.scaled(units[0]), x)
    maps = [labelled]
    for labels in others:
        maps.append(labelled.relabel(labels))
        maps[-1].y = targets.evaluate(gmap.loss, output, maps[-1].y)[1]
    return maps, [[None] * restarts] * len(sent)


def _each_label(y: Any, count: int, shape: tuple[int, ...]) -> list:
    if not isinstance(y, (Tensor, np.ndarray, list, tuple)):
        raise TypeError(f"y is {type(y).__name__}; give a label for each image, ({shape[0]},), or None")
    each = list(y) if not isinstance(y, Tensor) or y.ndim else [y]
    for labels in each if len(each) == count else [y]:
        found = np.shape(labels) if not torch.is_tensor(labels) else tuple(labels.shape)
        if len(each) != count or (found and found[0] != shape[0]) or (not found and hasattr(labels, "shape")):
            raise ValueError(
                f"shape={shape} says {shape[0]} images behind one gradient and y has {found}: give a label for each, "
                f"({shape[0]},), or None where they are unknown"
            )
    return each


def _differentiable(gmap: GradientMap, x: Tensor) -> None:
    """The checks of the derivative that J's construction makes."""
    try:
        trusted(gmap, x, Linearization(gmap, x), lambda: Linearization(gmap, x))
    except RuntimeError as error:
        raise checks.not_differentiable(gmap.model, error) from error


def _takes_probabilities(gmap: GradientMap, output: Any, shape: tuple[int, ...]) -> None:
    if not torch.is_tensor(output) or output.ndim != 2 or len(output) != shape[0]:
        raise ValueError("dlg without labels optimises class probabilities, and this model's output is not of shape "
                         "(n, classes); give y")  # fmt: skip
    try:
        value = gmap.loss(output, output.softmax(-1))
        if value.ndim == 0:
            return
    except (RuntimeError, IndexError, TypeError, ValueError):
        pass
    raise ValueError("dlg without labels optimises class probabilities, which this loss does not take; give y")
