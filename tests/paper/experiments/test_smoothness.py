"""The experiment on depth, width and smoothness: its numbers by hand, its claims on made-up tables."""

import numpy as np
import pandas as pd
import pytest
import torch

import i2f
from i2f.paper import rows
from i2f.paper.experiments import smoothness
from i2f.paper.figures import smoothness as draw
from i2f.paper.results import Results
from i2f.paper.sweep import Settings

CONFIG = {
    "dataset": "mnist",
    "depths": [2, 4, 8],
    "width": 16,
    "activations": ["softplus", "gelu", "relu"],
    "attacked": [2, 8],
    "images": 20,
    "first_digit": 200,
    "init": "kaiming",
    "weight_seeds": 5,
    "relative": 1e-2,
    "gauss_newton_steps": 30,
}
THRESHOLDS = CONFIG | {"exact": 1e-8, "share": 0.8, "slope": 1.0}


SMALL = {"depths": [2, 4], "width": 8, "activations": ["softplus", "relu"], "images": 1, "attacked": [2]}


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    return tmp_path_factory.mktemp("chunks")


@pytest.fixture(scope="module")
def table(chunks):
    kept = Settings(jobs=1, progress="off", store=rows.Store(chunks=chunks))
    return smoothness.run(smoothness.problems(CONFIG | SMALL), kept).tables["problems"]


def test_problems_are_the_whole_family_the_deepest_first():
    tasks = smoothness.problems(CONFIG)
    assert len(tasks) == len({tuple(t.items()) for t in tasks}) == 3 * 3 * 20
    assert [t["depth"] for t in tasks] == [8] * 60 + [4] * 60 + [2] * 60
    assert all(t["model"] == f"cnn{t['depth']}x16" for t in tasks)
    assert all(t["weight_seed"] == 1 + t["image"] % 5 for t in tasks)
    assert {t["image"] for t in tasks} == set(range(200, 220))
    assert {t["depth"] for t in tasks if t["attacked"]} == {2, 8}


def test_a_row_is_what_j_says_and_what_the_attack_finds(table):
    row = table[(table.activation == "softplus") & (table.depth == 2)].iloc[0]
    x, y = i2f.data.load("mnist", n=1, offset=200, split="train")
    model = i2f.models.build("cnn2x8", "mnist", "kaiming", 1, activation="softplus").double()
    J = i2f.GradientJacobian(model, x, y)
    values = torch.linalg.svdvals(J.dense()) ** 2
    assert row["rank"] == len(values) == 784
    assert row.condition == pytest.approx(float(values[0] / values[-1]), rel=1e-5)
    variance = (1e-2 * float(J.gradient.norm())) ** 2 / J.shape[1]
    expected = np.sqrt(variance * float((1 / values).sum()) / 784)
    assert row.expected_rmse == pytest.approx(expected, rel=1e-5)
    assert row.converged
    assert row.mse <= 1e-10


def test_a_kink_stops_the_search(table):
    row = table[(table.activation == "relu") & (table.depth == 2)].iloc[0]
    assert not row.converged
    assert row.relative_residual > 1e-2
    assert row.mse > 1e-2


def test_what_is_not_attacked_has_a_spectrum_alone(table):
    seen = table[table.depth == 4]
    assert (np.isinf(seen.expected_rmse) == (seen["rank"] < 784)).all()
    assert (seen["rank"] > 0).all()
    assert seen.mse.isna().all()
    assert not seen.failed.any()
    assert not seen.converged.any()


def test_rows_are_read_as_they_were_solved(table, chunks):
    known = Settings(jobs=1, progress="off", store=rows.Store(chunks=chunks, solve=False))
    read = smoothness.run(smoothness.problems(CONFIG | SMALL), known).tables["problems"]
    pd.testing.assert_frame_equal(read, table)


def made_up(growth=3.0):
    found = pd.DataFrame(smoothness.problems(CONFIG))
    kinked, seen = found.activation == "relu", found.attacked
    expected = growth ** (np.log2(found.depth) * (1 + 0.02 * np.sin(found.image)))
    return found.assign(
        mse=np.where(kinked, 0.1, 1e-20),
        rmse=1e-10,
        relative_residual=1e-12,
        steps=5,
        condition=1e4,
        rank=784,
        converged=seen & ~kinked,
        failed=False,
        reason=np.where(kinked & seen, "stalled: no step of any length decreases the objective; without", ""),
        expected_rmse=expected,
    )


def verdicts(table):
    found = smoothness.judge({"problems": table}, THRESHOLDS)
    return {c.id.removeprefix("smoothness-"): c for c in found}


