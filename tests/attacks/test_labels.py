"""Labels read off a gradient: against counts by trial, every reduction, losses that are refused."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import i2f
from conftest import build_tiny, normal
from i2f import metrics
from i2f.attacks.labels import nearest_counts, recover_labels
from i2f.core.gradient import GradientMap

D = torch.float64


def mse(found, x):
    return float(metrics.mse(found.x.double(), x.double()).mean())


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
    c = n / classes + spread * normal(classes, seed=seed)
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


@pytest.mark.parametrize("label", range(10))
def test_one_label_is_read_without_error(lenet, digits, backward, label):
    x, y = digits[0][:1], torch.tensor([label])
    assert torch.equal(recover_labels(GradientMap(lenet, None), backward(lenet, x, y), x.shape), y)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [True, False])
def test_counts_of_a_batch(reduction, bias):
    """At its initial weights a network answers every image nearly alike: the counts are exact."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.Sigmoid(), nn.Linear(30, 6, bias=bias)).double()
    x, y = torch.rand(12, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 0, 0, 0, 1, 2, 2, 4, 5, 5, 5, 5])
    loss = nn.CrossEntropyLoss(reduction=reduction)
    gmap = GradientMap(model, y, loss)
    assert torch.equal(recover_labels(GradientMap(model, None, loss), gmap(x), x.shape), y)


def test_frozen_last_layer_has_no_labels_to_read(mlp):
    model, x, _ = mlp
    model[2].requires_grad_(False)
    with pytest.raises(ValueError, match="last layer, 2, is frozen"):
        i2f.invert(model, torch.ones(208, dtype=torch.float64), None, x.shape)


def test_without_labels_as_good_as_with(lenet, digits, backward):
    x, y = digits[0][1:2], digits[1][1:2]
    found = i2f.invert(lenet, backward(lenet, x, y), None, x.shape)
    assert torch.equal(found.y, y)
    assert float(metrics.mse(found.x, x)) <= 1e-10


def test_wrong_label_is_a_case(crop, backward):
    model, x, y = crop
    found = i2f.invert(model, backward(model, x, y), (y + 1) % 10, x.shape, steps=15)
    assert found.relative_residual > 1e-2
    assert not found.matched
    assert "match" not in found.reason  # why it stopped is another question


def test_dlg_finds_image_and_label(mlp, backward):
    model, x, y = mlp
    found = i2f.invert(model, backward(model, x, y), None, x.shape, method="dlg", steps=60, start="uniform", restarts=3)
    assert torch.equal(found.y, y)
    assert float(metrics.mse(found.x, x)) <= 1e-8


def test_soft_labels_are_part_of_the_objective(mlp, backward):
    """The reported loss is that of the soft label found, not of its largest entry."""
    model, x, y = mlp
    found = i2f.invert(model, backward(model, x, y), None, x.shape, method="dlg", steps=2, start="uniform")
    assert found.relative_residual**2 * float(backward(model, x, y).square().sum()) == pytest.approx(found.loss)
