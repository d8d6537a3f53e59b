"""A loss multiplied by c changes no answer, where the noise scales with c as J does, and ε with c² as λ does."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import i2f
from conftest import build_crop
from i2f import perturb, spectrum, trace
from i2f.core.influence import expected_square
from i2f.paper import penalty

VARIANCE, DAMPING = 1e-6, 1e-2  # at c = 1
SCALES = [
    *((torch.float64, c) for c in (1e-100, 1e-30, 1e-15, 1e15, 1e30, 1e100)),
    *((torch.float32, c) for c in (1e-25, 1e-15, 1e-12, 1.0, 1e12, 1e15)),
]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
ENDS = [SCALES[0], SCALES[5], SCALES[6], SCALES[11]]
# every scale on small networks, the ends of each dtype on the real one
CASES = [*((name, *at) for name in ("small", "crop") for at in SCALES), *(("lenet", *at) for at in ENDS)]


def small():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)), torch.rand(1, 12), torch.tensor([1])


def lenet():
    x, y = i2f.data.load("mnist", n=1)
    return i2f.models.build("lenet", "mnist", init="uniform", seed=1, normalize=False), x, y


NETWORKS = {"small": small, "crop": build_crop, "lenet": lenet}


def problem(network, dtype=torch.float64, c=1.0, method="dense"):
    model, x, y = NETWORKS[network]()
    return i2f.GradientJacobian(
        model.to(dtype), x.to(dtype), y, loss=lambda o, t: c * F.cross_entropy(o, t), method=method
    )


@functools.cache
def reference(network):
    """In float64, at c = 1, from J as a matrix: nothing of the solvers under test."""
    J = problem(network)
    rows, delta = J.dense(), perturb.gaussian(J.gradient, VARIANCE, seed=0)
    U, s, _ = torch.linalg.svd(torch.linalg.qr(rows.T, mode="r").R.T)
    values, image = s.square(), U.T @ (rows @ delta)
    return {
        "delta": delta,
        "values": values,
        "influence": {eps: float((image / (values + eps)).norm()) for eps in (0.0, DAMPING)},
        "displacement": U @ (image / (values + DAMPING)),
        "bound": {eps: float(image.norm() / (values[0] + eps)) for eps in (0.0, DAMPING)},
        "square": {eps: VARIANCE * float((values / (values + eps) ** 2).sum()) for eps in (0.0, DAMPING)},
    }


@pytest.mark.parametrize(("network", "dtype", "c"), CASES)
def test_dense_answers(network, dtype, c):
    J, right, rel = problem(network, dtype, c), reference(network), TOLERANCE[dtype]
    delta = (c * right["delta"]).to(dtype)
    for eps in (0.0, DAMPING):
        found = i2f.influence(J, delta, eps * c * c)
        assert found.converged
        assert found.norm == pytest.approx(right["influence"][eps], rel=rel)
        assert found.rmse == pytest.approx(right["influence"][eps] / J.shape[0] ** 0.5, rel=rel)
        assert expected_square(J, VARIANCE * c * c, eps * c * c) == pytest.approx(right["square"][eps], rel=rel)
    torch.testing.assert_close(
        found.displacement.double(), right["displacement"], rtol=0, atol=rel * float(right["displacement"].norm())
    )
    values = spectrum.decompose(J).values / c / c
    torch.testing.assert_close(values, right["values"], rtol=0, atol=1e-6 * float(values[0]))
    assert spectrum.rank(J) == J.shape[0]
    v = perturb.eigenvector(J, index=0, norm=5.0)
    assert float(v.norm()) == pytest.approx(5, rel=1e-6)
    assert i2f.influence(J, c * v).norm == pytest.approx(5 / float(right["values"][0]) ** 0.5, rel=rel)
    assert torch.equal(
        perturb.eigenvector(J, eigenvalue=float(right["values"][3]) * c * c, norm=5.0),
        perturb.eigenvector(J, index=3, norm=5.0),
    )


@pytest.mark.parametrize(("network", "dtype", "c"), CASES)
def test_answers_from_products(network, dtype, c):
    J, right, rel = problem(network, dtype, c, "matrix-free"), reference(network), TOLERANCE[dtype]
    delta, top = (c * right["delta"]).to(dtype), float(right["values"][0])
    for eps in (0.0, DAMPING) if network == "small" else (DAMPING,):
        found = i2f.influence(J, delta, eps * c * c)
        assert found.residual < 1e-4
        assert found.norm == pytest.approx(right["influence"][eps], rel=rel)
    for eps in (0.0, DAMPING):
        bound = i2f.lower_bound(J, delta, eps * c * c, tol=1e-5)
        assert bound.converged
        assert bound.lambda_max == pytest.approx(top * c * c, rel=1e-5)
        assert bound.norm == pytest.approx(right["bound"][eps], rel=rel)


@pytest.mark.parametrize("network", ["small", "lenet"])
def test_traces(network):
    """Their probes are the same at every scale."""
    estimates = trace.expected_square, trace.bayes_error
    J = problem(network, method="matrix-free")
    plain = [estimate(J, VARIANCE, DAMPING, probes=2) for estimate in estimates]
    for dtype, c in ENDS if network == "lenet" else SCALES:
        J = problem(network, dtype, c, "matrix-free")
        for estimate, right in zip(estimates, plain, strict=True):
            found = estimate(J, VARIANCE * c * c, DAMPING * c * c, probes=2)
            assert found.converged
            assert found.value == pytest.approx(right.value, rel=TOLERANCE[dtype])
            assert found.high == pytest.approx(right.high, rel=TOLERANCE[dtype])


def penalties(network, dtype, scale):
    """name -> (value, derivative by θ) of each penalty, without what the scale adds to the value."""
    model, x, y = NETWORKS[network]()
    model, x = model.to(dtype), x.to(dtype)
    parameters = list(model.parameters())

    def loss(output, y):
        return scale * F.cross_entropy(output, y)

    def draw():
        return torch.Generator().manual_seed(0)

    terms = {
        "bound": penalty.bound(model, x, y, power_steps=20, loss=loss, generator=draw()),
        "bayes": penalty.bayes(model, x, y, scale**2, loss=loss, generator=draw()),
    }
    found = {}
    for name, term in terms.items():
        slope = torch.cat([g.flatten() for g in torch.autograd.grad(term, parameters)]).double()
        found[name] = float(term.detach()) - 2 * math.log(scale), slope
    return found


plain_penalties = functools.cache(lambda network: penalties(network, torch.float64, 1.0))


@pytest.mark.parametrize(("network", "dtype", "c"), [case for case in CASES if case[0] != "crop"])
def test_penalties_and_their_derivatives(network, dtype, c):
    """log λ_max and −log of the trace move by 2 log c, their derivatives not at all."""
    found, plain = penalties(network, dtype, c), plain_penalties(network)
    for name, (right, right_slope) in plain.items():
        value, slope = found[name]
        assert value == pytest.approx(right, rel=TOLERANCE[dtype], abs=1e-4 if dtype == torch.float32 else 1e-9)
        off = float((slope - right_slope).norm() / right_slope.norm())
        assert off < {torch.float32: 1e-2, torch.float64: 1e-6}[dtype]


@pytest.mark.parametrize("method", ["dense", "matrix-free"])
@pytest.mark.parametrize("c", [1e-35, 1e-40])
def test_what_float32_does_not_resolve_is_refused(method, c):
    """Subnormal gradients have lost digits that no unit brings back."""
    with pytest.raises(ValueError, match=r"too small for torch.float32: scale the loss up"):
        problem("small", torch.float32, c, method)


@pytest.mark.parametrize("c", [1e-150, 1e150])
def test_eigenvalues_out_of_float64_are_refused(c):
    """λ goes as c²."""
    J = problem("small", c=c)
    delta = torch.ones_like(J.gradient)
    for ask in (
        lambda: i2f.influence(J, delta),
        lambda: i2f.lower_bound(J, delta),
        lambda: spectrum.decompose(J),
        lambda: expected_square(J, 1.0, 1.0),
        lambda: trace.bayes_error(J, 1.0, 1.0),
    ):
        with pytest.raises(ValueError, match=r"J is of size .*, and λ, of its square, leaves float64: scale the loss"):
            ask()


def test_a_gradient_far_smaller_than_its_jacobian():
    """As of a regression that is almost met: squares of a unit from the gradient overflow in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.rand(1, 6)
    y = model(x).detach() + 1e-7
    for c, method in ((1e25, "matrix-free"), (1e25, "dense"), (1.0, "matrix-free")):
        J = i2f.GradientJacobian(model, x, y, loss=lambda o, t, c=c: c * F.mse_loss(o, t), method=method)
        twin = i2f.GradientJacobian(model.double(), x.double(), y.double(), loss=F.mse_loss)
        model.float()
        delta = torch.linspace(-1, 1, J.shape[1])
        eps = 1e-2 * float(spectrum.decompose(twin).values[0])
        exact = i2f.influence(twin, delta.double(), eps)
        assert i2f.influence(J, c * delta, eps * c * c, rtol=1e-6).norm == pytest.approx(exact.norm, rel=1e-2)
        assert i2f.lower_bound(J, c * delta, tol=1e-4).norm == pytest.approx(
            i2f.lower_bound(twin, delta.double(), tol=1e-4).norm, rel=1e-2
        )
