"""Attacks on what other people bring: losses of any scale, networks without a third derivative, inputs in every usual
form. What is right comes from a closed form, from a plain backward(), or from a twin without the feature."""

import hashlib
import itertools
import math
import signal
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

import i2f
from conftest import build_tiny
from i2f import metrics
from i2f.attacks import steps
from i2f.attacks.krylov import KrylovSolver
from i2f.attacks.labels import nearest_counts, recover_labels
from i2f.attacks.match import Match
from i2f.attacks.point import Point
from i2f.attacks.prior import Prior
from i2f.attacks.problem import Problem
from i2f.core.examination import check
from i2f.core.gradient import GradientMap
from i2f.core.trust import may_ignore_stops

D = torch.float64


def noise(*shape, seed=0, dtype=D):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mse(found, x):
    return float(metrics.mse(found.x.double(), x.double()).mean())


@pytest.fixture
def guard():
    """A loop without an end becomes a failure."""

    def stop(*_):
        raise TimeoutError("the attack did not end")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


# the loss's scale

ATTACKS = {
    "gauss-newton": {},
    "box": {"box": True},
    "krylov": {},
    "prior": {"ridge": 1e-2},
    "whitened": {"covariance": 1e-4},
    "dgl": {"method": "dgl", "steps": 60},
    "tag": {"method": "dgl", "steps": 60, "l1": 1e-2, "ridge": 1e-3},
    "idlg": {"method": "idlg", "steps": 60, "y": None},
    "dlg": {"method": "dlg", "steps": 5, "box": True},
    "gs": {"method": "gs", "steps": 60, "ridge": 1e-3},
}
POWERS = {"ridge": 2, "covariance": 2, "l1": 1}


def at_scale(backward, c, dtype, attack):
    """The attack on c times the loss, with the noise, and the weights beside a squared distance, scaled along."""
    model, x, y = build_tiny("mlp")
    sent = backward(model, x, y)
    sent = c * (sent + 1e-2 * noise(len(sent)))
    options = dict(ATTACKS[attack])
    for name, power in POWERS.items():
        if name in options and attack != "gs":
            options[name] *= c**power
    if attack == "whitened":
        options["covariance"] = options["covariance"] * torch.linspace(0.5, 2, len(sent), dtype=D)
    found = i2f.invert(
        model.to(dtype),
        sent.to(dtype),
        options.pop("y", y),
        x.shape,
        loss=lambda o, t: c * F.cross_entropy(o, t),
        **options,
    )
    return found, mse(found, x)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(
    ("dtype", "c"),
    [
        (D, 1e-100),
        (D, 1e-30),
        (D, 1e-15),
        (D, 1e30),
        (torch.float32, 1e-15),
        (torch.float32, 1e-12),
        (torch.float32, 1e15),
    ],
)
def test_no_answer_depends_on_the_scale_of_the_loss(backward, monkeypatch, attack, dtype, c):
    if attack == "krylov":
        monkeypatch.setattr(steps.StepSolver, "fits", lambda problem: False)
    (one, error), (found, other) = at_scale(backward, 1.0, dtype, attack), at_scale(backward, c, dtype, attack)
    assert other == pytest.approx(error, rel=1e-6 if dtype == D else 1e-3)
    assert found.loss == pytest.approx(one.loss * (1 if attack in ("whitened", "gs") else c**2), rel=1e-3)
    assert found.relative_residual == pytest.approx(one.relative_residual, rel=1e-3)
    assert (found.converged, found.matched) == (one.converged, one.matched)


def test_a_callback_sees_the_users_loss(backward):
    model, x, y = build_tiny("mlp")
    c, seen = 1e-20, []
    loss = lambda o, t: c * F.cross_entropy(o, t)  # noqa: E731
    sent = backward(model, x.flip(-1), y, loss)
    i2f.invert(model, sent, y, x.shape, loss=loss, steps=2, callback=seen.append)
    for at in seen:
        assert at.loss == pytest.approx(float((backward(model, at.x, y, loss) - sent).square().sum()), rel=1e-9)


