"""What the attacker knows decides: masks, known noise, several images."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import i2f
from conftest import build_tiny, normal
from i2f import metrics, perturb
from i2f.attacks.match import LowRank, Match

# masks and known noise


def test_pruned_gradient_gives_itself_away(lenet, digits, backward):
    """At ratio 0.5 the kept half determines the image; matching the zeros as well lands far from it."""
    x, y = digits[0][:1], digits[1][:1]
    g = backward(lenet, x, y)
    sent = g + perturb.prune(g, 0.5)
    known = i2f.invert(lenet, sent, y, x.shape, mask=sent != 0)
    naive = i2f.invert(lenet, sent, y, x.shape)
    assert float(metrics.mse(known.x, x)) <= 1e-8
    assert float(metrics.mse(naive.x, x)) >= 1e-4
    assert known.relative_residual <= 1e-10 < naive.relative_residual


@pytest.mark.parametrize("method", ["gauss-newton", "dgl", "gs"])
def test_masked_coordinates_do_not_matter(mlp, backward, method):
    model, x, y = mlp
    g = backward(model, x, y)
    mask = torch.arange(len(g)) % 3 > 0
    found = [
        i2f.invert(model, torch.where(mask, g, junk), y, x.shape, method=method, mask=mask, steps=10)
        for junk in (0.0, 7.0)
    ]
    assert torch.equal(found[0].x, found[1].x)
    assert found[0].relative_residual == found[1].relative_residual


@pytest.mark.parametrize("tiny", ["mlp", "conv"], indirect=True)
@pytest.mark.parametrize("full", [False, True], ids=["variances", "matrix"])
def test_known_noise_lands_on_the_weighted_least_squares_solution(tiny, backward, twin, full):
    """To first order, x − x₀ = (J Σ⁻¹ Jᵀ)⁻¹ J Σ⁻¹ δ, here with J by finite differences."""
    model, x, y = tiny
    g, J = backward(model, x, y), twin(model, x, y)
    scale = torch.logspace(-3, 3, len(g), dtype=torch.float64)[torch.randperm(len(g), generator=torch.manual_seed(0))]
    covariance = torch.diag(scale)
    if full:
        mix = normal(len(g), 3)
        covariance = covariance + mix @ mix.T
    delta = 1e-6 * torch.linalg.cholesky(covariance) @ normal(len(g), seed=1)
    A = J @ torch.linalg.inv(covariance)
    expected = torch.linalg.solve(A @ J.T, A @ delta)
    found = i2f.invert(model, g + delta, y, x.shape, covariance=covariance if full else scale, seed=1)
    error = (found.x - x).reshape(-1)
    assert float((error - expected).norm() / expected.norm()) <= 2e-2
    plain = torch.linalg.solve(J @ J.T, J @ delta)
    assert float((plain - expected).norm() / expected.norm()) > 0.5  # and that is not the unweighted one


def test_match_is_its_matrix():
    """W as a matrix: W and Wᵀ are each other's transposes, WᵀW is the inverse covariance of the known part."""
    size, mask = 7, torch.tensor([1, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
    root = normal(size, size)
    covariance = root @ root.T + torch.eye(size)
    for cov in (None, covariance.diagonal(), covariance):
        match = Match(size, mask, cov)
        W = match(torch.eye(size, dtype=torch.float64)).T
        transposed = torch.stack([match.adjoint(e, size) for e in torch.eye(5, dtype=torch.float64)], 1)
        torch.testing.assert_close(W, transposed.T)
        known = torch.eye(size) if cov is None else torch.diag(cov) if cov.ndim == 1 else cov
        inverse = torch.linalg.inv(known.double()[mask][:, mask])
        torch.testing.assert_close((W.T @ W)[mask][:, mask], inverse)
        assert not (W.T @ W)[~mask].any()
    assert Match(size).plain
    assert not Match(size, mask).plain


def low_rank(size, rank):
    """V with orthonormal rows and the variances along them; and the same covariance as a matrix."""
    known = LowRank(torch.linalg.qr(normal(size, rank))[0].T, torch.logspace(-2, 2, rank, dtype=torch.float64), 1e-3)
    return known, known.basis.T @ torch.diag(known.variances) @ known.basis + known.floor * torch.eye(
        size, dtype=torch.float64
    )


@pytest.mark.parametrize("masked", [False, True])
def test_low_rank_covariance_whitens_as_its_matrix_does(masked):
    """WᵀW is the inverse covariance of the known part, in any unit of the residual; W and Wᵀ are transposes."""
    size, mask = 9, torch.arange(9) % 4 != 1
    mask = mask if masked else None
    known, matrix = low_rank(size, 3)
    match, kept = Match(size, mask, known), torch.arange(size) if mask is None else mask.nonzero()[:, 0]
    W = match(torch.eye(size, dtype=torch.float64)).T
    inverse = torch.linalg.inv(matrix[kept][:, kept])
    torch.testing.assert_close((W.T @ W)[kept][:, kept], inverse, rtol=1e-9, atol=1e-9)
    transposed = torch.stack([match.adjoint(e, size) for e in torch.eye(len(kept), dtype=torch.float64)], 1)
    torch.testing.assert_close(W, transposed.T)
    v = normal(size)
    torch.testing.assert_close(match.scaled(0.25)(v), match(v) / 4)
    torch.testing.assert_close(match.to(v.device, torch.float32)(v.float()), match(v).float(), rtol=1e-3, atol=1e-3)


def test_low_rank_covariance_gives_the_attack_of_its_matrix(mlp, backward):
    model, x, y = mlp
    sent = backward(model, x, y)
    known, matrix = low_rank(len(sent), 12)
    noise = known.variances.sqrt() * normal(12, seed=1) @ known.basis + known.floor**0.5 * normal(len(sent), seed=2)
    found, dense, plain = (
        i2f.invert(model, sent + 1e-2 * noise, y, x.shape, covariance=one) for one in (known, matrix, None)
    )
    assert found.converged
    torch.testing.assert_close(found.x, dense.x, rtol=0, atol=1e-6)
    assert float((plain.x - dense.x).norm()) > 1e-3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"basis": torch.eye(3, 5)}, r"basis of shape \(3, 5\)"),
        ({"variances": torch.ones(2)}, r"variances \(2,\)"),
        ({"basis": 2 * torch.eye(3, 9)}, "not orthonormal"),
        ({"variances": -torch.ones(3)}, "variances ≥ 0"),
        ({"floor": 0.0}, "floor > 0"),
    ],
)
def test_low_rank_covariances_that_are_none_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Match(9, None, replace(low_rank(9, 3)[0], **change))


