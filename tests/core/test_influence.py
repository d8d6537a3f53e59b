"""Eq. 4 and Eq. 5 against least squares, closed forms, random draws and a minimiser that shares no code."""

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares

import i2f
from i2f import perturb, spectrum, trace
from i2f.core.influence import expected_square

# ε in units of λ_max
DAMPINGS = [0.0, 1e-3, 0.1, 10.0]


def pair(J, variance=1e-4, seed=0):
    return J, perturb.gaussian(J.gradient, variance, seed)


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("method", ["dense", "matrix-free"])
@pytest.mark.parametrize("tiny", ["mlp", "conv", "norms", "tied", "relu", "pair"], indirect=True)
def test_undamped_is_least_squares(tiny, method):
    """(J Jᵀ)⁻¹Jδ = argmin_d ‖Jᵀd − δ‖."""
    J, delta = pair(i2f.GradientJacobian(*tiny, method=method))
    prediction = i2f.influence(J, delta, rtol=1e-12)
    rows = J.dense().numpy()
    expected = np.linalg.lstsq(rows.T, delta.numpy(), rcond=None)[0]
    assert prediction.converged
    np.testing.assert_allclose(prediction.displacement.numpy(), expected, rtol=0, atol=1e-8 * np.abs(expected).max())
    assert prediction.norm == pytest.approx(np.linalg.norm(expected), rel=1e-8)
    assert prediction.rmse == pytest.approx(prediction.norm / np.sqrt(len(expected)))


@pytest.mark.parametrize("i", [1])
def test_direct_equals_iterative_on_digits(lenet, digits, i):
    x, y = digits[0][i : i + 1], digits[1][i : i + 1]
    J, delta = pair(i2f.GradientJacobian(lenet, x, y, method="matrix-free"))
    damping = 1e-3 * spectrum.lambda_max(J).value
    iterative = i2f.influence(J, delta, damping)
    direct = i2f.influence(i2f.GradientJacobian(lenet, x, y, method="dense"), delta, damping)
    assert iterative.converged
    assert direct.converged
    assert relative(iterative.displacement, direct.displacement) <= 1e-6


def test_damping_goes_to_zero(tiny):
    """(J Jᵀ + εI)⁻¹Jδ → (J Jᵀ)⁻¹Jδ, and linearly: a tenth of ε is a tenth of the difference."""
    J, delta = pair(i2f.GradientJacobian(*tiny))
    exact, smallest = i2f.influence(J, delta).displacement, float(spectrum.decompose(J).values[-1])
    gaps = [relative(i2f.influence(J, delta, share * smallest).displacement, exact) for share in (1e-2, 1e-3, 1e-4)]
    assert gaps[0] <= 1e-2
    assert gaps[1:] == pytest.approx([0.1 * gaps[0], 0.01 * gaps[0]], rel=0.05)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_lower_bound(tiny, damping):
    J = i2f.GradientJacobian(*tiny)
    damping *= float(spectrum.decompose(J).values[0])
    for seed in range(2):
        delta = pair(J, seed=seed)[1]
        bound, influence = i2f.lower_bound(J, delta, damping, tol=1e-10), i2f.influence(J, delta, damping)
        assert bound.norm <= influence.norm
        assert bound.rmse == pytest.approx(bound.norm / J.shape[0] ** 0.5)
        assert bound.norm == pytest.approx(float((J.dense() @ delta).norm()) / (bound.lambda_max + damping))


@pytest.mark.parametrize("damping", DAMPINGS)
def test_lower_bound_is_tight(tiny, damping):
    """Along the first singular vector the two are equal: nothing larger than Eq. 5 is a bound."""
    J = i2f.GradientJacobian(*tiny)
    damping *= float(spectrum.decompose(J).values[0])
    delta = perturb.eigenvector(J, index=0)
    bound = i2f.lower_bound(J, delta, damping, tol=1e-10)
    assert bound.norm == pytest.approx(i2f.influence(J, delta, damping).norm, rel=1e-8)


