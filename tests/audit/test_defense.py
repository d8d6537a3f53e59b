"""Defences by name, and noise that is designed: no other of its energy protects the worst direction more."""

import copy
import functools
import math

import pytest
import torch
from torch.nn import functional as F

import i2f
from conftest import build_tiny
from i2f import spectrum, streams
from i2f.audit import audit
from i2f.audit.defense import KINDS, Defense, parse
from i2f.audit.noise import averaged, designed, input_noise, squared_norm

# what a defence adds follows J alone: one image, J Jᵀ of condition 7e5, two images behind one gradient
NETWORKS = ("mlp", "attention", "pair")
DRAWS = 1000


@pytest.fixture(params=NETWORKS)
def J(request):
    return i2f.GradientJacobian(*build_tiny(request.param))


@functools.cache
def drawn(network, text):
    """(J, formed; so many draws of δ) of a defence, the same at every call; what is relative, is to ‖g‖."""
    J = i2f.GradientJacobian(*build_tiny(network))
    J.dense()
    found = parse(text.replace("‖g‖", repr(1e-9 * float(J.gradient.norm()))))
    return J, found, torch.stack([found.delta(J, seed) for seed in range(DRAWS)])


NOISES = {name: f"{name}:1e-5" for name, kind in KINDS.items() if kind.shares or kind.variance}
NOISES |= {"none": "none", "clip": "clip:1e9", "dp": "dp:1e9:‖g‖"}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("none", ()),
        ("gaussian:1e-3", (1e-3,)),
        ("dp:1.0:0.5", (1.0, 0.5)),
        ("prune:0.9", (0.9,)),
        ("quantize:4", (4,)),
        ("eigenvector:3:5", (3, 5)),
    ],
)
def test_a_defence_is_its_text(text, values, J):
    found = parse(text)
    assert found.values == values
    assert parse(str(found)) == found
    assert found.delta(J).shape == J.gradient.shape


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gausian:1", "did you mean 'gaussian'"),
        ("gaussian", "0 values: give gaussian:<variance>"),
        ("dp:1", "give dp:<clipping norm>:<noise multiplier>"),
        ("none:1", "1 values: give none"),
        ("gaussian:much", "no number: give gaussian:<variance>"),
        ("gaussian:-1", "at least 0"),
        ("gaussian:nan", "out of range"),
        ("quantize:2.5", "bits must be a whole number"),
        ("eigenvector:0.5:1", "index must be a whole number"),
    ],
)
def test_a_malformed_defence_is_named(text, words):
    with pytest.raises(ValueError, match=words):
        parse(text)


def test_a_clipped_gradient_is_scaled_back(J):
    norm = float(J.gradient.norm())
    clip, dp = Defense("clip", (norm / 4,)), Defense("dp", (norm / 4, 0.1))
    torch.testing.assert_close(clip.undone(J, clip.delta(J)), torch.zeros_like(J.gradient), atol=1e-12, rtol=0)
    assert clip.variance(J) == 0
    assert dp.variance(J) == pytest.approx((0.1 * norm) ** 2)
    noise = dp.undone(J, dp.delta(J, seed=3))
    torch.testing.assert_close(noise, 4 * i2f.perturb.gaussian(J.gradient, (0.1 * norm / 4) ** 2, 3))
    assert Defense("dp", (2 * norm, 0.1)).variance(J) == pytest.approx((0.2 * norm) ** 2)  # nothing was clipped
    assert Defense("prune", (0.5,)).variance(J) is None


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", NOISES)
def test_variances_along_the_singular_vectors_are_those_of_the_draws(network, name):
    """E[(v_iᵀδ)²] = s_i, for noise so small that the first order is all."""
    J, found, deltas = drawn(network, NOISES[name])
    spectral, rank = spectrum.decompose(J), spectrum.rank(J)
    along = (deltas @ J.dense().T) @ spectral.vectors[:, :rank] / spectral.values[:rank].sqrt()
    expected = found.variances(J)[:rank] * (2 if name == "laplace" else 1)  # half of it counts against an attacker
    torch.testing.assert_close(along.square().mean(0), expected, rtol=0.2, atol=1e-30)


@pytest.mark.parametrize("text", ["prune:0.5", "quantize:4", "eigenvector:0:1"])
def test_what_is_no_noise_has_no_variances(J, text):
    with pytest.raises(ValueError, match="adds no noise of known covariance"):
        parse(text).variances(J)


