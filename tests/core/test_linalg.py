"""Solvers on prescribed spectra: matrices whose eigenvalues are known because they were chosen."""

import pytest
import torch

from i2f.core import linalg

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


def test_a_diagonal_does_not_stand_for_the_largest_eigenvalue():
    """1 1ᵀ + cI has the eigenvalues n + c, once, and c: singular by λ_max where rtol < c < rtol·n."""
    A = torch.ones(N, N, dtype=torch.float64) + 1e-5 * torch.eye(N, dtype=torch.float64)
    b = torch.arange(1.0, N + 1, dtype=torch.float64)
    solution = linalg.solve_dense(A, b, rtol=1e-6)
    assert not solution.converged
    assert "rank 1 of 40" in solution.reason
    torch.testing.assert_close(solution.u, b.mean().expand(N) / (N + 1e-5))
    assert linalg.solve_dense(A, b, rtol=1e-8).converged


@pytest.mark.parametrize(("below", "damping"), [(0.999, 0.0), (1.001, 0.0), (0.9, 0.1)])
def test_dense_has_the_rank_of_its_definition(below, damping):
    """On both sides of rtol·λ_max, of the matrix with its damping, and where the norm misleads: half of λ is λ_max."""
    smallest = 1e-3 * below
    A, b = matrix([*[1.0] * (N // 2), *[0.1] * (N // 2 - 1), smallest])
    solution = linalg.solve_dense(A, b, damping, rtol=1e-3)
    assert solution.converged == (smallest + damping > 1e-3 * (1 + damping))


def test_dense_sees_an_eigenvector_that_any_simple_start_is_orthogonal_to():
    """λ_min belongs to (1, 2, 0, …): orthogonal to (1, -½, 1, …), and so do its next larger neighbours."""
    w = torch.zeros(N, dtype=torch.float64)
    w[0], w[1] = 1.0, 2.0
    basis = torch.linalg.qr(torch.cat([w[:, None], matrix([1.0] * N)[0] + torch.randn(N, N).double()], dim=1)[:, :N])[0]
    values = torch.tensor([1e-10, 1e-9, *[1.0] * (N - 2)], dtype=torch.float64)
    A = (basis * values) @ basis.T
    solution = linalg.solve_dense((A + A.T) / 2, torch.ones(N, dtype=torch.float64), rtol=3e-10)
    assert not solution.converged
    assert "rank 39 of 40" in solution.reason


@pytest.mark.parametrize("scale", [2.0**-660, 2.0**-100, 2.0**100, 2.0**660])
@pytest.mark.parametrize("shrink", ["A", "b"])
def test_solvers_have_no_scale(scale, shrink):
    """(sA + sεI)u = tb has the solution (t/s)u, and the same residual and steps; powers of two round nothing."""
    A, b = matrix(geometric(1e4))
    s, t = (scale, 1.0) if shrink == "A" else (1.0, scale)
    for damping in (0.0, 1e-3):
        for solve in (linalg.solve_dense, lambda A, b, eps: linalg.solve_cg(lambda v: A @ v, b, eps)):
            plain, scaled = solve(A, b, damping), solve(s * A, t * b, s * damping)
            torch.testing.assert_close(scaled.u * (s / t), plain.u, rtol=1e-12, atol=0)
            assert (scaled.converged, scaled.reason) == (True, plain.reason)
            assert scaled.residual == pytest.approx(plain.residual, rel=1e-6, abs=1e-15)


def test_cg_in_float32_neither_underflows_nor_overflows():
    A, b = matrix(geometric(10.0))
    for scale in (1e-25, 1e25):
        solution = linalg.solve_cg(lambda v: A.float() @ v, (scale * b).float(), rtol=1e-5)
        assert solution.converged
        exact = torch.linalg.solve(A, b)
        torch.testing.assert_close(solution.u.double() / scale, exact, rtol=0, atol=1e-4 * float(exact.norm()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_product_that_is_not_finite_is_no_solution(bad):
    _, b = matrix(geometric(10.0))
    lower, upper = -torch.ones_like(b), torch.ones_like(b)

    def step(free, r):
        return linalg.Solution(r, 0.0, True, "")

    for found in (
        linalg.solve_cg(lambda v: bad * v, b),
        linalg.minimize_in_box(lambda v: bad * v, b, lower, upper, step),
    ):
        assert not found.converged
        assert not found.indefinite
        assert "not finite" in found.reason
        assert torch.isfinite(found.u).all()


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_a_minimum_in_a_box_has_no_scale(scale):
    """Of a diagonal matrix, where each entry is clamped by itself; in float32."""
    d = torch.linspace(1, 3, N)
    b = torch.linspace(-4, 4, N)
    lower, upper = -torch.ones(N), torch.ones(N)

    def step(free, r):
        return linalg.Solution(torch.where(free, r / scale / d, 0.0), 0.0, True, "")

    found = linalg.minimize_in_box(lambda v: scale * (d * v), scale * b, lower, upper, step)
    assert found.converged
    torch.testing.assert_close(found.u, (b / d).clamp(-1, 1), rtol=1e-5, atol=1e-6)
