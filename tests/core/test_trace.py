"""Stochastic traces: against the spectrum, with intervals that cover, and honest when they have not settled."""

import numpy as np
import pytest
import torch

import i2f
from i2f import spectrum, trace
from i2f.core.influence import expected_square as exact_square


class Diagonal:
    """An operator with a prescribed spectrum, J = diag(√λ)."""

    def __init__(self, values, chunk=1):
        self.values = torch.as_tensor(values, dtype=torch.float64)
        self.shape = (len(self.values), len(self.values))
        self.x = torch.zeros(1, dtype=torch.float64)
        self.products, self.chunk = 0, chunk
        self.dtype, self.unit = self.values.dtype, 1.0

    def matvec(self, v):
        self.products += v.numel() // len(self.values)
        return self.values.sqrt() * v

    rmatvec = matvec


SPECTRUM = np.geomspace(1, 1e-4, 300)


def rotated(values, seed=0, chunk=1):
    """The same spectrum with eigenvectors in no special position: a diagonal one is summed exactly by any signs."""
    draw = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=draw, dtype=torch.float64))[0]
    operator = Diagonal(values, chunk)
    diagonal = operator.matvec
    operator.matvec = lambda v: diagonal(v) @ Q.T
    operator.rmatvec = lambda v: diagonal(v @ Q)
    return operator


@pytest.mark.parametrize("damping", [1e-1, 1e-3])
def test_a_diagonal_spectrum_is_summed_exactly(damping):
    """zᵀ f(A) z = Σ f(λ_i) z_i², and z_i² = 1: every probe gives the trace, so the interval has no width."""
    J = Diagonal(SPECTRUM)
    squares = trace.expected_square(J, 2.0, damping, probes=3, tol=1e-8)
    assert squares.value == pytest.approx(2 * (SPECTRUM / (SPECTRUM + damping) ** 2).sum(), rel=1e-6)
    assert squares.high - squares.low < 1e-5 * squares.value
    bayes = trace.bayes_error(J, 2.0, damping, probes=3, tol=1e-8)
    assert bayes.value == pytest.approx(2 * (1 / (SPECTRUM + damping)).sum(), rel=1e-6)
    assert squares.converged
    assert bayes.converged
    assert squares.products + bayes.products == J.products


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    J, truth = rotated(SPECTRUM), (1 / (SPECTRUM + 1e-2)).sum()
    found = [trace.bayes_error(J, 1.0, 1e-2, probes=4, seed=seed) for seed in range(40)]
    assert 34 <= sum(t.low <= truth <= t.high for t in found) <= 40
    assert all(t.high - t.low < 0.5 * truth for t in found)


def test_lenet_agrees_with_its_spectrum():
    x, y = i2f.data.load("mnist", n=1)
    model = i2f.models.build("lenet", "mnist", init="uniform", seed=1, normalize=False).double()
    free = i2f.GradientJacobian(model, x, y, method="matrix-free")
    values = spectrum.decompose(i2f.GradientJacobian(model, x, y)).values
    damping = 1e-2 * float(values[0])
    found = trace.bayes_error(free, 1e-3, damping, probes=6)
    exact = 1e-3 * float((1 / (values + damping)).sum())
    assert found.low <= exact <= found.high
    assert found.value == pytest.approx(exact, rel=0.05)
    assert found.products == free.products < 6 * 2 * 60
    squares = trace.expected_square(free, 1e-3, damping, probes=6)
    assert squares.value == pytest.approx(exact_square(free, 1e-3, damping), rel=0.2)


def test_a_budget_too_small_is_said():
    found = trace.bayes_error(rotated(SPECTRUM), 1.0, 1e-6, max_steps=6)
    assert not found.converged
    assert found.products == 8 * 2 * 6


def test_side_by_side_probes_give_and_cost_what_they_do_one_after_another():
    """Probes settle at different steps, and each leaves then."""
    alone, together = (rotated(np.geomspace(1, 1e-4, 100), chunk=chunk) for chunk in (1, 3))
    first, second = (trace.bayes_error(J, 1.0, 1e-4, probes=5, tol=1e-2) for J in (alone, together))
    assert second.value == pytest.approx(first.value, rel=1e-9)
    assert second.high == pytest.approx(first.high, rel=1e-9)
    assert (second.products, second.converged) == (first.products, first.converged)
    assert first.products % 5  # not all took the same number of steps