def test_neighbours_of_other_scales(backward):
    """Gradients of very different sizes, of one loss, in one call of a first-order method: each as if it were alone."""
    model, x, y = build_tiny("mlp")
    model = model.float()
    g = backward(model, x.float(), y)
    sent = torch.stack([g * 3e37, g, g * 1e-12, 2 * g, g])
    for method in ("dgl", "gauss-newton"):
        together = i2f.invert_many(model, sent, y.expand(5, 1), x.shape, method=method, steps=20, seed=3)
        for one, found in zip(sent, together, strict=True):
            alone = i2f.invert(model, one, y, x.shape, method=method, steps=20, seed=3)
            torch.testing.assert_close(found.x, alone.x, rtol=1e-4, atol=1e-4)
            assert found.failed == alone.failed


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "gradient is zero in every known"),
        (1e-40, "gradient has no entry above 1e-40"),
        (1e39, "gradient has entries up to 1e.39"),
    ],
)
def test_gradients_outside_the_range_of_the_dtype_are_refused(value, words):
    model, x, y = build_tiny("mlp")
    with pytest.raises(ValueError, match=words):
        i2f.invert(model.float(), torch.full((293,), value, dtype=D), y, x.shape)


def test_the_gram_matrix_of_a_neighbour_is_taken_in_its_own_units(backward):
    """Problems that share start and label share their first Gram matrix: the way of each is what it is alone."""
    model, x, y = build_tiny("conv")
    g = backward(model, x, y)
    sent = torch.stack([g, 1e6 * g, 1e-6 * g])
    together = i2f.invert_many(model, sent, y.expand(3, 1), x.shape, steps=6)
    for one, found in zip(sent, together, strict=True):
        alone = i2f.invert(model, one, y, x.shape, steps=6)
        assert (found.steps, found.evaluations) == (alone.steps, alone.evaluations)


@pytest.mark.parametrize("curvature", [0.0, math.inf, math.nan])
def test_a_curvature_that_is_no_number_ends_the_attack(guard, backward, monkeypatch, curvature):
    """No damping can be derived from it, and no loop over dampings runs for ever."""
    model, x, y = build_tiny("relu")
    monkeypatch.setattr(Point, "curvature", lambda *_: curvature)
    found = i2f.invert(model, backward(model, x, y), y, x.shape)
    assert not found.converged
    assert found.reason.startswith("stalled")


def test_a_gradient_far_beyond_the_models_is_not_called_matched_or_converged(backward):
    model, x, y = build_tiny("mlp")
    found = i2f.invert(model.float(), 1e35 * noise(293), y, x.shape)
    assert not found.converged
    assert found.relative_residual == pytest.approx(1.0)


def test_a_mask_decides_what_is_zero():
    model, x, y = build_tiny("mlp")
    sent = torch.ones(293, dtype=D)
    mask = torch.arange(293) < 7
    sent[mask] = 0
    with pytest.raises(ValueError, match="gradient is zero in every known"):
        i2f.invert(model, sent, y, x.shape, mask=mask)


@pytest.mark.parametrize("krylov", [False, True])
def test_dead_start_with_a_prior_goes_to_its_mean(monkeypatch, krylov):
    """J = 0 at every x near the start, so that the objective is ridge·‖x − mean‖² and a constant."""
    if krylov:
        monkeypatch.setattr(steps.StepSolver, "fits", lambda problem: False)
    model, x, y = build_tiny("relu")
    with torch.no_grad():
        model[0].bias.fill_(-100)
    found = i2f.invert(model, noise(344), y, x.shape, ridge=1e-3, mean=0.25)
    assert found.converged
    torch.testing.assert_close(found.x, torch.full_like(x, 0.25), rtol=0, atol=1e-9)


@pytest.mark.parametrize("matrix", [torch.full((3, 3), math.nan), -torch.eye(3), torch.zeros(3, 3)])
def test_a_factor_that_does_not_exist_ends_the_search_for_it(guard, matrix):
    factor = steps.cholesky(steps.Gram(matrix, 1e-300), 0.0)
    assert factor is None or torch.isfinite(factor).all()


