"""What the attacker knows decides: masks, known noise, the box, total variation, labels, several images."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import i2f
from i2f import metrics, perturb
from i2f.attacks.labels import recover_labels
from i2f.attacks.match import LowRank, Match
from i2f.attacks.prior import SMOOTHING, lagged_curvature, total_variation
from i2f.core.gradient import GradientMap


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


# box and total variation


@pytest.mark.parametrize("method", ["gauss-newton", "dgl", "gs", "dlg"])
def test_box_holds_at_every_iterate(mlp, backward, method):
    model, x, y = mlp
    x = x.round()  # the truth sits on the bounds
    g = backward(model, x, y)
    seen = []
    found = i2f.invert(
        model,
        g + perturb.gaussian(g, 1e-2, seed=0),
        y,
        x.shape,
        method=method,
        box=True,
        steps=15,
        start="normal",
        callback=lambda at: seen.append(at.x),
    )
    assert len(seen) > 2
    assert all(float(z.min()) >= 0 and float(z.max()) <= 1 for z in [*seen, found.x])


def test_box_is_the_constrained_minimiser_and_not_a_clamped_one(mlp, backward):
    """Against projected gradient descent, which shares no code with the attack's steps."""
    model, x, y = mlp
    x = x.round()
    g = backward(model, x, y)
    sent = g + perturb.gaussian(g, 3e-2, seed=2)
    found = i2f.invert(model, sent, y, x.shape, box=True)
    z, r = x.clone(), None
    for _ in range(20_000):
        J = i2f.GradientJacobian(model, z, y, method="matrix-free")
        r = J.gradient - sent
        z = (z - 0.1 * J.matvec(r).view_as(z)).clamp(0, 1)
        if float((z - found.x).abs().max()) < 1e-7:
            break
    torch.testing.assert_close(found.x, z, rtol=0, atol=1e-6)
    free = i2f.invert(model, sent, y, x.shape)
    assert found.converged
    assert int(((found.x == 0) | (found.x == 1)).sum()) >= 2
    assert found.loss < float((backward(model, free.x.clamp(0, 1), y) - sent).square().sum())


def test_box_helps_a_noisy_attack(lenet, digits):
    x, y = digits[0][:1], digits[1][:1]
    J = i2f.GradientJacobian(lenet, x, y)
    sent = J.gradient + perturb.gaussian(J.gradient, 1e-4, seed=0)
    free = i2f.invert(lenet, sent, y, x.shape)
    boxed = i2f.invert(lenet, sent, y, x.shape, box=True)
    assert boxed.converged
    assert float(metrics.mse(boxed.x, x)) < float(metrics.mse(free.x.clamp(0, 1), x))


def test_total_variation_is_what_it_says():
    x = torch.tensor([[[[0.0, 1.0, 1.0], [0.0, 1.0, 0.5]]]], dtype=torch.float64)
    rows, columns = 0.5 / 3, (1 + 0 + 1 + 0.5) / 4
    assert float(total_variation(x)) == pytest.approx(rows + columns, abs=2 * SMOOTHING)
    assert float(total_variation(torch.full_like(x, 0.3))) == 0


def test_lagged_curvature_is_symmetric_semidefinite_and_gives_the_gradient():
    x = normal(1, 2, 4, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(total_variation(x), x)
    K = lagged_curvature(x.detach())
    torch.testing.assert_close(K(x.detach().reshape(-1)), gradient.reshape(-1))
    matrix = K(torch.eye(40, dtype=torch.float64))
    torch.testing.assert_close(matrix, matrix.T)
    assert float(torch.linalg.eigvalsh(matrix)[0]) >= -1e-12
    hessian = torch.autograd.functional.hessian(total_variation, x.detach()).view(40, 40)
    assert float(torch.linalg.eigvalsh(matrix - hessian)[0]) >= -1e-9  # never flatter than TV is


@pytest.mark.parametrize("tiny", ["conv"], indirect=True)
@pytest.mark.parametrize("box", [False, True])
def test_total_variation_reaches_a_minimum(tiny, backward, box):
    """Stationary for ‖∇L − g‖² + tv·TV, by the gradient of that sum; and smoother than without."""
    model, x, y = tiny
    g = backward(model, x, y)
    sent = g + perturb.gaussian(g, 1e-3, seed=0)
    found = i2f.invert(model, sent, y, x.shape, tv=1e-2, box=box, steps=200)
    z = found.x.clone().requires_grad_()
    gmap = GradientMap(model, y)
    objective = (gmap(z, create_graph=True) - sent).square().sum() + 1e-2 * total_variation(z)
    (slope,) = torch.autograd.grad(objective, z)
    held = (z <= 0) & (slope > 0) | (z >= 1) & (slope < 0) if box else torch.zeros_like(z, dtype=torch.bool)
    assert found.loss == pytest.approx(objective.item(), rel=1e-9)
    assert float(slope[~held].norm()) <= 1e-5
    assert float(total_variation(found.x)) < float(total_variation(i2f.invert(model, sent, y, x.shape, box=box).x))


@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_gaussian_prior_moves_the_attack_as_damped_influence_says(lenet, digits, damping):
    """The MAP attacker lands (J Jᵀ + εI)⁻¹(Jδ + ε(mean − x₀)) away: Eq. 4 damped, where the prior's mean is the truth,
    and the prior's pull besides, where it is not."""
    x, y = digits[0][:1], digits[1][:1]
    J = i2f.GradientJacobian(lenet, x, y)
    delta = perturb.gaussian(J.gradient, 1e-12, seed=0)
    for mean in (x, x + 1e-4 * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)):
        found = i2f.invert(lenet, J.gradient + delta, y, x.shape, ridge=damping, mean=mean, start=x)
        pull = torch.linalg.solve(
            J.gram() + damping * torch.eye(x.numel(), dtype=x.dtype), damping * (mean - x).reshape(-1)
        )
        predicted = i2f.influence(J, delta, damping).displacement + pull
        assert found.converged
        assert float((found.x - x).reshape(-1).sub(predicted).norm()) <= 1e-3 * float(predicted.norm())


