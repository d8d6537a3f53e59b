"""δ: moments within their standard errors, exact pruning, and gradients that nobody changes."""

import hashlib
import math

import numpy as np
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


KINDS = {
    "gaussian": lambda g: perturb.gaussian(g, 1e-2, seed=3),
    "laplace": lambda g: perturb.laplace(g, 1e-2, seed=3),
    "prune": lambda g: perturb.prune(g, 0.3),
    "clip": lambda g: perturb.clip(g, 0.1),
    "dp": lambda g: perturb.dp(g, 0.1, 0.5, seed=3),
    "quantize": lambda g: perturb.quantize(g, 4),
    "quantize, drawn": lambda g: perturb.quantize(g, 4, seed=3),
}


def test_streams_of_a_seed_share_nothing():
    """The draws by their definition, from generators seeded by SHA-256 of name and seed; and no two of them alike."""

    def stream(name):
        number = int.from_bytes(hashlib.sha256(f"{name}:3".encode()).digest()[:8], "little") >> 1
        return torch.Generator().manual_seed(number)

    zero, half = torch.zeros(50_000, dtype=torch.float64), torch.full((50_000,), 1 / 3, dtype=torch.float64)
    half[0] = 1.0
    normal = torch.randn(50_000, generator=stream("gaussian"), dtype=torch.float64)
    assert torch.equal(perturb.gaussian(zero, 4.0, seed=3), 2 * normal)
    assert torch.equal(perturb.dp(zero, 4.0, 0.5, seed=3), 2 * normal)
    u = torch.rand(50_000, generator=stream("laplace"), dtype=torch.float64)  # by the inverse of its distribution
    quantile = torch.where(u < 0.5, (2 * u).log(), -(2 - 2 * u).log()) * 0.5**0.5
    torch.testing.assert_close(perturb.laplace(zero, 1.0, seed=3), quantile)
    rounded = half + perturb.quantize(half, 1, seed=3)  # to −1 or 1: up with probability 2/3
    up = torch.rand(50_000, generator=stream("quantize"), dtype=torch.float64) >= 1 / 3
    assert torch.equal(rounded[1:] > 0, up[1:])
    drawn = torch.stack([normal, quantile, rounded, torch.randn(50_000, generator=torch.Generator().manual_seed(3))])
    correlations = torch.corrcoef(drawn.double()).fill_diagonal_(0)
    assert float(correlations.abs().max()) < 5 / 50_000**0.5


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
@pytest.mark.parametrize("name", ["gaussian", "laplace", "quantize"])
def test_integers_of_numpy(gradient, name, kind):
    draw = getattr(perturb, name)
    assert torch.equal(draw(gradient, 8, seed=kind(3)), draw(gradient, 8, seed=3))
    assert torch.equal(perturb.quantize(gradient, kind(8)), perturb.quantize(gradient, 8))
    with pytest.raises(TypeError, match="seed is float; give an integer"):
        draw(gradient, 8, seed=3.0)
    with pytest.raises(TypeError, match="bits is float; give an integer"):
        perturb.quantize(gradient, 2.5)


