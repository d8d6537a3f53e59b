"""Penalties are what they say, and so are their derivatives by θ."""

import pytest
import torch

import i2f
from i2f import penalty, spectrum

SMOOTH = ["mlp", "conv", "norms", "tied", "attention"]


def _values(model, x, y):
    return spectrum.decompose(i2f.GradientJacobian(model, x, y)).values


def _slope(model, x, y, measure, h=1e-5):
    """The derivative of a function of the model along a fixed random direction in θ, by central differences."""
    generator = torch.Generator().manual_seed(1)
    steps = [h * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]
    found = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, step in zip(model.parameters(), steps, strict=True):
                p += sign * step
        found.append(measure())
        with torch.no_grad():
            for p, step in zip(model.parameters(), steps, strict=True):
                p -= sign * step
    return (found[0] - found[1]) / 2, [step / h for step in steps], h


def _along(model, term, steps):
    gradients = torch.autograd.grad(term, list(model.parameters()), materialize_grads=True)
    return sum(float((g * s).sum()) for g, s in zip(gradients, steps, strict=True))


@pytest.mark.parametrize("tiny", SMOOTH, indirect=True)
def test_sensitivity_is_the_length_of_a_product(tiny):
    model, x, y = tiny
    J = i2f.GradientJacobian(model, x, y)
    w = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    found = penalty.sensitivity(model, x, y, w)
    assert float(found.detach()) == pytest.approx(float(J.rmatvec(w.reshape(-1)).square().sum()), rel=1e-10)


@pytest.mark.parametrize("tiny", SMOOTH, indirect=True)
def test_the_bounds_term_is_the_largest_eigenvalue(tiny):
    model, x, y = tiny
    generator = torch.Generator().manual_seed(0)
    slope, steps, h = _slope(model, x, y, lambda: float(_values(model, x, y)[0].log()))
    term = penalty.bound(model, x, y, power_steps=200, generator=generator)
    assert float(term.detach().exp()) == pytest.approx(float(_values(model, x, y)[0]), rel=1e-6)
    assert _along(model, term, steps) == pytest.approx(slope / h, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("tiny", ["mlp", "attention"], indirect=True)
def test_the_bayes_term_has_the_derivative_of_the_trace(tiny):
    """Over all signs z, zᵀA⁻¹z has the mean tr A⁻¹; here with unit vectors, whose sum it is exactly."""
    model, x, y = tiny
    damping = 0.1 * float(_values(model, x, y)[0])
    total = 0.0
    slope, steps, h = _slope(model, x, y, lambda: float((1 / (_values(model, x, y) + damping)).sum()))
    A = i2f.GradientJacobian(model, x, y).gram() + damping * torch.eye(x.numel(), dtype=x.dtype)
    for w in torch.linalg.inv(A):
        total -= _along(model, penalty.sensitivity(model, x, y, w.view_as(x)), steps)
    assert total == pytest.approx(slope / h, rel=1e-4)
    term = penalty.bayes(model, x, y, damping, cg_steps=300, generator=torch.Generator().manual_seed(0))
    z = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(0)).to(x) * 2 - 1
    w = torch.linalg.solve(A, z.reshape(-1))
    assert float(term.detach()) == pytest.approx(-float((z.reshape(-1) @ w).log()), rel=1e-3)
    wanted = _along(model, penalty.sensitivity(model, x, y, w.view_as(x)), steps) / float(z.reshape(-1) @ w)
    assert _along(model, term, steps) == pytest.approx(wanted, rel=1e-2)


def test_descent_on_the_term_lowers_the_eigenvalue(mlp):
    model, x, y = mlp
    before = float(_values(model, x, y)[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        penalty.bound(model, x, y, generator=torch.Generator().manual_seed(0)).backward()
        optimizer.step()
    assert float(_values(model, x, y)[0]) < 0.9 * before
