"""Joint optimisation: the penalty does what it should to a real training, and its claims on made-up tables."""

import numpy as np
import pandas as pd
import pytest
import torch

import i2f
from i2f.attacks.prior import TAU
from i2f.paper import rows
from i2f.paper.experiments import joint
from i2f.paper.figures import joint as draw
from i2f.paper.sweep import Settings

SETTING = {"dataset": "mnist", "init": "uniform"}
CONFIG = SETTING | {"seeds": 1, "digits": 60, "held_out": 20, "epochs": 1, "batch_size": 20, "lr": 0.003}
CONFIG |= {"penalised": 1, "every": 1, "damping": 0.01, "images": 2, "attacked": 1, "variance": 1e-6}
CONFIG |= {"gauss_newton_steps": 8}
THRESHOLDS = CONFIG | {"gain": 1.5, "kept": 0.05}


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
    assert set(draw.published(read, THRESHOLDS)) == {"overview.svg"}


def test_a_seed_draws_weights_and_order():
    tasks = problems({"plain": [0], "bound": [0.3]}, seeds=2)
    assert [(p["seed"], p["weight_seed"], p["method"]) for p in tasks] == [
        (seed, seed, method) for seed in (1, 2) for method in ("plain", "bound")
    ]


def test_a_penalised_network_shows_less(table):
    rows = table[table.image == 60].set_index("method")
    assert rows.lambda_max["bound"] < rows.lambda_max["plain"]
    assert rows.rmse["plain"] == pytest.approx(rows.expected_rmse["plain"], rel=0.3)
    assert table.columns.is_unique
    summary = joint.summary(table)
    assert summary["measured / expected"].iloc[0] == pytest.approx(1, abs=0.3)
    assert list(summary.converged) == ["1 of 1"] * 2


def test_held_out_digits_are_analysed_by_their_spectra():
    """The error of an attacker with a prior as a ridge regression in closed form, by another route."""
    (task,) = problems({"plain": [0]}, epochs=0)
    ((first, second),) = joint.solve([task])
    assert (first["image"], second["image"]) == (60, 61)
    assert "rmse" not in second
    x, y = i2f.data.load("mnist", 1, 61, split="train")
    model = i2f.models.build("lenet", "mnist", init="uniform", seed=1, normalize=False).double()
    D = i2f.GradientJacobian(model, x.double(), y).dense()
    posterior = torch.linalg.inv(D @ D.T / task["variance"] + torch.eye(784) / TAU**2)
    assert second["bayes_rmse"] == pytest.approx(float(posterior.diagonal().mean()) ** 0.5, rel=1e-6)
    assert second["bayes_rmse"] < min(TAU, second["expected_rmse"])


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


def made_up(gain=2.0, cost=0.01, seeds=17):
    rows = []
    for task in problems({"plain": [0], "bound": [0.1, 0.3], "bayes": [0.1]}, seeds=seeds):
        strong = task["method"] != "plain"
        for image in range(5):
            error = 0.05 * (gain * (1 + np.sin(task["seed"]) / 20) if strong else 1.0) * (1 + image / 10)
            rows.append(
                task
                | {
                    "accuracy": 0.9 - (cost + np.cos(task["seed"]) / 100) * strong + task["seed"] / 1000,
                    "image": image,
                    "gradient_norm": 0.5 if strong else 1.0,
                    "lambda_max": 1.0,
                    "expected_rmse": error,
                    "bayes_rmse": error,
                    "rmse": error if image == 0 else np.nan,
                    "converged": True if image == 0 else np.nan,
                    "failed": False,
                    "reason": "",
                }
            )
    return pd.DataFrame(rows)


def verdicts(table):
    return {c.id.removeprefix("joint-"): c for c in joint.judge({"problems": table}, THRESHOLDS)}


def test_claims():
    found = verdicts(made_up())
    assert {name: (c.number, c.verdict) for name, c in found.items()} == {
        "harder-bound": (49, "holds"),
        "harder-bayes": (49, "holds"),
        "cost-bound": (50, "holds"),
        "cost-bayes": (50, "holds"),
    }
    assert {(c.n, c.ledger) for c in found.values()} == {(17, "beyond")}
    assert found["harder-bound"].value == pytest.approx(2.0, rel=0.01)
    assert found["cost-bound"].value == pytest.approx(-0.01, abs=2e-3)
    assert "weight 0.3" in found["harder-bound"].note  # the largest
    relative = joint.effects(made_up())["bound"]["relative"]
    assert relative.value == pytest.approx(1.0, rel=0.01)  # the gradients are half as large


def test_claims_can_fail():
    found = verdicts(made_up(gain=1.1, cost=0.2))
    assert {c.verdict for c in found.values()} == {"fails"}


def test_pairs_are_of_one_seed():
    """Seeds that differ by far more than the penalty does decide as if they were alike."""
    table = made_up()
    table["bayes_rmse"] *= 10.0 ** (table.seed % 3)
    assert verdicts(table)["harder-bound"].low == pytest.approx(verdicts(made_up())["harder-bound"].low)


def test_networks_that_learnt_nothing_are_not_compared():
    table = made_up()
    assert {c.verdict for c in verdicts(table.assign(accuracy=table.accuracy - 0.7)).values()} == {"inconclusive"}


def test_a_seed_that_did_not_learn_is_left_out():
    table = made_up()
    lost = (table.method == "bound") & (table.seed == table.seed.iloc[0])
    found = verdicts(table.assign(accuracy=table.accuracy.mask(lost, 0.1), bayes_rmse=table.bayes_rmse.mask(lost, 1e3)))
    assert (found["harder-bound"].n, found["cost-bound"].n) == (16, 17)
    assert found["harder-bound"].value == pytest.approx(verdicts(table)["harder-bound"].value, rel=0.1)


def test_a_penalty_that_keeps_a_network_from_learning_protects_nothing():
    table = made_up()
    found = verdicts(table.assign(accuracy=table.accuracy.where(table.method != "bound", 0.1)))
    assert {name: c.verdict for name, c in found.items()} == {
        "harder-bound": "inconclusive",
        "harder-bayes": "holds",
        "cost-bound": "fails",
        "cost-bayes": "holds",
    }
    assert "0 of 17 pairs of networks learnt" in found["harder-bound"].note


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


def test_the_figure_has_every_network_and_both_noises():
    left, right = draw.overview(made_up(), 1.5).axes
    assert sum(len(line.get_xdata()) for line in left.lines if line.get_alpha()) == 17 * 4
    assert len(left.containers) == 4  # of each method and weight
    assert sum(len(c.get_offsets()) for c in right.collections if len(c.get_offsets()) == 17) == 17 * 4
    assert len(right.get_yticklabels()) == 4
