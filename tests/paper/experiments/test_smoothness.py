"""The experiment on depth, width and smoothness: its numbers by hand, its claims on made-up tables."""

import numpy as np
import pandas as pd
import pytest
import torch

import i2f
from i2f.paper.experiments import smoothness
from i2f.paper.figures import smoothness as draw
from i2f.paper.sweep import Settings

pytestmark = pytest.mark.usefixtures("few_draws")
CONFIG = {
    "dataset": "mnist",
    "init": "kaiming",
    "weight_seed": 1,
    "relative": 1e-2,
    "gauss_newton_steps": 15,
    "start_seed": 0,
}


THRESHOLDS = {"exact": 1e-8, "share": 0.99, "safer": 2.0}


@pytest.fixture(scope="module")
def table():
    tasks = problems([2], [8], ["softplus", "relu"], 1)
    return smoothness.run(tasks, Settings(jobs=1, progress="off")).tables["problems"]


def problems(depths, widths, activations, images):
    family = {"depths": depths, "widths": widths, "activations": activations, "images": images}
    return smoothness.problems(CONFIG | family)


def test_problems_are_the_whole_family_the_deepest_first():
    tasks = problems([2, 8], [8, 16], ["gelu", "relu"], 3)
    assert len(tasks) == len({tuple(t.items()) for t in tasks}) == 24
    assert [t["depth"] for t in tasks] == [8] * 12 + [2] * 12
    assert all(t["model"] == f"cnn{t['depth']}x{t['width']}" for t in tasks)


def test_a_row_is_what_j_says_and_what_the_attack_finds(table):
    row = table[table.activation == "softplus"].iloc[0]
    x, y = i2f.data.load("mnist", n=1)
    model = i2f.models.build("cnn2x8", "mnist", "kaiming", 1, activation="softplus").double()
    J = i2f.GradientJacobian(model, x, y)
    values = torch.linalg.svdvals(J.dense()) ** 2
    assert row["rank"] == len(values) == 784
    assert row.condition == pytest.approx(float(values[0] / values[-1]), rel=1e-5)
    variance = (1e-2 * float(J.gradient.norm())) ** 2 / J.shape[1]
    expected = np.sqrt(variance * float((1 / values).sum()) / 784)
    assert row.expected_rmse == pytest.approx(expected, rel=1e-5)
    assert row.converged
    assert row.mse <= 1e-10


def test_a_kink_stops_the_search(table):
    row = table[table.activation == "relu"].iloc[0]
    assert not row.converged
    assert row.relative_residual > 1e-2
    assert row.mse > 1e-2


def made_up(**replaced):
    tasks = problems([2, 4, 8], [8, 16], ["softplus", "relu"], 5)
    rows = [
        {
            **t,
            "mse": 1e-20 if t["activation"] == "softplus" else 0.1,
            "rmse": 1e-10,
            "relative_residual": 1e-12,
            "steps": 5,
            "condition": 1e4,
            "rank": 784,
            "converged": True,
            "failed": False,
            "reason": "",
            "expected_rmse": 3.0 ** np.log2(t["depth"]) * (1 + t["image"]),
        }
        for t in tasks
    ]
    return pd.DataFrame(rows).assign(**replaced)


def verdicts(table):
    return {
        c.id.removeprefix("smoothness-mnist-"): c for c in smoothness.judge({"problems": table}, THRESHOLDS, "mnist")
    }


def test_claims():
    found = verdicts(made_up())
    assert {name: c.verdict for name, c in found.items()} == {
        "smooth-softplus": "holds",
        "kinks": "fails",
        "rank": "holds",
        "narrow": "holds",
        "depth": "holds",
    }
    assert found["depth"].value == pytest.approx(3.0)


def test_one_bad_depth_is_enough():
    table = made_up()
    table.loc[(table.depth == 4) & (table.width == 16), "mse"] = 0.1
    assert verdicts(table)["smooth-softplus"].verdict == "fails"
    assert verdicts(table)["smooth-softplus"].value == 0


def test_a_singular_network_has_no_slope():
    table = made_up()
    table.loc[(table.activation == "relu") & (table.image == 2), ["rank", "expected_rmse"]] = [700, np.inf]
    found = verdicts(table)
    assert found["depth"].value == pytest.approx(3.0)
    assert found["rank"].value == pytest.approx(1 - 0.5 / 5)


def test_a_failed_attack_recovered_nothing():
    table = made_up()
    table.loc[table.width == 8, ["failed", "mse"]] = [True, 0.0]
    assert verdicts(table)["narrow"].verdict == "fails"


def test_the_summary_has_one_row_per_network():
    shown = smoothness.summary(made_up(), 1e-8)
    assert len(shown) == 12
    assert list(dict.fromkeys(shown.index.get_level_values("activation"))) == ["softplus", "relu"]


def test_the_figure_draws_every_activation(table):
    axes = draw.overview(table).axes
    assert len(axes) == 3
    assert {text.get_text() for text in axes[0].get_legend().get_texts()} == {"softplus", "ReLU"}
