"""Every device that this machine has gives the answers of independent arithmetic on the CPU: where there is a CUDA
device, each test of an answer runs on it too."""

import math

import numpy as np
import pytest
import torch

import i2f
from conftest import TINY, build_tiny
from i2f import defense, devices, perturb, spectrum, trace
from i2f.audit import audit
from i2f.core.influence import expected_square
from i2f.paper import penalty, pipeline

HERE = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=HERE)
def on(request, monkeypatch):
    """Moves models and tensors to the device of the turn, which is the current one."""
    monkeypatch.setattr(devices, "_chosen", request.param)
    device = devices.current()
    return lambda *things: tuple(thing.to(device) for thing in things)


def jacobian(on, name, **options):
    return i2f.GradientJacobian(*on(*build_tiny(name)), **options)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("method", ["dense", "matrix-free"])
def test_products_are_those_of_differences(on, twin, name, method):
    J, D = jacobian(on, name, method=method), twin(*build_tiny(name))
    v, delta = torch.randn(3, D.shape[0], dtype=D.dtype), torch.randn(3, D.shape[1], dtype=D.dtype)
    for product, factor, expected in ((J.rmatvec, v, v @ D), (J.matvec, delta, delta @ D.T)):
        for many, right in ((factor, expected), (factor[0], expected[0])):
            (there,) = on(many)
            found = product(there)
            assert found.device == there.device
            torch.testing.assert_close(found.cpu(), right, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["mlp", "conv", "attention"])
def test_spectrum_bound_and_influence(on, twin, name):
    D = twin(*build_tiny(name))
    values = np.linalg.svd(D.numpy(), compute_uv=False) ** 2
    delta = perturb.gaussian(torch.zeros(D.shape[1], dtype=D.dtype), 1e-4, seed=3)
    damping = 1e-3 * values[0]
    right = torch.linalg.solve(D @ D.T + damping * torch.eye(len(D), dtype=D.dtype), D @ delta)
    for method in ("dense", "matrix-free"):
        J = jacobian(on, name, method=method)
        assert spectrum.lambda_max(J, 1e-8).value == pytest.approx(values[0], rel=1e-6)
        found = i2f.influence(J, *on(delta), damping)
        torch.testing.assert_close(found.displacement.cpu(), right, rtol=1e-5, atol=1e-8)
        bound = float((D @ delta).norm()) / (values[0] + damping)
        assert i2f.lower_bound(J, *on(delta), damping).norm == pytest.approx(bound, rel=2e-3)
    assert spectrum.decompose(J).values.cpu().numpy() == pytest.approx(values, rel=1e-5, abs=1e-9 * values[0])
    expected = 1e-4 * (values / (values + damping) ** 2).sum()
    assert expected_square(J, 1e-4, damping) == pytest.approx(expected, rel=1e-5)
    estimate = trace.expected_square(J, 1e-4, damping, probes=64)
    assert estimate.value == pytest.approx(expected, rel=0.3)


@pytest.mark.parametrize("method", ["gauss-newton", "dgl", "dlg", "gs"])
def test_attacks(on, method):
    """Second order to machine precision; the others on their way, from the start that they have on any device."""
    model, x, y = on(*build_tiny("conv"))
    gradient = i2f.GradientJacobian(model, x, y).gradient
    steps = {"gauss-newton": 50, "dlg": 60, "dgl": 300, "gs": 300}[method]
    found = i2f.invert(model, gradient, y, x.shape, method=method, steps=steps, start="uniform", seed=2)
    assert found.x.device == x.device
    error = float((found.x - x).square().mean())
    if method == "gauss-newton":
        assert found.converged
        assert error < 1e-12
    else:
        assert error < 0.5 * float(
            (i2f.invert(model, gradient, y, x.shape, method=method, steps=1, start="uniform", seed=2).x - x)
            .square()
            .mean()
        )


def test_many_at_once_and_what_an_attacker_may_know(on):
    model, x, y = build_tiny("mlp")
    clean = i2f.GradientJacobian(model, x, y).gradient
    sent = torch.stack([clean, perturb.gaussian(clean, 1e-8, seed=1) + clean])
    model, x, y, sent = on(model, x, y, sent)
    both = i2f.invert_many(model, sent, torch.stack([y, y]), x.shape, seed=[0, 1])
    assert float((both[0].x - x).abs().max()) < 1e-7
    assert 1e-7 < float((both[1].x - x).abs().max()) < 0.1
    for known in (
        {"covariance": torch.full_like(sent[0], 1e-8)},
        {"mask": torch.arange(len(sent[0])).to(y) != 3},
        {"box": True},
        {"ridge": 1e-12},
    ):
        found = i2f.invert(model, sent[0], y, x.shape, **known)
        assert float((found.x - x).abs().max()) < 1e-3, known
    unknown = i2f.invert(model, sent[0], None, x.shape)
    assert unknown.y.tolist() == y.tolist()


def deep(on, network):
    x, y = i2f.data.load("cifar10", n=1)
    options = {"activation": "gelu"} if network == "resnet20" else {}
    return on(i2f.models.build(network, "cifar10", seed=1, **options), x, y)


