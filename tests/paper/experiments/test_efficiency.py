"""Costs: what is counted is what was spent, and verdicts can go either way."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

import i2f
from i2f.paper import rows
from i2f.paper.experiments import efficiency
from i2f.paper.figures import efficiency as draw
from i2f.paper.sweep import Settings

mpl.use("Agg")

CONFIG = {"networks": ["mnist lenet uniform", "cifar10 resnet20 default", "entailment bert-tiny"], "images": 2}
CONFIG |= {"weight_seeds": 5, "followed": 1, "goal": 0.01, "gauss_newton_steps": 20, "adam_steps": 24_000}
THRESHOLDS = CONFIG | {"cheaper": 0.1}


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    return tmp_path_factory.mktemp("chunks")


@pytest.fixture(scope="module")
def found(chunks):
    settings = Settings(jobs=1, progress="off", store=rows.Store(chunks=chunks))
    return efficiency.run(efficiency.problems(CONFIG), settings)


def test_the_first_network_alone_is_asked_for_more_than_its_bound():
    tasks = efficiency.problems(CONFIG | {"images": 7, "followed": 2})
    asked = {name: [t for t in tasks if t["network"] == name] for name in CONFIG["networks"]}
    assert [(t["image"], t["method"]) for t in asked["mnist lenet uniform"] if t["image"] < 2] == [
        (image, method) for image in (0, 1) for method in ("I_lb", "I²F", "gauss-newton")
    ]
    assert {name: len(some) for name, some in asked.items()} == dict(zip(asked, (7 + 2 * 2, 7, 7), strict=True))
    assert {t["method"] for name in CONFIG["networks"][1:] for t in asked[name]} == {"I_lb"}
    assert all(t["weight_seed"] == 1 + t["image"] % 5 for t in tasks)
    assert {t["network"]: t["dtype"] for t in tasks} == dict(zip(asked, ("float64", "float32", "float32"), strict=True))


def test_the_cost_is_what_was_spent(found):
    """By another route: the products of an operator made here, and the attacker's own callback."""
    table = found.tables["problems"]
    (first, *_), costs = table.d_x, table[(table.network == "mnist lenet uniform") & (table.image == 0)]
    costs = costs.set_index("method").evaluations
    x, y = i2f.data.load("mnist", 1)
    J = i2f.GradientJacobian(i2f.models.build("lenet", "mnist", "uniform", 1, normalize=False).double(), x.double(), y)
    assert costs["I²F"] == first + 1 == 785
    i2f.lower_bound(J, i2f.perturb.gaussian(J.gradient, 1e-3, 7))  # of whatever noise
    assert costs["I_lb"] == J.products
    assert J.products % 2 == 1  # two products a Lanczos step, and one with δ
    path = []
    i2f.invert(J.map.model, J.gradient, y, J.x.shape, seed=0, callback=path.append)
    assert costs["gauss-newton"] == next(at.evaluations for at in path if float((at.x - J.x).square().mean()) <= 0.01)
    assert table.reached.all()


def test_an_attack_that_never_arrives_is_told_from_one_that_did():
    (task,) = (t for t in efficiency.problems(CONFIG) if t["method"] == "gauss-newton")
    table = efficiency.run([task | {"goal": 0.0}], Settings(jobs=1, progress="off")).tables["problems"]
    assert not table.reached.any()


def test_an_attack_costs_what_its_reconstruction_says(digits):
    x, y = digits
    model = i2f.models.build("linear", "mnist", seed=1)
    J = i2f.GradientJacobian(model, x[:1], y[:1])
    found = i2f.invert(model, J.gradient, y[:1], J.x.shape, method="dgl", steps=7)
    assert found.evaluations == efficiency.attack_cost(7)


def test_networks_and_texts_are_measured_alike(found):
    bound = found.tables["problems"].query("method == 'I_lb'").groupby("network", sort=False)
    assert list(bound.d_x.first()) == [784, 3072, 12 * 32]
    assert bound.evaluations.max().between(3, 100).all()
    assert list(efficiency.summary(found.tables["problems"], 100)["images or texts"]) == [2, 2, 2]


def test_rows_survive_the_store(found, chunks):
    settings = Settings(jobs=1, progress="off", store=rows.Store(chunks=chunks, solve=False))
    again = efficiency.run(efficiency.problems(CONFIG), settings)
    pd.testing.assert_frame_equal(found.tables["problems"], again.tables["problems"])


def fake(bound: float, network: str = "mnist lenet uniform", images: int = 20) -> pd.DataFrame:
    costs = [("I_lb", bound), ("I²F", 785), ("gauss-newton", 2000)]
    common = {"network": network, "reached": True, "converged": True, "failed": False, "d_x": 784, "d_theta": 17038}
    found = [
        {**common, "image": image, "method": method, "evaluations": cost * (1 + image % 2 / 10)}
        for image in range(images)
        for method, cost in costs
    ]
    return pd.DataFrame(found)


def judge(table: pd.DataFrame):
    return efficiency.judge({"problems": table}, THRESHOLDS)


@pytest.mark.parametrize(("bound", "verdict"), [(20, "holds"), (4576, "inconclusive"), (10_000, "fails")])
def test_verdicts_follow_the_table(bound, verdict):
    """An attack is two evaluations a step, and one more: 48,001."""
    (found,) = judge(fake(bound))
    assert (found.id, found.number, found.n) == ("efficiency-bound-mnist-lenet-uniform", 29, 20)
    assert found.verdict == verdict
    assert found.value == pytest.approx(bound * 1.1**0.5 / 48_001)


def test_each_network_is_judged_by_itself():
    both = pd.concat([fake(20), fake(10_000, "cifar10 resnet18 default"), fake(20, "entailment bert-base")])
    assert [(c.verdict, c.unit, bool(c.note)) for c in judge(both)] == [
        ("holds", "image", False),
        ("fails", "image", True),
        ("holds", "text", False),
    ]


def test_a_bound_that_did_not_converge_has_no_cost():
    table = fake(20)
    table.loc[table.image < 3, ["converged", "evaluations"]] = [False, np.nan]
    (found,) = judge(table)
    assert (found.verdict, found.n) == ("inconclusive", 17)


def test_the_figure_draws_every_network():
    both = pd.concat([fake(20), fake(40, "entailment bert-base")], ignore_index=True)
    left, right = draw.overview(both, 24_000, 0.1).axes
    assert [t.get_text() for t in left.get_yticklabels()] == ["mnist lenet uniform", "entailment bert-base"]
    drawn = [point for c in left.collections for point in c.get_offsets() if point[0] > 0]
    assert np.array(drawn) * (48_001, 1) == pytest.approx(np.array([(21, 0), (42, 1)]))
    assert [bar.get_width() for bar in right.patches] == pytest.approx([21, 1.05 * 785, 2100, 48_001])
