"""Gradients, labels and networks as people bring them: taken in each usual form, or refused by name before any work."""

import functools
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import i2f

X = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)[None]
Y = torch.tensor([1])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double().eval()


def plain(model, loss=F.cross_entropy, x=X, y=Y) -> list[torch.Tensor]:
    """By backward() alone, one tensor a parameter."""
    model.zero_grad()
    loss(model(x), y).backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def flat(parts) -> torch.Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


FORMS = {
    "flat": lambda parts, names: flat(parts),
    "an array": lambda parts, names: flat(parts).numpy(),
    "a list": lambda parts, names: list(parts),
    "a tuple of arrays": lambda parts, names: tuple(part.numpy() for part in parts),
    "a dictionary": lambda parts, names: dict(zip(names, parts, strict=True)),
    "a dictionary in another order": lambda parts, names: dict(reversed(list(zip(names, parts, strict=True)))),
    "float32": lambda parts, names: [part.float() for part in parts],
    "with None for zeros": lambda parts, names: [parts[0], parts[1], parts[2], None],
    "with frozen ones": lambda parts, names: [*parts[:3], None],
}


@pytest.mark.parametrize("form", FORMS)
def test_flatten_gradient(form):
    model = network()
    parts = plain(model)
    if form == "with None for zeros":
        parts[3].zero_()
    if form == "with frozen ones":
        model[2].bias.requires_grad_(False)
        parts = plain(model)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    found = i2f.flatten_gradient(model, FORMS[form](parts, names))
    torch.testing.assert_close(found, flat(parts), rtol=1e-6 if form == "float32" else 0, atol=1e-8)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda parts: parts[:3], ValueError, "gradient has 3 entries; the model has 4 .*0.weight, 0.bias"),
        (lambda parts: [parts[1], parts[0], *parts[2:]], ValueError, r"gradient: 0.weight has shape \(8,\).*\(8, 6\)"),
        (lambda parts: {"0.weight": parts[0], "bias": parts[1]}, ValueError, "missing 0.bias, .*; unknown bias"),
        (lambda parts: [*parts[:3], parts[3] * math.nan], ValueError, "gradient has 3 NaN"),
        (lambda parts: 7, TypeError, r"gradient is int; give a flat \(83,\) tensor .*list or dictionary"),
        (lambda parts: network(), TypeError, "gradient is Sequential"),
        (lambda parts: flat(parts)[1:], ValueError, "gradient has shape .82,.*has 83"),
        (lambda parts: torch.stack([flat(parts)] * 2), ValueError, r"give a flat \(83,\) tensor$"),
    ],
)
def test_gradients_that_do_not_fit(change, error, words):
    model = network()
    with pytest.raises(error, match=words):
        i2f.flatten_gradient(model, change(plain(model)))


WEIGHTS = torch.tensor([0.2, 1.0, 3.0])
DOUBLE = WEIGHTS.double()
# labels, loss; what they must agree with, by backward() alone: labels, loss
LABELS = {
    "list": ([1], F.cross_entropy, Y, F.cross_entropy),
    "array": (np.array([1], dtype=np.uint8), F.cross_entropy, Y, F.cross_entropy),
    "int32": (Y.int(), F.cross_entropy, Y, F.cross_entropy),
    "column": (Y[:, None], F.cross_entropy, Y, F.cross_entropy),
    "one-hot": (F.one_hot(Y, 3), F.cross_entropy, Y, F.cross_entropy),
    "soft, float32": (
        torch.tensor([[0.25, 0.5, 0.25]]),
        F.cross_entropy,
        torch.tensor([[0.25, 0.5, 0.25]]).double(),
        F.cross_entropy,
    ),
    "weights in float32": (Y, nn.CrossEntropyLoss(WEIGHTS), Y, nn.CrossEntropyLoss(DOUBLE)),
    "weights in a partial": (Y, functools.partial(F.cross_entropy, weight=WEIGHTS), Y, nn.CrossEntropyLoss(DOUBLE)),
    "signs": (
        torch.tensor([-1]),
        lambda o, y: F.soft_margin_loss(o[:, 0], y.to(o.dtype)),
        torch.tensor([-1.0]).double(),
        lambda o, y: F.soft_margin_loss(o[:, 0], y),
    ),
    "binary, as integers": (
        torch.tensor([[0, 1, 1]]),
        F.binary_cross_entropy_with_logits,
        torch.tensor([[0.0, 1.0, 1.0]]).double(),
        F.binary_cross_entropy_with_logits,
    ),
    "booleans": (
        torch.tensor([[False, True, True]]),
        F.binary_cross_entropy_with_logits,
        torch.tensor([[0.0, 1.0, 1.0]]).double(),
        F.binary_cross_entropy_with_logits,
    ),
}