@pytest.mark.parametrize("chunk", [1, 3])
def test_what_was_asked_before_changes_no_answer_and_is_not_paid_twice(chunk):
    spectrum = np.geomspace(1, 1e-4, 100)
    asked = [(1.0, 1e-3), (1.0, 1e-1), (2.0, 1e-3), (1.0, 1e-2)]
    alone = [trace.bayes_error(rotated(spectrum, chunk=chunk), *one, probes=3, tol=1e-3) for one in asked]
    errors = trace.BayesError(J := rotated(spectrum, chunk=chunk), probes=3, tol=1e-3)
    for one, fresh in zip(asked, alone, strict=True):
        found = errors(*one)
        assert (found.value, found.low, found.high) == pytest.approx((fresh.value, fresh.low, fresh.high), rel=1e-12)
        assert found.converged == fresh.converged
    assert J.products == alone[0].products < sum(one.products for one in alone)  # the smallest ε was asked first


def test_an_exhausted_space_ends_the_search():
    """Three different eigenvalues need three steps."""
    J = rotated(np.repeat([1.0, 0.5, 0.1], 20))
    found = trace.bayes_error(J, 1.0, 1e-3, probes=2, tol=1e-10)
    assert found.converged
    assert found.products == 2 * 2 * 3


def probed(J, f, probes, seed=0):
    """The mean of zᵀ f(J Jᵀ) z over the probes that `trace` draws, from eigenvectors."""
    A = (J.matvec(J.rmatvec(torch.eye(len(J.values), dtype=torch.float64)))).numpy()
    values, vectors = np.linalg.eigh((A + A.T) / 2)
    rng = np.random.default_rng(seed)
    signs = np.stack([rng.choice([-1.0, 1.0], len(values)) for _ in range(probes)])
    return float(((signs @ vectors) ** 2 @ f(values.clip(0))).mean())


@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize("damping", [1e-3, 1e-5])
@pytest.mark.parametrize("spectrum", [np.geomspace(1, 1e-8, 300), np.r_[1.0, np.geomspace(1e-5, 1e-7, 299)]])
def test_converged_means_within_the_tolerance(spectrum, damping, tol):
    """Each quadrature against the exact one of the same probes: two looks that agree may stand on a plateau."""
    J = rotated(spectrum)
    squares = trace.expected_square(J, 1.0, damping, probes=3, tol=tol, max_steps=300)
    bayes = trace.bayes_error(J, 1.0, damping, probes=3, tol=tol, max_steps=300)
    assert squares.converged
    assert bayes.converged
    assert squares.value == pytest.approx(probed(J, lambda v: v / (v + damping) ** 2, 3), rel=1.01 * tol)
    assert bayes.value == pytest.approx(probed(J, lambda v: 1 / (v + damping), 3), rel=1.01 * tol)


@pytest.mark.parametrize(("damping", "resolved"), [(1e-3, True), (1e-6, False), (1e-8, False)])
def test_what_rests_on_roundings_has_not_converged(damping, resolved):
    """float32's products are known to 1e-7·λ_max: of smaller eigenvalues, which decide, they say nothing."""
    values = np.r_[1.0, np.geomspace(1e-5, 1e-7, 299)]
    J = rotated(values)
    J.x, J.dtype, (matvec, rmatvec) = J.x.float(), torch.float32, (J.matvec, J.rmatvec)
    draw, size = torch.Generator().manual_seed(0), torch.finfo(torch.float32).eps

    def rounded(product):  # as a product in float32 is: to a share of ‖J‖, in every direction
        return lambda v: (
            product(v.double()) + size * torch.randn(v.shape, generator=draw) / len(values) ** 0.5
        ).float()

    J.matvec, J.rmatvec = rounded(matvec), rounded(rmatvec)
    found = trace.bayes_error(J, 1.0, damping, max_steps=300)
    assert found.converged == resolved
    assert not resolved or found.value == pytest.approx((1 / (values + damping)).sum(), rel=0.02)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"damping": 0.0}, "positive and finite"),
        ({"probes": 1}, "at least 2"),
        ({"max_steps": 0}, "at least 1"),
        ({"variance": -1.0}, "variance"),
    ],
)
def test_bad_input_is_named(change, said):
    with pytest.raises(ValueError, match=said):
        trace.bayes_error(Diagonal(SPECTRUM), **{"variance": 1.0, "damping": 1e-2, **change})
