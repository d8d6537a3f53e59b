"""Rival measures by hand, and claims on made-up tables."""

import numpy as np
import pandas as pd
import pytest
import torch

from i2f import perturb, streams
from i2f.attacks.prior import TAU
from i2f.paper import rows
from i2f.paper.experiments import problems as shared
from i2f.paper.experiments import rivals
from i2f.paper.figures import rivals as draw
from i2f.paper.sweep import Settings

LENET = "mnist lenet uniform"
SMALL = {"networks": {LENET: 1e-7}, "digits": 2, "first_digit": 200, "garments": 1, "weight_seeds": 5}
SMALL |= {"gauss_newton_steps": 8, "order": 0.7}
THRESHOLDS = {"order": 0.7, "same_low": 0.8, "same_high": 1.25}


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(rivals.resampled, "__defaults__", (100,))


def verdicts(table):
    return {c.id.removeprefix("rivals-"): c for c in rivals.judge({"problems": table}, THRESHOLDS)}


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    return tmp_path_factory.mktemp("chunks")


@pytest.fixture(scope="module")
def table(chunks):
    return rivals.run(rivals.problems(SMALL), stored(chunks)).tables["problems"]


def stored(chunks, solve=True):
    return Settings(jobs=1, progress="off", store=rows.Store(chunks=chunks, solve=solve))


def test_problems_have_a_network_in_words():
    networks = {LENET: 1e-7, "fashion-mnist lenet uniform": 2e-7, "mnist cnn2x16 kaiming softplus": 3e-7}
    tasks = rivals.problems(SMALL | {"networks": networks, "weight_seeds": 2})
    names = ("dataset", "split", "model", "activation", "image", "weight_seed", "size", "noise_seed", "start_seed")
    assert [tuple(t[name] for name in names) for t in tasks] == [
        ("mnist", "train", "lenet", None, 200, 1, 1e-7, 1200, 200),
        ("mnist", "train", "lenet", None, 201, 2, 1e-7, 2201, 201),
        ("fashion-mnist", "test", "lenet", None, 0, 1, 2e-7, 1000, 0),
        ("fashion-mnist", "test", "lenet", None, 0, 2, 2e-7, 2000, 0),
        ("mnist", "train", "cnn2x16", "softplus", 200, 1, 3e-7, 1200, 200),
        ("mnist", "train", "cnn2x16", "softplus", 201, 2, 3e-7, 2201, 201),
    ]


def test_every_measure_by_its_formula(table):
    row = table.iloc[1]
    assert (row.image, row.weight_seed, row.variance) == (201, 2, 1e-7)
    J = shared.jacobian({"split": "train", "weight_seed": 2, "image": 201})
    D = J.dense()
    sigma = row.variance**0.5
    gram = D @ D.T
    values = torch.linalg.eigvalsh(gram).flip(0)
    delta = perturb.gaussian(J.gradient, 1e-7, 2201)
    expected = {
        "gradient_norm": sigma * 17_038**0.5 / float(J.gradient.norm()),
        "fisher": sigma / float(values[0]) ** 0.5,
        "trace": sigma * 28 / float(D.norm()),
        "bound": float((D @ delta).norm() / values[0]) / 28,
        "bayes": sigma * float((1 / (values + row.variance / TAU**2)).sum()) ** 0.5 / 28,
        "expected": sigma * float((1 / values).sum()) ** 0.5 / 28,
        "influence": float(torch.linalg.solve(gram, D @ delta).norm()) / 28,
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-5), name
    probe = streams.generator("sensitivity", 2201)
    direction = torch.randn(J.x.shape, generator=probe, dtype=torch.float64).reshape(-1)
    along = float((direction @ D).norm() / direction.norm())
    assert row.sensitivity == pytest.approx(sigma / along, rel=1e-2)
    assert row.rmse == pytest.approx(row.influence, rel=0.02)
    assert row["influence cost"] > row["bound cost"] > row["sensitivity cost"] > row["gradient_norm cost"]


