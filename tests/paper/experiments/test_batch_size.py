"""The batch experiment: its problems, its columns against independent algebra, and verdicts that can go either way."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch

import i2f
from i2f import claims
from i2f.paper import rows
from i2f.paper.experiments import batch_size
from i2f.paper.experiments import problems as shared
from i2f.paper.figures import batch_size as draw
from i2f.paper.results import Results
from i2f.paper.sweep import Settings

mpl.use("Agg")
VARIANCE = 1e-8
CONFIG = {"dataset": "mnist", "first_digit": 0, "weight_seeds": 5, "gauss_newton_steps": 50, "variance": VARIANCE}
PAIR = CONFIG | {"sizes": [1, 2], "looked": [2, 1], "attacked": [2, 1]}
THRESHOLDS = {
    **CONFIG,
    "exact": 1e-6,
    "share": 0.8,
    "compared": 4,
    "averaging": 0.5,
    "cut": 0.05,
    "same_low": 0.95,
    "same_high": 1.05,
}


def test_the_same_images_under_the_same_weights_make_batches_of_every_size():
    sizes = {"sizes": [1, 2, 4], "looked": [9, 3, 2], "attacked": [1, 2, 0]}
    tasks = batch_size.problems(CONFIG | sizes | {"first_digit": 200})
    fixed = [p for p in tasks if p["part"] == batch_size.FIXED]
    places = {(p["batch"], p["image"]): p["weight_seed"] for p in fixed}
    assert places == {
        **{(4, 200): 1, (4, 204): 2},
        **{(2, 200): 1, (2, 202): 1, (2, 204): 2},
        **{(1, 200 + i): 1 + i // 4 for i in range(9)},
    }
    assert len(fixed) == len(places)
    assert {(p["batch"], p["image"]) for p in tasks if p["attacked"]} == {(1, 200), (2, 200), (2, 202)}
    assert [(p["batch"], p["image"]) for p in tasks if p["part"] == batch_size.NONE] == [(2, 200), (2, 202), (1, 200)]
    assert {(p["noise"], p["size"]) for p in fixed} == {("gaussian", VARIANCE)}
    assert all(p["noise_seed"] == 1000 * p["weight_seed"] + p["image"] for p in tasks)
    assert tasks[0]["batch"] == 4  # the slowest first


@pytest.fixture
def small():
    """A network and two images small enough to see through: d_x = 2 · 36."""
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(1, 3, 3, padding=1), torch.nn.Sigmoid(), torch.nn.Flatten(), torch.nn.Linear(108, 4)
    model = torch.nn.Sequential(*layers).double().eval()
    for p in model.parameters():
        torch.nn.init.uniform_(p, -0.5, 0.5)
    return model, torch.rand(2, 1, 6, 6, dtype=torch.float64), torch.tensor([2, 1])


@pytest.fixture
def tables(small, monkeypatch, tmp_path):
    model, x, y = small

    def jacobian(problem):
        images = slice(problem["image"], problem["image"] + problem["batch"])
        return i2f.GradientJacobian(model, x[images], y[images])

    monkeypatch.setattr(shared, "jacobian", jacobian)
    tasks = batch_size.problems(PAIR)
    found = batch_size.run(tasks, Settings(jobs=1, progress="off", store=rows.Store(chunks=tmp_path)))
    return found.tables["problems"], found.tables["spectra"]


def test_columns_mean_what_they_say(small, tables, twin):
    """Against Jacobians by finite differences, and a Monte Carlo of the displacement."""
    model, x, y = small
    table, spectra = tables
    assert len(table) == 2 * 2 + 2 * 2
    assert (
        list(zip(table[table.batch == 2]["first"], table[table.batch == 2].image, strict=True)) == [(0, 0), (0, 1)] * 2
    )
    stacked = torch.cat([twin(model, x[i : i + 1], y[i : i + 1]) for i in range(2)]) / 2  # the mean of two gradients
    fixed = table[(table.part == batch_size.FIXED) & (table.batch == 2)].sort_values("image")
    noise = VARIANCE**0.5 * torch.randn(stacked.shape[1], 1000, dtype=torch.float64)
    moved = torch.linalg.pinv(stacked.T) @ noise
    measured = moved.view(2, 36, -1).square().mean((1, 2)).sqrt().numpy()
    assert fixed.expected_rmse.to_numpy() == pytest.approx(measured, rel=0.1)
    values = torch.linalg.svdvals(stacked) ** 2
    assert fixed.lambda_max.iloc[0] == pytest.approx(float(values[0]), rel=1e-6)
    assert (fixed["rank"] == 72).all()
    assert (fixed.d_x == 72).all()
    line = spectra[spectra.batch == 2]
    assert line.share.iloc[[0, -1]].tolist() == pytest.approx([1 / 72, 1])
    assert line.eigenvalue.iloc[0] == pytest.approx(float(values[0]), rel=1e-6)


def test_rows_survive_the_store(tables, tmp_path):
    tasks = batch_size.problems(PAIR)
    known = rows.Store(chunks=tmp_path, solve=False)
    again = batch_size.run(tasks, Settings(store=known)).tables
    rows.save(tmp_path / "published", known.asked)
    read = batch_size.run(tasks, Settings(store=rows.Store([tmp_path / "published"], solve=False))).tables
    for name, table in zip(("problems", "spectra"), tables, strict=True):
        pd.testing.assert_frame_equal(again[name], table)
        pd.testing.assert_frame_equal(read[name], table)


def test_attacks_land_where_predicted(tables):
    table, _ = tables
    none = table[table.part == batch_size.NONE]
    assert none.mse.max() <= 1e-12
    noisy = table[table.part == batch_size.FIXED]
    assert noisy.rmse.to_numpy() == pytest.approx(noisy.predicted_rmse.to_numpy(), rel=0.05)


def test_a_batch_hides_by_its_size_at_least(tables):
    """The theorem [G⁻¹]_ii ≥ (G_ii)⁻¹."""
    table, _ = tables
    expected = table[table.part == batch_size.FIXED].pivot(index="image", columns="batch", values="expected_rmse")
    assert (expected[2] >= 2 * expected[1]).all()


def test_a_singular_batch_has_no_expectation():
    class Singular:
        x = torch.zeros(2, 3)
        shape, dtype = (6, 50), torch.float64

        def gram(self):
            a = torch.arange(12, dtype=torch.float64).view(6, 2).sin()
            return a @ a.T

    seen = batch_size.look(Singular())
    assert seen.rank == 2
    assert np.isnan(seen.inverse).all()


def fake(mixing=1.5, mse=1e-20, error=1.0, rank=3136, batches=20) -> pd.DataFrame:
    """A table as it would look with this much mixing, this error without noise, and measured errors this many times the
    predicted ones; batches scatter by a little."""
    rows = []
    for batch in (1, 2, 4):
        for image in range(4 * batches):
            first = image - image % batch
            for part in batch_size.PARTS:
                expected = 0.001 * (1 if batch == 1 else batch * mixing ** (1 + 0.01 * np.sin(first)))
                rmse = mse**0.5 if part == batch_size.NONE else expected * error * (1 + 0.01 * np.sin(first))
                rows.append(
                    {
                        "part": part,
                        "batch": batch,
                        "image": image,
                        "first": first,
                        "weight_seed": 1 + image // 4 % 5,
                        "attacked": first < 20 * batch,
                        "d_x": 784 * batch,
                        "rank": rank if batch == 4 else 784 * batch,
                        "lambda_min": 0.1,
                        "expected_rmse": expected,
                        "predicted_rmse": expected,
                        "mse": rmse**2,
                        "rmse": rmse,
                        "converged": True,
                        "failed": False,
                    }
                )
    return pd.DataFrame(rows)


def judged(table: pd.DataFrame) -> dict[str, claims.Claim]:
    found = batch_size.judge({"problems": table}, THRESHOLDS)
    return {c.id.removeprefix("batch_size-"): c for c in found}


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({}, set()),
        ({"mse": 1e-3, "mixing": 5.0, "error": 1.2}, {"recovered", "averaging", "prediction"}),
        ({"error": 0.9}, {"prediction"}),
        ({"error": 1.05}, {"prediction"}),
    ],
)
def test_verdicts_follow_the_table(change, failing):
    found = judged(fake(**change))
    verdicts = {name: c.verdict for name, c in found.items()}
    if change == {"error": 1.05}:  # equal means that the whole interval is within the margin
        assert verdicts.pop("prediction") == "inconclusive"
        failing = set()
    assert verdicts == {name: "fails" if name in failing else "holds" for name in verdicts}
    assert {name: c.number for name, c in found.items()} == {
        "recovered": 36,
        "averaging": 37,
        "prediction": 38,
    }
    assert {(c.n, c.ledger) for c in found.values()} == {(20, "beyond")}


def test_a_batch_is_recovered_whole_or_not_at_all():
    table = fake()
    table.loc[(table.batch == 2) & (table.image == 7), "mse"] = 1e-3
    assert judged(table)["recovered"].value == 0.95
    table.loc[(table.batch == 2) & (table["first"] == 6), ["failed", "converged", "mse"]] = [True, False, np.nan]
    assert judged(table)["recovered"].value == 0.95
    assert "19 of 20 attacks converged, 1 failed" in judged(table)["recovered"].note


def test_attacks_that_did_not_finish_decide_nothing():
    table = fake()
    table.loc[(table.batch == 2) & (table["first"] < 6), ["converged", "rmse", "mse"]] = [False, 9.0, 81.0]
    found = judged(table)
    assert (found["prediction"].verdict, found["recovered"].verdict) == ("inconclusive", "inconclusive")
    assert "only 85% of the attacks finished" in found["prediction"].note
    assert (found["prediction"].n, found["recovered"].value) == (17, 0.85)


def test_the_law_is_judged_where_it_holds():
    table = fake(error=3.0)
    linear = (table.batch == 2) & (table["first"] < 20)
    table.loc[~linear, "predicted_rmse"] = 0.06
    table.loc[linear, "rmse"] = table.predicted_rmse * (1 + 0.01 * np.sin(table["first"]))
    assert (judged(table)["prediction"].verdict, judged(table)["prediction"].n) == ("holds", 10)


def test_ratios_part_averaging_from_mixing():
    table = fake(mixing=2.0)
    table.loc[table.batch == 1, "expected_rmse"] *= np.where(table[table.batch == 1].image % 2, 2.0, 0.5)
    ratios = batch_size.ratios(table, 4)  # within a batch, twice and half cancel
    assert len(ratios) == 20
    assert ratios.total.to_numpy() == pytest.approx(8, rel=0.01)
    assert ratios.mixing.to_numpy() == pytest.approx(2, rel=0.01)
    assert ratios.share.to_numpy() == pytest.approx(2 / 3, rel=0.01)
    assert (batch_size.ratios(table, 1).total == 1).all()


def test_a_singular_batch_hides_without_end():
    ratios = batch_size.ratios(fake(rank=3135), 4)
    assert (ratios.total == np.inf).all()
    assert (ratios.share == 0).all()


def test_an_image_is_compared_under_the_same_weights():
    table = fake()
    others = table[table.batch == 1].assign(weight_seed=9, expected_rmse=1e9)
    pd.testing.assert_frame_equal(batch_size.ratios(pd.concat([table, others]), 4), batch_size.ratios(table, 4))


def test_summary_shows_what_was_not_attacked():
    table = fake(mixing=2.0)
    table.loc[table.batch == 4, ["mse", "rmse"]] = np.nan
    shown = batch_size.summary(table[(table.batch < 4) | (table.part == batch_size.FIXED)], 1e-6)
    assert shown.loc["batches"].tolist() == ["80", "40", "20"]
    assert shown.loc["recovered whole without noise"].tolist() == ["1", "1", "–"]
    assert shown.loc["RMSE of the attack"].tolist()[2] == "–"
    assert [float(value) for value in shown.loc["expected RMSE / alone"]] == pytest.approx([1, 4, 8], rel=0.02)


def test_figures_draw_every_row():
    table = fake()
    table.loc[table["first"] == 4, "converged"] = False
    spectra = pd.DataFrame(
        [(b, i, s, (1 + i % 3) / s) for b in (1, 2, 4) for i in range(3) for s in (0.1, 0.5, 1)],
        columns=["batch", "image", "share", "eigenvalue"],
    )
    figures = draw.published(Results({"problems": table, "spectra": spectra}), {})
    left, middle, right = figures["overview.svg"].axes
    assert left.lines[1].get_ydata().tolist() == [4 * 20, 4 * 4, 4 * 2]  # the median, B² = 4 taken out
    averaging, total, mixing = middle.lines
    assert averaging.get_ydata().tolist() == [1, 2, 4]
    assert total.get_ydata() == pytest.approx([1, 3, 6], rel=0.01)
    assert mixing.get_ydata() == pytest.approx([1, 1.5, 1.5], rel=0.01)
    clouds = [len(c.get_offsets()) for c in middle.collections if len(c.get_offsets()) > 1]
    assert clouds == [40, 20, 40, 20]
    noisy = table[table.attacked & (table.part == batch_size.FIXED)]
    drawn = np.concatenate([c.get_offsets() for c in right.collections])
    assert sorted(map(tuple, drawn)) == sorted(zip(noisy.predicted_rmse, noisy.rmse, strict=True))
    hollow = sum((np.array(c.get_facecolors())[:, :3] == 1).all(1).sum() for c in right.collections)
    assert hollow == (~noisy.converged).sum()
