"""Solvers on prescribed spectra: matrices whose eigenvalues are known because they were chosen."""

import pytest
import torch

from i2f import linalg

N = 40


def matrix(eigenvalues):
    """Q diag(λ) Qᵀ with a random orthogonal Q; and a right-hand side."""
    generator = torch.Generator().manual_seed(0)
    eigenvalues = torch.as_tensor(eigenvalues, dtype=torch.float64)
    n = len(eigenvalues)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    return (Q * eigenvalues) @ Q.T, torch.randn(n, generator=generator, dtype=torch.float64)


def geometric(condition):
    return torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), N, dtype=torch.float64)


class Counted:
    """v -> A v, and how often."""

    def __init__(self, A):
        self.A, self.calls = A, 0

    def __call__(self, v):
        self.calls += 1
        return self.A @ v


def relative_residual(A, u, b, damping=0.0):
    return float((A @ u + damping * u - b).norm() / b.norm())


@pytest.mark.parametrize("damping", [0.0, 1e-2])
@pytest.mark.parametrize("condition", [1e2, 1e6])
def test_cg(condition, damping):
    A, b = matrix(geometric(condition))
    solution = linalg.solve_cg(lambda v: A @ v, b, damping, rtol=1e-9)
    assert solution.converged
    assert relative_residual(A, solution.u, b, damping) <= 1e-8
    assert solution.residual == pytest.approx(relative_residual(A, solution.u, b, damping), rel=1e-6, abs=1e-15)


def test_cg_needs_one_step_per_distinct_eigenvalue():
    A, b = matrix([1.0, 2.0, 5.0, 20.0] * 10)
    counted = Counted(A)
    solution = linalg.solve_cg(counted, b, rtol=1e-10)
    assert solution.converged
    assert counted.calls == 4 + 1  # and one for the true residual
    assert solution.reason == "converged in 4 steps"


def test_preconditioner_shortens_cg():
    A, b = matrix(geometric(1e6))
    rough = torch.linalg.inv(A + 1e-5 * torch.eye(N, dtype=A.dtype))
    plain, helped = Counted(A), Counted(A)
    linalg.solve_cg(plain, b, rtol=1e-8)
    solution = linalg.solve_cg(helped, b, rtol=1e-8, precondition=lambda r: rough @ r)
    torch.testing.assert_close(solution.u, torch.linalg.solve(A, b), rtol=0, atol=1e-4 * float(solution.u.norm()))
    assert solution.converged
    assert helped.calls < plain.calls / 4


def test_cg_out_of_steps():
    A, b = matrix(geometric(1e6))
    solution = linalg.solve_cg(lambda v: A @ v, b, max_steps=3)
    assert not solution.converged
    assert "3 steps" in solution.reason
    assert solution.residual == pytest.approx(relative_residual(A, solution.u, b), rel=1e-10)


def test_cg_on_an_indefinite_matrix():
    A, b = matrix([-1.0, *[1.0] * 9])
    solution = linalg.solve_cg(lambda v: A @ v, b)
    assert not solution.converged
    assert solution.indefinite
    assert "indefinite" in solution.reason


def test_cg_of_zero():
    A, b = matrix(geometric(10.0))
    solution = linalg.solve_cg(lambda v: A @ v, 0 * b)
    assert solution.converged
    assert not solution.u.any()


@pytest.mark.parametrize("damping", [0.0, 1e-3])
@pytest.mark.parametrize("condition", [1e2, 1e6, 1e10])
def test_dense(condition, damping):
    A, b = matrix(geometric(condition))
    solution = linalg.solve_dense(A, b, damping)
    exact = torch.linalg.solve(A + damping * torch.eye(N, dtype=A.dtype), b)
    assert solution.converged
    assert float((solution.u - exact).norm() / exact.norm()) <= 1e-14 * condition
    assert solution.residual == pytest.approx(relative_residual(A, solution.u, b, damping), rel=1e-6, abs=1e-14)


def test_dense_leaves_the_matrix_alone():
    A, b = matrix(geometric(10.0))
    before = A.clone()
    linalg.solve_dense(A, b, damping=1.0)
    assert torch.equal(A, before)


@pytest.mark.parametrize("zeros", [1, 30, 40])
def test_dense_singular(zeros):
    A, b = matrix([*[2.0] * (N - zeros), *[0.0] * zeros])
    solution = linalg.solve_dense(A, b)
    assert not solution.converged
    assert f"rank {N - zeros} of {N}" in solution.reason
    torch.testing.assert_close(solution.u, torch.linalg.pinv(A, hermitian=True) @ b)
    assert solution.residual == pytest.approx(relative_residual(A, solution.u, b))


def test_damping_cures_a_singular_matrix():
    A, b = matrix([*[2.0] * 10, *[0.0] * 30])
    solution = linalg.solve_dense(A, b, damping=0.5)
    assert solution.converged
    assert relative_residual(A, solution.u, b, 0.5) <= 1e-14


@pytest.mark.parametrize("condition", [1e1, 1e4, 1e8])
def test_smallest_eigenvalue(condition):
    A, _ = matrix(geometric(condition))
    exact = float(torch.linalg.eigvalsh(A)[0])
    found = linalg.smallest_eigenvalue(torch.linalg.cholesky(A))
    assert exact * (1 - 1e-6) <= found <= 1.1 * exact