# networks without a third derivative


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
    start = x + 0.1 * noise(*x.shape)
    for target in (sent, sent + 1e-3 * noise(len(sent))):
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

    here, there, v = point(model), point(twin), noise(x.numel(), seed=1)
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
    found = [i2f.invert(net, sent, y, x.shape, start=x + 0.05 * noise(*x.shape), steps=60) for net in nets]
    assert all(f.matched for f in found)
    torch.testing.assert_close(found[0].x, found[1].x, rtol=0, atol=1e-5)


# labels


class Recurrent(nn.Module):
    """An LSTM that starts from a state for three sequences, no more and no fewer."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 5)
        self.register_buffer("state", torch.zeros(1, 3, 6))

    def forward(self, x):
        return self.head(self.cell(x, (self.state, self.state))[0][:, -1])


class Reshaped(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(x.view(1, -1))


def test_the_label_probe_keeps_the_batch(backward):
    torch.manual_seed(0)
    model, y = Recurrent().double().eval(), torch.tensor([0, 2, 2])
    x = torch.rand(3, 2, 4, dtype=D)
    assert torch.equal(recover_labels(GradientMap(model, None), backward(model, x, y), x.shape), y)
    model, y, x = Reshaped().double().eval(), torch.tensor([3]), torch.rand(1, 2, 4, dtype=D)
    found = i2f.invert(model, backward(model, x, y), None, x.shape)
    assert torch.equal(found.y, y)
    assert mse(found, x) <= 1e-12


def nearest_by_trial(c, n):
    counts = [k for k in itertools.product(range(n + 1), repeat=len(c)) if sum(k) == n]
    return min(sum((a - b) ** 2 for a, b in zip(k, c, strict=True)) for k in counts)


@pytest.mark.parametrize("spread", [0.3, 2.0, 30.0])
@pytest.mark.parametrize("seed", range(20))
def test_counts_are_the_nearest_whole_ones(seed, spread):
    n, classes = 1 + seed % 5, 2 + seed % 4
    c = n / classes + spread * noise(classes, seed=seed)
    labels = nearest_counts(c, torch.zeros(classes, dtype=D), 1.0, n)
    counts = torch.bincount(labels, minlength=classes)
    assert len(labels) == n
    assert float((counts - c).square().sum()) == pytest.approx(nearest_by_trial(c.tolist(), n))


@pytest.mark.parametrize("size", [1e5, 1e20, 1e308])
def test_counts_in_any_noise(size):
    """All images belong to the class that stands out by more than n; at the end of the range, too."""
    bias, n = size * torch.linspace(1, -1, 100, dtype=D), 1000
    assert nearest_counts(torch.full((100,), 10.0, dtype=D), bias, 1e-3, n).tolist() == [99] * n


def test_labels_of_a_gradient_that_is_not_finite_are_refused(mlp):
    model, x, _ = mlp
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="gradient has 293 NaN or infinite"):
            recover_labels(GradientMap(model, None), torch.full((293,), value, dtype=D), x.shape)


WEIGHTS = torch.tensor([1.0, 1.0, 5.0, 0.2, 3.0], dtype=D)
UNEQUAL = {
    "weighted sum": nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum"),
    "weighted": nn.CrossEntropyLoss(weight=WEIGHTS),
    "weighted in pairs": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.0, 5.0, 5.0, 1.0], dtype=D)),
}
UNREADABLE = {
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "a class ignored": nn.CrossEntropyLoss(ignore_index=3),
    "tempered": lambda o, y: F.cross_entropy(o / 2, y),
    "negative": lambda o, y: -F.cross_entropy(o, y),
}


@pytest.mark.parametrize("loss", UNEQUAL.values(), ids=UNEQUAL)
def test_labels_of_weighted_losses(mlp, backward, loss):
    """One image's label is read whatever its class's weight; those of several are refused."""
    model, x, _ = mlp
    gmap = GradientMap(model, None, loss)
    for label in range(5):
        y = torch.tensor([label])
        assert torch.equal(recover_labels(gmap, backward(model, x, y, loss), x.shape), y)
    for n in (2, 7):  # two: the first two classes weigh the same
        several = x.expand(n, -1).clone()
        with pytest.raises(ValueError, match="plain cross-entropy"):
            recover_labels(gmap, backward(model, several, torch.full((n,), 2), loss), several.shape)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("loss", UNREADABLE.values(), ids=UNREADABLE)
def test_labels_of_other_losses_are_refused(mlp, loss, n):
    model = mlp[0]
    with pytest.raises(ValueError, match="plain cross-entropy"):
        recover_labels(GradientMap(model, None, loss), torch.ones(293, dtype=D), (n, 12))


def test_a_confident_network_does_not_hide_the_loss(mlp, backward):
    """Where softmax is 0 and 1 to rounding, the form of the loss must be seen elsewhere."""
    model, x, y = mlp
    with torch.no_grad():
        model[2].bias[0] += 1e4
    y = torch.tensor([3])
    assert torch.equal(recover_labels(GradientMap(model, None), backward(model, x, y), x.shape), y)


def test_one_label_without_a_bias(backward):
    """Features of either sign: ∇_W L = (p − e) hᵀ projected on a mean feature has no sign of its own."""
    for seed in range(10):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4, bias=False)).double()
        x, y = torch.randn(1, 6, dtype=D), torch.tensor([seed % 4])
        assert torch.equal(recover_labels(GradientMap(model, None), backward(model, x, y), x.shape), y)


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Sigmoid()])
def test_two_classes_without_a_bias(backward, activation):
    """±(p − e) hᵀ: read where features are known not to be negative, and refused elsewhere."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), activation, nn.Linear(8, 2, bias=False)).double()
    for label in (0, 1):
        x, y = torch.rand(1, 6, dtype=D), torch.tensor([label])
        sent = backward(model, x, y)
        if isinstance(activation, nn.Sigmoid):
            assert torch.equal(recover_labels(GradientMap(model, None), sent, x.shape), y)
        else:
            with pytest.raises(ValueError, match=r"labels \d and \d explain"):
                recover_labels(GradientMap(model, None), sent, x.shape)