@pytest.mark.parametrize("name", ["row-space", "linear", "averaged", "eigenvector"])
def test_an_audit_refuses_what_it_cannot_judge(mlp, name):
    text = "eigenvector:0:1" if name == "eigenvector" else f"{name}:0.1"
    with pytest.raises(ValueError, match=f"{text}' cannot be audited: .*(covariance|direction)"):
        audit(*mlp, text)


def test_relative_noise_has_the_length_it_says(J):
    found = parse("relative:0.3")
    assert found.variance(J) * J.shape[1] == pytest.approx((0.3 * float(J.gradient.norm())) ** 2)


@pytest.mark.parametrize("factor", [1e-24, 1e24])
def test_norms_are_not_summed_in_float32(mlp, factor):
    """Where squares of the gradient's entries leave float32, and they themselves do not."""
    model, x, y = mlp
    J = i2f.GradientJacobian(model, x, y)
    K = i2f.GradientJacobian(copy.deepcopy(model).float(), x, y, lambda out, y: factor * F.cross_entropy(out, y))
    for text in ("relative:0.3", f"dp:{1e-3 * factor}:0.5"):
        wanted = parse(text.replace(f"{1e-3 * factor}", "1e-3")).variance(J)
        assert parse(text).variance(K) == pytest.approx(wanted * factor**2, rel=1e-3)
    assert parse("designed:0.3").input_variance(K) == pytest.approx(parse("designed:0.3").input_variance(J), rel=1e-3)


@pytest.mark.parametrize("network", NETWORKS)
def test_designed_noise_has_its_energy_and_the_same_error_in_every_direction(network):
    J, _, deltas = drawn(network, NOISES["designed"])  # so little that the first order is all
    energy = (1e-5 * float(J.gradient.norm())) ** 2
    torch.testing.assert_close(deltas[0], designed(J, energy, seed=0), rtol=1e-6, atol=0)
    assert float(deltas.square().sum(1).mean()) == pytest.approx(energy, rel=0.1)
    rank = spectrum.rank(J)
    values, vectors = spectrum.decompose(J)
    errors = (deltas @ J.dense().T) @ vectors[:, :rank] / values[:rank]  # Eq. 4 of each draw
    c = energy / float(J.gram().diagonal().sum())
    torch.testing.assert_close(errors.square().mean(0), torch.full((rank,), c, dtype=errors.dtype), rtol=0.2, atol=0)


def test_no_other_shares_protect_the_worst_direction_more(J):
    """The error in direction i under variances s along the singular vectors is s_i/λ_i."""
    values = spectrum.decompose(J).values[: spectrum.rank(J)]
    best = float((values / values.sum() / values).min())
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        shares = torch.rand(len(values), generator=generator, dtype=values.dtype)
        assert float((shares / shares.sum() / values).min()) <= best * (1 + 1e-12)


def test_designed_noise_is_the_gradient_of_a_noisy_input(mlp):
    """So whoever matches it perfectly finds x + √c z, at any size, and no more of x."""
    model, x, y = mlp
    J = i2f.GradientJacobian(model, x, y)
    c = 0.01
    delta = designed(J, c * squared_norm(J), seed=5)
    z = torch.randn(x.shape, generator=streams.generator("designed", 5), dtype=torch.float64)
    found = i2f.invert(model, J.gradient + delta, y, x.shape, start=x.clone())
    torch.testing.assert_close(found.x, x + math.sqrt(c) * z, atol=1e-6, rtol=0)
    assert not torch.equal(designed(J, 1.0), designed(J, 1.0))  # no seed: nobody can draw it again


def test_a_seed_draws_designed_noise_of_its_own(lenet, digits):
    """Neither the seed's own stream, nor an attack's start, nor Gaussian noise of that seed begins at its secret."""
    J = i2f.GradientJacobian(lenet, digits[0][:1], digits[1][:1], method="matrix-free")
    z = input_noise(J, 3).flatten()
    assert torch.equal(z, input_noise(J, 3).flatten())
    others = [torch.Generator().manual_seed(3), *(streams.generator(name, 3) for name in ("start", "gaussian"))]
    for generator in others:
        draw = torch.randn(len(z), generator=generator, dtype=torch.float64)
        assert abs(float(torch.corrcoef(torch.stack([z, draw]))[0, 1])) < 0.2


