"""The box, total variation and a Gaussian prior: the minimisers that they promise."""

import pytest
import torch
from torch.nn import functional as F

import i2f
from conftest import build_crop, normal
from i2f import metrics, perturb
from i2f.attacks.prior import SMOOTHING, lagged_curvature, total_variation
from i2f.core.gradient import GradientMap


@pytest.mark.parametrize("method", ["gauss-newton", "dgl", "gs", "dlg"])
def test_box_holds_at_every_iterate(mlp, backward, method):
    model, x, y = mlp
    x = x.round()  # the truth sits on the bounds
    g = backward(model, x, y)
    seen = []
    found = i2f.invert(
        model,
        g + perturb.gaussian(g, 1e-2, seed=0),
        y,
        x.shape,
        method=method,
        box=True,
        steps=15,
        start="normal",
        callback=lambda at: seen.append(at.x),
    )
    assert len(seen) > 2
    assert all(float(z.min()) >= 0 and float(z.max()) <= 1 for z in [*seen, found.x])


def test_box_is_the_constrained_minimiser_and_not_a_clamped_one(mlp, backward):
    """Against projected gradient descent, which shares no code with the attack's steps."""
    model, x, y = mlp
    x = x.round()
    g = backward(model, x, y)
    sent = g + perturb.gaussian(g, 3e-2, seed=2)
    found = i2f.invert(model, sent, y, x.shape, box=True)
    z, parameters = x.clone(), list(model.parameters())
    for _ in range(20_000):
        z.requires_grad_()
        parts = torch.autograd.grad(F.cross_entropy(model(z), y), parameters, create_graph=True)
        misfit = (torch.cat([part.flatten() for part in parts]) - sent).square().sum() / 2
        z = (z.detach() - 0.1 * torch.autograd.grad(misfit, z)[0]).clamp(0, 1)
        if float((z - found.x).abs().max()) < 1e-7:
            break
    torch.testing.assert_close(found.x, z, rtol=0, atol=1e-6)
    free = i2f.invert(model, sent, y, x.shape)
    assert found.converged
    assert int(((found.x == 0) | (found.x == 1)).sum()) >= 2
    assert found.loss < float((backward(model, free.x.clamp(0, 1), y) - sent).square().sum())


def test_box_helps_a_noisy_attack(crop, backward):
    model, x, y = crop
    sent = backward(model, x, y)
    sent = sent + perturb.gaussian(sent, 1e-4, seed=0)
    free = i2f.invert(model, sent, y, x.shape)
    boxed = i2f.invert(model, sent, y, x.shape, box=True)
    assert boxed.converged
    assert float(metrics.mse(boxed.x, x)) < float(metrics.mse(free.x.clamp(0, 1), x))


def test_total_variation_is_what_it_says():
    x = torch.tensor([[[[0.0, 1.0, 1.0], [0.0, 1.0, 0.5]]]], dtype=torch.float64)
    rows, columns = 0.5 / 3, (1 + 0 + 1 + 0.5) / 4
    assert float(total_variation(x)) == pytest.approx(rows + columns, abs=2 * SMOOTHING)
    assert float(total_variation(torch.full_like(x, 0.3))) == 0