def test_rows_survive_the_store(table, chunks):
    found = rivals.run(rivals.problems(SMALL), stored(chunks, solve=False))
    pd.testing.assert_frame_equal(table, found.tables["problems"])
    (figure,) = draw.published(found, SMALL).values()
    assert len(figure.axes) == 2


def made_up(network=LENET, digits=40):
    """The expected error is the measured one; the norm orders images backwards."""
    found = []
    for task in rivals.problems(SMALL | {"networks": {network: 1e-7}, "digits": digits, "garments": 20}):
        truth = 1 + task["image"] % 40
        row = dict.fromkeys(rivals.MEASURES, truth) | {"gradient_norm": 1 / truth}
        row |= {"rmse": truth * (1 + np.sin(truth) / 100), "failed": False, "converged": True, "reason": ""}
        found.append(task | row | {f"{name} cost": 1 for name in rivals.MEASURES})
    return pd.DataFrame(found)


def test_claims():
    found = verdicts(made_up())
    assert {name: (c.number, c.verdict) for name, c in found.items()} == {
        "expected": (51, "holds"),
        "fisher": (52, "holds"),
        "calibration": (53, "holds"),
    }
    assert found["expected"].value == pytest.approx(1, abs=0.01)
    assert {(c.n, c.ledger) for c in found.values()} == {(40, "beyond")}
    assert "bootstrap (BCa) [" in found["expected"].note


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.2, "holds"), (1.4, "fails"), (0.7, "fails"), (1.25, "inconclusive")]
)
def test_calibrated_means_that_the_whole_interval_is_within_the_margin(factor, verdict):
    table = made_up()
    assert verdicts(table.assign(rmse=factor * table.rmse))["calibration"].verdict == verdict


def test_ranks_are_those_within_a_weight_seed():
    table = made_up()
    shifted = table.assign(rmse=table.rmse * 1000.0**table.weight_seed)
    assert verdicts(shifted)["expected"].value == pytest.approx(1, abs=0.01)


def test_an_attack_that_did_not_converge_decides_nothing():
    table = made_up()
    few = table.assign(converged=table.image != 200)
    assert {c.verdict for c in verdicts(few).values()} == {"holds"}
    table = table.assign(converged=table.image > 209, failed=table.image < 205)
    table.loc[table.failed, [*rivals.MEASURES, "rmse"]] = np.nan  # it raised
    found = verdicts(table)
    assert {c.verdict for c in found.values()} == {"inconclusive"}
    assert (found["expected"].n, found["calibration"].n) == (35, 30)


def test_an_image_under_several_weights_counts_once():
    table = made_up("fashion-mnist lenet uniform")
    assert len(table) == 100
    assert rivals.order(table, "expected").n == rivals.resampled(table, "expected").n == 20
    worse = table.assign(
        rmse=table.rmse.where(table.weight_seed < 3, 100 - table.rmse)
    )  # backwards under three of five
    for estimate in (rivals.order(worse, "expected"), rivals.resampled(worse, "expected")):
        assert estimate.value == pytest.approx(-0.2, abs=0.01)


def test_comparison_and_figure():
    table = pd.concat([made_up(), made_up("fashion-mnist lenet uniform")])
    shown = rivals.comparison(table).set_index(["network", "measure"])
    assert len(shown) == 2 * len(rivals.MEASURES)
    assert shown["measured / predicted"][LENET, "I²F"] == pytest.approx(1, abs=0.01)
    assert shown["90% within"][LENET, "I²F"] == pytest.approx(1.01, abs=2e-3)
    assert shown["pooled"][LENET, "I²F"] == pytest.approx(
        rivals.resampled(table[table.network == LENET], "influence").value
    )
    left, right = draw.overview(table, 0.7).axes
    assert len(left.get_yticklabels()) == len(rivals.MEASURES)
    assert len(right.lines) == 2 * 2 * len(rivals.MEASURES) + 1