SCALES = [(torch.float64, c) for c in (1e-30, 1e-15, 1e15, 1e30)] + [(torch.float32, c) for c in (1e-15, 1e15)]


@pytest.mark.parametrize(("dtype", "factor"), SCALES)
@pytest.mark.parametrize(
    ("text", "method"),
    [
        *((text, "dense") for text in ("relative:0.3", "clip:0.25", "dp:0.25:0.1", "prune:0.5", "quantize:4")),
        *(("designed:0.1", method) for method in ("dense", "matrix-free")),  # the others use the gradient alone
    ],
)
def test_defences_do_not_depend_on_the_losss_scale(mlp, dtype, factor, text, method):
    """δ, what is left of it to a knowing attacker, and its variance, all in units of the gradient."""
    model, x, y = mlp
    J = i2f.GradientJacobian(model, x, y, method=method)
    K = i2f.GradientJacobian(
        copy.deepcopy(model).to(dtype), x, y, lambda out, y: factor * F.cross_entropy(out, y), method=method
    )
    own = parse(text)
    scaled = Defense(own.name, (own.values[0] * factor, *own.values[1:])) if own.name in ("clip", "dp") else own
    near = {"rtol": 1e-6, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-5}
    delta, found = own.delta(J, 1), scaled.delta(K, 1)
    torch.testing.assert_close(found.double() / factor, delta, **near)
    torch.testing.assert_close(scaled.undone(K, found).double() / factor, own.undone(J, delta), **near)
    if own.variance(J):
        assert scaled.variance(K) == pytest.approx(own.variance(J) * factor**2, rel=1e-4)
    if own.input_variance(J):
        assert scaled.input_variance(K) == pytest.approx(own.input_variance(J), rel=1e-4)


def test_traces_agree(tiny):
    exact = squared_norm(i2f.GradientJacobian(*tiny))
    drawn = squared_norm(i2f.GradientJacobian(*tiny, method="matrix-free"))
    assert drawn == pytest.approx(exact, rel=0.4)


def test_averaged_shares_are_optimal():
    """No small shift of energy between two directions gains; directions that are too sharp get none."""
    values = torch.logspace(1, -4, 30, dtype=torch.float64)
    tau, energy = 0.3, 0.2
    shares = averaged(values, energy, tau)

    def left(s):
        return float((s * tau**2 / (values * tau**2 + s)).sum())

    assert float(shares.sum()) == pytest.approx(energy)
    assert float(shares.min()) == 0
    assert float(shares[values.argmax()]) == 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        i, j = torch.randint(0, 30, (2,), generator=generator).tolist()
        moved = shares.clone()
        amount = min(1e-3 * energy, float(moved[i]))
        moved[i] -= amount
        moved[j] += amount
        assert left(moved) <= left(shares) + 1e-12
    assert left(shares) > left(torch.full_like(values, energy / 30))
    with pytest.raises(ValueError, match="not positive"):
        averaged(torch.tensor([1.0, 0.0]), 1.0, 1.0)
    with pytest.raises(ValueError, match="tau=0 is out of range"):
        averaged(values, 1.0, 0)


@pytest.mark.parametrize("factor", [1e-60, 1e-30, 1.0, 1e30, 1e60])
@pytest.mark.parametrize("energy", [0.0, 1e-9, 0.2, 1e6])
def test_averaged_shares_do_not_depend_on_the_scale(factor, energy):
    """The condition for an optimum at each scale: where s > 0, s + λτ² = τ²√(λ/ν) for one ν; elsewhere λ ≥ 1/ν."""
    values = torch.logspace(1, -4, 30, dtype=torch.float64) * factor
    shares = averaged(values, energy * factor, 0.3) / factor
    values = values / factor
    assert float(shares.sum()) == pytest.approx(energy, rel=1e-9)
    some = shares > 0
    if energy:
        level = (shares + values * 0.09) / (0.09 * values.sqrt())  # 1/√ν
        torch.testing.assert_close(level[some], level[some].mean().expand(int(some.sum())), rtol=1e-9, atol=0)
        assert (values[~some].sqrt() >= float(level[some].mean()) * (1 - 1e-9)).all()
    assert bool(some.any()) == (energy > 0)
