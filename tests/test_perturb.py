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


def test_clip_shortens_what_is_long_and_nothing_else(gradient):
    length = float(gradient.norm())
    clipped = gradient + perturb.clip(gradient, length / 3)
    assert float(clipped.norm()) == pytest.approx(length / 3)
    torch.testing.assert_close(clipped, gradient / 3)
    assert not perturb.clip(gradient, 2 * length).any()
    assert not perturb.clip(torch.zeros(4), 1.0).any()
    with pytest.raises(ValueError, match="norm=0"):
        perturb.clip(gradient, 0)


def test_dp_is_clipping_and_noise_of_the_clipped_size():
    gradient = torch.full((40_000,), 0.1)
    delta = perturb.dp(gradient, norm=2.0, multiplier=0.5, seed=0)
    noise = delta - perturb.clip(gradient, 2.0)
    assert float(noise.std()) == pytest.approx(1.0, rel=0.02)
    assert torch.equal(perturb.dp(gradient, 2.0, 0.0), perturb.clip(gradient, 2.0))


def test_quantize_keeps_so_many_levels():
    gradient = torch.linspace(-1, 0.9, 1001, dtype=torch.float64)
    rounded = gradient + perturb.quantize(gradient, 2)
    torch.testing.assert_close(rounded.unique(), torch.tensor([-1, -1 / 3, 1 / 3, 1], dtype=torch.float64))
    assert float(perturb.quantize(gradient, 2).abs().max()) <= 1 / 3 + 1e-12
    many = torch.full((20_000,), 0.1, dtype=torch.float64)
    many[0] = 1.0
    drawn = many + perturb.quantize(many, 2, seed=0)
    assert drawn[1:].unique().tolist() == [pytest.approx(-1 / 3), pytest.approx(1 / 3)]
    assert float(drawn[1:].mean()) == pytest.approx(0.1, abs=0.01)  # to the nearest, it would be 1/3
    assert not perturb.quantize(torch.zeros(3), 8).any()
    with pytest.raises(ValueError, match="bits=0"):
        perturb.quantize(gradient, 0)
