"""Eigenpairs of J Jᵀ: the published log, NumPy's eigenvalues, and the definition of a singular vector."""

import numpy as np
import pytest
import torch

import i2f
from i2f import perturb, spectrum

# λ_max for the first five MNIST test images, inputs normalised (the released code's log, to its three digits)
PUBLISHED = [2.715616, 3.556172, 4.151347, 2.362554, 2.658296]


@pytest.fixture(params=range(5))
def published(request, digits):
    """(J, λ_max in pixels): with normalisation as a layer, λ is the published value over std²."""
    i = request.param
    model = i2f.models.build("lenet", "mnist", "uniform", seed=1, normalize=True).double()
    J = i2f.GradientJacobian(model, digits[0][i : i + 1], digits[1][i : i + 1], method="matrix-free")
    return J, PUBLISHED[i] / i2f.models.SPECS["mnist"].std[0] ** 2


def test_published_log_dense(published):
    J, expected = published
    assert float(spectrum.decompose(J).values[0]) == pytest.approx(expected, rel=1e-6)


def test_published_log_matrix_free(published):
    J, expected = published
    found = spectrum.lambda_max(J, tol=1e-4)
    assert found.converged
    assert found.value == pytest.approx(expected, rel=1e-4)
    assert found.products == J.products


def eigvalsh(J):
    """λ of J Jᵀ, descending, from J alone."""
    rows = J.dense().numpy()
    return np.linalg.eigvalsh(rows @ rows.T)[::-1]


def test_lambda_max(tiny):
    J = i2f.GradientJacobian(*tiny)
    assert spectrum.lambda_max(J, tol=1e-8).value == pytest.approx(eigvalsh(J)[0], rel=1e-10)


def test_lambda_max_of_one_input():
    """d_x = 1: there is one eigenvalue, and it is the largest."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).double()
    J = i2f.GradientJacobian(model, torch.full((1, 1), 0.3, dtype=torch.float64), torch.tensor([0]))
    assert spectrum.lambda_max(J).value == pytest.approx(float(J.gram()), rel=1e-12)


def test_lambda_max_is_repeatable(lenet, digits):
    """Value and cost, at a tolerance so loose that another start vector would show."""
    J = i2f.GradientJacobian(lenet, digits[0][:1], digits[1][:1], method="matrix-free")
    first, again = spectrum.lambda_max(J, tol=0.1), spectrum.lambda_max(J, tol=0.1)
    assert first == again
    assert J.products == first.products + again.products


def test_decompose_values(tiny):
    J = i2f.GradientJacobian(*tiny)
    np.testing.assert_allclose(spectrum.decompose(J).values.numpy(), eigvalsh(J), rtol=1e-8)


def test_decompose_vectors(tiny):
    J = i2f.GradientJacobian(*tiny)
    values, U = spectrum.decompose(J)
    A = J.dense() @ J.dense().T
    torch.testing.assert_close(U.T @ U, torch.eye(len(A), dtype=A.dtype), rtol=0, atol=1e-12)
    torch.testing.assert_close(A @ U, U * values, rtol=0, atol=1e-12 * float(values[0]))


@pytest.mark.parametrize("index", [0, 4, -1])
def test_right_singular_vector(tiny, index):
    J = i2f.GradientJacobian(*tiny)
    values, U = spectrum.decompose(J)
    index %= len(values)
    v, u = spectrum.right_singular_vector(J, index), U[:, index]
    Jv = J.matvec(v)
    assert float(v.norm()) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(Jv, values[index].sqrt() * u * torch.sign(Jv @ u), rtol=0, atol=1e-10)
    assert v[v.abs().argmax()] > 0


def test_rank(tiny):
    J = i2f.GradientJacobian(*tiny)
    assert spectrum.rank(J) == np.linalg.matrix_rank(J.dense().numpy()) == J.shape[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rank_of_a_blind_network(blind, dtype):
    model, x, y = blind
    J = i2f.GradientJacobian(model.to(dtype), x, y)
    assert spectrum.rank(J) == 3
    assert (spectrum.decompose(J).values >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("eps", "rank"), [(1e-5, 11), (0.0, 10)])
def test_layer_norm_hides_the_mean(dtype, eps, rank):
    """And the scale too where nothing is added to the variance; float32's rounding must not count as rank."""
    torch.manual_seed(0)
    layers = torch.nn.LayerNorm(12, eps=eps), torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)
    J = i2f.GradientJacobian(torch.nn.Sequential(*layers).to(dtype), torch.rand(1, 12), torch.tensor([1]))
    assert spectrum.rank(J) == rank


def test_no_direction_for_a_zero_eigenvalue(blind):
    J = i2f.GradientJacobian(*blind)
    spectrum.right_singular_vector(J, 2)
    with pytest.raises(ValueError, match=r"index=3 .* zero eigenvalue \(rank 3 of 9\)"):
        spectrum.right_singular_vector(J, 3)


def test_indices_and_sizes_of_numpy(mlp):
    J = i2f.GradientJacobian(*mlp)
    right = perturb.eigenvector(J, index=2, norm=5.0)
    assert torch.equal(perturb.eigenvector(J, index=np.int64(2), norm=np.float32(5)), right)
    value = np.float64(spectrum.decompose(J).values[2])
    assert torch.equal(perturb.eigenvector(J, eigenvalue=value, norm=torch.tensor(5.0)), right)
    assert spectrum.lambda_max(J, np.float64(1e-3)) == spectrum.lambda_max(J, 1e-3)
    for bad in (float("nan"), np.float32("nan"), torch.tensor(float("nan"))):
        with pytest.raises(ValueError, match="norm="):
            perturb.eigenvector(J, index=2, norm=bad)
        with pytest.raises(ValueError, match="eigenvalue="):
            perturb.eigenvector(J, eigenvalue=bad)
        with pytest.raises(ValueError, match="tol="):
            spectrum.lambda_max(J, bad)
