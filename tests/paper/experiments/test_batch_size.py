"""The batch experiment: its problems, its columns against independent algebra, and verdicts that can go either way."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch

import i2f
from i2f.paper import rows
from i2f.paper.experiments import batch_size
from i2f.paper.experiments import problems as shared
from i2f.paper.figures import batch_size as draw
from i2f.paper.results import Results
from i2f.paper.sweep import Settings

mpl.use("Agg")
pytestmark = pytest.mark.usefixtures("few_draws")
CONFIG = {"dataset": "mnist", "gauss_newton_steps": 50, "start_seed": 0}
THRESHOLDS = {
    "exact": 1e-6,
    "share": 0.99,
    "compared": 2,
    "group": 2,
    "hidden": 2.0,
    "averaging": 0.5,
    "accuracy": 0.05,
    "cut": 0.05,
}
VARIANCE = 1e-8


def test_problems_tile_the_images():
    sizes = {"sizes": [1, 2, 4], "looked": [3, 5, 4], "attacked": [2, 2, 0]}
    tasks = batch_size.problems(CONFIG | sizes | {"variance": 1e-4})
    batches = {(p["batch"], p["image"]) for p in tasks}
    assert batches == {(1, 0), (1, 1), (1, 2), (2, 0), (2, 2), (4, 0)}
    assert {(p["batch"], p["image"]) for p in tasks if p["attacked"]} == {(1, 0), (1, 1), (2, 0)}
    assert {(p["batch"], p["image"]) for p in tasks if p["part"] == batch_size.NONE} == {(1, 0), (1, 1), (2, 0)}
    assert {p["batch"]: p["size"] for p in tasks if p["part"] == batch_size.SCALED} == {2: 1e-4 / 4, 4: 1e-4 / 16}
    assert {p["size"] for p in tasks if p["part"] == batch_size.FIXED} == {1e-4}
    assert all(p["noise_seed"] == p["image"] for p in tasks)
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
    sizes = {"sizes": [1, 2], "looked": [2, 2], "attacked": [2, 2]}
    tasks = batch_size.problems(CONFIG | sizes | {"variance": VARIANCE})
    found = batch_size.run(tasks, Settings(jobs=1, progress="off", store=rows.Store(chunks=tmp_path)))
    return found.tables["problems"], found.tables["spectra"]


def test_columns_mean_what_they_say(small, tables, twin):
    """Against Jacobians by finite differences, and a Monte Carlo of the displacement."""
    model, x, y = small
    table, spectra = tables
    assert len(table) == 2 * 2 + 3 * 2
    assert sorted(table[table.batch == 2].image.unique()) == [0, 1]
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
    sizes = {"sizes": [1, 2], "looked": [2, 2], "attacked": [2, 2]}
    tasks = batch_size.problems(CONFIG | sizes | {"variance": VARIANCE})
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
    noisy = table[table.part != batch_size.NONE]
    assert noisy.rmse.to_numpy() == pytest.approx(noisy.predicted_rmse.to_numpy(), rel=0.05)
    alone, pair = (
        table[(table.batch == b) & (table.part == p)].set_index("image").expected_rmse
        for b, p in ((1, batch_size.FIXED), (2, batch_size.SCALED))
    )
    assert (pair >= alone).all()  # mixing never helps the attacker


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


def fake(mixing=1.5, mse=1e-20, error=0.01, rank=1568, sets=4) -> pd.DataFrame:
    """A table as it would look with this much mixing, this error without noise, and so wrong a prediction."""
    rows = []
    for image in range(2 * sets):
        for batch in (1, 2):
            for part in batch_size.PARTS:
                scaled = part == batch_size.SCALED
                if batch == 1 and scaled:
                    continue
                expected = 0.001 * (1 if batch == 1 else mixing * (1 if scaled else 2))
                rmse = mse**0.5 if part == batch_size.NONE else expected * (1 + error)
                rows.append(
                    {
                        "part": part,
                        "batch": batch,
                        "image": image,
                        "attacked": True,
                        "d_x": 784 * batch,
                        "rank": rank if batch == 2 else 784,
                        "lambda_min": 0.1,
                        "expected_rmse": expected,
                        "predicted_rmse": expected,
                        "mse": rmse**2,
                        "rmse": rmse,
                        "converged": image > 0,
                        "failed": False,
                    }
                )
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({}, set()),
        (
            {"mse": 1e-3, "rank": 1567, "mixing": 3.0, "error": 0.2},
            {"recovered-1", "recovered-2", "rank", "averaging", "prediction-2"},
        ),
        ({"mixing": 0.8, "error": np.nan}, {"hides", "prediction-2"}),  # NaN: attacks that failed
    ],
)
def test_verdicts_follow_the_table(change, failing):
    found = batch_size.judge({"problems": fake(**change)}, THRESHOLDS, "mnist")
    verdicts = {c.id.removeprefix("batch_size-mnist-"): c.verdict for c in found}
    assert len(verdicts) == 6
    notes = {c.id.removeprefix("batch_size-mnist-"): c.note for c in found}
    assert notes["prediction-2"].startswith("6 of 8 attacks converged")  # four pairs, two kinds of noise
    units = {c.id.removeprefix("batch_size-mnist-"): c.n for c in found}
    assert (units["recovered-1"], units["recovered-2"], units["hides"]) == (8, 4, 4)  # images, pairs, sets
    assert verdicts == {name: "fails" if name in failing else "holds" for name in verdicts}


def test_ratios_part_averaging_from_mixing():
    ratios = batch_size.ratios(fake(mixing=2.0), 2)
    assert ratios.total.to_numpy() == pytest.approx(4)
    assert ratios.mixing.to_numpy() == pytest.approx(2)
    assert ratios.share.to_numpy() == pytest.approx(0.5)


def test_summary_shows_what_was_not_attacked():
    table = fake()
    table.loc[table.batch == 2, ["mse", "rmse"]] = np.nan
    shown = batch_size.summary(table[(table.batch == 1) | (table.part != batch_size.NONE)], 1e-6)
    assert shown.loc["recovered without noise"].tolist() == ["1", "–"]
    assert shown.loc["RMSE expected, fixed"].tolist() == ["0.001", "0.003"]
    assert shown.loc["RMSE attack, over B²"].tolist() == ["0.001", "–"]


def test_figures_draw_every_row():
    table = fake()
    spectra = pd.DataFrame(
        [(b, i, s, 1 / s) for b, i in ((1, 0), (1, 1), (2, 0)) for s in (0.1, 0.5, 1)],
        columns=["batch", "image", "share", "eigenvalue"],
    )
    figures = draw.published(Results({"problems": table, "spectra": spectra}), {})
    left, middle, right = figures["overview.svg"].axes
    assert sum(len(line.get_xdata()) for line in left.lines) == len(spectra)
    assert left.lines[-1].get_ydata().tolist() == [4 * 10, 4 * 2, 4 * 1]  # B² = 4 taken out
    noisy = table[table.part != batch_size.NONE]
    drawn = np.concatenate([c.get_offsets() for c in right.collections])
    assert sorted(map(tuple, drawn)) == sorted(zip(noisy.predicted_rmse, noisy.rmse, strict=True))
    alone = int((noisy.batch == 1).sum())
    assert sum(len(c.get_offsets()) for c in middle.collections) == len(noisy) + alone  # B = 1 is on both lines
    hollow = sum((np.array(c.get_facecolors()) == 1).all(1).sum() for c in right.collections)
    assert hollow == (~noisy.converged).sum()