@pytest.mark.parametrize("method", ["gauss-newton", "dgl", "dlg", "gs"])
def test_labels_in_each_usual_form(mlp, backward, method):
    model, x, y = mlp
    one_hot = F.one_hot(y, 5).double()
    soft = torch.tensor([[0.1, 0.2, 0.3, 0.3, 0.1]], dtype=D)
    run = partial(i2f.invert, model, shape=x.shape, method=method, steps=8)
    base = run(gradient=backward(model, x, y), y=y)
    for form in (y.int(), y[:, None], y.tolist(), y.numpy(), one_hot.float(), one_hot.numpy()):
        torch.testing.assert_close(run(gradient=backward(model, x, y), y=form).x, base.x, rtol=0, atol=1e-7)
    found = run(gradient=backward(model, x, soft), y=soft)
    loss = float((backward(model, found.x, soft) - backward(model, x, soft)).square().sum())
    if method != "gs":
        assert found.loss == pytest.approx(loss, rel=1e-9, abs=1e-25)
    if method == "gauss-newton":
        assert mse(found, x) <= 1e-12


def test_labels_of_each_of_many(backward):
    model, x, _ = build_tiny("mlp")
    y = [[0], torch.tensor([3]), np.array([1])]
    sent = [backward(model, x, torch.as_tensor(labels)) for labels in y]
    found = i2f.invert_many(model, sent, y, x.shape)
    assert [int(f.y) for f in found] == [0, 3, 1]
    assert all(mse(f, x) <= 1e-12 for f in found)


# inputs


def parts_of(model, x, y):
    value = F.cross_entropy(model(x), y)
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(value, list(model.parameters())), strict=True))


