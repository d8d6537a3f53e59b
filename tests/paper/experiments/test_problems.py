"""Problems by their plain values: what is predicted, what an attack finds, and that neighbours do not matter."""

import numpy as np
import pandas as pd
import pytest
import torch

import i2f
from i2f import perturb, sweep
from i2f.paper.experiments import problems as shared

NOISY = {"dataset": "mnist", "model": "linear", "noise": "gaussian", "size": 1e-8}


def test_a_problem_says_which_image_network_and_noise(digits):
    x, y = digits
    problem = {"dataset": "mnist", "image": 2, "init": "normal", "weight_seed": 5, "noise": "prune", "size": 0.3}
    J = shared.jacobian(problem)
    model = i2f.models.build("lenet", "mnist", init="normal", seed=5, normalize=False).double()
    direct = i2f.GradientJacobian(model, x[2:3], y[2:3])
    torch.testing.assert_close(J.gradient, direct.gradient)
    assert torch.equal(shared.perturbation(J, problem), perturb.prune(J.gradient, 0.3))
    with pytest.raises(ValueError, match="did you mean 'gaussian'"):
        shared.perturbation(J, {"noise": "gausian"})


def test_prediction_is_what_the_formulas_say():
    (row,) = shared.predict([{**NOISY, "dampings": [0.5]}])
    J = shared.jacobian(NOISY)
    delta = perturb.gaussian(J.gradient, 1e-8, seed=0)
    A = J.dense().numpy()
    displacement = np.linalg.pinv(A.T, rcond=1e-9) @ delta.numpy()  # another route: the least-squares solution
    assert row["predicted_rmse"] == pytest.approx(np.linalg.norm(displacement) / 28, rel=1e-5)
    damped = np.linalg.solve(A @ A.T + 0.5 * np.eye(len(A)), A @ delta.numpy())
    assert row["predicted_rmse, ε = 0.5"] == pytest.approx(np.linalg.norm(damped) / 28)
    assert row["bound_rmse"] == pytest.approx(i2f.lower_bound(J, delta, tol=1e-9).rmse)
    assert row["predicted_rmse"] == pytest.approx(i2f.influence(J, delta).rmse, rel=1e-6)
    assert row["noise_norm"] == pytest.approx(float(delta.norm()))
    (pruned,) = shared.predict([{**NOISY, "noise": "prune", "size": 0.1}])
    assert np.isnan(pruned["expected_mse"])


def test_attack_says_what_was_found():
    row, other = shared.attack([NOISY, {**NOISY, "image": 1}], keep=True)
    J = shared.jacobian(NOISY)
    delta = shared.perturbation(J, NOISY)
    found = i2f.invert(J.map.model, J.gradient + delta, J.map.y, J.x.shape)
    assert row["rmse"] == pytest.approx(float((found.x - J.x).square().mean().sqrt()), rel=1e-6)
    assert row["objective_ratio"] == pytest.approx(found.loss / float(delta.square().sum()), rel=1e-6)
    assert row["label_found"]
    loud, clean = shared.attack([{**NOISY, "size": 1e-3}, {**NOISY, "noise": "none"}])
    assert loud["converged"]  # no image has that gradient
    assert loud["relative_residual"] > 1e-3
    assert (loud["matched"], row["matched"], clean["matched"]) == (False, True, True)
    assert row["picture"].shape == (1, 1, 28, 28)
    assert row["rmse"] != other["rmse"]


def test_neighbours_do_not_matter():
    problems = [*sweep.grid(**NOISY, image=[0, 1], method=["dgl", "gauss-newton"], steps=4)]
    beside = shared.attack(problems)
    for problem, row in zip(problems, beside, strict=True):
        (alone,) = shared.attack([problem])
        assert row["mse"] == pytest.approx(alone["mse"], rel=1e-3)


def test_mask_is_read_from_the_zeros():
    problem = {"dataset": "mnist", "noise": "prune", "size": 0.3, "steps": 10}
    ignorant, reader = shared.attack([problem, {**problem, "mask": "zeros"}])
    assert reader["mse"] <= 1e-10 < ignorant["mse"]


def test_a_ridge_pulls_towards_the_mean_of_the_training_images():
    """So strong a prior that nothing else counts: what is found is the mean image, and not the private one."""
    (row,) = shared.attack([{**NOISY, "ridge": 1e6, "known_images": 30}], keep=True)
    digits, _ = i2f.data.load("mnist", 30, split="train")
    mean, tau_squared = shared.pixels("mnist", None, 30)
    assert row["picture"] == pytest.approx(digits.mean(0, keepdim=True).numpy(), abs=1e-4)
    assert mean[0].numpy() == pytest.approx(digits.numpy().mean(0), abs=1e-5)
    assert tau_squared == pytest.approx(digits.numpy().var(0, ddof=1).mean(), rel=1e-5)


def test_an_attack_that_failed_recovered_nothing():
    """Whether it ended without an image or with a best one; a prediction that is missing stays missing."""
    table = pd.DataFrame(
        {
            "rmse": [0.11, np.nan, 0.1, 0.1],
            "mse": [0.0121, np.nan, 0.01, 0.01],
            "failed": [False, True, True, False],
            "predicted_rmse": [0.1, 0.1, 0.1, np.nan],
        }
    )
    assert list(shared.relative_error(table)) == pytest.approx([0.1, np.inf, np.inf, np.nan], nan_ok=True)
    raised = table.assign(predicted_rmse=[0.1, np.nan, np.inf, 0.1])
    assert list(shared.relative_error(raised)) == pytest.approx([0.1, np.inf, np.inf, 0.0], abs=1e-12)
    assert list(shared.lost(table).mse) == pytest.approx([0.0121, np.inf, np.inf, 0.01])
    assert list(shared.scored(table).index) == [0, 3]
    assert table.rmse[2] == 0.1  # the table itself is left as it was


def test_neighbours_may_differ_in_what_no_attack_sees(monkeypatch):
    """A part's name does not split a call: problems of one start and label share their first Gram matrix."""
    problems = [{**NOISY, "part": part} for part in ("law", "paper")]
    calls = []
    original = shared.invert_many
    monkeypatch.setattr(shared, "invert_many", lambda *a, **k: calls.append(len(a[1])) or original(*a, **k))
    shared.attack(problems)
    assert calls == [2]