def test_claims_hold_and_fail_as_the_table_says():
    found = verdicts(made_up())
    assert {name: (c.verdict, c.number, c.n) for name, c in found.items()} == {
        "smooth-softplus": ("holds", 39, 20),
        "smooth-gelu": ("holds", 39, 20),
        "kinks": ("fails", 40, 20),
        "depth": ("holds", 41, 20),
    }
    assert {c.ledger for c in found.values()} == {"beyond"}
    assert "0 of 40 attacks converged, 40 stalled" in found["kinks"].note
    table = made_up(growth=1.5)
    table["mse"] = np.where(table.activation == "softplus", 1e-3, 1e-20)
    again = {name: c.verdict for name, c in verdicts(table).items()}
    assert again == {"smooth-softplus": "fails", "smooth-gelu": "holds", "kinks": "holds", "depth": "fails"}


def test_an_image_must_be_recovered_at_every_depth():
    table = made_up()
    soft = table.activation == "softplus"
    table.loc[soft & (table.depth == 8) & (table.image < 210), "mse"] = 0.1
    table.loc[soft & (table.depth == 2) & (table.image >= 210), "mse"] = 0.1
    table.loc[(table.depth == 4), "mse"] = np.nan  # not attacked
    found = verdicts(table)
    assert (found["smooth-softplus"].verdict, found["smooth-softplus"].value) == ("fails", 0)
    assert found["smooth-gelu"].value == 1


def test_attacks_that_ran_out_of_steps_decide_nothing():
    table = made_up()
    short = (table.depth == 8) & (table.image < 210)
    table.loc[short, ["converged", "reason", "mse"]] = [False, "used its 30 steps", 0.1]
    found = verdicts(table)
    assert {found[name].verdict for name in ("smooth-softplus", "smooth-gelu", "kinks")} == {"inconclusive"}
    assert "only 75% of the attacks finished" in found["kinks"].note
    stalled = made_up().assign(converged=False, reason="stalled: no step", mse=0.1)
    found = verdicts(stalled)
    assert (found["smooth-gelu"].verdict, found["kinks"].verdict) == ("inconclusive", "fails")


def test_a_failed_attack_recovered_nothing():
    table = made_up()
    gelu = (table.activation == "gelu") & (table.image < 204)
    table.loc[gelu, ["failed", "mse", "rmse"]] = [True, 0.0, 0.0]
    table["converged"] = table.converged.astype(object).mask(gelu)  # NaN: of a problem that raised
    found = verdicts(table)["smooth-gelu"]
    assert (found.value, found.verdict) == (0.8, "inconclusive")
    assert "only 80% of the attacks finished" in found.note


def test_the_slope_is_of_networks_whose_j_has_full_rank():
    table = made_up()
    assert smoothness.slopes(table).mean().to_numpy() == pytest.approx(np.log2(3), rel=0.01)
    table.loc[(table.activation == "relu") & (table.image == 202) & (table.depth == 4), "expected_rmse"] = np.inf
    table.loc[table.activation == "gelu", "expected_rmse"] = np.nan
    assert list(smoothness.slopes(table)) == ["softplus"]
    assert verdicts(table)["depth"].note.startswith("softplus: ")
    assert "depth" not in verdicts(table.assign(expected_rmse=np.inf))
    assert "depth" not in verdicts(table[table.depth == 2])


def test_the_summary_has_one_row_per_network():
    table = made_up()
    table.loc[(table.activation == "relu") & (table.image == 202), "expected_rmse"] = np.inf
    table.loc[~table.attacked, ["mse", "rmse"]] = np.nan
    shown = smoothness.summary(table, 1e-8)
    assert list(shown.index) == [(depth, name) for depth in (2, 4, 8) for name in ("softplus", "gelu", "relu")]
    for column in ("recovered", "RMSE, attack"):
        assert shown[column].isna().tolist() == [False] * 3 + [True] * 3 + [False] * 3
    assert shown.loc[(8, "relu"), ["recovered", "full rank"]].tolist() == [0.0, 0.95]


def test_the_figure_draws_every_attack_and_every_network():
    table = made_up()
    table.loc[table.activation == "gelu", "expected_rmse"] = np.inf  # has no place on the axis
    left, middle, right = draw.published(Results({"problems": table}), {})["overview.svg"].axes
    assert sum(len(c.get_offsets()) for c in left.collections) == table.attacked.sum()
    drawn = np.concatenate([np.asarray(c.get_offsets())[:, 1] for c in left.collections])
    assert np.sort(drawn) == pytest.approx(np.sort(table[table.attacked].rmse.to_numpy()))
    assert [line.get_label() for line in middle.lines] == ["softplus", "GELU", "ReLU"]
    assert right.lines[0].get_ydata() == pytest.approx([3, 9, 27], rel=0.1)