def test_gradients_in_each_usual_form(mlp, backward):
    model, x, y = mlp
    parts, flat = parts_of(model, x, y), backward(model, x, y)
    base = i2f.invert(model, flat, y, x.shape)
    backwards = dict(reversed(parts.items()))
    for form in (list(parts.values()), tuple(parts.values()), parts, backwards, flat.numpy(), flat.float()):
        found = i2f.invert(model, form, y, x.shape)
        torch.testing.assert_close(found.x, base.x, rtol=0, atol=1e-5)
    for many in ([parts, flat], [flat.numpy(), list(parts.values())], np.stack([flat, flat])):
        for found in i2f.invert_many(model, many, y.expand(2, 1), x.shape):
            torch.testing.assert_close(found.x, base.x, rtol=0, atol=1e-9)


def test_everything_as_arrays(mlp, backward):
    model, x, y = mlp
    sent = backward(model, x, y)
    mask, covariance = torch.arange(293) % 3 > 0, torch.linspace(1, 2, 293, dtype=D)
    given = {"mask": mask, "covariance": covariance, "mean": 0.3 + 0 * x, "start": x + 0.1, "ridge": 1e-6}
    arrays = {name: value.numpy() if torch.is_tensor(value) else np.float64(value) for name, value in given.items()}
    base = i2f.invert(model, sent, y, x.shape, **given)
    found = i2f.invert(model, sent.numpy(), y.numpy(), np.array(x.shape), **arrays)
    assert torch.equal(found.x, base.x)
    listed = i2f.invert(
        model, sent, y, list(x.shape), **given | {"mask": mask.tolist(), "start": given["start"].tolist()}
    )
    assert torch.equal(listed.x, base.x)


GRADIENT = torch.linspace(-1, 1, 293, dtype=D)
WRONG = {
    "gradient": ({"gradient": 3.0}, "gradient is float"),
    "model as gradient": ({"gradient": nn.Linear(2, 2)}, "gradient is Linear"),
    "y": ({"y": 7}, "y is int"),
    "y of names": ({"y": "cat"}, "y is str"),
    "shape": ({"shape": 28}, "shape=28 is no sequence"),
    "shape of names": ({"shape": "28"}, "shape='28' is no sequence"),
    "shape of fractions": ({"shape": (1, 12.0)}, "shape=.* is no sequence of whole numbers"),
    "mask": ({"mask": nn.Linear(2, 2)}, "mask is Linear"),
    "covariance": ({"covariance": nn.Linear(2, 2)}, "covariance is Linear"),
    "mean": ({"mean": nn.Linear(2, 2), "ridge": 1.0}, "mean is Linear"),
    "start": ({"start": nn.Linear(2, 2)}, "start is Linear"),
    "seed": ({"seed": 1.5}, "seed is float"),
    "seed of a name": ({"seed": "7"}, "seed is str"),
    "steps": ({"steps": 2.5}, "steps is float"),
    "restarts": ({"restarts": "2"}, "restarts is str"),
    "callback": ({"callback": 7}, "callback is int"),
}


@pytest.mark.parametrize(("given", "words"), WRONG.values(), ids=WRONG)
def test_wrong_types_are_named(mlp, given, words):
    model, x, y = mlp
    with pytest.raises(TypeError, match=words):
        i2f.invert(model, **{"gradient": GRADIENT, "y": y, "shape": x.shape} | given)


def test_a_dictionary_of_many_is_refused(mlp):
    model, x, y = mlp
    with pytest.raises(TypeError, match="gradients is dict"):
        i2f.invert_many(model, {"0": GRADIENT}, y[None], x.shape)


NOT_FINITE = {
    "gradient": lambda bad: {"gradient": GRADIENT * bad},
    "start": lambda bad: {"start": torch.full((1, 12), bad)},
    "mean": lambda bad: {"mean": torch.full((1, 12), bad), "ridge": 1.0},
    "y": lambda bad: {"y": torch.full((1, 5), bad)},
    "covariance": lambda bad: {"covariance": torch.full((293,), bad)},
}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", NOT_FINITE)
def test_nan_is_refused_by_name(mlp, name, bad):
    model, x, y = mlp
    with pytest.raises(ValueError, match=rf"{name} has \d+ NaN or infinite"):
        i2f.invert(model, **{"gradient": GRADIENT, "y": y, "shape": x.shape} | NOT_FINITE[name](bad))


