"""J = ∂²L/∂x∂θ: adjoint products, an independent dense twin, and a model left as it was."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import i2f


@pytest.fixture(params=["dense", "matrix-free"])
def operator(request):
    """A constructor of J whose products come from the formed matrix, or from the two graphs."""

    def make(model, x, y, **options):
        J = i2f.GradientJacobian(model, x, y, method=request.param, **options)
        if request.param == "dense":
            J.dense()
        return J

    return make


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, rtol=1e-9):
    return float((a - b).norm()) <= rtol * float(b.norm())


def adjoint(J):
    delta, v = normal(J.shape[1], seed=1), normal(J.shape[0], seed=2)
    Jd = J.matvec(delta)
    return abs(float(Jd @ v - delta @ J.rmatvec(v))) <= 1e-10 * float(Jd.norm() * v.norm())


def test_adjoint(tiny, operator):
    assert adjoint(operator(*tiny))


@pytest.mark.parametrize("name", ["lenet", "linear"])
def test_adjoint_on_digits(name, digits, operator):
    x, y = digits
    assert adjoint(operator(i2f.models.build(name, "mnist", "uniform", seed=1).double(), x[:1], y[:1]))


def test_dense_equals_twin(tiny, twin):
    assert close(i2f.GradientJacobian(*tiny).dense(), twin(*tiny))


def test_products_equal_twins(tiny, twin, operator):
    J, T = operator(*tiny), twin(*tiny)
    delta, v = normal(J.shape[1]), normal(J.shape[0])
    assert close(J.matvec(delta), T @ delta)
    assert close(J.rmatvec(v), v @ T)


def test_digit_rows_equal_differences(digits, lenet, backward):
    x, y = digits[0][:1], digits[1][:1]
    J, v, h = i2f.GradientJacobian(lenet, x, y).dense(), normal(784), 1e-4
    ahead, behind = (backward(lenet, x + s * h * v.view_as(x), y) for s in (1, -1))
    assert close(v @ J, (ahead - behind) / (2 * h), 1e-5)


def test_shape_and_gradient(tiny, backward):
    model, x, y = tiny
    J = i2f.GradientJacobian(model, x, y)
    assert J.shape == (x.numel(), sum(p.numel() for p in model.parameters()))
    assert close(J.gradient, backward(model, x, y), 1e-14)


def test_batch_is_its_vectors(tiny, operator):
    J = operator(*tiny)
    deltas, vs = normal(3, J.shape[1]), normal(3, J.shape[0])
    assert close(J.matvec(deltas), torch.stack([J.matvec(d) for d in deltas]), 1e-14)
    assert close(J.rmatvec(vs), torch.stack([J.rmatvec(v) for v in vs]), 1e-14)


def test_products_are_counted(mlp):
    J = i2f.GradientJacobian(*mlp)
    counts = [J.products]
    for act in (
        lambda: J.matvec(normal(J.shape[1])),
        lambda: J.rmatvec(normal(4, J.shape[0])),
        J.dense,
        J.gram,  # nothing new: the formed J is kept
        lambda: J.matvec(normal(2, J.shape[1])),
    ):
        act()
        counts.append(J.products)
    assert counts == [0, 1, 5, 17, 17, 19]


def test_gram_is_float64(tiny):
    model, x, y = tiny
    J = i2f.GradientJacobian(model.float(), x, y)
    J.dense()
    assert J.gram().dtype == torch.float64
    assert close(J.gram(), J.dense().double() @ J.dense().double().T, 1e-13)
    assert close(i2f.GradientJacobian(model, x, y).gram(), J.gram(), 1e-6)


def test_gram_past_one_block(digits, lenet):
    J = i2f.GradientJacobian(lenet, digits[0][:1], digits[1][:1])
    assert close(J.gram(), J.dense() @ J.dense().T, 1e-13)


def test_float32_is_near_float64(tiny, operator):
    model, x, y = tiny
    J = i2f.GradientJacobian(model, x, y).dense()
    single = operator(model.float(), x, y)
    delta = normal(J.shape[1])
    assert single.gradient.dtype == single.matvec(delta).dtype == single.dense().dtype == torch.float32
    assert close(single.dense().double(), J, 1e-5)
    assert close(single.matvec(delta).double(), J @ delta, 1e-5)


def test_frozen_parameters_are_left_out(mlp):
    model, x, y = mlp
    J = i2f.GradientJacobian(model, x, y)
    model[0].weight.requires_grad_(False)
    frozen = i2f.GradientJacobian(model, x, y)
    size = model[0].weight.numel()
    assert frozen.shape == (J.shape[0], J.shape[1] - size)
    assert close(frozen.dense(), J.dense()[:, size:], 1e-14)
    assert close(frozen.gradient, J.gradient[size:], 1e-14)


def test_custom_loss_with_float_targets(mlp, twin, operator):
    model, x, _ = mlp
    y = normal(1, 5)
    J, T, delta = operator(model, x, y, loss=F.mse_loss), twin(model, x, y, F.mse_loss), normal(293)
    assert close(J.dense(), T)
    assert close(J.matvec(delta), T @ delta)


def test_works_under_no_grad(tiny, operator):
    v = normal(tiny[1].numel())
    with torch.no_grad():
        inside = operator(*tiny).rmatvec(v)
    assert close(inside, operator(*tiny).rmatvec(v), 1e-14)


def test_matrix_free_never_forms_J(mlp, monkeypatch):
    def refuse(*_):
        raise AssertionError("J was formed")

    monkeypatch.setattr("i2f.core.jacobian.dense_jacobian", refuse)
    monkeypatch.setattr("i2f.core.jacobian.jacobian_gram", refuse)
    J = i2f.GradientJacobian(*mlp, method="matrix-free")
    delta = normal(J.shape[1])
    i2f.influence(J, delta)
    i2f.lower_bound(J, delta)
    with pytest.raises(AssertionError, match="J was formed"):
        i2f.spectrum.decompose(J)


def test_auto_goes_by_size(mlp, monkeypatch):
    assert i2f.GradientJacobian(*mlp).is_dense
    monkeypatch.setattr("i2f.core.jacobian.DENSE_BYTES", 12 * 293 * 8 - 1)
    assert not i2f.GradientJacobian(*mlp).is_dense


class Counter(nn.Module):
    """Counts its calls in a buffer, in place, as BatchNorm does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.calls += 1
        return x


