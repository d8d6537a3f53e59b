"""The Lanczos process, and λ_max by it, on spectra that are prescribed."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh

from i2f import spectrum
from i2f.lanczos import Lanczos

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
    Q, T = process.basis, np.diag(process.diagonal) + np.diag(process.beside[:-1], 1) + np.diag(process.beside[:-1], -1)
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