def test_nan_is_no_mask(mlp):
    model, x, y = mlp
    with pytest.raises(ValueError, match=r"mask is .*float.*booleans"):
        i2f.invert(model, GRADIENT, y, x.shape, mask=torch.full((293,), math.nan))


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = build_tiny("mlp")[0]

    def forward(self, x):
        return self.inner(F.dropout(x, 0.5))


@pytest.mark.parametrize("method", ["gauss-newton", "dgl", "dlg", "gs"])
@pytest.mark.parametrize("labels", [True, False])
def test_random_models_are_refused(mlp, method, labels):
    _, x, y = mlp
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="model is random"):
        i2f.invert(Dropping(), GRADIENT, y if labels else None, x.shape, method=method, steps=1)


class OnceCube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, by_output):
        return 3 * ctx.saved_tensors[0] ** 2 * by_output


@pytest.mark.parametrize("method", ["gauss-newton", "dgl", "dlg", "gs"])
def test_networks_without_a_second_derivative_are_refused(mlp, method):
    model, x, y = mlp
    model[1] = Call(OnceCube.apply)
    with pytest.raises(ValueError, match="without a second derivative"):
        i2f.invert(model, GRADIENT, y, x.shape, method=method, steps=1)


def test_a_loss_that_does_not_take_the_labels_says_why(mlp):
    model, x, _ = mlp
    with pytest.raises(ValueError, match=r"loss .*y"):
        i2f.invert(model, GRADIENT, torch.rand(1, 4, dtype=D), x.shape, loss=F.l1_loss)


@pytest.mark.parametrize("method", ["gauss-newton", "dgl", "dlg", "gs"])
@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, torch.no_grad, partial(torch.autocast, "cpu", torch.bfloat16)],
    ids=["inference_mode", "no_grad", "autocast"],
)
def test_a_callers_context_changes_no_answer(backward, method, context):
    model, x, y = build_tiny("mlp")
    model, x = model.float(), x.float()
    sent = backward(model, x, y)
    run = partial(i2f.invert, method=method, steps=6, start=torch.full_like(x, 0.4))
    outside = run(model, sent, y, x.shape)
    with context():
        inside = run(model, sent.clone(), y.clone(), x.shape, start=torch.full_like(x, 0.4))
    assert torch.equal(inside.x, outside.x)
    assert not inside.x.is_inference()


@pytest.mark.parametrize("seed", [np.int64(3), np.uint8(3), torch.tensor(3), [np.int32(3)], np.array([3]), (3,)])
def test_seeds_of_any_integer_type(mlp, backward, seed):
    model, x, y = mlp
    sent = backward(model, x, y)[None]
    base = i2f.invert_many(model, sent, y[None], x.shape, seed=3, steps=2)[0]
    assert torch.equal(i2f.invert_many(model, sent, y[None], x.shape, seed=seed, steps=2)[0].x, base.x)


def test_half_precision_models_are_attacked_in_float32(backward):
    model, x, y = build_tiny("mlp")
    model = model.to(torch.bfloat16)
    wide = model.float()
    sent = backward(wide, x.float(), y)
    with pytest.warns(UserWarning, match="computed in float32"):
        found = i2f.invert(model.to(torch.bfloat16), sent.to(torch.bfloat16), y, x.shape)
    base = i2f.invert(model.float(), sent.to(torch.bfloat16).float(), y, x.shape)
    assert found.x.dtype == torch.float32
    assert torch.equal(found.x, base.x)


# draws, the box, and what is said at the end


def drawn(name, seed, *shape):
    state = int.from_bytes(hashlib.sha256(f"{name}:{seed}".encode()).digest()[:8], "little") >> 1
    return torch.randn(*shape, generator=torch.Generator().manual_seed(state), dtype=D)


