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

pytestmark = pytest.mark.usefixtures("few_draws")
THRESHOLDS = {"order": 0.7, "calibration": 1.5}
ATTACK = {"gauss_newton_steps": 8, "start_seed": 0}


def config(networks, levels, weight_seed):
    return {"networks": networks, "levels": levels, "weight_seed": weight_seed, **ATTACK}


SMALL = config({"mnist lenet uniform": 2}, [0.001], 1)


def verdicts(table):
    found = rivals.judge({"problems": table}, THRESHOLDS)
    return {c.id.removeprefix("rivals-mnist-lenet-uniform-"): c for c in found}


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    return tmp_path_factory.mktemp("chunks")


@pytest.fixture(scope="module")
def table(chunks):
    return rivals.run(rivals.problems(SMALL), stored(chunks)).tables["problems"]


def stored(chunks, solve=True):
    return Settings(jobs=1, progress="off", store=rows.Store(chunks=chunks, solve=solve))


def test_problems_have_a_network_in_words():
    tasks = rivals.problems(config({"mnist lenet uniform": 2, "mnist cnn2x16 kaiming softplus": 1}, [0.1, 0.2], 3))
    assert [(t["model"], t["activation"], t["image"], t["level"]) for t in tasks] == [
        ("lenet", None, 0, 0.1),
        ("lenet", None, 0, 0.2),
        ("lenet", None, 1, 0.1),
        ("lenet", None, 1, 0.2),
        ("cnn2x16", "softplus", 0, 0.1),
        ("cnn2x16", "softplus", 0, 0.2),
    ]


def test_every_measure_by_its_formula(table):
    row = table.iloc[1]
    J = shared.jacobian({"dataset": "mnist", "model": "lenet", "init": "uniform", "weight_seed": 1, "image": 1})
    D = J.dense()
    sigma = row.variance**0.5
    gram = D @ D.T
    values = torch.linalg.eigvalsh(gram).flip(0)
    delta = perturb.gaussian(J.gradient, row.variance, 1)
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
    probe = streams.generator("sensitivity", 1)
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


def test_all_images_of_a_network_meet_the_same_noise(table):
    assert table.variance.nunique() == 1


def made_up():
    found = []
    generator = np.random.default_rng(0)
    for task in rivals.problems(config({"mnist lenet uniform": 8}, [0.1, 0.2], 1)):
        truth = (1 + task["image"]) * task["level"]
        row = dict.fromkeys(rivals.MEASURES, truth)
        row |= {"gradient_norm": task["level"] * generator.uniform(), "bound": task["level"] / (1 + task["image"])}
        found.append(
            task
            | row
            | {"rmse": truth, "failed": False, "converged": True, "reason": ""}
            | {f"{name} cost": 1 for name in rivals.MEASURES}
        )
    return pd.DataFrame(found)


def test_claims():
    found = verdicts(made_up())
    assert found["influence"].verdict == found["fisher"].verdict == found["calibration"].verdict == "holds"
    assert found["bound"].verdict == "fails"
    assert found["bound"].value == pytest.approx(-1)
    assert found["influence"].n == 8
    assert "gradient-norm" in found


def test_an_attack_that_failed_is_the_largest_error():
    """Of the image that every measure calls the safest, the order stands; of the least safe one, it does not."""
    table = made_up()
    for image, order in ((7, 1.0), (0, 1 - 6 * (7**2 + 7 * 1**2) / (8 * 63))):  # it moves seven ranks, the others one
        spoiled = table.assign(failed=table.image == image, rmse=table.rmse.mask(table.image == image, 1e-9))
        found = verdicts(spoiled)
        assert found["influence"].value == pytest.approx(order)
        assert found["influence"].n == 8
        assert found["calibration"].value == np.inf  # two attacks of sixteen: more than one in ten
    raised = table.assign(failed=table.image == 0)
    raised.loc[raised.failed, [*rivals.MEASURES, "rmse"]] = np.nan  # it has no prediction
    assert {c.n for c in verdicts(raised).values()} == {7}


def test_comparison_and_figure():
    shown = rivals.comparison(made_up())
    assert len(shown) == len(rivals.MEASURES)
    assert shown.set_index("measure")["measured / predicted"]["I²F"] == pytest.approx(1)
    left, right = draw.overview(made_up()).axes
    assert len(left.get_yticklabels()) == len(rivals.MEASURES)
    assert len(right.lines) >= len(rivals.MEASURES)
