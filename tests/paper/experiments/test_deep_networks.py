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

CONFIG = {"weight_seed": 1, "relative": 10.0, "tolerance": 1e-4, "head": 8, "traced": 1, "probes": 40}
ONE = {"cifar10 resnet20 gelu": 1}
THRESHOLDS = {"products": 52, "share": 0.8, "order": 0.5, "tight": 10.0, "relative": 10.0}
SMALL = models.Spec((3, 4, 4), 10, (0.5,) * 3, (0.25,) * 3)


@pytest.fixture(scope="module")
def small():
    """A ResNet20 of one 4×4 image, whose J can be formed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.SPECS, "cifar10", SMALL)
        patch.setattr(i2f.data, "load", lambda name, n, offset: (torch.full((1, 3, 4, 4), 0.3) + IMAGE, LABEL))
        tasks = deep.problems(CONFIG | {"networks": ONE, "solved": ONE})
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
    networks = {"networks": {"cifar10 vit": 3, "mnist lenet": 1}, "solved": {"cifar10 vit": 2}}
    found = deep.problems(CONFIG | networks)
    assert [p["solved"] for p in found] == [True, True, False, False]
    assert [p["traced"] for p in found] == [True, False, False, False]
    assert [p["head"] for p in found] == [8, 8, 8, None]


def test_a_row_may_have_the_bound_alone():
    (task,) = deep.problems(CONFIG | {"networks": {"mnist lenet": 1}, "solved": {}})
    (row,) = deep.solve([task])
    assert row["converged"]
    assert row["products"] == row["evaluations"]
    assert not {"second", "damped_rmse", "bayes_value"} & row.keys()


def test_problems_name_activations_and_weights():
    networks = {"cifar10 vit": 1, "cifar10 resnet20 gelu": 1, "imagenet efficientnet_lite0 imagenet": 1}
    plain, soft, trained = deep.problems(CONFIG | {"networks": networks, "solved": {}})
    assert (plain["model"], plain["activation"]) == ("vit", None)
    assert (soft["model"], soft["activation"], soft["network"]) == ("resnet20", "gelu", "resnet20 gelu")
    assert (trained["weights"], trained["dataset"]) == ("imagenet", "imagenet")
    with pytest.raises(ValueError, match="too many words"):
        deep.problems(CONFIG | {"networks": {"cifar10 vit gelu gelu": 1}, "solved": {}})


def made_up(images=20):
    """Two networks on the same images; damped I²F is 20 times the bound of the first, 5 times that of the second, and
    is known of every image, and of six."""
    rng = np.random.default_rng(0)
    parts = []
    for network, factor, solved in (("resnet18 gelu", 20, images), ("resnet20 gelu", 5, images), ("vit", 100, 6)):
        at = np.arange(images)
        part = pd.DataFrame(
            {
                "dataset": "cifar10",
                "network": network,
                "image": at,
                "solved": at < solved,
                "d_x": 3072,
                "d_theta": 10**6,
                "products": 13,
                "lambda_max": 2.0,
                "second": 0.5,
                "bound_rmse": 1e-3 * (1 + at),
                "prior_rmse": 0.245,
                "damped_rmse": factor * 1e-3 * (1 + at) * rng.uniform(0.99, 1.01, images),
                "solve_products": 80,
                "bayes_value": 0.2,
                "trace_products": 200,
                "converged": True,
                "failed": False,
                "reason": "",
            }
        )
        part.loc[at >= solved, ["damped_rmse", "solve_products"]] = np.nan
        parts.append(part)
    photographs = {"dataset": "imagenet", "network": "resnet152", "bound_rmse": 10.0 ** -np.arange(images)}
    alone = ["damped_rmse", "solve_products", "bayes_value", "trace_products", "second"]
    photographs = parts[0].assign(**photographs, solved=False, **dict.fromkeys(alone, np.nan))
    return pd.concat([photographs, *parts], ignore_index=True)


def judged(table, **replaced):
    return {c.id.removeprefix("deep_networks-"): c for c in deep.judge({"problems": table}, THRESHOLDS | replaced)}


def test_claims():
    found = judged(made_up())
    assert {name: c.verdict for name, c in found.items()} == {
        "photographs": "not run",
        "products": "holds",
        "tight-resnet18-gelu": "fails",
        "tight-resnet20-gelu": "holds",
    }  # six solves of the ViT are too few for a verdict
    assert found["tight-resnet18-gelu"].value == pytest.approx(20, rel=0.02)
    assert [c.number for c in found.values()] == [32, 34, 35, 35]
    assert [c.ledger for c in found.values()] == ["paper", *["beyond"] * 3]
    assert judged(made_up(), products=12)["products"].verdict == "fails"


def test_an_image_counts_by_its_costliest_network():
    table = made_up()
    assert judged(table)["products"].n == 40
    table.loc[[20, 41, 62], "products"] = 53  # images 0, 1 and 2 of the small ones, a network each
    assert judged(table)["products"].value == pytest.approx(37 / 40)
    table.loc[20, ["products", "failed"]] = [np.nan, True]  # its cost is unknown
    assert judged(table)["products"].value == pytest.approx(37 / 40)


def test_a_solve_that_was_cut_off_decides_nothing():
    table = made_up()
    table.loc[table.network == "resnet20 gelu", "converged"] = table.image > 0
    found = judged(table)["tight-resnet20-gelu"]
    assert (found.verdict, found.n) == ("holds", 19)
    table.loc[table.network == "resnet20 gelu", "converged"] = table.image > 2
    assert judged(table)["tight-resnet20-gelu"].verdict == "inconclusive"


def test_the_photographs_bound_is_told_by_its_spread():
    note = judged(made_up())["photographs"].note
    bounds = 10.0 ** -np.arange(20)
    low, high = np.quantile(bounds, [0.1, 0.9])
    assert f"geometric mean {10**-9.5:.2g}" in note
    assert f"percentile {high / low:.2g}, 20 photographs" in note


def test_claims_without_photographs_and_solves():
    table = made_up().query("network == 'vit'").drop(columns=["damped_rmse", "solve_products", "bayes_value"])
    table = table.assign(solved=False)
    assert list(judged(table)) == ["photographs", "products"]
    assert deep.summary(table)["damped I²F"].iloc[0] == "–"
    assert len(draw.overview(table, 10.0).axes) == 3


def test_the_figure_shows_every_question():
    left, middle, right = draw.overview(made_up(), 10.0).axes
    assert len(left.get_legend().get_texts()) == 4
    assert len(middle.get_legend().get_texts()) == 3
    assert [t.get_text() for t in right.get_legend().get_texts()][:2] == ["resnet18 gelu", "resnet20 gelu"]
    clouds = [c for c in right.collections if len(c.get_offsets())]
    assert sum(len(c.get_offsets()) for c in clouds) == 20 + 20 + 6
