"""Attacks find the image, or say how far they came; I²F meets a real inversion."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import i2f
from conftest import Trace
from i2f import metrics, perturb
from i2f.attacks.descent import _cosine
from i2f.attacks.match import Match
from i2f.attacks.point import Point
from i2f.attacks.prior import Prior
from i2f.attacks.problem import Problem
from i2f.core.examination import check
from i2f.core.gradient import GradientMap


@pytest.mark.parametrize("i", range(2))
def test_digit_to_machine_precision(lenet, digits, backward, i):
    x, y = digits[0][i : i + 1], digits[1][i : i + 1]
    found = i2f.invert(lenet, backward(lenet, x, y), y, x.shape, seed=i)
    assert float(metrics.mse(found.x, x)) <= 1e-10
    assert found.steps <= 10
    assert found.converged
    assert found.relative_residual <= 1e-10


def test_small_colour_image(backward):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 5, padding=2), nn.Sigmoid(), nn.Conv2d(8, 8, 5, stride=2, padding=2), nn.Sigmoid()
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10)).double().eval()
    for p in model.parameters():
        nn.init.uniform_(p, -0.5, 0.5)
    x, y = torch.rand(1, 3, 8, 8, dtype=torch.float64), torch.tensor([3])
    found = i2f.invert(model, backward(model, x, y), y, x.shape, steps=15)
    assert float(metrics.mse(found.x, x)) <= 1e-8


@pytest.mark.parametrize("tiny", ["mlp", "conv", "norms", "tied", "relu", "pair"], indirect=True)
def test_small_networks(tiny, backward):
    model, x, y = tiny
    found = i2f.invert(model, backward(model, x, y), y, x.shape, steps=15)
    assert float(metrics.mse(found.x, x).max()) <= 1e-20


def test_linear_model(digits, backward):
    """Where ∇_W L / ∇_b L gives the image exactly, so must the attack."""
    x, y = digits[0][:1], digits[1][:1]
    model = i2f.models.build("linear", "mnist", "uniform", seed=1, normalize=False).double()
    found = i2f.invert(model, backward(model, x, y), y, x.shape)
    torch.testing.assert_close(found.x, x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("i", [3])
def test_influence_is_right_about_a_real_inversion(lenet, digits, i):
    """Gaussian noise of variance 1e-5: predicted and measured RMSE agree within 2%; the bound lies far below."""
    x, y = digits[0][i : i + 1], digits[1][i : i + 1]
    J = i2f.GradientJacobian(lenet, x, y)
    delta = perturb.gaussian(J.gradient, variance=1e-5, seed=i)
    found = i2f.invert(lenet, J.gradient + delta, y, x.shape)
    measured = float(metrics.rmse(found.x, x))
    assert found.converged
    assert measured == pytest.approx(i2f.influence(J, delta).rmse, rel=0.02)
    assert i2f.lower_bound(J, delta).rmse < measured / 50


@pytest.mark.parametrize("tiny", ["mlp", "conv", "attention", "relu", "pair"], indirect=True)
def test_objective_never_increases(tiny, backward):
    model, x, y = tiny
    trace = Trace()
    noisy = backward(model, x, y)
    noisy = noisy + perturb.gaussian(noisy, 1e-2, seed=0)
    found = i2f.invert(model, noisy, y, x.shape, steps=15, callback=trace)
    assert trace.steps == list(range(found.steps + 1))
    assert found.steps > 1
    assert all(later < earlier for earlier, later in zip(trace.losses, trace.losses[1:], strict=False))
    assert trace.losses[-1] == found.loss


def test_dgl_keeps_its_best_iterate(mlp, backward):
    """With a step too long Adam overshoots: its last iterate is not its best."""
    model, x, y = mlp
    trace = Trace()
    target = backward(model, x, y)
    found = i2f.invert(model, target, y, x.shape, method="dgl", steps=60, lr=0.5, seed=3, callback=trace)
    assert found.loss == min(trace.losses) < 0.5 * trace.losses[-1]
    assert float((backward(model, found.x, y) - target).square().sum()) == pytest.approx(found.loss, rel=1e-9)


def test_callback_that_is_an_empty_list_is_called(mlp, backward):
    class Record(list):
        def __call__(self, iterate):
            self.append(iterate)

    model, x, y = mlp
    record = Record()
    i2f.invert(model, backward(model, x, y), y, x.shape, steps=2, callback=record)
    assert len(record) == 3


def test_dgl_finds_the_image(mlp, backward):
    """Two evaluations a step: a gradient and a product."""
    model, x, y = mlp
    found = i2f.invert(model, backward(model, x, y), y, x.shape, method="dgl", steps=300)
    assert float(metrics.mse(found.x, x)) <= 1e-10
    assert found.evaluations == 2 * 300 + 1


@pytest.mark.parametrize("masked", [False, True])
def test_tags_loss(mlp, backward, masked):
    model, x, y = mlp
    target, trace = backward(model, x, y), Trace()
    mask = torch.arange(len(target)) % 2 == 0 if masked else torch.ones_like(target, dtype=torch.bool)
    found = i2f.invert(model, target, y, x.shape, method="dgl", l1=0.01, mask=mask, steps=5, callback=trace)
    for loss, image in zip(trace.losses, trace.images, strict=True):
        residual = (backward(model, image, y) - target)[mask]
        assert loss == pytest.approx(float(residual @ residual) + 0.01 * float(residual.abs().sum()))
    assert found.loss == min(trace.losses)
    with pytest.raises(ValueError, match="l1"):
        i2f.invert(model, target, y, x.shape, method="dgl", l1=-1.0)


def test_gauss_newton_ends_at_a_stationary_point(mlp, backward):
    """With noise a residual r stays; the objective's gradient J r vanishes all the same."""
    model, x, y = mlp
    target = backward(model, x, y)
    target = target + perturb.gaussian(target, 1e-2, seed=0)
    found = i2f.invert(model, target, y, x.shape)
    assert found.converged
    assert found.relative_residual > 1e-3
    assert float(i2f.GradientJacobian(model, found.x, y).matvec(backward(model, found.x, y) - target).norm()) <= 1e-6


