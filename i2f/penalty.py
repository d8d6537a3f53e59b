"""Privacy as a differentiable term of the loss: how sharply a sample's gradient shows its input, as a function of θ.

Both terms are built from q(θ) = ‖Jᵀw‖² with w held fixed, whose derivative by θ takes one more backward pass:

    bound       λ_max(J Jᵀ) = max_{‖u‖=1} ‖Jᵀu‖², at the u of a few power steps: what I_lb divides by
    bayes       tr((J Jᵀ + εI)⁻¹) = E[zᵀw], w = (J Jᵀ + εI)⁻¹z: the Bayes error over σ², which for ε → 0 is E[I²]/σ². As
                d(A⁻¹) = −A⁻¹ dA A⁻¹, its derivative is that of −‖Jᵀw‖², w held fixed
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2f import checks, linalg
from i2f.gradient import Loss, elementary


def sensitivity(model: nn.Module, x: Tensor, y: Tensor, w: Tensor, loss: Loss = F.cross_entropy) -> Tensor:
    """‖Jᵀw‖² = ‖∇_θ⟨∇_x L, w⟩‖², a scalar with its graph in θ. x: (n, ...), one gradient of all; w: of x's shape."""
    Jw = _rmatvec(model, x, y, w, loss)
    return torch.stack([part.square().sum() for part in Jw]).sum()


def bound(
    model: nn.Module, x: Tensor, y: Tensor, power_steps: int = 3, loss: Loss = F.cross_entropy,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """log λ_max(J Jᵀ) from below, differentiable in θ: minimising it raises I_lb = ‖Jδ‖/λ_max for noise of one size.

    Cost: some 2·power_steps + 4 gradients.
    """
    u = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    for _ in range(power_steps):
        u = _gram(model, x, y, u / u.norm().clamp_min(TINY), loss)
    return sensitivity(model, x, y, u / u.norm().clamp_min(TINY), loss).clamp_min(TINY).log()


TINY = 1e-30  # keeps the logarithm of a J that vanishes finite


def bayes(
    model: nn.Module, x: Tensor, y: Tensor, damping: float, cg_steps: int = 20, loss: Loss = F.cross_entropy,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """−log tr((J Jᵀ + εI)⁻¹), one draw: a term whose gradient by θ is that of the logarithm, w held fixed. Minimising
    it raises the Bayes error at ε = σ²/τ² > 0. Cost: some 2·cg_steps + 4 gradients.
    """
    checks.at_least("damping", damping, 1e-300)
    z = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
    solved = linalg.solve_cg(
        lambda v: _gram(model, x, y, v.view_as(x), loss).reshape(-1), z.reshape(-1), damping, 1e-3, cg_steps
    )
    w = solved.u.view_as(x).to(x)
    trace = float((z * w).sum())
    held = sensitivity(model, x, y, w, loss)
    return held / trace - held.detach() / trace - torch.log(torch.tensor(trace, dtype=x.dtype))


def _rmatvec(model: nn.Module, x: Tensor, y: Tensor, w: Tensor, loss: Loss, graph: bool = True) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.enable_grad(), elementary():
        x = x.detach().requires_grad_()
        (by_x,) = torch.autograd.grad(loss(model(x), y), x, create_graph=True)
        return list(torch.autograd.grad((by_x * w).sum(), parameters, create_graph=graph, materialize_grads=True))


def _gram(model: nn.Module, x: Tensor, y: Tensor, v: Tensor, loss: Loss) -> Tensor:
    """J Jᵀ v, of x's shape, without a graph in θ."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    v = [part.detach() for part in _rmatvec(model, x, y, v, loss, graph=False)]
    with torch.enable_grad(), elementary():
        x = x.detach().requires_grad_()
        by_theta = torch.autograd.grad(loss(model(x), y), parameters, create_graph=True, materialize_grads=True)
        inner = torch.stack([(g * part).sum() for g, part in zip(by_theta, v, strict=True)]).sum()
        return torch.autograd.grad(inner, x)[0]