@pytest.mark.parametrize("name", KINDS)
def test_arrays_and_half_precision(gradient, name):
    """δ of an array is that of its tensor; of a half-precision gradient, float32's."""
    draw = KINDS[name]
    assert torch.equal(draw(gradient.numpy()[::-1]), draw(gradient.flip(0)))
    for dtype in (torch.float16, torch.bfloat16):
        low = gradient.to(dtype)
        assert draw(low).dtype == torch.float32
        assert torch.equal(draw(low), draw(low.float()))
    long = torch.full((100_000,), 300.0, dtype=torch.float16)  # its length leaves float16
    assert float((long + perturb.clip(long, 3.0)).norm()) == pytest.approx(3.0, rel=1e-3)
    assert not draw(gradient.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("name", KINDS)
def test_a_gradient_of_another_kind_is_named(gradient, name):
    whole, complex_ = gradient.to(torch.int64), torch.complex(gradient, gradient)
    for bad in ([gradient], {"weight": gradient}, 3, None, "g", whole, complex_, np.arange(4)):
        with pytest.raises(TypeError, match=r"^gradient is .*; give the flat floating-point tensor or array"):
            KINDS[name](bad)
    for bad in (gradient[:0], gradient[None]):
        with pytest.raises(ValueError, match="gradient has shape"):
            KINDS[name](bad)
    with pytest.raises(ValueError, match="gradient has 1 NaN"):
        KINDS[name](torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize("kind", [float, np.float32, torch.tensor])
@pytest.mark.parametrize("bad", ["nan", "inf", "-1"])
def test_sizes_that_are_none_are_named(gradient, kind, bad):
    number = kind(float(bad))
    for draw, name in (
        (perturb.gaussian, "variance"),
        (perturb.laplace, "variance"),
        (perturb.prune, "ratio"),
        (perturb.clip, "norm"),
        (lambda g, v: perturb.dp(g, 1.0, v), "multiplier"),
        (lambda g, v: perturb.dp(g, v, 1.0), "norm"),
    ):
        with pytest.raises(ValueError, match=f"^{name}="):
            draw(gradient, number)


@pytest.mark.parametrize("c", [2.0**-1000, 2.0**-100, 2.0**100, 2.0**1000])
def test_noise_scales_with_the_gradient(gradient, c):
    """δ(c·g) = c·δ(g) where sizes go along, for powers of two exactly."""
    for draw in (
        lambda g, c: perturb.prune(g, 0.3),
        lambda g, c: perturb.clip(g, 0.1 * c),
        lambda g, c: perturb.quantize(g, 4),
        lambda g, c: perturb.quantize(g, 4, seed=3),
        lambda g, c: perturb.dp(g, 0.1 * c, 0.5, seed=3),
    ):
        assert torch.equal(draw(c * gradient, c), c * draw(gradient, 1.0))
    if 1e-150 < c < 1e150:  # the variance is of c's square
        assert torch.equal(perturb.gaussian(c * gradient, c * c, seed=3), c * perturb.gaussian(gradient, 1.0, seed=3))


@pytest.mark.parametrize("c", [1e-25, 1e-15, 1e15, 1e25])
def test_noise_scales_with_the_gradient_in_float32(gradient, c):
    for draw in (
        lambda g, c: perturb.prune(g, 0.3),
        lambda g, c: perturb.clip(g, 0.1 * c),
        lambda g, c: perturb.quantize(g, 4),
        lambda g, c: perturb.laplace(g, c * c, seed=3),
        lambda g, c: perturb.dp(g, 0.1 * c, 0.5, seed=3),
    ):
        scaled, plain = draw((c * gradient).float(), c), draw(gradient, 1.0)
        torch.testing.assert_close(scaled.double() / c, plain, rtol=1e-5, atol=1e-5)


def test_noise_that_the_dtype_loses_is_refused(gradient):
    """As zero it would protect nothing, and an audit of it would say what it likes."""
    for draw in (perturb.gaussian, perturb.laplace):
        for variance in (1e-90, 1e90):
            with pytest.raises(
                ValueError, match=r"noise of deviation 1e[-+]45 leaves torch.float32: give the gradient"
            ):
                draw(gradient.float(), variance)
            assert torch.isfinite(draw(gradient, variance)).all()
    with pytest.raises(
        ValueError, match=r"norm=1e-06 is .* of the gradient's: g \+ δ would be rounding in torch.float32"
    ):
        perturb.clip(gradient.float(), 1e-6)
    assert float((gradient + perturb.clip(gradient, 1e-6)).norm()) == pytest.approx(1e-6, rel=1e-6)


def test_laplace_is_finite_at_the_ends_of_its_draw(gradient, monkeypatch):
    """torch.rand gives 0 once in 2⁵³ draws, at which the quantile is −∞."""
    for end, value in ((0.0, -(2.0**0.5) / 2 * 52 * math.log(2)), (1 - 2.0**-53, 2.0**0.5 / 2 * 52 * math.log(2))):
        monkeypatch.setattr(torch, "rand", lambda shape, end=end, **_: torch.full(shape, end, dtype=torch.float64))
        assert perturb.laplace(gradient, 1.0).tolist() == [pytest.approx(value)] * 1000


def test_pruning_counts_in_decimal_however_large(gradient):
    zeros = torch.zeros(7_000_000, dtype=torch.float32) + 1
    assert int((perturb.prune(zeros, 0.29) != 0).sum()) == 2_030_000
    assert int((perturb.prune(gradient[:10], 0.9999999999) != 0).sum()) == 9