# several images behind one gradient


def test_two_digits_behind_one_gradient(lenet, digits, backward):
    x, y = digits[0][:2], digits[1][:2]
    found = i2f.invert(lenet, backward(lenet, x, y), y, x.shape)
    assert float(metrics.mse(metrics.assign(found.x, x), x).max()) <= 1e-6


def test_best_order_is_found():
    truth = torch.rand(5, 1, 4, 4, dtype=torch.float64)
    shuffled = truth[[3, 0, 4, 1, 2]] + 1e-3
    torch.testing.assert_close(metrics.assign(shuffled, truth), truth + 1e-3)
    assert metrics.compare(shuffled, truth)["mse"] == pytest.approx(1e-6)


@pytest.mark.parametrize("tiny", ["pair"], indirect=True)
def test_reduction_of_the_loss_is_part_of_what_is_known(tiny, backward):
    """Two images under a summed loss: found by who knows the sum; a mean cannot explain their gradient."""
    model, x, y = tiny

    def total(output, labels):
        return F.cross_entropy(output, labels, reduction="sum")

    sent = backward(model, x, y, total)
    found = i2f.invert(model, sent, y, x.shape, loss=total)
    assert float(metrics.mse(metrics.assign(found.x, x), x).max()) <= 1e-16
    assert i2f.invert(model, sent, y, x.shape).relative_residual > 1e-3


def test_a_low_rank_covariance_takes_arrays_and_float32():
    """The rows of an honest float32 factorisation are orthonormal to float32's rounding."""
    model, x, y = build_tiny("mlp")
    gradient = i2f.GradientJacobian(model, x, y).gradient
    basis = torch.linalg.qr(normal(len(gradient), 3).float())[0].T
    known = LowRank(basis, torch.full((3,), 0.1, dtype=torch.float64), 1e-3)
    wanted = i2f.invert(model, gradient, y, x.shape, covariance=known, steps=3)
    given = LowRank(basis.numpy(), [0.1] * 3, 1e-3)
    assert torch.equal(i2f.invert(model, gradient, y, x.shape, covariance=given, steps=3).x, wanted.x)
    with pytest.raises(ValueError, match=r"covariance.variances has 1 NaN or infinite"):
        i2f.invert(model, gradient, y, x.shape, covariance=LowRank(basis, [0.1, float("inf"), 0.1], 1e-3))
