"""Penalties are what they say, and so are their derivatives by θ."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import i2f
from i2f import spectrum
from i2f.paper import penalty

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
    term = penalty.bound(model, x, y, power_steps=100, generator=generator)
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


class OwnNorm(nn.Module):
    """A user's class, which calls the operation itself."""

    def __init__(self, operation, width=8):
        super().__init__()
        self.operation, self.first, self.last = operation, nn.Linear(6, width), nn.Linear(width, 3)
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return self.last(torch.tanh(self.operation(self.first(x), self.weight, self.bias)))


def _attend(h, weight, bias):
    q, k = h * weight, h + bias
    return F.scaled_dot_product_attention(*(t.view(1, 1, 4, 2) for t in (q, k, h))).reshape(1, 8)


OPERATIONS = {
    "layer_norm": lambda h, w, b: F.layer_norm(h, (8,), w, b),
    "torch.layer_norm": lambda h, w, b: torch.layer_norm(h, (8,), w, b),
    "instance_norm": lambda h, w, b: F.instance_norm(h.view(1, 2, 4), weight=w[:2], bias=b[:2]).view(1, 8),
    "group_norm": lambda h, w, b: F.group_norm(h, 2, w, b),
    "attention": _attend,
}


def _own(operation):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = OwnNorm(operation).double()
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(0, 0.7)
        return model, torch.rand(1, 6, dtype=torch.float64), torch.tensor([1])


def _encoder(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, **options)
        model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 4)).double()
        return model, torch.rand(1, 3, 8, dtype=torch.float64), torch.tensor([1])


NETWORKS = {
    **{name: (lambda operation=operation: _own(operation)) for name, operation in OPERATIONS.items()},
    "encoder in training mode": lambda: _encoder(activation="gelu"),
    "encoder, norm first": lambda: _encoder(activation="gelu", norm_first=True),
    "encoder": lambda: tuple(t.eval() if isinstance(t, nn.Module) else t for t in _encoder(activation="gelu")),
}


def _square(backward, model, x, y, w, h=1e-3):
    """‖Jᵀw‖² by central differences of plain gradients along w: shares no code with the package."""
    ahead = [backward(model, x + k * h * w, y) for k in (-2, -1, 1, 2)]
    return float(((ahead[0] - 8 * ahead[1] + 8 * ahead[2] - ahead[3]) / (12 * h)).square().sum())


@pytest.mark.parametrize("name", NETWORKS)
def test_sensitivity_and_its_derivative_are_those_of_differences(backward, name):
    """The third derivative, of operations whose own is wrong (layer norm) or missing (instance norm, attention)."""
    model, x, y = NETWORKS[name]()
    w = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    slope, steps, h = _slope(model, x, y, lambda: _square(backward, model, x, y, w), h=1e-4)
    term = penalty.sensitivity(model, x, y, w)
    assert float(term.detach()) == pytest.approx(_square(backward, model, x, y, w), rel=1e-7)
    assert _along(model, term, steps) == pytest.approx(slope / h, rel=1e-5)


@pytest.mark.parametrize("name", ["layer_norm", "encoder"])
def test_both_terms_of_such_networks(name):
    model, x, y = NETWORKS[name]()
    slope, steps, h = _slope(model, x, y, lambda: float(_values(model, x, y)[0].log()))
    values, draw = _values(model, x, y), torch.Generator().manual_seed(0)
    term = penalty.bound(model, x, y, power_steps=100, generator=draw)
    assert float(term.detach().exp()) == pytest.approx(float(values[0]), rel=1e-5)
    assert _along(model, term, steps) == pytest.approx(slope / h, rel=1e-3, abs=1e-6)
    assert torch.isfinite(penalty.bayes(model, x, y, float(values[0]), generator=draw))