@pytest.mark.parametrize("network", ["resnet20", "vit"])
def test_deep_products_are_adjoint(on, network):
    model, x, y = deep(on, network)
    for J, off in (
        (i2f.GradientJacobian(model, x, y, method="matrix-free"), 1e-3),
        (i2f.GradientJacobian(model.double(), x.double(), y, method="matrix-free"), 1e-9),
    ):
        delta, v = torch.randn_like(J.gradient), torch.randn_like(J.x).reshape(-1)
        assert float(J.matvec(delta) @ v) == pytest.approx(float(delta @ J.rmatvec(v)), rel=off)


def test_a_deep_attack_descends(on):
    """By Krylov spaces, in float32."""
    model, x, y = deep(on, "resnet20")
    J = i2f.GradientJacobian(model, x, y, method="matrix-free")
    start = x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    before = float((J.map(start) - J.gradient).norm() / J.gradient.norm())
    found = i2f.invert(model, J.gradient, y, x.shape, steps=2, start=start)
    assert found.relative_residual < 0.5 * before


def test_penalties_and_designed_noise(on):
    model, x, y = on(*build_tiny("norms"))
    here = build_tiny("norms")
    w = torch.randn(i2f.GradientJacobian(*here).shape[0], dtype=torch.float64)
    for found, right in zip(
        *(
            torch.autograd.grad(penalty.sensitivity(m, a, b, w.view_as(a)), list(m.parameters()), allow_unused=True)
            for m, a, b, w in (on(model, x, y, w), (*here, w))
        ),
        strict=True,
    ):
        assert (found is None) == (right is None)
        if found is not None:
            torch.testing.assert_close(found.cpu(), right, rtol=1e-6, atol=1e-9)
    J, K = i2f.GradientJacobian(model, x, y), i2f.GradientJacobian(*here)
    noise = defense.designed(J, 1e-3, seed=5)
    torch.testing.assert_close(noise.cpu(), defense.designed(K, 1e-3, seed=5), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["none", "gaussian:1e-6", "prune:0.5", "designed:0.01", "quantize:8", "dp:1:0.01"])
def test_audits(on, kind):
    """The same judgement wherever the model is: noise is drawn alike on every device."""
    model, x, y = build_tiny("conv")
    (here,) = audit(model, x, y, kind, attack=True)
    (there,) = audit(*on(model, x, y), kind, attack=True)
    assert there.judged == pytest.approx(here.judged, rel=1e-4, abs=1e-9)
    assert there.image.device.type == "cpu"


@pytest.mark.parametrize("network", ["bert-tiny", "gpt2-tiny"])
def test_texts(on, network):
    pytest.importorskip("transformers", reason="texts need pip install 'i2f[text]'")
    from i2f import language
    from i2f.text.tokens import read_tokens

    model, tokens, y = on(
        language.build(network, seed=1).double(), torch.tensor([[101, 1996, 3899, 2743, 102]]), torch.tensor([1])
    )
    J = i2f.GradientJacobian(model, model.embed(tokens), y, model.loss)
    assert read_tokens(model, J.gradient, 5).tokens.tolist() == tokens.tolist()


# Choosing one ---------------------------------------------------------------------------------------------------------


def test_a_device_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert devices.resolve("auto") == devices.resolve("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device='cuda' is not on this machine: choose 'auto', or one of 'cpu'"):
        devices.resolve("cuda")
    with pytest.raises(ValueError, match="device='gpu' is unknown"):
        devices.use("gpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.resolve("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.resolve("auto").type == "cuda"


def test_a_choice_holds_for_the_process(monkeypatch):
    monkeypatch.setattr(devices, "_chosen", "cpu")
    assert devices.current() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.use("cuda").type == devices.current().type == devices.chosen() == "cuda"
    with pytest.raises(ValueError, match="device='nowhere'"):
        devices.use("nowhere")
    assert devices.chosen() == "cuda"


def test_a_notebooks_device_is_the_environments(monkeypatch):
    monkeypatch.setattr(devices, "_chosen", "cpu")
    monkeypatch.setenv("I2F_DEVICE", "auto")
    assert pipeline.settings().device == devices.chosen() == "auto"
    monkeypatch.setenv("I2F_DEVICE", "nowhere")
    with pytest.raises(ValueError, match="device='nowhere'"):
        pipeline.settings()
    monkeypatch.delenv("I2F_DEVICE")
    assert pipeline.settings().device == ""
    assert devices.chosen() == "auto"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_products_keep_all_of_float32(monkeypatch):
    """TensorFloat-32 would leave 11 bits."""
    monkeypatch.setattr(devices, "_chosen", "cpu")  # what `use` sets goes when the test ends
    torch.backends.cuda.matmul.allow_tf32 = True
    devices.use("cuda")
    a = torch.rand(256, 256, device="cuda")
    off = float((a @ a - (a.double() @ a.double()).float()).abs().max())
    assert off < 256 * 256 * 2.0**-24 / math.sqrt(256)
