"""Attacks side by side: the same rows in the same order for any number of workers, and nothing hidden in them."""

import pickle

import pytest
import torch

import i2f
from i2f import perturb
from i2f.sweep import Attack, attack_all


@pytest.fixture
def attacks(mlp):
    model, x, y = mlp
    J = i2f.GradientJacobian(model, x, y)
    return [
        Attack(J, perturb.gaussian(J.gradient, 1e-6, seed=i), method, {"seed": i, "steps": 10 + i})
        for i, method in enumerate(["gauss-newton", "dgl", "gauss-newton"])
    ]


def test_any_number_of_workers_gives_the_same(attacks):
    alone, together = attack_all(attacks, jobs=1), attack_all(attacks, jobs=3)
    for (row, found), (other, twin) in zip(alone, together, strict=True):
        assert str(row) == str(other)  # NaN differs from itself, but not as text
        assert torch.equal(found.x, twin.x)


def test_row_says_what_was_predicted_and_what_was_found(attacks):
    for attack, (row, found) in zip(attacks, attack_all(attacks, jobs=1), strict=True):
        J, delta = attack.J, attack.delta
        direct = i2f.invert(J.map.model, J.gradient + delta, J.map.y, J.x.shape, method=attack.method, **attack.options)
        torch.testing.assert_close(found.x, direct.x)
        assert row["method"] == attack.method
        assert row["predicted_rmse"] == pytest.approx(i2f.influence(J, delta).rmse)
        assert row["mse"] == pytest.approx(float(((found.x - J.x) ** 2).mean()))
        assert row["objective_ratio"] == pytest.approx(found.loss / float(delta.square().sum()))
        assert (row["converged"], row["reason"]) == (found.converged, found.reason)


def test_no_noise_has_no_objective_ratio(attacks):
    J = attacks[0].J
    ((row, _),) = attack_all([Attack(J, torch.zeros_like(J.gradient))], jobs=1)
    assert row["objective_ratio"] != row["objective_ratio"]  # NaN
    assert row["mse"] < 1e-20


def test_package_travels_to_workers_by_name():
    """A notebook's own function that names i2f is sent with the module in its globals."""
    assert pickle.loads(pickle.dumps(i2f)) is i2f
