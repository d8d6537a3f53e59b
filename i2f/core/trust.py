"""Whether products with J are the derivative of the gradient, decided by numbers where autograd may be wrong."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from i2f.core.gradient import GradientMap
from i2f.core.linearization import Linearization, Recomputation
from i2f.core.message import LocalSteps

DIRECTIONS = 3  # a value that leaves PyTorch spoils one direction of J, which a single draw may miss
Products = Linearization | Recomputation


def trusted(gmap: GradientMap, x: Tensor, at_x: Products, build: Callable[[], Products]) -> Products:
    """`at_x`, or what `build` makes in its place, once its J is known to be the derivative of its gradient.

    Raises: ValueError, RuntimeError where it is not, or has no second derivative.
    """
    if gmap.stops and may_ignore_stops(gmap, x):
        at_x = build()
    part = at_x.part()
    part.check()
    causes = [*sorted(gmap.way.needs.escaping), *sorted(part.own_functions)]
    del part  # a group's graphs, which `confirm` builds again
    confirm(x, at_x, causes)
    return at_x


def followed(gmap: GradientMap, message: LocalSteps, x: Tensor) -> GradientMap:
    """The map to what local steps change, once they can be followed at x.

    Raises: as `GradientMap.sending` and `LocalSteps.check`.
    """
    if gmap.stops:
        may_ignore_stops(gmap, x)
    sending = gmap.sending(message)
    with torch.enable_grad():
        message.check(sending, x)
    return sending


def may_ignore_stops(gmap: GradientMap, x: Tensor) -> bool:
    """Whether what the network stops does not matter to J: products with and without it agree. From then on the plain
    graphs, which are faster, are used."""
    delta = torch.from_numpy(np.random.default_rng(1).standard_normal(gmap.size)).to(x)
    held = Linearization(gmap, x)
    gmap.hold(False)
    plain, v = Linearization(gmap, x), torch.ones_like(x).reshape(-1)
    if plain.reacts:
        found, wanted = plain.matvec(delta), held.matvec(delta)
        near = (1e-4 if x.dtype == torch.float32 else 1e-9) * float(wanted.norm())
        by_v = float(delta @ plain.rmatvec(v))
        size = float(wanted.norm()) * float(v.norm())
        if float((found - wanted).norm()) <= near and abs(by_v - float(wanted @ v)) <= 1e-4 * size:
            return True
    gmap.hold(True)
    return False


def confirm(x: Tensor, at_x: Products, causes: list[str]) -> None:
    """Where something may be hidden from autograd (`causes`: an autograd.Function of the user's, a value that leaves
    PyTorch), compares Jᵀv with central differences of the gradient along `DIRECTIONS` directions, in float64, and J
    with Jᵀ.

    Raises: ValueError where they differ.
    """
    if not causes:
        return
    draws = np.random.default_rng(1)
    vs = torch.from_numpy(draws.standard_normal((DIRECTIONS, x.numel()))).to(x.device)
    delta = torch.from_numpy(draws.standard_normal(at_x.gmap.size)).to(at_x.x)
    try:
        exact = at_x.gmap.cast(torch.float64)
        there = Linearization(exact, x.to(exact.dtype))
        wanted = [there.rmatvec(v.to(exact.dtype)) for v in vs]
    except Exception:  # what the user's own code does in float64 may be anything
        exact, wanted = at_x.gmap, [at_x.rmatvec(v.to(at_x.x)) for v in vs]
    along = at_x.rmatvec(vs[0].to(at_x.x))
    apart = abs(float(at_x.matvec(delta) @ vs[0].to(at_x.x) - delta @ along))
    rounding = (1e-2 if x.dtype == torch.float32 else 1e-4) * float(along.norm() * delta.norm())
    adjoint = apart <= rounding / at_x.gmap.size**0.5
    if not (adjoint and all(_differs_so(exact, x.to(exact.dtype), v, w) for v, w in zip(vs, wanted, strict=True))):
        unseen = "its gradient depends on x in a way that autograd does not see"
        cure = "use operations that autograd differentiates"
        raise ValueError(f"model or loss: {unseen}; the cause may be {', '.join(causes)}: {cure}")


def _differs_so(gmap: GradientMap, x: Tensor, v: Tensor, wanted: Tensor) -> bool:
    """Whether central differences give Jᵀv = `wanted` at one step at least: a kink between two points spoils the larger
    steps, and rounding the smaller ones."""
    steps, near = ((1e-4, 1e-5, 1e-6), 1e-3) if x.dtype == torch.float64 else ((1e-2, 1e-3), 0.1)
    along = v.to(x.dtype).view_as(x)
    for step in steps:
        found = (gmap(x + step * along) - gmap(x - step * along)) / (2 * step)
        if float((found - wanted).norm()) <= near * float(torch.maximum(wanted.norm(), found.norm())):
            return True
    return False
