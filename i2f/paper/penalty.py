"""Privacy as a differentiable term of the loss: how sharply a sample's gradient shows its input, as a function of θ.

Both terms are built from q(θ) = ‖Jᵀw‖² with w held fixed, whose derivative by θ takes one more backward pass:

    bound       λ_max(J Jᵀ) = max_{‖u‖=1} ‖Jᵀu‖², at the u of a few power steps: what I_lb divides by
    bayes       tr((J Jᵀ + εI)⁻¹) = E[zᵀw], w = (J Jᵀ + εI)⁻¹z: the Bayes error over σ², which for ε → 0 is E[I²]/σ². As
                d(A⁻¹) = −A⁻¹ dA A⁻¹, its derivative is that of −‖Jᵀw‖², w held fixed
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2f._torch.operations import elementary, ordinary
from i2f._torch.watch import BELOW, Watch
from i2f.core import checks, linalg
from i2f.core.gradient import Loss


@ordinary()
def sensitivity(model: nn.Module, x: Tensor, y: Tensor, w: Tensor, loss: Loss = F.cross_entropy) -> Tensor:
    """‖Jᵀw‖² = ‖∇_θ⟨∇_x L, w⟩‖², a scalar with its graph in θ. x: (n, ...), one gradient of all; w: of x's shape.

    Raises: ValueError for a layer in training mode, a part of the gradient that is stopped, a value that x's dtype does
    not hold.
    """
    _check(model, x, y, loss)
    if w.shape != x.shape:
        raise ValueError(f"w has shape {tuple(w.shape)} and x {tuple(x.shape)}; give w, of input space, the shape of x")
    Jw = _rmatvec(model, x, y, w, loss)
    size, limits = _norm(Jw), torch.finfo(x.dtype)
    if size and not limits.tiny <= size**2 <= limits.max:
        raise ValueError(f"w gives ‖Jᵀw‖ = {size:.0e}, whose square leaves {x.dtype}: scale w or the loss")
    return _square(Jw)


@ordinary()
def bound(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    power_steps: int = 3,
    loss: Loss = F.cross_entropy,
    generator: torch.Generator | None = None,
) -> Tensor:
    """log λ_max(J Jᵀ) from below, differentiable in θ: minimising it raises I_lb = ‖Jδ‖/λ_max for noise of one size.
    Where J = 0 it is −∞, with derivative zero.

    Cost: some 2·power_steps + 4 gradients. Raises: ValueError for a layer in training mode, or a part of the gradient
    that is stopped.
    """
    _check(model, x, y, loss)
    u = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    for _ in range(power_steps):
        u = _gram(model, x, y, _direction(u), loss)
    Jw = _rmatvec(model, x, y, _direction(u), loss)
    unit = linalg.power_of_two(_norm(Jw))
    square = _square([part / unit for part in Jw])
    if not square.detach() > 0:
        return square * 0 - math.inf
    return square.log() + 2 * math.log(unit)


@ordinary()
def bayes(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    damping: float,
    cg_steps: int = 20,
    loss: Loss = F.cross_entropy,
    generator: torch.Generator | None = None,
) -> Tensor:
    """−log tr((J Jᵀ + εI)⁻¹), one draw: a term whose gradient by θ is that of the logarithm, w held fixed. Minimising
    it raises the Bayes error at ε = σ²/τ² > 0. Cost: some 2·cg_steps + 4 gradients.

    Raises: as `bound`; ValueError for ε that is not positive, or λ/ε out of range of x's dtype.
    """
    _check(model, x, y, loss)
    damping = float(checks.at_least("damping", damping, 1e-300))
    unit = linalg.power_of_two(damping**0.5)  # J/unit, in which ε is of order one
    z = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1

    def gram(v: Tensor) -> Tensor:
        return _gram(model, x, y, v.view_as(x), loss, unit).reshape(-1)

    w = linalg.solve_cg(gram, z.reshape(-1), damping / unit**2, 1e-3, cg_steps).u.view_as(x)
    trace = linalg.dot(z.reshape(-1), w.reshape(-1))
    if not trace > 0:
        raise ValueError(f"damping={damping:g} is out of range: λ/ε leaves {x.dtype}")
    held = _square([part / unit for part in _rmatvec(model, x, y, w, loss)]) / trace
    return held - held.detach() - math.log(trace) + 2 * math.log(unit)


def _check(model: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> None:
    """Refuses what would make the two orders of differentiation disagree, and networks that draw."""
    checks.deterministic(model)
    with torch.enable_grad(), Watch() as watch:
        value = loss(model(x.detach().clone().requires_grad_().clone()), y)
    if value.ndim:
        raise ValueError(f"loss returned shape {tuple(value.shape)}; it must return one number (reduce it)")
    if watch.drew:
        raise ValueError(checks.DRAWS)
    if watch.needs.stopped or watch.needs.escaping - {BELOW}:  # PyTorch's own losses clamp a variance so
        raise ValueError(
            "model or loss takes values out of the graph (detach, no_grad, item, an autograd.Function of its own): a "
            "penalty needs derivatives through all of it"
        )


def _rmatvec(model: nn.Module, x: Tensor, y: Tensor, w: Tensor, loss: Loss, graph: bool = True) -> list[Tensor]:
    with torch.enable_grad(), elementary():
        x = x.detach().clone().requires_grad_()
        value = loss(model(x.clone()), y)  # a clone: the forward may change it in place
        (by_x,) = torch.autograd.grad(value, x, create_graph=True, materialize_grads=True)
        if by_x.grad_fn is None:
            raise ValueError("∂²L/∂x∂θ is zero: loss must depend on x and on θ, and on both together")
        return list(torch.autograd.grad((by_x * w).sum(), _theta(model), create_graph=graph, materialize_grads=True))


def _gram(model: nn.Module, x: Tensor, y: Tensor, v: Tensor, loss: Loss, unit: float = 0.0) -> Tensor:
    """J Jᵀv/unit², of x's shape, without a graph in θ; J Jᵀv/‖Jᵀv‖ without a unit, up to a factor of two."""
    Jv = [part.detach() for part in _rmatvec(model, x, y, v, loss, graph=False)]
    by = unit or linalg.power_of_two(_norm(Jv))
    with torch.enable_grad(), elementary():
        x = x.detach().clone().requires_grad_()
        by_theta = torch.autograd.grad(
            loss(model(x.clone()), y), _theta(model), create_graph=True, materialize_grads=True
        )
        inner = torch.stack([(g * (part / by)).sum() for g, part in zip(by_theta, Jv, strict=True)]).sum()
        (product,) = torch.autograd.grad(inner, x, materialize_grads=True)
    return product / unit if unit else product


def _theta(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def _norm(parts: Iterable[Tensor]) -> float:
    return math.hypot(*(linalg.norm(part.detach()) for part in parts))


def _square(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack([part.square().sum() for part in parts]).sum()


def _direction(u: Tensor) -> Tensor:
    """u/‖u‖; zero where u is."""
    u = u / linalg.unit_of(u)
    return u / (linalg.norm(u) or 1.0)