@pytest.mark.parametrize("tiny", ["mlp", "norms"], indirect=True)
def test_gradient_of_another_model(tiny, backward):
    model, x, y = tiny
    target = backward(model, x, y)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.flip(0))
    found = i2f.invert(model, target, y, x.shape, steps=300)
    assert found.reason.startswith(("stationary", "stalled"))
    assert found.relative_residual > 0.05


@pytest.mark.parametrize("tiny", ["mlp", "conv", "pair"], indirect=True)
def test_float32(tiny):
    model, x, y = tiny
    model = model.float()
    found = i2f.invert(model, i2f.GradientJacobian(model, x, y).gradient, y, x.shape)
    assert found.x.dtype == torch.float32
    assert float(metrics.mse(found.x.double(), x).max()) <= 1e-8
    assert found.converged


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tiny", ["relu"], indirect=True)
def test_kinks_never_make_it_worse(tiny, seed):
    model, x, y = tiny
    target = perturb.gaussian(torch.zeros(344, dtype=torch.float64), 0.1, seed=seed)  # no image has this gradient
    trace = Trace()
    found = i2f.invert(model, target, y, x.shape, seed=seed, steps=30, callback=trace)
    assert found.loss < trace.losses[0]


@pytest.mark.parametrize("tiny", ["relu"], indirect=True)
def test_dead_start(guard, tiny, backward):
    """Every ReLU is off at the start, so J = 0 there: no way down, and the attack says so."""
    model, x, y = tiny
    target, trace = backward(model, x, y), Trace()
    with torch.no_grad():
        model[0].bias.fill_(-100)
    found = i2f.invert(model, target, y, x.shape, callback=trace)
    assert torch.equal(found.x, trace.images[0])
    assert found.reason.startswith(("stationary", "stalled"))


def test_operation_without_forward_mode(cubic, backward):
    model, x, y = cubic
    found = i2f.invert(model, backward(model, x, y), y, x.shape)
    assert found.relative_residual <= 1e-10


def test_fused_attention(transformer, backward):
    model, x, y = transformer
    trace = Trace()
    i2f.invert(model, backward(model, x, y), y, x.shape, steps=3, callback=trace)
    assert trace.losses[-1] < trace.losses[0]


WEIGHTS = torch.arange(1, 6, dtype=torch.float64)  # a loss may hold tensors of its own
LOSSES = {"weighted": nn.CrossEntropyLoss(weight=WEIGHTS), "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1)}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_other_losses(mlp, backward, loss):
    model, x, y = mlp
    found = i2f.invert(model, backward(model, x, y, loss), y, x.shape, loss=loss)
    assert float(metrics.mse(found.x, x)) <= 1e-10


def test_float_targets(mlp, backward):
    model, x, _ = mlp
    y = torch.linspace(-1, 1, 5, dtype=torch.float64)[None]
    found = i2f.invert(model, backward(model, x, y, F.mse_loss), y, x.shape, loss=F.mse_loss)
    assert float(metrics.mse(found.x, x)) <= 1e-10


@pytest.mark.parametrize("tiny", ["mlp", "conv", "attention", "norms"], indirect=True)
def test_second_order_term_is_what_gauss_newton_leaves_out(tiny, twin, backward):
    """S v = d/dt J(x + tv) r with r held still, here by differences of a J that shares no code with the package."""
    model, x, y = tiny
    gmap, v, h = GradientMap(model, y), torch.linspace(-1, 1, x.numel(), dtype=x.dtype), 1e-3
    target = backward(model, x.flip(-1), y)
    check(gmap, x, "x")
    point = Point(Problem(gmap, target, x, 1, 0.0, Match(gmap.size), Prior(0.0, 0.0, x)), x)
    ahead, behind = (twin(model, x + k * h * v.view_as(x), y) @ point.residual for k in (1, -1))
    torch.testing.assert_close(point.slope(), twin(model, x, y) @ point.residual, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(point.second_order_term(v), (ahead - behind) / (2 * h), rtol=1e-4, atol=1e-6)


def test_large_noise_is_no_obstacle(lenet, digits):
    """Noise that leaves a residual no image explains: Gauss–Newton alone needs over fifty steps here."""
    x, y = digits[0][:1], digits[1][:1]
    J = i2f.GradientJacobian(lenet, x, y)
    found = i2f.invert(lenet, J.gradient + perturb.eigenvector(J, index=99, norm=5.0), y, x.shape, steps=20)
    assert found.converged
    assert found.loss < 0.2 * 25


def test_cosine_distance_keeps_its_digits_in_float32():
    """1 − cos of a small angle t is t²/2; taken as a difference it would be 0 or a unit of rounding here."""
    a = torch.tensor([1.0, 2.0, 2.0])
    b = a + 1e-5 * torch.tensor([2.0, 1.0, -2.0])  # orthogonal to a and as long: t = 1e-5
    assert float(_cosine(a, b)) == pytest.approx(5e-11, rel=0.05)