@pytest.mark.parametrize("form", LABELS)
def test_labels_in_each_form(form):
    y, loss, like, like_loss = LABELS[form]
    J = i2f.GradientJacobian(network(), X, y, loss)
    torch.testing.assert_close(J.gradient, flat(plain(network(), like_loss, y=like)), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("y", "loss", "error", "words"),
    [
        (7, F.cross_entropy, TypeError, r"y is int; .*torch.tensor\(\[7\]\)"),
        (network(), F.cross_entropy, TypeError, "y is Sequential"),
        (["seven"], F.cross_entropy, TypeError, "y cannot be read as numbers"),
        (torch.tensor([[0.5, math.nan, 0.5]]), F.cross_entropy, ValueError, "y has 1 NaN"),
        (torch.tensor([-100]), F.cross_entropy, ValueError, "y holds -100 alone, the label that the loss ignores"),
        (torch.tensor([3]), nn.CrossEntropyLoss(ignore_index=3), ValueError, "y holds 3 alone"),
        (torch.tensor([-1]), F.cross_entropy, ValueError, r"y holds \[-1\]; this model has 3 classes"),
        (torch.tensor([3]), lambda o, y: F.cross_entropy(o, y), ValueError, r"y holds \[3\]; this model has 3 classes"),
        (Y, lambda o, y: F.cross_entropy(o, y, WEIGHTS), ValueError, "loss failed .*expected scalar type Double"),
        (
            Y,
            lambda o, y: o["logits"].sum(),
            ValueError,
            r"loss failed on the model's output, \(1, 3\) of torch",
        ),
        (Y, "mse", TypeError, "loss is str; it must be a function"),
        (Y, lambda o, y: 1.0, ValueError, "loss returned float; it must return a tensor"),
        (Y, lambda o, y: F.cross_entropy(o, y) * math.nan, ValueError, "the loss at this x has 1 NaN"),
    ],
)
def test_labels_and_losses_that_do_not_fit(y, loss, error, words):
    with pytest.raises(error, match=words):
        i2f.GradientJacobian(network(), X, y, loss)


def test_an_ignored_label_among_others():
    x = torch.cat([X, 1 - X])
    J = i2f.GradientJacobian(network(), x, torch.tensor([1, -100]))
    torch.testing.assert_close(J.gradient, flat(plain(network())))
    assert not J.dense()[6:].any()  # the ignored image is not behind this gradient


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    half = network().to(dtype)
    exact = i2f.GradientJacobian(network().to(dtype).double(), X, Y)
    with pytest.warns(UserWarning, match=f"parameters in {dtype}: its gradient is computed in float32"):
        J = i2f.GradientJacobian(half, X.to(dtype), Y)
    assert J.dtype == torch.float32
    assert next(half.parameters()).dtype == dtype
    same = i2f.GradientJacobian(network().to(dtype).double(), X.to(dtype).double(), Y)
    torch.testing.assert_close(J.gram(), same.gram(), rtol=1e-5, atol=1e-7)
    assert float((J.gram() - exact.gram()).norm() / exact.gram().norm()) < 0.1


def test_autocast_around_a_call_changes_nothing():
    delta = torch.linspace(-1, 1, 83, dtype=torch.float32)
    model, x = network().float(), X.float()
    J = i2f.GradientJacobian(model, x, Y)
    with torch.autocast("cpu", torch.bfloat16):
        inside = i2f.GradientJacobian(model, x, Y)
        torch.testing.assert_close(inside.matvec(delta), J.matvec(delta))
    torch.testing.assert_close(inside.gradient, J.gradient)


class Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network().float()

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x)


class Inference(Autocast):
    def forward(self, x):
        with torch.inference_mode():
            return self.net(x)


def spoiled(place: str) -> nn.Module:
    model = nn.Sequential(nn.BatchNorm1d(6), *network()).double().eval()
    with torch.no_grad():
        dict([*model.named_parameters(), *model.named_buffers()])[place].view(-1)[0] = math.nan
    return model


class Exploding(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x) / (x[:, :1] - x[:, :1])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Autocast(), "forward enables autocast"),
        (Inference(), r"enters torch.inference_mode\(\)"),
        (spoiled("1.weight"), "model: 1.weight has 1 NaN or infinite entries of 48"),
        (spoiled("0.running_mean"), "model: 0.running_mean has 1 NaN or infinite entries of 6"),
        (Exploding(), "the model's output at this x has 3 NaN or infinite"),
    ],
)
def test_networks_that_are_refused(model, words):
    with pytest.raises(ValueError, match=words):
        i2f.GradientJacobian(model, X, Y)


def test_inference_mode_around_everything():
    J = i2f.GradientJacobian(network(), X, Y)
    delta = torch.linspace(-1, 1, 83, dtype=torch.float64)
    with torch.inference_mode():
        made = network()  # its weights are inference tensors
        inside = i2f.GradientJacobian(made, X.clone(), Y.clone())
        found = inside.matvec(delta.clone()), inside.rmatvec(X[0].clone()), inside.dense(), inside.map(X.clone())
        later = J.matvec(delta.clone())
    torch.testing.assert_close(found, (J.matvec(delta), J.rmatvec(X[0]), J.dense(), J.gradient))
    torch.testing.assert_close(later, J.matvec(delta))


def test_a_gradient_that_its_dtype_cannot_hold():
    with pytest.raises(ValueError, match=r"largest entry is .*e-3\d, too small for torch.float32: scale the loss up"):
        i2f.GradientJacobian(network().float(), X.float(), Y, lambda o, y: 1e-35 * F.cross_entropy(o, y))


def test_a_stationary_network_has_a_jacobian():
    """g = 0 tells nothing of the size of J, which the unit then follows."""
    with torch.no_grad():
        answer = network()(X)
    for scale in (1.0, 1e-25):
        J = i2f.GradientJacobian(network(), X, answer, lambda o, y, scale=scale: scale * F.mse_loss(o, y))
        assert not J.gradient.any()
        assert i2f.influence(J, scale * torch.ones(83, dtype=torch.float64), damping=1e-3 * scale**2).norm > 0
        if scale == 1:
            wanted = i2f.lower_bound(J, torch.ones(83, dtype=torch.float64)).norm
    found = i2f.lower_bound(J, scale * torch.ones(83, dtype=torch.float64)).norm
    assert found == pytest.approx(wanted, rel=1e-6)


class Counting(nn.Module):
    """Keeps a state from pass to pass."""

    def __init__(self):
        super().__init__()
        self.net, self.passes = network(), 0

    def forward(self, x):
        self.passes += 1
        return self.net(x) * self.passes


def test_a_state_stays_what_it_was():
    model = Counting()
    J = i2f.GradientJacobian(model, X, Y)
    assert model.passes == 0
    torch.testing.assert_close(J.gradient, flat(plain(model)))  # of the next pass
    step = 1e-5 * torch.eye(6, dtype=torch.float64)[:1]
    difference = (J.map(X + step) - J.map(X - step)) / 2e-5
    torch.testing.assert_close(J.dense()[0], difference, rtol=1e-6, atol=1e-8)


def test_arrays_for_everything():
    J = i2f.GradientJacobian(network(), X.numpy(), Y.numpy())
    delta = np.linspace(-1, 1, 83)
    torch.testing.assert_close(J.matvec(delta), J.matvec(torch.from_numpy(delta)))
    assert i2f.influence(J, delta).norm == pytest.approx(i2f.influence(J, torch.from_numpy(delta)).norm)


def test_nothing_is_said_of_an_ordinary_network():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        i2f.GradientJacobian(network(), X, Y).dense()