@pytest.mark.parametrize("index", [0, 3, -1])
def test_eigenvector_noise(tiny, index):
    """I(c·v_i) = c/√λ_i."""
    J = i2f.GradientJacobian(*tiny)
    values = spectrum.decompose(J).values
    index %= len(values)
    prediction = i2f.influence(J, perturb.eigenvector(J, index, norm=5.0))
    assert prediction.norm == pytest.approx(5.0 / float(values[index]) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_expected_square(mlp, damping):
    J, variance, draws = i2f.GradientJacobian(*mlp), 1e-2, 400
    squares = [i2f.influence(*pair(J, variance, seed), damping).norm ** 2 for seed in range(draws)]
    standard_error = np.std(squares, ddof=1) / draws**0.5
    assert abs(np.mean(squares) - expected_square(J, variance, damping)) <= 4 * standard_error
    assert standard_error <= 0.05 * np.mean(squares)  # else the line above would say little


def test_expected_square_is_a_trace(tiny):
    J = i2f.GradientJacobian(*tiny)
    expected = 1e-3 * float(torch.linalg.inv(J.dense() @ J.dense().T).trace())
    assert expected_square(J, 1e-3) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("i", range(5))
def test_lower_bound_is_cheap(lenet, digits, i):
    J, delta = pair(i2f.GradientJacobian(lenet, digits[0][i : i + 1], digits[1][i : i + 1], method="matrix-free"))
    bound, again = i2f.lower_bound(J, delta, tol=1e-3), i2f.lower_bound(J, delta, tol=1e-3)
    assert bound == again
    assert bound.converged
    assert bound.products <= 52
    assert bound.products + again.products == J.products


def test_singular(blind):
    J, delta = pair(i2f.GradientJacobian(*blind, method="dense"))
    prediction = i2f.influence(J, delta)
    expected = torch.linalg.pinv(J.dense().T) @ delta
    assert not prediction.converged
    assert "rank 3 of 9" in prediction.reason
    assert relative(prediction.displacement, expected) <= 1e-10


def test_singular_matrix_free(blind):
    """Conjugate gradients cannot know the rank; their answer must still be the pseudo-inverse's."""
    J, delta = pair(i2f.GradientJacobian(*blind, method="matrix-free"))
    prediction = i2f.influence(J, delta, rtol=1e-12)
    assert relative(prediction.displacement, torch.linalg.pinv(J.dense().T) @ delta) <= 1e-10


def test_singular_expected_square(blind):
    """The directions that the gradient does not see are left out, as in the pseudo-inverse."""
    J = i2f.GradientJacobian(*blind)
    assert expected_square(J, 1.0) == pytest.approx(float(torch.linalg.pinv(J.dense()).square().sum()), rel=1e-8)


@pytest.mark.parametrize("method", ["dense", "matrix-free"])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_residual_is_the_true_one(tiny, method, damping):
    J, delta = pair(i2f.GradientJacobian(*tiny, method=method))
    prediction = i2f.influence(J, delta, damping, rtol=1e-2, max_steps=4)
    d, rows = prediction.displacement, J.dense()
    b = rows @ delta
    true = float((rows @ (rows.T @ d) + damping * d - b).norm() / b.norm())
    assert prediction.residual == pytest.approx(true, rel=1e-6, abs=1e-9)
    if method == "matrix-free":
        assert prediction.residual > 1e-6  # stopped early: a real residual to report


@pytest.mark.parametrize(("method", "costs"), [("dense", [12 + 1, 1]), ("matrix-free", [1 + 2 * 2, 1 + 2 * 2])])
def test_products(mlp, method, costs):
    """Dense: d_x for J, once, and one for Jδ. Matrix-free: Jδ, two a step, two for the true residual."""
    J, delta = pair(i2f.GradientJacobian(*mlp, method=method))
    assert [i2f.influence(J, delta, max_steps=1).products for _ in range(2)] == costs
    assert J.products == sum(costs)


def test_against_an_independent_minimiser(mlp, backward):
    """argmin_x ‖∇L(x) − (g + δ)‖² found by SciPy from plain gradients: I²F is right to first order in δ."""
    model, x, y = mlp
    J = i2f.GradientJacobian(model, x, y)
    direction = perturb.gaussian(J.gradient, 1.0, seed=0)
    errors = []
    for size in (2e-3, 1e-3):
        target = backward(model, x, y) + size * direction

        def misfit(z, target=target):
            return (backward(model, torch.from_numpy(z).view_as(x), y) - target).numpy()

        found = least_squares(misfit, x.flatten().numpy(), jac="3-point", xtol=1e-15, ftol=1e-15, gtol=1e-15)
        moved = torch.from_numpy(found.x) - x.flatten()
        errors.append(relative(i2f.influence(J, size * direction).displacement, moved))
    assert errors[0] <= 0.01
    assert errors[1] / errors[0] == pytest.approx(0.5, rel=0.05)


ASKED = {
    "influence": lambda J, d, e: i2f.influence(J, d, e).norm,
    "lower_bound": lambda J, d, e: i2f.lower_bound(J, d, e).norm,
    "expected_square": lambda J, d, e: expected_square(J, 2.0, e),
    "decompose": lambda J, d, e: float(spectrum.decompose(J).values[1]),
    "lambda_max": lambda J, d, e: spectrum.lambda_max(J).value,
    "eigenvector": lambda J, d, e: float(perturb.eigenvector(J, index=1)[3]),
    "expected trace": lambda J, d, e: trace.expected_square(J, 2.0, e, probes=2).value,
    "Bayes trace": lambda J, d, e: trace.bayes_error(J, 2.0, e, probes=2).value,
}


@pytest.mark.parametrize("name", ASKED)
def test_a_model_is_no_jacobian(mlp, name):
    with pytest.raises(TypeError, match=r"^J is Sequential; give an i2f.GradientJacobian\(model, x, y\)$"):
        ASKED[name](mlp[0], torch.zeros(3), 0.1)


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("method", ["dense", "matrix-free"])
def test_inference_mode_changes_no_answer(mlp, name, method):
    """And what J keeps from there serves autograd afterwards."""
    J, K = (i2f.GradientJacobian(*mlp, method=method) for _ in range(2))
    delta = perturb.gaussian(J.gradient, 1e-2, seed=0)
    right = ASKED[name](J, delta, 0.1)
    with torch.inference_mode():
        found = ASKED[name](K, delta.clone(), 0.1)
    assert found == right
    assert ASKED[name](K, delta, 0.1) == right
    kept = spectrum.decompose(K).vectors
    assert not kept.is_inference()
    assert not K.gram().is_inference()


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor, int])
def test_numbers_of_every_kind(mlp, kind):
    J = i2f.GradientJacobian(*mlp)
    delta = perturb.gaussian(J.gradient, 1e-2, seed=0)
    one = kind(1)
    for name in ("influence", "lower_bound", "expected_square", "expected trace", "Bayes trace"):
        found = ASKED[name](J, delta, one)
        assert found == ASKED[name](J, delta, 1.0)
        assert type(found) is float
    assert trace.bayes_error(J, one, 1.0, probes=2) == trace.bayes_error(J, 1.0, 1.0, probes=2)
    assert expected_square(J, one) == expected_square(J, 1.0)


