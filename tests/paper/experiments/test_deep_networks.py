"""The experiment on deep networks: each estimate against its dense twin, its claims on made-up tables."""

import numpy as np
import pandas as pd
import pytest
import torch

import i2f
from i2f import models
from i2f.paper.experiments import deep_networks as deep
from i2f.paper.experiments import problems as shared
from i2f.paper.figures import deep_networks as draw

pytestmark = pytest.mark.usefixtures("few_draws")
CONFIG = {"weight_seed": 1, "relative": 10.0, "tolerance": 1e-4, "head": 8, "solved": 1, "traced": 1, "probes": 40}
THRESHOLDS = {"products": 52, "order": 0.5, "tight": 10.0}
SMALL = models.Spec((3, 4, 4), 10, (0.5,) * 3, (0.25,) * 3)


@pytest.fixture(scope="module")
def small():
    """A ResNet20 of one 4×4 image, whose J can be formed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.SPECS, "cifar10", SMALL)
        patch.setattr(i2f.data, "load", lambda name, n, offset: (torch.full((1, 3, 4, 4), 0.3) + IMAGE, LABEL))
        tasks = deep.problems(CONFIG | {"networks": {"cifar10 resnet20 gelu": 1}})
        shared._network.cache_clear()
        (row,) = deep.solve(tasks)
        shared._network.cache_clear()  # its moments are the patched ones
        x, y = i2f.data.load("cifar10", 1, 0)
        J = i2f.GradientJacobian(models.build("resnet20", "cifar10", seed=1, activation="gelu").double(), x, y)
        return row, J


IMAGE = 0.4 * torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(3))
LABEL = torch.tensor([4])


def test_every_estimate_has_its_dense_twin(small):
    row, J = small
    values = torch.linalg.svdvals(J.dense()) ** 2
    norm = float(J.gradient.norm())
    assert row["variance"] == pytest.approx((10 * norm) ** 2 / J.shape[1], rel=1e-4)
    assert row["damping"] == pytest.approx(row["variance"] / deep.VARIANCE)
    assert row["lambda_max"] == pytest.approx(float(values[0]), rel=1e-3)
    assert row["second"] == pytest.approx(float(values[1] / values[0]), rel=1e-2)
    delta = i2f.perturb.gaussian(J.gradient, row["variance"], seed=0)
    exact = i2f.influence(J, delta, row["damping"])
    assert row["damped_rmse"] == pytest.approx(exact.rmse, rel=2e-2)
    bound = i2f.lower_bound(J, delta, row["damping"])
    assert row["bound_rmse"] == pytest.approx(bound.rmse, rel=2e-3)
    bayes = np.sqrt(row["variance"] * float((1 / (values + row["damping"])).sum()) / J.shape[0])
    assert row["bayes_low"] <= bayes <= row["bayes_high"]
    assert row["bayes_settled"]
    assert row["last"] == pytest.approx(float(values[7] / values[0]), rel=0.1)  # after 16 Lanczos steps
    assert row["bayes_value"] == pytest.approx(bayes, rel=2e-2)
    assert row["bound_rmse"] <= row["damped_rmse"]
    assert row["bayes_value"] <= row["prior_rmse"]


def test_the_first_images_are_solved_and_traced():
    found = deep.problems(CONFIG | {"networks": {"cifar10 vit": 3, "mnist lenet": 1}, "solved": 2})
    assert [p["solved"] for p in found] == [True, True, False, True]
    assert [p["traced"] for p in found] == [True, False, False, True]


def test_problems_name_activations_and_weights():
    networks = {"cifar10 vit": 1, "cifar10 resnet20 gelu": 1, "imagenet efficientnet_lite0 imagenet": 1}
    plain, soft, trained = deep.problems(CONFIG | {"networks": networks})
    assert (plain["model"], plain["activation"]) == ("vit", None)
    assert (soft["model"], soft["activation"], soft["network"]) == ("resnet20", "gelu", "resnet20 gelu")
    assert (trained["weights"], trained["dataset"]) == ("imagenet", "imagenet")
    with pytest.raises(ValueError, match="too many words"):
        deep.problems(CONFIG | {"networks": {"cifar10 vit gelu gelu": 1}})


def made_up():
    rng = np.random.default_rng(0)
    images = np.arange(10)
    return pd.DataFrame(
        {
            "dataset": "cifar10",
            "network": "vit",
            "image": images,
            "d_x": 3072,
            "d_theta": 10**6,
            "products": 13,
            "lambda_max": 2.0,
            "second": 0.5,
            "bound_rmse": 1e-3 * (1 + images),
            "prior_rmse": 0.245,
            "damped_rmse": 0.02 * (1 + images) * rng.uniform(0.99, 1.01, 10),
            "solve_products": 80,
            "bayes_value": 0.2,
            "trace_products": 200,
            "converged": True,
            "failed": False,
            "reason": "",
        }
    )


def test_claims():
    found = {c.id: c for c in deep.judge({"problems": made_up()}, THRESHOLDS)}
    assert {name: c.verdict for name, c in found.items()} == {
        "deep_networks-products": "holds",
        "deep_networks-images-cifar10-vit": "holds",
        "deep_networks-tight-cifar10-vit": "fails",
    }
    assert found["deep_networks-tight-cifar10-vit"].value == pytest.approx(20, rel=0.02)
    shuffled = made_up().assign(damped_rmse=[3, 1, 4, 1.5, 9, 2, 6, 5, 3.5, 0.8])
    assert {c.id: c.verdict for c in deep.judge({"problems": shuffled}, THRESHOLDS | {"products": 12})}[
        "deep_networks-products"
    ] == "fails"


def test_a_network_that_failed_leaves_its_cost_unknown():
    table = made_up()
    table.loc[0, ["products", "failed"]] = [np.nan, True]
    assert deep.judge({"problems": table}, THRESHOLDS)[0].verdict == "inconclusive"


def test_claims_without_solves():
    table = made_up().drop(columns=["damped_rmse", "solve_products", "bayes_value", "trace_products"])
    assert [c.id for c in deep.judge({"problems": table}, THRESHOLDS)] == ["deep_networks-products"]
    assert deep.summary(table)["damped I²F"].iloc[0] == "–"
    assert len(draw.overview(table).axes) == 3


def test_photos_are_judged_by_their_order():
    table = pd.DataFrame(
        {
            "image": range(20),
            "bound_rmse": np.arange(1, 21.0),
            "rmse": np.arange(21.0, 1, -1),
            "steps allowed": 60,
            "relative_residual": 0.3,
        }
    )
    (claim,) = deep.judge_photos(table, THRESHOLDS)
    assert claim.verdict == "fails"
    assert claim.value == pytest.approx(-1)
    assert "0.3" in claim.note


def test_the_figure_shows_every_question():
    left, middle, right = draw.overview(made_up()).axes
    assert len(left.get_legend().get_texts()) == 4
    assert len(middle.get_legend().get_texts()) == 3
    assert right.get_legend().get_texts()[0].get_text() == "vit"