def test_lagged_curvature_is_symmetric_semidefinite_and_gives_the_gradient():
    x = normal(1, 2, 4, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(total_variation(x), x)
    K = lagged_curvature(x.detach())
    torch.testing.assert_close(K(x.detach().reshape(-1)), gradient.reshape(-1))
    matrix = K(torch.eye(40, dtype=torch.float64))
    torch.testing.assert_close(matrix, matrix.T)
    assert float(torch.linalg.eigvalsh(matrix)[0]) >= -1e-12
    hessian = torch.autograd.functional.hessian(total_variation, x.detach()).view(40, 40)
    assert float(torch.linalg.eigvalsh(matrix - hessian)[0]) >= -1e-9  # never flatter than TV is


@pytest.mark.parametrize("tiny", ["conv"], indirect=True)
@pytest.mark.parametrize("box", [False, True])
def test_total_variation_reaches_a_minimum(tiny, backward, box):
    """Stationary for ‖∇L − g‖² + tv·TV, by the gradient of that sum; and smoother than without."""
    model, x, y = tiny
    g = backward(model, x, y)
    sent = g + perturb.gaussian(g, 1e-3, seed=0)
    found = i2f.invert(model, sent, y, x.shape, tv=1e-2, box=box, steps=200)
    z = found.x.clone().requires_grad_()
    gmap = GradientMap(model, y)
    objective = (gmap(z, create_graph=True) - sent).square().sum() + 1e-2 * total_variation(z)
    (slope,) = torch.autograd.grad(objective, z)
    held = (z <= 0) & (slope > 0) | (z >= 1) & (slope < 0) if box else torch.zeros_like(z, dtype=torch.bool)
    assert found.loss == pytest.approx(objective.item(), rel=1e-9)
    assert float(slope[~held].norm()) <= 1e-5
    assert float(total_variation(found.x)) < float(total_variation(i2f.invert(model, sent, y, x.shape, box=box).x))


@pytest.mark.parametrize(("network", "damping"), [("crop", 1e-3), ("crop", 1.0), ("lenet", 1e-3)])
def test_gaussian_prior_moves_the_attack_as_damped_influence_says(lenet, digits, network, damping):
    """The MAP attacker lands (J Jᵀ + εI)⁻¹(Jδ + ε(mean − x₀)) away: Eq. 4 damped, where the prior's mean is the truth,
    and the prior's pull besides, where it is not."""
    model, x, y = build_crop() if network == "crop" else (lenet, digits[0][:1], digits[1][:1])
    J = i2f.GradientJacobian(model, x, y)
    delta = perturb.gaussian(J.gradient, 1e-12, seed=0)
    for mean in (x, x + 1e-4 * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)):
        found = i2f.invert(model, J.gradient + delta, y, x.shape, ridge=damping, mean=mean, start=x)
        pull = torch.linalg.solve(
            J.gram() + damping * torch.eye(x.numel(), dtype=x.dtype), damping * (mean - x).reshape(-1)
        )
        predicted = i2f.influence(J, delta, damping).displacement + pull
        assert found.converged
        assert float((found.x - x).reshape(-1).sub(predicted).norm()) <= 1e-3 * float(predicted.norm())


@pytest.mark.parametrize("tiny", ["conv"], indirect=True)
def test_priors_join_in_every_method(tiny, backward):
    """The minimum of distance, total variation and Gaussian prior together: found by one method, by the gradient of
    that sum, and approached by the other."""
    model, x, y = tiny
    sent = backward(model, x, y)
    prior = {"tv": 1e-2, "ridge": 1e-2, "mean": torch.full_like(x, 0.3)}
    second = i2f.invert(model, sent, y, x.shape, **prior)
    first = i2f.invert(model, sent, y, x.shape, method="dgl", start="gray", lr=1e-2, steps=200, **prior)
    for found in (second, first):
        z = found.x.clone().requires_grad_()
        distance = (GradientMap(model, y)(z, create_graph=True) - sent).square().sum()
        objective = distance + 1e-2 * total_variation(z) + 1e-2 * (z - 0.3).square().sum()
        (slope,) = torch.autograd.grad(objective, z)
        assert found.loss == pytest.approx(objective.item(), rel=1e-9)
        assert float(slope.norm()) <= 1e-5 or found is first
    assert second.loss <= first.loss <= 1.05 * second.loss
    at_truth = i2f.invert(model, sent, y, x.shape, start=x, **prior)  # where the gradient is matched, and no minimum
    assert at_truth.steps > 0
    assert at_truth.loss == pytest.approx(second.loss, rel=1e-3)
