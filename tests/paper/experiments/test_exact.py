"""The law behind kinks on a small network by dense twins, and claims on made-up tables."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import i2f
from i2f.attacks.recursive.graph import Graph
from i2f.core import perturb
from i2f.paper.experiments import exact
from i2f.paper.figures import exact as draw
from i2f.paper.results import Results

CONFIG = {"networks": {"cifar10 resnet18": 3, "mnist cnn16x16": 2}, "first_digit": 200, "weight_seeds": 2}
CONFIG |= {"law": "cifar10 resnet18", "images": 2, "below": 0.3333, "above": 3.0}
CONFIG |= {"exact": 1e-12, "share": 0.6, "close": 0.02, "predicted": 0.6}


def network() -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 1, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 36, 5)).double().eval()


def test_problems_name_image_network_and_noise():
    tasks = exact.problems(CONFIG)
    names = ("model", "split", "image", "weight_seed", "level", "stages")
    assert sorted(tuple(t[name] for name in names) for t in tasks if t["image"] in (0, 2, 201)) == [
        ("cnn16x16", "train", 201, 2, 0.0, False),
        ("resnet18", "test", 0, 1, 0.0, True),
        ("resnet18", "test", 0, 1, 0.3333, False),
        ("resnet18", "test", 0, 1, 3.0, False),
        ("resnet18", "test", 2, 1, 0.0, False),
    ]
    assert len({(t["network"], t["image"], t["level"]) for t in tasks}) == len(tasks) == 3 + 2 * 2 + 2


@pytest.fixture(scope="module")
def solved():
    """One image under a small network, at all levels; its first kink is where a bisection finds it."""
    model, x = network(), torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    J = i2f.GradientJacobian(model, x, torch.tensor([3]))
    tasks = [t for t in exact.problems(CONFIG) if t["image"] == 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact.shared, "jacobian", lambda problem: J)
        rows = exact.solve(tasks)
    return J, pd.DataFrame(rows).assign(level=[t["level"] for t in tasks], stages=[t["stages"] for t in tasks])


def test_the_displacement_and_the_first_kink_have_dense_twins(solved):
    J, table = solved
    xi = perturb.gaussian(J.gradient, 1.0, 1000)
    d = torch.from_numpy(np.linalg.lstsq(J.dense().numpy().T, xi.numpy(), rcond=None)[0]).reshape(J.x.shape)
    predicted = table[table.level > 0]
    assert predicted.predicted_rmse.to_numpy() == pytest.approx(
        predicted.variance.to_numpy() ** 0.5 * float(d.square().mean().sqrt()), rel=1e-4
    )
    graph, first = Graph(J.map.model, tuple(J.x.shape)), table.first_kink.iloc[0]
    assert table.variance.to_numpy() == pytest.approx((table.level * first).to_numpy() ** 2)
    low, high = 0.0, 1.0
    for _ in range(60):  # of the network itself
        middle = (low + high) / 2
        low, high = (low, middle) if exact.crossed(graph, J.x[0], (J.x + middle * d)[0]) else (middle, high)
    assert first == pytest.approx(high, rel=1e-3)


def test_the_attack_ends_where_the_law_says(solved):
    _, table = solved
    assert table.converged.all()
    none, below, above = (table[table.level == level].iloc[0] for level in (0.0, 0.3333, 3.0))
    assert none.mse < 1e-20
    assert below.difference < 1e-3
    assert below.crossed == 0
    assert above.crossed > 0
    assert len(none.stage_images) == 1
    assert below.stage_images.shape == (0, 1, 12, 12)
    assert json.loads(none.layers)[0][1:] == [1, 1, False]


def fake(off: float = 1e-4, crossed: int = 4, converged: bool = True, images: int = 10) -> pd.DataFrame:
    levels = (("cifar10 resnet18", 0.0), ("cifar10 resnet18", 0.3333), ("cifar10 resnet18", 3.0))
    return pd.DataFrame(
        {
            "network": name,
            "image": image,
            "level": level,
            "weight_seed": image % 5,
            "mse": 1e-28,
            "predicted_rmse": 0.01 * level,
            "rmse": 0.01 * level * (1 + off * (1 + 0.01 * image)),
            "difference": off,
            "crossed": crossed if level > 1 else 0,
            "converged": converged,
            "failed": False,
            "label_found": True,
            "layers": '[["_6", 1, 1, false], ["_2", 124, 196, false]]',
            "stages": not level and not image,
            "dataset": "cifar10",
            "split": "test",
        }
        for name, level in levels
        for image in range(images)
    )


def verdicts(table: pd.DataFrame) -> dict[str, str]:
    return {claim.id: claim.verdict for claim in exact.judge({"problems": table}, CONFIG)}


def test_verdicts():
    assert set(verdicts(fake()).values()) == {"holds"}
    assert verdicts(fake(off=0.1))["exact-law"] == "fails"
    assert verdicts(fake(crossed=0))["exact-kink"] == "fails"
    lost = fake()
    lost.loc[(lost.level == 0) & (lost.image < 9), "mse"] = 0.1
    assert verdicts(lost)["exact-recovered-cifar10-resnet18"] == "fails"
    assert verdicts(lost)["exact-law"] == "holds"


def test_attacks_that_did_not_finish_decide_nothing():
    table = fake()
    table.loc[(table.level > 0) & (table.image < 5), "converged"] = False
    found = verdicts(table)
    assert {found[name] for name in ("exact-law", "exact-beyond", "exact-kink")} == {"inconclusive"}
    assert exact.law(table).converged.tolist() == [5, 5]
    assert exact.summary(table, 1e-12).recovered.tolist() == [10]


def test_figures_draw_every_attack():
    table = fake()
    pictures = np.array([np.zeros((2, 3, 32, 32), np.uint8)] * len(table) + [None], dtype=object)[:-1]
    recovered = np.array([np.zeros((3, 32, 32), np.uint8)] * len(table) + [None], dtype=object)[:-1]
    found = Results({"problems": table}, {"stage_images": pictures, "recovered": recovered})
    figures = draw.published(found, CONFIG)
    assert sum(len(ax.images) for ax in figures["coming_back.png"].axes) == 2 + 2
    left, right = figures["overview.svg"].axes
    for ax, column in ((left, "rmse"), (right, "crossed")):
        drawn = np.concatenate([np.asarray(c.get_offsets()[:, 1], dtype=float) for c in ax.collections])
        assert np.sort(drawn) == pytest.approx(np.sort(table[table.level > 0][column]))
    assert [bar.get_height() for bar in figures["layers.svg"].axes[0].patches] == pytest.approx([1, 124 / 196])