def test_starts_share_nothing_with_noise_of_the_same_seed(mlp, backward):
    model, x, y = mlp
    seen = []
    i2f.invert(model, backward(model, x, y), y, x.shape, start="normal", seed=5, steps=1, callback=seen.append)
    torch.testing.assert_close(seen[0].x, drawn("start", 5, 1, 12))


def test_label_logits_come_from_the_seed_and_not_from_the_number_of_restarts(mlp, backward):
    """A restart's draw does not depend on how many follow it."""
    model, x, y = mlp
    sent = backward(model, x, y)

    def losses(**options):
        seen = []
        i2f.invert(model, sent, None, x.shape, method="dlg", start="normal", steps=1, callback=seen.append, **options)
        return [at.loss for at in seen if at.step == 0]

    soft = drawn("labels", 5, 1, 5).softmax(-1)
    at_start = float((backward(model, drawn("start", 5, 1, 12), soft) - sent).square().sum())
    assert losses(seed=5)[0] == pytest.approx(at_start)
    assert losses(seed=5, restarts=3)[0] == losses(seed=5)[0]
    assert len(set(losses(seed=5, restarts=3))) == 3


class Watching(nn.Module):
    """Keeps the range of every input that it sees."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x):
        RANGES.append(tuple(x.detach().aminmax()))
        return self.inner(x)


RANGES: list[tuple[torch.Tensor, torch.Tensor]] = []
OPTIMIZERS = {
    "dlg": {"method": "dlg"},
    "dlg, line search": {"method": "dlg", "optimizer": partial(torch.optim.LBFGS, line_search_fn="strong_wolfe")},
    "dgl, L-BFGS": {"method": "dgl", "optimizer": torch.optim.LBFGS, "lr": 1.0},
    "gs, L-BFGS": {"method": "gs", "optimizer": torch.optim.LBFGS, "lr": 0.5, "signed": False},
    "dgl": {"method": "dgl", "lr": 0.5},
    "gs": {"method": "gs"},
    "gauss-newton": {"method": "gauss-newton"},
    "dlg without labels": {"method": "dlg", "y": None},
}


@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_nothing_is_evaluated_outside_the_box(backward, options):
    model, x, y = build_tiny("mlp")
    x = x.round()
    sent = backward(model, x, y)
    sent = sent + 0.1 * noise(len(sent))
    RANGES.clear()
    found = i2f.invert(Watching(model), sent, shape=x.shape, box=True, steps=10, start="normal", **{"y": y} | options)
    assert len(RANGES) > 10
    assert min(float(low.detach()) for low, _ in RANGES) >= 0
    assert max(float(high.detach()) for _, high in RANGES) <= 1
    assert float(found.x.min()) >= 0
    assert float(found.x.max()) <= 1


def test_boxed_lbfgs_ends_where_the_second_order_attack_does(backward):
    model, x, y = build_tiny("mlp")
    x = x.round()
    sent = backward(model, x, y)
    sent = sent + 3e-2 * noise(len(sent))
    found, other = (
        i2f.invert(model, sent, y, x.shape, box=True, method=m, start="gray") for m in ("dlg", "gauss-newton")
    )
    assert other.converged
    assert found.loss == pytest.approx(other.loss, rel=1e-6)
    torch.testing.assert_close(found.x, other.x, rtol=0, atol=1e-4)


def test_matched_and_converged_are_two_things(mlp, backward):
    model, x, y = mlp
    sent = backward(model, x, y)
    noisy = i2f.invert(model, sent + 0.1 * noise(len(sent)), y, x.shape)
    clean = i2f.invert(model, sent, y, x.shape)
    short = i2f.invert(model, sent, y, x.shape, method="dgl", steps=1)
    loose = i2f.invert(model, sent, y, x.shape, tolerance=0.5)
    assert (noisy.converged, noisy.matched) == (True, False)
    assert (clean.converged, clean.matched) == (True, True)
    assert (short.converged, short.matched) == (False, False)
    assert loose.matched
    assert loose.relative_residual > 1e-3
    assert all("not matched" not in f.reason for f in (noisy, clean, short, loose))
