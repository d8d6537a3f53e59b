"""Gradient inversion: find the input behind a gradient. One signature, one result, whatever the method."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2f import checks
from i2f.attacks.first_order import dgl
from i2f.attacks.gauss_newton import gauss_newton
from i2f.attacks.problem import Callback, Problem, Reconstruction
from i2f.gradient import GradientMap, Loss

__all__ = ["METHODS", "STARTS", "Problem", "Reconstruction", "invert"]


class Method(NamedTuple):
    """An attack, with the step budget and the start that it is published with."""

    run: Callable[..., Reconstruction]
    steps: int
    start: str


METHODS = {
    "gauss-newton": Method(gauss_newton, 50, "gray"),
    "dgl": Method(dgl, 24_000, "normal"),
}

# name -> the start's draw from independent N(0, 1) entries, in pixels
STARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "gray": lambda noise: 0.5 + 0.1 * noise,
    "uniform": lambda noise: torch.special.ndtr(noise),  # U(0, 1)
    "normal": lambda noise: noise,
}


def invert(
    model: nn.Module,
    gradient: Tensor,
    y: Tensor,
    shape: Sequence[int],
    *,
    method: str = "gauss-newton",
    loss: Loss = F.cross_entropy,
    start: str | Tensor | None = None,
    seed: int = 0,
    steps: int | None = None,
    progress: bool = False,
    callback: Callback | None = None,
    **options: Any,
) -> Reconstruction:
    """DGL:  G_r(g) = argmin_x ‖∇_θ L(x, θ) − g‖².

    The arguments are all that the attacker knows; the private input is not among them.

    Args:
        model: as shared, in evaluation mode. gradient: what was sent, flat (d_θ,), perturbed or not.
        y: the true labels, (n,). shape: of the input, (n, C, H, W). loss: (output, y) -> scalar.
        method: "gauss-newton" (second order, to machine precision) or "dgl" (Adam, the paper's).
        start: "gray" 0.5 + 0.1·N(0, 1), "uniform" U(0, 1), "normal" N(0, 1), or a tensor; None for the method's own.
        seed: of the start; the same start for every dtype and device. steps: budget; None for the method's own.
        progress: show a bar. callback: called as (step, x, ‖∇L(x) − g‖², evaluations) at every iterate.
        options: of the method (dgl: lr).

    Returns: a `Reconstruction`. Raises: ValueError or TypeError for bad input, before any work.
    """
    chosen = METHODS[checks.one_of("method", method, METHODS)]
    known = [p for p in inspect.signature(chosen.run).parameters if p != "problem"]
    for option in options:
        if option not in known:
            raise TypeError(f"method {method!r} has no option {option!r}; it takes {', '.join(known) or 'none'}")
    steps = chosen.steps if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps={steps} is out of range: give at least 1")
    gmap = GradientMap(model, y, loss)
    checks.flat("gradient", gradient, gmap.size, "the model's trainable parameter space", batch=False)
    shape = tuple(shape)
    if len(shape) < 2:
        raise ValueError(f"shape={shape} has no batch dimension: give (n, ...), (1, C, H, W) for one image")
    x = _start(chosen.start if start is None else start, shape, seed).to(gmap.device, gmap.dtype)
    checks.images_and_labels(x, y)
    gmap.check(x, f"shape={shape}")
    problem = Problem(gmap, gradient.detach().to(x), x, steps, callback, progress)
    return chosen.run(problem, **options)


def _start(start: str | Tensor, shape: tuple[int, ...], seed: int) -> Tensor:
    if torch.is_tensor(start):
        if tuple(start.shape) != shape:
            raise ValueError(f"start has shape {tuple(start.shape)} and shape is {shape}; they must agree")
        return checks.finite("start", start)
    draw = STARTS[checks.one_of("start", start, STARTS)]
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draw(noise)
