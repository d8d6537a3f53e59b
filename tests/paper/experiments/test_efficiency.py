"""Costs: what is counted is what was spent, and verdicts can go either way."""

import numpy as np
import pandas as pd
import pytest

import i2f
from i2f.paper import rows
from i2f.paper.experiments import efficiency
from i2f.paper.figures import efficiency as draw
from i2f.paper.sweep import Settings

pytestmark = pytest.mark.usefixtures("few_draws")
CONFIG = {"dataset": "mnist", "images": 1, "networks": ["linear default"], "deep": [], "variance": 1e-3, "goal": 0.01}
CONFIG |= {"gauss_newton_steps": 20, "adam_steps": 5, "lbfgs_steps": 2}
CONFIG |= {"deep_gauss_newton_steps": 3, "deep_adam_steps": 4}
THRESHOLDS = {"cheaper": 10.0, "products": 100.0}


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    return tmp_path_factory.mktemp("chunks")


@pytest.fixture(scope="module")
def table(chunks):
    settings = Settings(jobs=1, progress="off", store=rows.Store(chunks=chunks))
    return efficiency.run(efficiency.problems(CONFIG), settings).tables["problems"]


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
    costs = table.set_index("method")
    assert costs.evaluations["gauss-newton"] == arrived
    assert costs.reached["gauss-newton"]
    assert not costs.reached["gs"]  # five steps are too few
    assert costs.evaluations["gs"] >= 10


def test_rows_survive_the_store(table, chunks):
    settings = Settings(jobs=1, progress="off", store=rows.Store(chunks=chunks, solve=False))
    found = efficiency.run(efficiency.problems(CONFIG), settings)
    pd.testing.assert_frame_equal(table, found.tables["problems"])
    (figure,) = draw.published(found, CONFIG).values()
    assert len(figure.axes) == 1


def test_an_estimate_does_not_depend_on_an_attackers_budget():
    tasks, others = (efficiency.problems(CONFIG | {"adam_steps": steps}) for steps in (5, 6))
    assert {t["method"] for t, other in zip(tasks, others, strict=True) if t != other} == {"dgl", "gs"}


def test_the_summary_marks_attacks_that_did_not_arrive():
    both = fake(2100)
    deep = both[both.method.isin(efficiency.DEEP)].assign(network="resnet20 default gelu", reached=False)
    shown = efficiency.summary(pd.concat([deep, both], ignore_index=True))
    assert list(shown.index) == ["I_lb", "I²F", "gauss-newton", "dgl"]
    assert shown.loc["dgl"].to_list() == ["≥ 2,100", "2,100"]
    assert shown.loc["I²F"].to_list() == ["–", "785"]


def fake(attack: int) -> pd.DataFrame:
    costs = [("I_lb", 21), ("I²F", 785), ("dgl", attack), ("gauss-newton", attack)]
    return pd.DataFrame(
        {
            "dataset": "mnist",
            "network": "lenet uniform",
            "image": image,
            "method": method,
            "evaluations": cost,
            "reached": True,
        }
        for image in range(5)
        for method, cost in costs
    )


def judge(table: pd.DataFrame, **thresholds: float) -> list:
    return efficiency.judge({"problems": table}, THRESHOLDS | thresholds, "mnist")


@pytest.mark.parametrize(
    ("attack", "expected"), [(2100, ["holds"] * 5), (105, ["holds", "fails", "fails", "fails", "fails"])]
)
def test_verdicts_follow_the_table(attack, expected):
    found = judge(fake(attack))
    assert [c.id.removeprefix("efficiency-mnist-") for c in found] == [
        "products",
        "bound-dgl",
        "exact-dgl",
        "bound-gauss-newton",
        "exact-gauss-newton",
    ]
    assert [c.verdict for c in found] == expected
    assert found[1].value == pytest.approx(attack / 21)
    assert found[2].value == pytest.approx(attack / 785)
    assert judge(fake(attack), products=20.0)[0].verdict == "fails"


def test_the_network_on_which_the_attack_is_cheapest_decides():
    both = pd.concat([fake(2100), fake(105).assign(network="linear default")])
    found = {c.id: c for c in judge(both)}
    assert found["efficiency-mnist-bound-dgl"].value == pytest.approx(5)
    assert found["efficiency-mnist-bound-dgl"].verdict == "fails"
    assert found["efficiency-mnist-bound-dgl"].note == "arrived: lenet uniform 100%, linear default 100%"


def test_a_budget_that_ran_out_is_no_proof():
    """Five times the bound's cost and not arrived: it may be ten times or more."""
    table = fake(105)
    table.loc[table.method == "dgl", "reached"] = False
    found = {c.id.removeprefix("efficiency-mnist-"): c for c in judge(table)}
    assert (found["bound-dgl"].verdict, found["bound-gauss-newton"].verdict) == ("inconclusive", "fails")
    assert found["bound-dgl"].note == "arrived: lenet uniform 0%; a larger budget might do"


def test_an_estimate_that_raised_leaves_its_cost_unknown():
    table = fake(2100)
    table.loc[0, "evaluations"] = np.nan
    assert judge(table)[0].verdict == "inconclusive"


def test_a_large_network_is_asked_for_less():
    tasks = efficiency.problems(CONFIG | {"dataset": "cifar10", "images": 2, "deep": ["resnet20 default gelu"]})
    assert [t["method"] for t in tasks if t["network"] == "resnet20 default gelu"] == [*efficiency.DEEP] * 2
    assert tasks[0]["network"] == "resnet20 default gelu"  # the costliest first
    assert [t.get("budget") for t in tasks[:3]] == [None, 3, 4]
    (row,) = efficiency.solve(tasks[:1])
    assert (row["d_x"], row["d_theta"]) == (3072, 272_474)
    assert row["evaluations"] <= 52


def test_a_network_without_exact_prediction_leaves_the_others_claims_alone():
    table = fake(2100)
    deep = table[table.method.isin(efficiency.DEEP)].assign(network="resnet20 default gelu", evaluations=50)
    both = pd.concat([deep, table], ignore_index=True)
    alone, together = ({c.id: c for c in judge(t)} for t in (table, both))
    exact = [name for name in alone if "-exact-" in name]
    assert exact
    assert all(together[n].value == alone[n].value and together[n].verdict == alone[n].verdict for n in exact)
    assert together["efficiency-mnist-bound-dgl"].value <= alone["efficiency-mnist-bound-dgl"].value


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
