"""δ: moments within their standard errors, exact pruning, and gradients that nobody changes."""

import pytest
import torch

import i2f
from i2f import perturb, spectrum

D = 200_000
KURTOSIS = {"gaussian": 3.0, "laplace": 6.0}


@pytest.fixture(params=["gaussian", "laplace"])
def noise(request):
    return getattr(perturb, request.param)


@pytest.fixture
def gradient():
    return torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("variance", [1e-5, 4.0])
def test_moments(noise, variance):
    """Mean 0 and variance σ², to four standard errors: σ/√n, and σ²√((κ − 1)/n) with κ the kurtosis."""
    delta = noise(torch.zeros(D, dtype=torch.float64), variance, seed=0)
    kurtosis = KURTOSIS[noise.__name__]
    assert abs(float(delta.mean())) <= 4 * (variance / D) ** 0.5
    assert abs(float(delta.var()) / variance - 1) <= 4 * ((kurtosis - 1) / D) ** 0.5
    assert float((delta**4).mean()) / variance**2 == pytest.approx(kurtosis, rel=0.06)


def test_seed_repeats_the_draw(noise, gradient):
    assert torch.equal(noise(gradient, 1.0, seed=3), noise(gradient, 1.0, seed=3))
    assert not torch.equal(noise(gradient, 1.0, seed=3), noise(gradient, 1.0, seed=4))
    assert not torch.equal(noise(gradient, 1.0), noise(gradient, 1.0))


def test_seed_leaves_the_global_stream_alone(noise, gradient):
    before = torch.get_rng_state()
    noise(gradient, 1.0, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_same_draw_in_either_precision(noise, gradient):
    single = noise(gradient.float(), 1.0, seed=3)
    assert single.dtype == torch.float32
    assert torch.equal(single, noise(gradient, 1.0, seed=3).float())


def test_no_variance_is_no_noise(noise, gradient):
    assert not noise(gradient, 0.0, seed=3).any()


@pytest.mark.parametrize(("d", "ratio", "pruned"), [(10, 0.0, 0), (10, 0.3, 3), (7, 0.5, 3), (9, 0.99, 8)])
def test_prune(gradient, d, ratio, pruned):
    gradient = gradient[:d]
    shared = gradient + perturb.prune(gradient, ratio)
    kept = shared != 0
    assert int((~kept).sum()) == pruned
    assert torch.equal(shared[kept], gradient[kept])
    assert pruned == 0 or gradient[~kept].abs().max() < gradient[kept].abs().min()


def test_prune_counts_ties():
    assert int((perturb.prune(torch.ones(10), 0.4) != 0).sum()) == 4


@pytest.mark.parametrize("name", ["gaussian", "laplace", "prune"])
def test_gradient_is_not_changed(gradient, name):
    before = gradient.clone()
    delta = getattr(perturb, name)(gradient, 0.5)
    delta += 1
    assert torch.equal(gradient, before)


def test_eigenvector_norm(tiny):
    J = i2f.GradientJacobian(*tiny)
    assert float(perturb.eigenvector(J, index=2, norm=5.0).norm()) == pytest.approx(5.0)
    torch.testing.assert_close(perturb.eigenvector(J, index=2), spectrum.right_singular_vector(J, 2))


def test_eigenvector_by_eigenvalue(tiny):
    """The nearest λ on a log scale: between two neighbours the geometric mean decides, not the arithmetic."""
    J = i2f.GradientJacobian(*tiny)
    values = spectrum.decompose(J).values
    index = int((values[:-1] / values[1:]).argmax())  # the widest gap
    above, below = float(values[index]), float(values[index + 1])
    middle = (above * below) ** 0.5
    assert middle * 1.01 < (above + below) / 2
    assert torch.equal(perturb.eigenvector(J, eigenvalue=middle * 1.01), perturb.eigenvector(J, index=index))
    assert torch.equal(perturb.eigenvector(J, eigenvalue=middle / 1.01), perturb.eigenvector(J, index=index + 1))


@pytest.mark.parametrize(("eigenvalue", "index"), [(1e9, 0), (1e-300, 2)])
def test_eigenvalue_outside_the_spectrum(blind, eigenvalue, index):
    """The last eigenvector that there is, never one of the null space."""
    J = i2f.GradientJacobian(*blind)
    assert torch.equal(perturb.eigenvector(J, eigenvalue=eigenvalue), perturb.eigenvector(J, index=index))


def test_prune_counts_in_decimal():
    assert int((perturb.prune(torch.ones(100), 0.29) != 0).sum()) == 29