@pytest.mark.parametrize("kind", [float, np.float32, torch.tensor])
@pytest.mark.parametrize("bad", ["nan", "inf", "-1"])
def test_numbers_that_are_none_are_named(mlp, kind, bad):
    J, number = i2f.GradientJacobian(*mlp), kind(float(bad))
    delta = torch.ones_like(J.gradient)
    for name in ("influence", "lower_bound", "expected_square", "expected trace", "Bayes trace"):
        with pytest.raises(ValueError, match=r"^damping="):
            ASKED[name](J, delta, number)
    for ask in (
        expected_square,
        lambda J, v: trace.bayes_error(J, v, 1.0),
        lambda J, v: trace.expected_square(J, v, 1.0),
    ):
        with pytest.raises(ValueError, match=r"^variance="):
            ask(J, number)


@pytest.mark.parametrize("method", ["dense", "matrix-free"])
@pytest.mark.parametrize("ask", [i2f.influence, i2f.lower_bound])
def test_delta_of_every_form(mlp, method, ask):
    model, x, y = mlp
    J = i2f.GradientJacobian(model, x, y, method=method)
    delta = perturb.gaussian(J.gradient, 1e-2, seed=0)
    right, parts = ask(J, delta).norm, J.map.split(delta)
    named = dict(zip((name for name, _ in model.named_parameters()), parts, strict=True))
    for form in (parts, tuple(parts), named, dict(reversed(named.items())), delta.numpy(), [p.numpy() for p in parts]):
        assert ask(J, form).norm == right
    for bad in ("noise", None, 3):
        with pytest.raises(TypeError, match="delta"):
            ask(J, bad)
    for bad in (delta[:-1], parts[:-1], delta * float("nan")):
        with pytest.raises(ValueError, match="delta"):
            ask(J, bad)


@pytest.mark.parametrize("method", ["dense", "matrix-free"])
@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_a_gradient_that_does_not_react_predicts_nothing(method, damping):
    """Every ReLU is off at x: J = 0, and I²F = 0 is no sign of a perfect attack."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100)
    J = i2f.GradientJacobian(model, torch.rand(1, 4, dtype=torch.float64), torch.tensor([1]), method=method)
    prediction = i2f.influence(J, torch.ones_like(J.gradient), damping)
    assert not prediction.converged
    assert "does not react to the input" in prediction.reason
    for ask in (lambda: i2f.lower_bound(J, torch.ones_like(J.gradient)), lambda: expected_square(J, 1.0, damping)):
        with pytest.raises(ValueError, match="J Jᵀ is zero at this x"):
            ask()
    assert i2f.influence(J, torch.zeros_like(J.gradient), 1.0).converged
