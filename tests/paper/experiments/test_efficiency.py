"""Costs: what is counted is what was spent, and verdicts can go either way."""

import numpy as np
import pandas as pd
import pytest

import i2f
from i2f.paper.experiments import efficiency
from i2f.paper.figures import efficiency as draw

BUDGET = {"gauss-newton": 20, "dgl": 5, "dlg": 2, "gs": 5}


@pytest.fixture(scope="module")
def table():
    return efficiency.measure(efficiency.problems("mnist", 1, ["linear default"], 1e-3), BUDGET, goal=0.01, jobs=1)


def test_every_estimate_and_every_attack_has_a_row(table):
    assert list(table.method) == [*efficiency.ESTIMATES, *efficiency.ATTACKS]
    cost = table.set_index("method").evaluations
    assert cost["I²F"] == 784 + 1  # J formed, and one product with δ
    assert 3 <= cost["I_lb"] <= 100
    assert cost["I_lb"] % 2 == 1  # two products a Lanczos step, and one with δ


def test_an_attack_is_followed_until_it_arrives(table, digits):
    x, y = digits
    model = i2f.models.build("linear", "mnist", init="default", seed=1, normalize=False).double()
    J = i2f.GradientJacobian(model, x[:1], y[:1])
    path = []
    i2f.invert(model, J.gradient, y[:1], J.x.shape, callback=path.append)
    arrived = next(at.evaluations for at in path if float((at.x - J.x).square().mean()) <= 0.01)
    rows = table.set_index("method")
    assert rows.evaluations["gauss-newton"] == arrived
    assert rows.reached["gauss-newton"]
    assert not rows.reached["gs"]  # five steps are too few
    assert rows.evaluations["gs"] >= 10


def fake(attack: int) -> pd.DataFrame:
    rows = [("I_lb", 21), ("I²F", 785), ("dgl", attack), ("gauss-newton", attack)]
    return pd.DataFrame(
        {"dataset": "mnist", "network": "lenet uniform", "image": image, "method": method, "evaluations": cost,
         "reached": True}
        for image in range(5)
        for method, cost in rows
    )  # fmt: skip


@pytest.mark.parametrize(
    ("attack", "expected"), [(2100, ["holds"] * 5), (105, ["holds", "fails", "fails", "fails", "fails"])]
)
def test_verdicts_follow_the_table(attack, expected):
    found = efficiency.judge(fake(attack), "mnist", cheaper=10.0, products=100.0)
    assert [c.id.removeprefix("efficiency-mnist-") for c in found] == [
        "products", "bound-dgl", "exact-dgl", "bound-gauss-newton", "exact-gauss-newton"
    ]  # fmt: skip
    assert [c.verdict for c in found] == expected
    assert found[1].value == pytest.approx(attack / 21)
    assert found[2].value == pytest.approx(attack / 785)
    assert efficiency.judge(fake(attack), "mnist", cheaper=10.0, products=20.0)[0].verdict == "fails"


def test_the_network_on_which_the_attack_is_cheapest_decides():
    both = pd.concat([fake(2100), fake(105).assign(network="linear default")])
    found = {c.id: c for c in efficiency.judge(both, "mnist", cheaper=10.0, products=100.0)}
    assert found["efficiency-mnist-bound-dgl"].value == pytest.approx(5)
    assert found["efficiency-mnist-bound-dgl"].verdict == "fails"
    assert found["efficiency-mnist-bound-dgl"].note == "arrived: lenet uniform 100%, linear default 100%"


def test_a_budget_that_ran_out_is_no_proof():
    """Five times the bound's cost and not arrived: it may be ten times or more."""
    table = fake(105)
    table.loc[table.method == "dgl", "reached"] = False
    found = {c.id.removeprefix("efficiency-mnist-"): c for c in efficiency.judge(table, "mnist", 10.0, 100.0)}
    assert (found["bound-dgl"].verdict, found["bound-gauss-newton"].verdict) == ("inconclusive", "fails")
    assert found["bound-dgl"].note == "arrived: lenet uniform 0%; a larger budget might do"


def test_an_estimate_that_raised_leaves_its_cost_unknown():
    table = fake(2100)
    table.loc[0, "evaluations"] = np.nan
    assert efficiency.judge(table, "mnist", cheaper=10.0, products=100.0)[0].verdict == "inconclusive"


def test_a_large_network_is_asked_for_less():
    tasks = efficiency.problems("cifar10", 2, ["lenet uniform"], 1e-3, ["resnet20 default gelu"])
    assert [t["method"] for t in tasks if t["network"] == "resnet20 default gelu"] == [*efficiency.DEEP] * 2
    assert tasks[0]["network"] == "resnet20 default gelu"  # the costliest first
    (row,) = efficiency._solve({}, {}, 0.01, 0, [t for t in tasks if t["image"] == 0][:1])
    assert (row["d_x"], row["d_theta"]) == (3072, 272_474)
    assert row["evaluations"] <= 52


def test_a_network_without_exact_prediction_leaves_the_others_claims_alone():
    table = fake(2100)
    deep = table[table.method.isin(efficiency.DEEP)].assign(network="resnet20 default gelu", evaluations=50)
    both = pd.concat([deep, table], ignore_index=True)
    alone, beside = (
        {c.id: c for c in efficiency.judge(t, "mnist", 10.0, 100.0)} for t in (table, both)
    )  # fmt: skip
    exact = [name for name in alone if "-exact-" in name]
    assert exact
    assert all((beside[name].value, beside[name].verdict) == (alone[name].value, alone[name].verdict) for name in exact)
    assert beside["efficiency-mnist-bound-dgl"].value <= alone["efficiency-mnist-bound-dgl"].value


def test_figure_draws_every_row():
    table = fake(2100)
    table.loc[table.method == "dgl", "reached"] = False
    (ax,) = draw.overview(table).axes
    drawn = [tuple(point) for points in ax.collections for point in points.get_offsets()]
    assert len(drawn) == len(table)
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        "lower bound I_lb",
        "exact I²F",
        "Gauss–Newton",
        "DGL, Adam",
    ]
    hollow = [c for c in ax.collections if len(c.get_offsets()) and c.get_facecolor()[0][:3].min() == 1]
    assert {point[0] for c in hollow for point in c.get_offsets()} == {2100}
