"""What holds for every network: properties of J, I²F and its bound over architectures that Hypothesis builds."""

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import i2f

ACTIVATIONS = (nn.Tanh, nn.Sigmoid, nn.Softplus, nn.GELU, nn.ELU, nn.ReLU, nn.Identity)
LOSSES = (
    F.cross_entropy,
    lambda out, y: F.mse_loss(out, F.one_hot(y, out.shape[1]).to(out)),
    lambda out, y: F.cross_entropy(out, y, reduction="sum", label_smoothing=0.1),
)
METHODS = ("dense", "matrix-free", "recompute")
few = settings(max_examples=20, deadline=None, derandomize=True, database=None)


class Drawn(NamedTuple):
    model: nn.Module
    x: Tensor
    y: Tensor
    loss: Any
    method: str

    def J(self, scale: float = 1.0) -> i2f.GradientJacobian:
        """J of the loss times `scale`."""
        return i2f.GradientJacobian(
            self.model, self.x, self.y, loss=lambda out, y: scale * self.loss(out, y), method=self.method
        )


@st.composite
def networks(draw: st.DrawFn) -> Drawn:
    """A chain of layers, or the same behind a residual connection, in float64."""
    widths = draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    classes, n, seed = draw(st.integers(2, 4)), draw(st.integers(1, 3)), draw(st.integers(0, 2**16))
    act, bias, residual = draw(st.sampled_from(ACTIVATIONS)), draw(st.booleans()), draw(st.booleans())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b, bias=bias), act())]
        body = nn.Sequential(*layers)
        model = nn.Sequential(Residual(body) if residual else body, nn.Linear(widths[-1], classes)).double().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(0, 0.7)
        x, y = torch.rand(n, widths[0], dtype=torch.float64), torch.randint(classes, (n,))
    return Drawn(model, x, y, draw(st.sampled_from(LOSSES)), draw(st.sampled_from(METHODS)))


class Residual(nn.Module):
    """body(x) + mean of x, which no rule of layers knows."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x.mean(1, keepdim=True)


seeds = st.integers(0, 2**16)
factors = st.floats(-3, 3, allow_subnormal=False)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def near(a: Tensor, b: Tensor, scale: float, rtol: float = 1e-12) -> bool:
    return a.shape == b.shape and float((a - b).norm()) <= rtol * scale


def formed_or_not(J: i2f.GradientJacobian) -> Any:
    """The products before and after J is formed."""
    yield J
    J.dense()
    yield J


@given(networks(), seeds)
@few
def test_shapes(net: Drawn, seed: int) -> None:
    d_x, d_theta = net.x.numel(), sum(p.numel() for p in net.model.parameters())
    for J in formed_or_not(net.J()):
        assert J.shape == (d_x, d_theta)
        assert J.gradient.shape == J.rmatvec(normal(d_x, seed=seed)).shape == (d_theta,)
        assert J.matvec(normal(d_theta, seed=seed)).shape == (d_x,)
        for k in (1, 2):
            assert J.matvec(normal(k, d_theta, seed=seed)).shape == (k, d_x)
            assert J.rmatvec(normal(k, d_x, seed=seed)).shape == (k, d_theta)
    assert J.dense().shape == (d_x, d_theta)
    assert J.gram().shape == (d_x, d_x)


@given(networks(), seeds)
@few
def test_adjoint(net: Drawn, seed: int) -> None:
    """⟨Jδ, v⟩ = ⟨δ, Jᵀv⟩."""
    size = net.J().dense().norm()
    for J in formed_or_not(net.J()):
        delta, v = normal(J.shape[1], seed=seed), normal(J.shape[0], seed=seed + 1)
        Jd, Jv = J.matvec(delta), J.rmatvec(v)
        assert abs(float(Jd @ v - delta @ Jv)) <= 1e-12 * float(size * delta.norm() * v.norm())


@given(networks(), seeds)
@few
def test_derivative_of_the_gradient(net: Drawn, seed: int) -> None:
    """Jᵀv = (g(x + hv) − g(x − hv))/2h + O(h²), by plain backward(); kinks of ReLU are too rare to be met at this h."""
    parameters = list(net.model.parameters())

    def g(x: Tensor) -> Tensor:
        return torch.cat([d.reshape(-1) for d in torch.autograd.grad(net.loss(net.model(x), net.y), parameters)])

    J, h = net.J(), 1e-5
    v = normal(*net.x.shape, seed=seed)
    right = (g(net.x + h * v) - g(net.x - h * v)) / (2 * h)
    assert near(J.rmatvec(v.reshape(-1)), right, float(right.norm() + J.gradient.norm()), 1e-7)
    assert near(J.gradient, g(net.x), float(J.gradient.norm()))


@given(networks(), seeds, factors, factors)
@few
def test_linearity(net: Drawn, seed: int, a: float, b: float) -> None:
    size = float(net.J().dense().norm())
    for J in formed_or_not(net.J()):
        for product, length in ((J.matvec, J.shape[1]), (J.rmatvec, J.shape[0])):
            p, q = normal(length, seed=seed), normal(length, seed=seed + 1)
            scale = size * float(abs(a) * p.norm() + abs(b) * q.norm())
            assert near(product(a * p + b * q), a * product(p) + b * product(q), scale)


@given(networks(), seeds, st.integers(1, 5))
@few
def test_a_stack_is_its_vectors(net: Drawn, seed: int, k: int) -> None:
    for J in formed_or_not(net.J()):
        for product, length in ((J.matvec, J.shape[1]), (J.rmatvec, J.shape[0])):
            stack = normal(k, length, seed=seed)
            each = torch.stack([product(one) for one in stack])
            assert near(product(stack), each, float(each.norm()))


@given(networks())
@few
def test_gram(net: Drawn) -> None:
    """J Jᵀ is the same by whatever columns, symmetric, and has no negative eigenvalue beyond rounding."""
    gram, J = net.J().gram(), net.J().dense()
    assert near(gram, J @ J.T, float(J.norm() ** 2))
    assert near(gram, gram.T, float(J.norm() ** 2))
    assert float(torch.linalg.eigvalsh(gram)[0]) >= -1e-12 * float(J.norm() ** 2)


@given(networks())
@few
def test_images_of_a_sum_are_blocks(net: Drawn) -> None:
    """J of Σ_i L(x_i) stacks the images' own Jacobians."""
    total = net._replace(loss=lambda out, y: F.cross_entropy(out, y, reduction="sum"))
    each = [total._replace(x=net.x[i : i + 1], y=net.y[i : i + 1]).J().dense() for i in range(len(net.x))]
    J = total.J().dense()
    assert near(J, torch.cat(each), float(J.norm()))