def test_parameters_that_the_loss_never_meets(mlp):
    """The terms and their derivatives are those of the network without them."""
    model, x, y = mlp
    wider = copy.deepcopy(model)
    wider.unused = nn.Linear(4, 4).double()
    wider.forward = lambda x: nn.Sequential.forward(wider[:3], x)

    def terms(model):
        w = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
        draw = torch.Generator().manual_seed(0)
        return (
            penalty.sensitivity(model, x, y, w),
            penalty.bound(model, x, y, generator=draw),
            penalty.bayes(model, x, y, 0.1, generator=draw),
        )

    for plain, wide in zip(terms(model), terms(wider), strict=True):
        assert float(wide.detach()) == pytest.approx(float(plain.detach()), rel=1e-12)
        wide.backward()
        for p, q in zip(torch.autograd.grad(plain, list(model.parameters())), wider.parameters(), strict=False):
            torch.testing.assert_close(q.grad, p)
        assert wider.unused.weight.grad is None or not wider.unused.weight.grad.any()
        wider.zero_grad()


def test_a_jacobian_that_vanishes():
    """log 0 = −∞, and nothing to descend: not the logarithm of a small number."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100)
    x, y = torch.rand(1, 4, dtype=torch.float64), torch.tensor([1])
    term = penalty.bound(model, x, y)
    assert float(term.detach()) == -math.inf
    term.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert float(penalty.sensitivity(model, x, y, torch.ones_like(x)).detach()) == 0
    assert float(penalty.bayes(model, x, y, 0.5).detach()) == pytest.approx(-math.log(4 / 0.5))


def test_a_square_out_of_range_is_refused(mlp):
    model, x, y = mlp
    model, x = model.float(), x.float()
    for size in (1e-25, 1e25):
        with pytest.raises(ValueError, match=r"w gives ‖Jᵀw‖ = .* whose square leaves torch.float32"):
            penalty.sensitivity(model, x, y, torch.full_like(x, size))
    with pytest.raises(ValueError, match="w has shape"):
        penalty.sensitivity(model, x, y, torch.ones(3))
    with pytest.raises(ValueError, match=r"damping=1e-90 is out of range: λ/ε leaves torch.float32"):
        penalty.bayes(model, x, y, 1e-90)
    for bad in (0.0, -1.0, float("nan"), torch.tensor(float("nan"))):
        with pytest.raises(ValueError, match="damping="):
            penalty.bayes(model, x, y, bad)


def _noisy(model, x, y):
    return nn.Sequential(model, nn.Dropout(0.5)), x, y, {}


def _stopped(model, x, y):
    return model, x, y, {"loss": lambda o, t: F.cross_entropy(o, t) * o.detach().square().sum()}


def _unreduced(model, x, y):
    return model, x, y, {"loss": lambda o, t: F.cross_entropy(o, t, reduction="none")}


def _separate(model, x, y):
    return model, x, y, {"loss": lambda o, t: sum(p.sum() for p in model.parameters())}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_noisy, "training mode"),
        (_stopped, "out of the graph"),
        (_unreduced, "loss returned shape"),
        (_separate, "is zero"),
    ],
)
def test_what_makes_no_jacobian_is_refused(mlp, spoil, said):
    model, x, y, options = spoil(*mlp)
    model.train()
    w = torch.ones_like(x)
    for ask in (
        lambda: penalty.sensitivity(model, x, y, w, **options),
        lambda: penalty.bound(model, x, y, **options),
        lambda: penalty.bayes(model, x, y, 1.0, **options),
    ):
        with pytest.raises(ValueError, match=said):
            ask()


def test_inference_mode_and_inputs_changed_in_place(mlp):
    model, x, y = mlp
    right = float(penalty.bound(model, x, y, generator=torch.Generator().manual_seed(0)).detach())

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            x *= 1.0
            return self.inner(x)

    assert float(penalty.bound(InPlace(), x, y, generator=torch.Generator().manual_seed(0)).detach()) == right
    with torch.inference_mode():
        found = penalty.bound(model, x.clone(), y, generator=torch.Generator().manual_seed(0))
    assert float(found.detach()) == right
