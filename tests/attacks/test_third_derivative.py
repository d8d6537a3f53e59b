"""Networks without a third derivative are attacked without the second-order term."""

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

import i2f
from conftest import build_tiny, normal
from i2f.attacks import steps
from i2f.attacks.krylov import KrylovSolver
from i2f.attacks.match import Match
from i2f.attacks.point import Point
from i2f.attacks.prior import Prior
from i2f.attacks.problem import Problem
from i2f.core.examination import check
from i2f.core.gradient import GradientMap
from i2f.core.trust import may_ignore_stops

D = torch.float64


class CubeDerivative(torch.autograd.Function):
    """3x² · g, which can be differentiated once."""

    @staticmethod
    def forward(ctx, x, g):
        ctx.save_for_backward(x, g)
        return 3 * x**2 * g

    @staticmethod
    @once_differentiable
    def backward(ctx, by_output):
        x, g = ctx.saved_tensors
        return 6 * x * g * by_output, 3 * x**2 * by_output


class TwiceCube(torch.autograd.Function):
    """x³ with two derivatives and no third."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, by_output):
        return CubeDerivative.apply(ctx.saved_tensors[0], by_output)


class FailingSquare(torch.autograd.Function):
    """6x · g, whose own derivative raises, as PyTorch's batch_norm does."""

    @staticmethod
    def forward(ctx, x, g):
        return 6 * x * g

    @staticmethod
    def backward(ctx, by_output):
        raise RuntimeError("this does not support 3rd+ order derivatives")


class CubeDerivativeThatRaises(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, g):
        ctx.save_for_backward(x, g)
        return 3 * x**2 * g

    @staticmethod
    def backward(ctx, by_output):
        x, g = ctx.saved_tensors
        return FailingSquare.apply(x, g) * by_output, 3 * x**2 * by_output


class RaisingCube(TwiceCube):
    @staticmethod
    def backward(ctx, by_output):
        return CubeDerivativeThatRaises.apply(ctx.saved_tensors[0], by_output)


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.fixture(params=[TwiceCube, RaisingCube], ids=["left out", "raises"])
def twins(request):
    """(network with two derivatives, the same with all, x, y)."""
    pair = [build_tiny("mlp") for _ in range(2)]
    for (model, _, _), function in zip(pair, (request.param.apply, lambda x: x**3), strict=True):
        model[1] = Call(function)
    return pair[0][0], pair[1][0], *pair[0][1:]


@pytest.mark.parametrize("krylov", [False, True])
def test_goes_on_without_a_third_derivative(twins, backward, monkeypatch, krylov):
    if krylov:
        monkeypatch.setattr(steps.StepSolver, "fits", lambda problem: False)
    model, twin, x, y = twins
    sent = backward(twin, x, y)
    start = x + 0.1 * normal(*x.shape)
    for target in (sent, sent + 1e-3 * normal(len(sent))):
        found, other = (i2f.invert(m, target, y, x.shape, start=start, steps=60) for m in (model, twin))
        torch.testing.assert_close(found.x, other.x, rtol=0, atol=1e-6)
        assert "without the second-order term" in found.reason
        assert "second-order" not in other.reason


@pytest.mark.parametrize("prior", [Prior(0.0, 0.0, torch.zeros(())), Prior(0.0, 0.3, torch.zeros((), dtype=D))])
def test_a_point_without_a_third_derivative(twins, backward, prior):
    """Its slope is the twin's; its model of the objective is Gauss–Newton's, whichever is asked for."""
    model, twin, x, y = twins
    target = backward(twin, x.flip(-1), y)

    def point(model):
        gmap = GradientMap(model, y)
        check(gmap, x, "x")
        if gmap.stops:
            may_ignore_stops(gmap, x)
        return Point(Problem(gmap, target, x, 1, 0.0, Match(gmap.size), prior), x)

    here, there, v = point(model), point(twin), normal(x.numel(), seed=1)
    torch.testing.assert_close(here.slope(), there.slope())
    torch.testing.assert_close(here.half_hessian(v, newton=True), there.half_hessian(v))
    assert here.predicted_decrease(v)[0] == pytest.approx(there.predicted_decrease(v)[0])
    assert here.predicted_decrease(v)[0] == pytest.approx(here.predicted_decrease(v)[1])
    assert there.predicted_decrease(v)[0] != pytest.approx(there.predicted_decrease(v)[1])
    assert not here.order.third
    solvers = KrylovSolver(), KrylovSolver()
    s = [solver.solve(p, -p.slope(), 1.0, False)[0] for solver, p in zip(solvers, (here, there), strict=True)]
    pairs = zip(solvers, (here, there), strict=True)
    corrections = [solver.correct(p, p.at(s[1]), s[1], 1.0, False) for solver, p in pairs]
    torch.testing.assert_close(s[0], s[1])
    torch.testing.assert_close(corrections[0], corrections[1])


def test_running_out_of_memory_is_not_a_missing_derivative(mlp, monkeypatch):
    model, x, y = mlp
    gmap = GradientMap(model, y)
    point = Point(Problem(gmap, gmap(x.flip(-1)), x, 1, 0.0, Match(gmap.size), Prior(0.0, 0.0, x)), x)

    def fail(weights, create_graph=False):
        if create_graph:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return torch.zeros_like(x)

    monkeypatch.setattr(point, "_backward", fail)
    with pytest.raises(RuntimeError, match="allocate memory"):
        point.slope()


class WrittenOut(nn.Module):
    """InstanceNorm2d in elementary operations."""

    def forward(self, x):
        centred = x - x.mean((2, 3), keepdim=True)
        return centred / (centred.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()


def test_instance_norm(backward):
    """The input's mean and size are lost by channel after the convolution, not the image itself."""
    nets = []
    for norm in (nn.InstanceNorm2d(3), WrittenOut()):
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 3, 3, padding=1), norm, nn.Tanh(), nn.Flatten(), nn.Linear(48, 4)
        nets.append(nn.Sequential(*layers).double().eval())
    x, y = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=D), torch.tensor([1])
    sent = backward(nets[1], x, y)
    found = [i2f.invert(net, sent, y, x.shape, start=x + 0.05 * normal(*x.shape), steps=60) for net in nets]
    assert all(f.matched for f in found)
    torch.testing.assert_close(found[0].x, found[1].x, rtol=0, atol=1e-5)
