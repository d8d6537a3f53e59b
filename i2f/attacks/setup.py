"""From what an attacker knows to problems that an attack can run: every check is made here, before any work."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from i2f import checks
from i2f.attacks.labels import recover_labels
from i2f.attacks.match import Match
from i2f.attacks.prior import BOX, Prior
from i2f.attacks.problem import Callback, Problem
from i2f.gradient import GradientMap

# name -> the start's draw from independent N(0, 1) entries, in pixels
STARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "gray": lambda noise: 0.5 + 0.1 * noise,
    "uniform": lambda noise: torch.special.ndtr(noise),  # U(0, 1)
    "normal": lambda noise: noise,
}


def make_problems(
    gmap: GradientMap,
    gradients: Tensor,
    y: Tensor | None,
    shape: Sequence[int],
    *,
    mask: Tensor | None,
    covariance: Tensor | None,
    start: str | Tensor,
    restarts: int,
    seed: int | Sequence[int],
    box: bool,
    tv: float,
    ridge: float,
    mean: float | Tensor,
    soft_labels: bool,
    steps: int,
    tolerance: float | None,
    callback: Callback | None,
    progress: bool,
) -> list[list[Problem]]:
    """A list of P problems for each restart. Arguments as those of `invert_many`; `gmap` has no labels yet.

    Raises: ValueError naming the argument, what was wrong with it and what would do.
    """
    shape = _shape(shape, tv)
    space = "the model's trainable parameter space"
    gradients = torch.atleast_2d(checks.flat("gradient", gradients, gmap.size, space)).detach()
    gradients = gradients.to(gmap.device, gmap.dtype)
    count = len(gradients)
    noises = [_noise(s, restarts, shape) for s in _one_each("seed", seed, count)]
    starts = _starts(start, noises, shape, restarts)
    if box:
        starts = starts.clamp(*BOX)
    starts = starts.to(gmap.device, gmap.dtype)
    prior = Prior(tv, checks.at_least("ridge", ridge, 0.0), _mean(mean, shape).to(starts))
    output = gmap.check(starts[0, 0], f"shape={shape}")
    maps = [gmap] * count if soft_labels else _labelled(gmap, gradients, y, shape, output)
    logits = [None] * restarts
    if soft_labels:
        logits = torch.randn(
            restarts, shape[0], output.shape[-1], generator=torch.Generator().manual_seed(restarts), dtype=torch.float64
        ).to(output)
        _takes_probabilities(gmap, output)
    masks = [mask] * count if mask is None or mask.ndim != 2 else _one_each("mask", mask, count)
    matches = {id(m): Match(gmap.size, m, covariance).to(gradients) for m in masks}
    if tolerance is None:
        tolerance = 64 * torch.finfo(gmap.dtype).eps
    checks.at_least("tolerance", tolerance, 0.0)
    return [
        [
            Problem(maps[i], gradients[i], starts[i, k], steps, tolerance, matches[id(masks[i])], prior, box, logits[k],
                    index=i, restart=k, callback=callback, progress=progress)
            for i in range(count)
        ]
        for k in range(restarts)
    ]  # fmt: skip


def _shape(shape: Sequence[int], tv: float) -> tuple[int, ...]:
    shape = tuple(shape)
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"shape={shape} has no batch dimension: give (n, ...), (1, C, H, W) for one image")
    if checks.at_least("tv", tv, 0.0) and len(shape) != 4:
        raise ValueError(f"tv={tv} needs images, shape (n, C, H, W); this shape is {shape}")
    return shape


def _mean(mean: float | Tensor, shape: tuple[int, ...]) -> Tensor:
    mean = torch.as_tensor(mean)
    try:
        torch.broadcast_to(mean, shape)
    except RuntimeError:
        raise ValueError(
            f"mean has shape {tuple(mean.shape)} and shape is {shape}: give a number or an image of that shape"
        ) from None
    return checks.finite("mean", mean)


def _one_each(name: str, value, count: int) -> list:
    values = [value] * count if isinstance(value, int) else list(value)
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} gradients: give one each, or one for all")
    return values


def _noise(seed: int, restarts: int, shape: tuple[int, ...]) -> Tensor:
    """A restart's draw does not depend on how many follow it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(restarts)])


def _starts(start: str | Tensor, noises: list[Tensor], shape: tuple[int, ...], restarts: int) -> Tensor:
    """(P, restarts, *shape)."""
    if not torch.is_tensor(start):
        return STARTS[checks.one_of("start", start, STARTS)](torch.stack(noises))
    if restarts > 1:
        raise ValueError(f"restarts={restarts} from one given start would repeat one attack: name a random start")
    each = (len(noises), *shape)
    if tuple(start.shape) not in (shape, each):
        raise ValueError(f"start has shape {tuple(start.shape)} and shape is {shape}; they must agree")
    return checks.finite("start", start).detach().expand(each)[:, None]


def _takes_probabilities(gmap: GradientMap, output: Tensor) -> None:
    try:
        value = gmap.loss(output, output.softmax(-1))
        if value.ndim == 0:
            return
    except (RuntimeError, IndexError, TypeError, ValueError):
        pass
    raise ValueError("dlg without labels optimises class probabilities, which this loss does not take; give y")


def _labelled(
    gmap: GradientMap, gradients: Tensor, y: Tensor | None, shape: tuple, output: Tensor
) -> list[GradientMap]:
    """The map with each problem's labels: those given, or those read off its gradient."""
    if y is None:
        return [gmap.relabel(recover_labels(gmap, gradient, shape)) for gradient in gradients]
    if not torch.is_tensor(y) or y.ndim < 2 or y.shape[:2] != (len(gradients), shape[0]):
        found = tuple(y.shape[1:]) if torch.is_tensor(y) and y.ndim > 1 and len(gradients) == 1 else tuple(y.shape)
        raise ValueError(
            f"shape={shape} says {shape[0]} images behind one gradient and y has {found}: give a label for each, "
            f"({shape[0]},), or None where they are unknown"
        )
    for labels in y:
        checks.classes_in_range(labels, output)
    return [gmap.relabel(labels) for labels in y]
