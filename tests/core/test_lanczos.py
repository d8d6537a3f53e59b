"""The Lanczos process, and λ_max by it, on spectra that are prescribed."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh

from i2f import spectrum
from i2f.core.lanczos import Lanczos

N = 300
SPECTRA = {
    "one far ahead": np.r_[100.0, np.linspace(0, 1, N - 1)],
    "geometric": np.geomspace(1e-6, 10, N),
    "two nearly equal": np.r_[1.0, 1 - 1e-5, np.linspace(0, 0.5, N - 2)],
    "two equal": np.r_[1.0, 1.0, np.linspace(0, 0.9, N - 2)],
    "flat": np.full(N, 3.0),
    "crowded at the top": 1 - np.linspace(0, 1, N) ** 2,
    "low rank": np.r_[5.0, 4.0, 3.0, np.zeros(N - 3)],
}


class Prescribed:
    """A J of which J Jᵀ = U diag(values) Uᵀ: what spectrum and trace use of a GradientJacobian."""

    def __init__(self, values, seed=0):
        rng = np.random.default_rng(seed)
        self.U = np.linalg.qr(rng.standard_normal((len(values), len(values))))[0]
        self.values = np.asarray(values, dtype=float)
        self.J = torch.from_numpy(self.U * np.sqrt(self.values))
        self.shape, self.x, self.products = self.J.shape, self.J[:1], 0
        self.dtype, self.unit = self.J.dtype, 1.0

    def matvec(self, v):
        self.products += 1
        return self.J @ v

    def rmatvec(self, v):
        self.products += 1
        return self.J.T @ v


@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize("name", SPECTRA)
def test_lambda_max_is_within_its_tolerance(name, tol):
    J = Prescribed(SPECTRA[name])
    found = spectrum.lambda_max(J, tol)
    truth = SPECTRA[name].max()
    assert found.converged
    assert found.residual <= tol
    assert truth * (1 - tol) <= found.value <= truth * (1 + 1e-12)
    assert found.products == J.products


@pytest.mark.parametrize("name", SPECTRA)
def test_lambda_max_agrees_with_arpack(name):
    J = Prescribed(SPECTRA[name])
    matrix = (J.J @ J.J.T).numpy()
    assert spectrum.lambda_max(J, 1e-10).value == pytest.approx(eigsh(matrix, k=1)[0][0], rel=1e-9)


def test_lambda_max_stops_no_later_than_it_must():
    """A spectrum with a leader needs few steps, a crowded one more; a tighter tolerance never fewer."""
    counts = {name: spectrum.lambda_max(Prescribed(SPECTRA[name]), 1e-3).products for name in SPECTRA}
    assert counts["one far ahead"] <= 8
    assert counts["low rank"] <= 10
    assert counts["crowded at the top"] > counts["geometric"] > counts["one far ahead"]
    crowded = [spectrum.lambda_max(Prescribed(SPECTRA["crowded at the top"]), t).products for t in (1e-1, 1e-2, 1e-4)]
    assert crowded == sorted(crowded)


def test_lambda_max_says_when_its_steps_ended():
    found = spectrum.lambda_max(Prescribed(SPECTRA["crowded at the top"]), 1e-12, max_steps=5)
    assert not found.converged
    assert found.residual > 1e-12
    assert found.products == 10


def matrix(values, seed=0):
    J = Prescribed(values, seed)
    return torch.from_numpy(J.U @ np.diag(values) @ J.U.T)


def test_the_basis_is_orthonormal_and_tridiagonalises():
    A = matrix(SPECTRA["geometric"])
    b = torch.from_numpy(np.random.default_rng(1).standard_normal(N))
    process = Lanczos(lambda v: A @ v, b)
    for _ in range(80):
        process.step()
    Q, off = process.basis, process.off_diagonal[:-1]
    T = np.diag(process.diagonal) + np.diag(off, 1) + np.diag(off, -1)
    torch.testing.assert_close(Q @ Q.T, torch.eye(80, dtype=Q.dtype), rtol=0, atol=1e-12)
    torch.testing.assert_close(Q @ A @ Q.T, torch.from_numpy(T), rtol=0, atol=1e-11)


@pytest.mark.parametrize("shift", [1e-3, 1.0, 100.0])
def test_one_process_solves_for_every_shift(shift):
    A = matrix(SPECTRA["geometric"])
    b = torch.from_numpy(np.random.default_rng(1).standard_normal(N))
    process, applied = Lanczos(lambda v: A @ v, b), []
    while not applied or applied[-1] > 1e-10:
        process.step()
        applied.append(process.solve(shift)[1])
    u, residual, definite = process.solve(shift)
    assert definite
    assert float((A @ u + shift * u - b).norm() / b.norm()) == pytest.approx(residual, abs=1e-11)
    exact = torch.linalg.solve(A + shift * torch.eye(N), b)
    torch.testing.assert_close(u, exact, rtol=0, atol=1e-9 * float(exact.norm()) / shift)


def test_an_indefinite_matrix_is_seen():
    A = torch.diag(torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64))
    process = Lanczos(lambda v: A @ v, torch.ones(3, dtype=torch.float64))
    for _ in range(3):
        process.step()
    u, residual, definite = process.solve(0.5)
    assert not definite
    assert residual == np.inf
    assert not u.any()
    assert process.solve(1.5)[2]


def test_it_stops_when_the_space_is_exhausted():
    A = matrix(SPECTRA["low rank"])
    process = Lanczos(lambda v: A @ v, A @ torch.ones(N, dtype=torch.float64))
    while not process.exhausted:
        process.step()
    assert len(process) == 3
    np.testing.assert_allclose(process.ritz()[0], [3, 4, 5], rtol=1e-10)


@pytest.mark.parametrize("after", [1, 3])
def test_a_product_that_is_not_finite_ends_it_unsolved(after):
    """Never a residual of zero: the space did not close, it was cut off."""
    A = matrix(SPECTRA["geometric"])
    process = Lanczos(lambda v: A @ v if len(process) < after else v / 0, torch.ones(N, dtype=torch.float64))
    while not process.exhausted:
        process.step()
    assert process.broken
    assert len(process) == after
    assert process.residuals(process.ritz()[1])[-1] > 1e-6
    u, residual, _ = process.solve(1.0)
    assert residual > 1e-6
    b = torch.ones(N, dtype=torch.float64)
    assert float((A @ u + u - b).norm() / b.norm()) == pytest.approx(residual, rel=1e-6)


def test_lambda_max_of_products_that_are_not_finite_is_refused():
    J = Prescribed(SPECTRA["geometric"])
    J.matvec = lambda v: v / 0
    with pytest.raises(ValueError, match=r"J has a product that is not finite in torch.float64: scale the loss down"):
        spectrum.lambda_max(J)


@pytest.mark.parametrize("scale", [2.0**-70, 2.0**70])
def test_the_process_has_no_scale_in_float32(scale):
    """Squares of b's and of A's numbers would leave float32."""
    A, b = matrix(np.geomspace(1e-3, 1, N)).float(), torch.linspace(-1, 2, N)
    plain, scaled = Lanczos(lambda v: A @ v, b), Lanczos(lambda v: scale * (A @ v), scale * b)
    for _ in range(10):
        plain.step()
        scaled.step()
    torch.testing.assert_close(scaled.basis, plain.basis)
    np.testing.assert_allclose(np.array(scaled.diagonal) / scale, plain.diagonal)
    torch.testing.assert_close(scaled.solve(1e-2 * scale)[0], plain.solve(1e-2)[0])


@pytest.mark.parametrize("k", [3, 12, N])
def test_quadrature_brackets_what_it_sums(k):
    """bᵀ(A + ε)⁻¹b is no less than the Gauss rule says and no more than the Gauss–Radau rule with a node at 0."""
    values = np.geomspace(1e-4, 1, N)
    A, b = matrix(values), torch.linspace(-1, 2, N, dtype=torch.float64)
    process = Lanczos(lambda v: A @ v, b)
    for _ in range(k):
        process.step()
    exact = float(b @ torch.linalg.solve(A + 1e-3 * torch.eye(N, dtype=A.dtype), b))
    below, above = (float(w @ (1 / (n + 1e-3))) for n, w in (process.quadrature(), process.quadrature(node=0.0)))
    assert below <= exact * (1 + 1e-9)
    assert above >= exact * (1 - 1e-9)
    assert (above - below <= 1e-6 * exact) == (k == N)
    assert process.quadrature(node=0.0)[0][0] == pytest.approx(0, abs=1e-12) or k == N
    nodes, weights = process.quadrature(node=0.0)
    assert float(weights.sum()) == pytest.approx(float(b @ b))
    assert float(weights @ nodes) == pytest.approx(float(b @ A @ b))
