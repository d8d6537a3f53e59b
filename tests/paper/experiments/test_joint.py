"""Joint optimisation: the penalty does what it should to a real training, and its claims on made-up tables."""

import numpy as np
import pandas as pd
import pytest
import torch

from i2f.paper import rows
from i2f.paper.experiments import joint
from i2f.paper.figures import joint as draw
from i2f.paper.sweep import Settings

pytestmark = pytest.mark.usefixtures("few_draws")
SETTING = {"dataset": "mnist", "init": "uniform", "weight_seed": 1}
CONFIG = SETTING | {"seeds": 1, "digits": 60, "held_out": 20, "epochs": 1, "batch_size": 20, "lr": 0.003}
CONFIG |= {"penalised": 1, "every": 1, "damping": 0.01, "images": 2, "attacked": 1, "variance": 1e-6}
CONFIG |= {"gauss_newton_steps": 8}
THRESHOLDS = {"gain": 1.5, "kept": 0.05}


def problems(methods, **more):
    return joint.problems(CONFIG | {"methods": methods} | more)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Solved, and read again."""
    chunks, tasks = tmp_path_factory.mktemp("chunks"), problems({"plain": [0], "bound": [0.3]})
    stores = [rows.Store(chunks=chunks, solve=yes) for yes in (True, False)]
    return [joint.run(tasks, Settings(jobs=1, progress="off", store=store)) for store in stores]


@pytest.fixture(scope="module")
def table(found):
    return found[0].tables["problems"]


def test_stored_rows_are_the_solved_ones(found):
    solved, read = found
    pd.testing.assert_frame_equal(solved.tables["problems"], read.tables["problems"])
    assert len(read.tables["problems"]) == 4  # of two networks, two images
    assert set(draw.published(read, CONFIG)) == {"overview.svg"}


def test_a_penalised_network_shows_less(table):
    rows = table[table.image == 0].set_index("method")
    assert rows.lambda_max["bound"] < rows.lambda_max["plain"]
    assert rows.rmse["plain"] == pytest.approx(rows.expected_rmse["plain"], rel=0.3)
    assert table.columns.is_unique
    found = verdicts(table).values()
    assert all("converged" in claim.note for claim in found if "RMSE" in claim.statistic)
    assert list(joint.summary(table).columns) == [
        "accuracy",
        "gradient",
        "lambda_max",
        "expected",
        "measured",
        "clamped",
    ]


def test_images_beyond_those_attacked_are_judged_by_their_spectra_alone(table):
    others = table[table.image == 1]
    assert others.expected_rmse.gt(0).all()
    assert others[["mse_clamped", "rmse", "converged"]].isna().all(axis=None)
    found = verdicts(table.assign(accuracy=0.9))
    assert "of 1 images attacked" in found["bound"].note
    axes = draw.overview(table.assign(accuracy=0.9)).axes
    assert "of 2 attacks converged" in axes[0].get_xlabel()  # one of each network


def test_the_order_of_training_is_the_same_whatever_is_added(monkeypatch):
    """Noise and penalties draw from streams of their own."""
    orders, original = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *a, **k: orders.append(original(*a, **k)) or orders[-1])
    for method, weight in (("plain", 0.0), ("bound", 0.1), ("dp", 0.5)):
        (task,) = problems({method: [weight]}, digits=40, epochs=2, batch_size=10)
        joint.train(task | {"seed": 3})
    plain, bound, dp = torch.stack(orders).view(3, 2, 40)
    assert torch.equal(plain, bound)
    assert torch.equal(plain, dp)


def test_every_method_trains():
    for method in (joint.BAYES, joint.DP):
        _, accuracy = joint.train(*problems({method: [0.1]}, digits=40))
        assert 0 <= accuracy <= 1


def made_up(gain=2.0, cost=0.01):
    rows = []
    for task in problems({"plain": [0], "bound": [0.1, 0.3], "bayes": [0.1]}, seeds=4):
        strong = task["method"] != "plain"
        for image in range(5):
            rows.append(
                task
                | {
                    "accuracy": 0.9 - cost * strong + task["seed"] / 1000,
                    "image": image,
                    "gradient_norm": 1.0,
                    "lambda_max": 1.0,
                    "expected_rmse": 0.1 * (gain if strong else 1.0),
                    "rmse": 0.1,
                    "converged": True,
                    "failed": False,
                    "mse_clamped": (0.05 * (gain if strong else 1.0) * (1 + image / 10)) ** 2,
                    "reason": "",
                }
            )
    return pd.DataFrame(rows)


def verdicts(table):
    return {c.id.removeprefix("joint-mnist-"): c for c in joint.judge({"problems": table}, THRESHOLDS, "mnist")}


def test_claims():
    found = verdicts(made_up())
    assert {name: c.verdict for name, c in found.items()} == dict.fromkeys(
        ("bound", "bound-relative", "bound-accuracy", "bayes", "bayes-relative", "bayes-accuracy"), "holds"
    )
    assert found["bound-relative"].value == pytest.approx(2.0)
    assert found["bound"].n == 4
    assert found["bound"].value == pytest.approx(2.0)
    assert found["bound-accuracy"].value == pytest.approx(-0.01)


def test_claims_can_fail():
    found = verdicts(made_up(gain=1.1, cost=0.2))
    assert {c.verdict for c in found.values()} == {"fails"}


def test_networks_that_learnt_nothing_are_not_compared():
    table = made_up()
    assert {c.verdict for c in verdicts(table.assign(accuracy=table.accuracy - 0.7)).values()} == {"inconclusive"}


def test_a_penalty_that_keeps_a_network_from_learning_has_no_verdict():
    table = made_up()
    found = verdicts(table.assign(accuracy=table.accuracy.where(table.method != "bound", 0.1)))
    assert {name: c.verdict for name, c in found.items()} == {
        "bound": "inconclusive",
        "bound-relative": "inconclusive",
        "bound-accuracy": "fails",
        "bayes": "holds",
        "bayes-relative": "holds",
        "bayes-accuracy": "holds",
    }
    assert "penalised network has learnt too little" in found["bound"].note


def test_a_lazy_penalty_is_taken_at_every_kth_step_and_counts_k_times(monkeypatch):
    taken = []

    def term(p, model, x, *rest):
        taken.append(0)
        return model(x).sum() * 0 + sum(p.sum() for p in model.parameters())

    monkeypatch.setattr(joint, "_term", term)
    (task,) = problems({"bound": [1e3]}, digits=100)  # five steps
    joint.train(task)
    assert len(taken) == 5
    slopes = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: slopes.append(self.param_groups[0]["params"][-1].grad))
    joint.train(task | {"every": 3})
    assert len(taken) == 5 + 2
    assert [float(s.mean().round(decimals=-2)) for s in slopes] == [3e3, 0, 0, 3e3, 0]


def test_the_figure_has_every_method_that_learnt():
    table = made_up()
    figure = draw.overview(table)
    for ax in figure.axes:
        drawn = [line for line in ax.lines if not line.get_label().startswith("_")]
        assert [len(line.get_xdata()) for line in drawn] == [1, 2, 1]
        assert np.isfinite(drawn[0].get_xdata()).all()
    assert figure.get_supxlabel() == ""
    table.loc[(table.weight == 0.3) & (table.seed == 1), "accuracy"] = 0.1
    figure = draw.overview(table)
    assert [len(line.get_xdata()) for line in figure.axes[0].lines if not line.get_label().startswith("_")] == [1] * 3
    assert "0.3" in figure.get_supxlabel()