@pytest.mark.parametrize("tiny", ["mlp", "norms"], indirect=True)
def test_model_is_left_as_it_was(tiny, operator):
    model, x, y = tiny
    model = nn.Sequential(Counter(), *model)
    model[1].bias.requires_grad_(False)
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    before = copy.deepcopy(model)
    J = operator(model, x, y)
    i2f.influence(J, normal(J.shape[1]))
    i2f.invert(model, J.gradient, y, x.shape, steps=1)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before.buffers(), strict=True))
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.requires_grad == b.requires_grad
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(p.grad is None for p in model.parameters() if p is not first)


def test_input_is_left_as_it_was(mlp, operator):
    model, x, y = mlp
    before = x.clone()
    operator(model, x, y).rmatvec(normal(12))
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert x.grad is None


@pytest.mark.parametrize("change", ["x", "y", "parameters", "buffers", "mode"])
@pytest.mark.parametrize("tiny", ["norms"], indirect=True)
def test_J_stays_at_its_point(tiny, change):
    """What the caller does afterwards (a training step, the next batch) must not pass into a J formed late."""
    model, x, y = tiny
    J, early = i2f.GradientJacobian(model, x, y), i2f.GradientJacobian(model, x, y).dense()
    model.train(change == "mode")
    for tensor in {"x": [x], "y": [y], "parameters": model.parameters(), "buffers": model.buffers()}.get(change, []):
        tensor.detach().mul_(2)
    assert close(J.dense(), early)


def test_operation_without_forward_mode(cubic, twin):
    model, x, y = cubic
    J = i2f.GradientJacobian(model, x, y)
    assert close(J.dense(), twin(model, x, y))
    assert J.products == J.shape[0]


def test_fused_attention(transformer, operator):
    """PyTorch's own encoder layer: its fused attention kernel has no second derivative and must not be used."""
    assert adjoint(operator(*transformer))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_jacobian_is_not_copied(mlp, copied):
    """Its graphs would be lost, and every product be zero."""
    J = i2f.GradientJacobian(*mlp, method="matrix-free")
    with pytest.raises(TypeError, match="build it from model, x and y"):
        copied(J)