@given(networks(), seeds, st.integers(-60, 60))
@few
def test_invariant_to_a_power_of_two(net: Drawn, seed: int, power: int) -> None:
    """The loss and the noise times 2^k: every digit of I²F and of its bound stays."""
    scale, J = 2.0**power, net.J()
    delta = normal(J.shape[1], seed=seed)
    damping = 1e-4 * float(J.dense().norm() ** 2)
    K = net.J(scale)
    first, second = i2f.influence(net.J(), delta, damping), i2f.influence(K, scale * delta, scale**2 * damping)
    assert first.norm == second.norm
    assert torch.equal(first.displacement, second.displacement)
    bound = i2f.lower_bound(net.J(), delta, damping)
    scaled = i2f.lower_bound(net.J(scale), scale * delta, scale**2 * damping)
    assert scaled.norm == bound.norm
    assert scaled.lambda_max == scale**2 * bound.lambda_max


@given(networks(), seeds, st.floats(-12, 12))
@few
def test_invariant_to_the_scale_of_the_loss(net: Drawn, seed: int, decades: float) -> None:
    scale, J = 10.0**decades, net.J()
    delta = normal(J.shape[1], seed=seed)
    damping = 1e-3 * float(J.dense().norm() ** 2)
    one, other = net.J(), net.J(scale)
    first = i2f.influence(one, delta, damping)
    assert i2f.influence(other, scale * delta, scale**2 * damping).norm == pytest.approx(first.norm, rel=1e-6)
    bound = i2f.lower_bound(one, delta, damping)
    scaled = i2f.lower_bound(other, scale * delta, scale**2 * damping)
    assert scaled.norm == pytest.approx(bound.norm, rel=1e-6)


@given(networks(), seeds, st.floats(-6, 2))
@few
def test_the_bound_is_below(net: Drawn, seed: int, decades: float) -> None:
    """I_lb(δ) ≤ I(δ) at the same ε; λ_max is approached from below, to 10⁻³."""
    J = net.J()
    delta = normal(J.shape[1], seed=seed)
    damping = 10.0**decades * float(J.dense().norm() ** 2)
    assert i2f.lower_bound(J, delta, damping).norm <= i2f.influence(J, delta, damping).norm * (1 + 1.1e-3)


@given(networks(), seeds, st.data())
@few
def test_a_gradient_in_any_form(net: Drawn, seed: int, data: st.DataObject) -> None:
    """Flat, a list in the parameters' order, a dictionary in any order, NumPy: the same J δ."""
    J = net.J()
    flat = normal(J.shape[1], seed=seed)
    named = dict(net.model.named_parameters())
    parts = [v.view_as(p) for v, p in zip(flat.split([p.numel() for p in named.values()]), named.values(), strict=True)]
    shuffled = data.draw(st.permutations(list(zip(named, parts, strict=True))))
    right, K = J.matvec(flat), net.J()
    norm = i2f.influence(K, flat, 1e-2).norm
    for form in (parts, tuple(parts), dict(shuffled), flat.numpy(), [p.numpy() for p in parts]):
        assert torch.equal(J.matvec(form), right)
        assert i2f.influence(K, form, 1e-2).norm == norm
