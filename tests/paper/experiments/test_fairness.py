"""The fairness experiment: its problems, its table, its statistics, and verdicts that can go either way."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch

import i2f
from i2f import claims
from i2f.paper import rows
from i2f.paper.experiments import fairness
from i2f.paper.experiments import problems as shared
from i2f.paper.figures import fairness as draw
from i2f.paper.results import Results
from i2f.paper.sweep import Settings

mpl.use("Agg")
pytestmark = pytest.mark.usefixtures("few_draws")
CONFIG = {"dataset": "mnist", "variance": 1e-5, "strong_variance": 1e-3, "steps": 20}
THRESHOLDS = {"ratio": 10.0, "p_value": 0.01, "share": 0.8, "narrowing": 0.5}


def fake(width: float, by_class: float, noise: float, equal: float, images: int = 60) -> pd.DataFrame:
    """A table as an attack would leave it: log E[I²] spreads by `width` over images and by `by_class` over classes; the
    measured error strays from I²F by `noise`, and by `equal` where each image has its own variance."""
    rng = np.random.default_rng(0)
    t = np.exp(5 + width * rng.permutation(np.linspace(-1, 1, images)) + by_class * (np.arange(images) % 10))
    rows = []
    for part, variance in (("same", 1e-5), ("strong", 1e-5), ("equal", None)):
        for image in range(images):
            size = variance or 0.0016 / t[image]
            stray = rng.standard_normal() * (equal if part == "equal" else noise)
            predicted, mse = size * t[image], size * t[image] * np.exp(stray)
            rows.append(
                {
                    "part": part,
                    "image": image,
                    "label": image % 10,
                    "variance": size,
                    "expected_mse": predicted,
                    "predicted_mse": predicted,
                    "predicted_rmse": predicted**0.5,
                    "answered": False,
                    "mse": mse,
                    "rmse": mse**0.5,
                    "converged": image % 3 > 0,
                    "failed": False,
                }
            )
    return pd.DataFrame(rows)


def judge(table: pd.DataFrame) -> list[claims.Claim]:
    return fairness.judge({"problems": table}, THRESHOLDS, "mnist")


@pytest.fixture
def table() -> pd.DataFrame:
    return fake(1.5, 0.0, 0.05, 0.1)


def test_parts_are_what_they_should_be():
    problems = fairness.problems(CONFIG | {"images": 5, "strong_images": 2, "equal_images": 3, "target": 0.0016})
    assert [p["image"] for p in problems] == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2]
    assert [p["label"] for p in problems] == [7, 2, 1, 0, 4, 7, 2, 7, 2, 1]
    assert [p["size"] for p in problems if p["part"] != "equal"] == [1e-5] * 5 + [1e-3] * 2
    assert all(p["target"] == 0.0016 and "size" not in p for p in problems if p["part"] == "equal")


def test_columns_mean_what_they_say(mlp, monkeypatch):
    """On a network small enough for the pseudo-inverse of J itself, in the linear regime."""
    model, x, y = mlp
    jacobians = {i: i2f.GradientJacobian(model, x.roll(i, 1), y) for i in range(2)}
    monkeypatch.setattr(shared, "jacobian", lambda p: jacobians[p["image"]])
    monkeypatch.setattr(shared, "network", lambda *_: model)
    monkeypatch.setattr(fairness.data, "load", lambda *_, **__: (x, torch.tensor([1, 1])))
    sizes = {"images": 2, "variance": 1e-8, "strong_images": 1, "strong_variance": 1e-8, "equal_images": 2}
    problems = fairness.problems(CONFIG | sizes | {"target": 1e-6})
    found = fairness.solve(problems)
    for p, row in zip(problems, found, strict=True):
        J = jacobians[p["image"]]
        inverse = torch.linalg.pinv(J.dense().T)  # (J Jᵀ)⁻¹ J
        delta = i2f.perturb.gaussian(J.gradient, row["variance"], seed=p["image"])
        assert row["predicted_mse"] == pytest.approx(float((inverse @ delta).square().mean()), rel=1e-5)
        assert row["expected_mse"] == pytest.approx(row["variance"] * float(inverse.square().sum()) / 12, rel=1e-5)
        assert row["mse"] == pytest.approx(row["predicted_mse"], rel=0.1)
        assert row["picture"] == pytest.approx(255 * jacobians[p["image"]].x[0].numpy(), abs=1)
    assert [row["expected_mse"] for row in found[-2:]] == pytest.approx([1e-6] * 2)
    with torch.no_grad():
        answers = [bool(model(jacobians[p["image"]].x).argmax() == 1) for p in problems]
    assert [row["answered"] for row in found] == answers


def test_stored_rows_are_the_solved_ones(tmp_path):
    sizes = {"images": 2, "strong_images": 2, "equal_images": 1, "target": 0.0016, "steps": 1}
    problems = fairness.problems(CONFIG | sizes)
    settings = [Settings(jobs=1, progress="off", store=rows.Store(chunks=tmp_path, solve=yes)) for yes in (True, False)]
    solved, read = (fairness.run(problems, one) for one in settings)
    pd.testing.assert_frame_equal(solved.tables["problems"], read.tables["problems"])
    assert np.array_equal(solved.arrays["pictures"], read.arrays["pictures"])
    figures = draw.published(read, {"cut": 0.1, "shown": 1})
    assert set(figures) == {"overview.svg", "pictures.png"}
    truth = [figures["pictures.png"].axes[k].images[0].get_array().max() for k in (0, 4)]
    assert truth == pytest.approx([1, 1], abs=0.01)


def test_extremes_are_the_least_and_the_best_protected(table):
    chosen = draw.extremes(table, "same", 2)
    mse = table.mse[table.part == "same"].sort_values()
    assert list(chosen.mse) == [*mse[:2], *mse[-2:]]
    worst = chosen.index[0]
    table.loc[worst, "failed"] = True
    assert worst not in draw.extremes(table, "same", 2).index


def test_explained_is_the_adjusted_r_squared():
    table = fake(1.5, 0.3, 0.3, 0.1).query("part == 'same'")
    fit = np.corrcoef(np.log(table.predicted_mse), np.log(table.mse))[0, 1] ** 2
    assert fairness.explained(table, ["predicted_mse"]) == pytest.approx(1 - (1 - fit) * 59 / 58)
    y = np.log(table.mse)
    within = (y - y.groupby(table.label).transform("mean")).var(ddof=0) / y.var(ddof=0)
    assert fairness.explained(table, ["label"]) == pytest.approx(1 - within * 59 / 50)
    assert np.isnan(fairness.explained(table.head(2), ["predicted_mse"]))
    copies = pd.concat([table.head(2)] * 5).assign(image=range(10))  # a resampling numbers the copies of a unit
    assert np.isnan(fairness.explained(copies, ["predicted_mse"]))


def test_cost_is_that_of_the_variances_themselves(table):
    """One variance for all, found by hand so that the statistic of the errors is the target."""
    same, equal = (table[table.part == part] for part in ("same", "equal"))
    t = same.expected_mse / 1e-5
    cost = fairness.cost(table)
    assert cost["the mean error"] == pytest.approx(equal.variance.mean() / (0.0016 / t.mean()))
    assert cost["the smallest error"] == pytest.approx(equal.variance.mean() / (0.0016 / t.min()))
    assert cost["the smallest error"] < 1 < cost["the mean error"]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (
            (2.0, 0.0, 0.05, 0.1),
            ["holds", "inconclusive", "inconclusive", "holds", "holds", "holds", "holds"],
        ),  # unequal images
        (
            (0.1, 0.3, 0.05, 0.1),
            ["inconclusive", "holds", "holds", "holds", "holds", "holds", "holds"],
        ),  # unequal classes
        (
            (0.1, 0.0, 1.5, 1.5),
            ["holds", "inconclusive", "inconclusive", "fails", "fails", "fails", "fails"],
        ),  # the attack's own whims
        (
            (0.1, 0.0, 0.001, 0.1),
            ["fails", "inconclusive", "inconclusive", "holds", "holds", "holds", "fails"],
        ),  # all alike
    ],
)
def test_verdicts_follow_the_table(shape, expected):
    found = judge(fake(*shape))
    assert [c.verdict for c in found] == expected
    assert len({c.id for c in found}) == 7
    assert all(c.id.startswith("fairness-mnist-") for c in found)


def test_one_class_that_decides_alone_is_named():
    """Images of the class that the network answers anyway are protected; the others are all alike."""
    table = fake(0.1, 0.0, 0.3, 0.3)
    lucky = table.label == 9
    for column in ("predicted_mse", "expected_mse", "mse"):
        table.loc[lucky, column] *= 1e4
    found = {c.id.removeprefix("fairness-mnist-"): c for c in judge(table)}
    assert found["foretold"].verdict == "holds"
    found = judge(table.assign(answered=lucky))
    found = {c.id.removeprefix("fairness-mnist-"): c for c in found}
    assert found["foretold"].verdict == "holds except when"
    assert found["foretold"].within[2] < THRESHOLDS["share"]
    assert (found["classes"].verdict, found["classes-others"].verdict) == ("holds", "inconclusive")


def test_a_failed_attack_counts_in_the_notes_alone(table):
    before = judge(table)
    lost = table.head(1).assign(image=99, mse=np.nan, predicted_mse=np.nan, failed=True)
    after = judge(pd.concat([table, lost], ignore_index=True))
    assert [(c.value, c.n) for c in after] == [(c.value, c.n) for c in before]
    assert ", 1 failed" in next(c.note for c in after if c.id.endswith("samples"))


def test_noise_is_compared_on_images_that_both_kinds_were_tried_on(table):
    gone = (table.part == "same") & (table.image == 3)
    spoiled = table.assign(failed=gone, mse=table.mse.mask(gone), rmse=table.rmse.mask(gone))
    claim = next(c for c in judge(spoiled) if c.id.endswith("equalised"))
    assert claim.n == table.image.nunique() - 1
    assert ", 1 failed" in claim.note


def test_a_single_class_has_no_test():
    (found,) = (c for c in judge(fake(2.0, 0.0, 0.05, 0.1).assign(label=3)) if c.id.endswith("mnist-classes"))
    assert (found.value, found.low, found.high, found.verdict) == (1.0, -np.inf, np.inf, "inconclusive")


def test_figure_draws_every_image(table):
    figure = draw.overview(table, 0.1)
    classes, images, scatter, equal = figure.axes
    same, strong, own = (table[table.part == part] for part in ("same", "strong", "equal"))
    measured, predicted = (c.get_offsets()[:, 1] for c in classes.collections)
    assert sorted(measured) == sorted(same.mse)
    assert sorted(predicted) == sorted(same.predicted_mse)
    assert [list(line.get_xdata()) for line in images.lines] == [
        sorted(rows[name]) for rows in (same, strong) for name in ("mse", "predicted_mse")
    ]
    drawn = np.concatenate([c.get_offsets() for c in scatter.collections])
    both = pd.concat([same, strong])
    assert sorted(map(tuple, drawn)) == sorted(zip(both.predicted_rmse, both.rmse, strict=True))
    assert any("not converged" in t.get_text() for t in scatter.get_legend().get_texts())
    assert [sorted(c.get_offsets()[:, 1]) for c in equal.collections] == [sorted(same.mse), sorted(own.mse)]


def test_pictures_stand_next_to_their_truth(table):
    shape = (len(table), 1, 4, 4)
    truth = np.broadcast_to(np.linspace(0, 0.9, len(table))[:, None, None, None], shape)
    figure = draw.recoveries(Results({"problems": table}, {"truth": truth, "pictures": truth + 0.05}), 2)
    same = draw.extremes(table, "same", 2)
    shown = [float(ax.images[0].get_array()[0, 0]) for ax in figure.axes]
    assert len(shown) == 16
    assert shown[:4] == pytest.approx(list(truth[same.index, 0, 0, 0]))
    assert shown[4:8] == pytest.approx(list(truth[same.index, 0, 0, 0] + 0.05))
    assert figure.axes[4].get_xlabel() == f"MSE {same.mse.iloc[0]:.2g}"