@pytest.mark.parametrize("tiny", ["conv"], indirect=True)
def test_priors_join_in_every_method(tiny, backward):
    """The minimum of distance, total variation and Gaussian prior together: found by one method, by the gradient of
    that sum, and approached by the other."""
    model, x, y = tiny
    sent = backward(model, x, y)
    prior = {"tv": 1e-2, "ridge": 1e-2, "mean": torch.full_like(x, 0.3)}
    second = i2f.invert(model, sent, y, x.shape, **prior)
    first = i2f.invert(model, sent, y, x.shape, method="dgl", start="gray", lr=1e-3, steps=2000, **prior)
    for found in (second, first):
        z = found.x.clone().requires_grad_()
        distance = (GradientMap(model, y)(z, create_graph=True) - sent).square().sum()
        objective = distance + 1e-2 * total_variation(z) + 1e-2 * (z - 0.3).square().sum()
        (slope,) = torch.autograd.grad(objective, z)
        assert found.loss == pytest.approx(objective.item(), rel=1e-9)
        assert float(slope.norm()) <= 1e-5 or found is first
    assert second.loss <= first.loss <= 1.05 * second.loss
    at_truth = i2f.invert(model, sent, y, x.shape, start=x, **prior)  # where the gradient is matched, and no minimum
    assert at_truth.steps > 0
    assert at_truth.loss == pytest.approx(second.loss, rel=1e-3)


# labels


@pytest.mark.parametrize("label", range(10))
def test_one_label_is_read_without_error(lenet, digits, backward, label):
    x, y = digits[0][:1], torch.tensor([label])
    assert torch.equal(recover_labels(GradientMap(lenet, None), backward(lenet, x, y), x.shape), y)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [True, False])
def test_counts_of_a_batch(reduction, bias):
    """At its initial weights a network answers every image nearly alike: the counts are exact."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.Sigmoid(), nn.Linear(30, 6, bias=bias)).double()
    x, y = torch.rand(12, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 0, 0, 0, 1, 2, 2, 4, 5, 5, 5, 5])
    loss = nn.CrossEntropyLoss(reduction=reduction)
    gmap = GradientMap(model, y, loss)
    assert torch.equal(recover_labels(GradientMap(model, None, loss), gmap(x), x.shape), y)


def test_frozen_last_layer_has_no_labels_to_read(mlp):
    model, x, _ = mlp
    model[2].requires_grad_(False)
    with pytest.raises(ValueError, match="last layer, 2, is frozen"):
        i2f.invert(model, torch.ones(208, dtype=torch.float64), None, x.shape)


def test_without_labels_as_good_as_with(lenet, digits, backward):
    x, y = digits[0][1:2], digits[1][1:2]
    found = i2f.invert(lenet, backward(lenet, x, y), None, x.shape)
    assert torch.equal(found.y, y)
    assert float(metrics.mse(found.x, x)) <= 1e-10


def test_wrong_label_is_a_case(lenet, digits, backward):
    x, y = digits[0][1:2], digits[1][1:2]
    found = i2f.invert(lenet, backward(lenet, x, y), (y + 1) % 10, x.shape, steps=15)
    assert found.relative_residual > 1e-2
    assert not found.matched
    assert "match" not in found.reason  # why it stopped is another question


def test_dlg_finds_image_and_label(mlp, backward):
    model, x, y = mlp
    found = i2f.invert(model, backward(model, x, y), None, x.shape, method="dlg", steps=60, start="uniform", restarts=3)
    assert torch.equal(found.y, y)
    assert float(metrics.mse(found.x, x)) <= 1e-8


def test_soft_labels_are_part_of_the_objective(mlp, backward):
    """The reported loss is that of the soft label found, not of its largest entry."""
    model, x, y = mlp
    found = i2f.invert(model, backward(model, x, y), None, x.shape, method="dlg", steps=2, start="uniform")
    assert found.relative_residual**2 * float(backward(model, x, y).square().sum()) == pytest.approx(found.loss)


# several images behind one gradient


def test_four_digits_behind_one_gradient(lenet, digits, backward):
    x, y = digits[0][:4], digits[1][:4]
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
