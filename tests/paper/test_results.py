"""What is committed under results/ comes out again: on this machine, within what rounding to three digits leaves."""

from pathlib import Path

import pandas as pd
import pytest

from i2f.paper.experiments import problems as shared

RESULTS = Path(__file__).parents[2] / "results"
PREDICTED = 0.006  # relative, on predictions: dense linear algebra, and a table of three digits
MEASURED = 0.02  # relative, on errors of attacks that converged
PROBLEM = ("dataset", "model", "init", "weight_seed", "image", "noise", "size", "noise_seed")


def published(key: str) -> pd.DataFrame:
    return pd.read_csv(RESULTS / key / "problems.csv").rename(columns={"variance": "size"})


@pytest.mark.parametrize("image", [0, 3])
def test_influence_against_attack(image):
    table = published("influence_vs_attack-mnist")
    rows = table[(table.attacker == "gauss-newton") & (table.model == "lenet") & (table.image == image)]
    row = rows[rows.converged & (rows["size"] == 1e-5)].iloc[0]
    problem = {name: row[name] for name in PROBLEM} | {"image": image, "weight_seed": 1, "noise_seed": image}
    (predicted,) = shared.predict([problem], dampings=(1.0,))
    for name in ("predicted_rmse", "predicted_rmse, ε = 1", "bound_rmse", "expected_mse", "lambda_max", "lambda_min"):
        assert predicted[name] == pytest.approx(row[name], rel=PREDICTED), name
    (found,) = shared.attack([problem])
    assert found["rmse"] == pytest.approx(row.rmse, rel=MEASURED)


def test_pruning():
    table = published("pruning-mnist")
    row = table[(table.attacker == "ignores") & (table.image == 0) & (table["size"] == 0.5)].iloc[0]
    problem = {"dataset": "mnist", "image": 0, "noise": "prune", "size": 0.5}
    (predicted,) = shared.predict([problem])
    assert predicted["predicted_rmse"] == pytest.approx(row.predicted_rmse, rel=PREDICTED)
    (found,) = shared.attack([problem])
    assert found["rmse"] == pytest.approx(row.rmse, rel=MEASURED)


def test_initialization():
    table = published("initialization-mnist")
    for init in ("normal", "xavier"):
        row = table[(table.init == init) & (table.weight_seed == 2) & (table["size"] == 1e-3)].iloc[0]
        problem = {"init": init, "weight_seed": 2, "noise": "gaussian", "size": 1e-3}
        (predicted,) = shared.predict([problem])
        assert predicted["expected_mse"] == pytest.approx(row.expected_mse, rel=PREDICTED)
        assert predicted["predicted_rmse"] == pytest.approx(row.predicted_rmse, rel=PREDICTED)
