"""The fairness experiment: its problems, its table, its statistics, and verdicts that can go either way."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.collections import PathCollection

import i2f
from i2f import claims
from i2f.paper import estimates, rows
from i2f.paper.experiments import fairness
from i2f.paper.experiments import problems as shared
from i2f.paper.figures import fairness as draw
from i2f.paper.results import Results
from i2f.paper.sweep import Settings

mpl.use("Agg")
CONFIG = {"first_digit": 200, "init": "uniform", "weight_seeds": 5, "variance": 1e-5, "strong_variance": 1e-3}
CONFIG |= {"target": 0.0016, "gauss_newton_steps": 20}
THRESHOLDS = CONFIG | {"ratio": 2.0, "effect": 0.06, "p_value": 0.05}


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(estimates.resampled, "__defaults__", (500,))
    monkeypatch.setattr(estimates.permutation, "__defaults__", (200, 0))


def fake(tail: float = 1.0, by_class: float = 0.0, images: int = 200) -> pd.DataFrame:
    """A table as an attack would leave it: the logarithm of the error has a spread of 0.2 over images, plus `tail` for
    every sixth ten, plus `by_class` for classes from 5 on; the seeds differ in level."""
    random, found = np.random.default_rng(0), []
    image = np.arange(200, 200 + images)
    t = 0.2 * random.standard_normal(images) + tail * (image // 10 % 6 == 0) + by_class * (image % 10 >= 5)
    for part, seed in [(part, seed) for part in ("same", "strong", "equal") for seed in range(1, 6)]:
        mine = image if part != "equal" else image[:40][image[:40] % 5 == seed - 1]
        expected = 1e-3 * seed * np.exp(t[mine - 200]) if part != "equal" else np.full(len(mine), 1.6e-3)
        mse = expected * (100 if part == "strong" else 1) * np.exp(0.1 * random.standard_normal(len(mine)))
        found.append(
            pd.DataFrame(
                {
                    "part": part,
                    "image": mine,
                    "weight_seed": seed,
                    "pictured": (seed == 1) & (part != "equal"),
                    "label": mine % 10,
                    "answered": False,
                    "variance": 1e-3 if part == "strong" else 1e-5,
                    "expected_mse": expected,
                    "mse": mse,
                    "rmse": np.sqrt(mse),
                    "converged": True,
                    "failed": False,
                }
            )
        )
    return pd.concat(found, ignore_index=True)


def judge(table: pd.DataFrame) -> dict[str, claims.Claim]:
    found = {c.id.removeprefix("fairness-"): c for c in fairness.judge({"problems": table}, THRESHOLDS)}
    assert [found[name].number for name in ("samples", "classes", "classes-strong")] == [19, 20, 21]
    return found


def verdicts(table: pd.DataFrame) -> list[str]:
    return [c.verdict for c in judge(table).values()]


def test_every_digit_meets_every_seed_and_some_their_own_noise():
    found = pd.DataFrame(fairness.problems(CONFIG | {"digits": 7, "equal_digits": 6}))
    crossed = [(image, seed) for seed in range(1, 6) for image in range(200, 207)]
    for part, size in (("same", 1e-5), ("strong", 1e-3)):
        rows = found[found.part == part]
        assert list(zip(rows.image, rows.weight_seed, strict=True)) == crossed
        assert set(rows["size"]) == {size}
        assert (rows.pictured == (rows.weight_seed == 1)).all()
    equal = found[found.part == "equal"]
    assert sorted(equal.image) == list(range(200, 206))
    assert (equal.weight_seed == 1 + equal.image % 5).all()
    assert equal["size"].isna().all()
    assert not equal.pictured.any()
    assert found.groupby(["image", "weight_seed"]).noise_seed.nunique().max() == 1  # one draw, scaled
    assert found.noise_seed.nunique() == len(crossed)


def test_columns_mean_what_they_say(mlp, monkeypatch):
    """On a network small enough for the pseudo-inverse of J itself, in the linear regime."""
    model, x, y = mlp
    jacobians = {200 + i: i2f.GradientJacobian(model, x.roll(i, 1), y) for i in range(2)}
    monkeypatch.setattr(shared, "jacobian", lambda p: jacobians[p["image"]])
    sizes = {"digits": 2, "weight_seeds": 1, "variance": 1e-8, "strong_variance": 1e-9, "equal_digits": 2}
    problems = fairness.problems(CONFIG | sizes | {"target": 1e-6})
    found = fairness.solve(problems)
    for p, row in zip(problems, found, strict=True):
        J = jacobians[p["image"]]
        inverse = torch.linalg.pinv(J.dense().T)  # (J Jᵀ)⁻¹ J
        delta = i2f.perturb.gaussian(J.gradient, row["variance"], seed=1000 + p["image"])
        assert row["predicted_mse"] == pytest.approx(float((inverse @ delta).square().mean()), rel=1e-5)
        assert row["expected_mse"] == pytest.approx(row["variance"] * float(inverse.square().sum()) / 12, rel=1e-5)
        assert row["mse"] == pytest.approx(row["predicted_mse"], rel=0.1)
        assert row["label"] == int(y)
        with torch.no_grad():
            assert row["answered"] == bool(model(J.x).argmax() == y)
        if p["part"] == "equal":
            assert "picture" not in row
        else:
            assert row["picture"] == pytest.approx(255 * J.x[0].numpy(), abs=1)
    assert [row["variance"] for row in found[:4]] == [1e-8, 1e-8, 1e-9, 1e-9]
    assert [row["expected_mse"] for row in found[-2:]] == pytest.approx([1e-6] * 2)


def test_stored_rows_are_the_solved_ones(tmp_path):
    problems = fairness.problems(CONFIG | {"digits": 2, "weight_seeds": 2, "equal_digits": 1, "gauss_newton_steps": 1})
    problems = [p for p in problems if p["weight_seed"] == 1 or p["image"] == 200]
    settings = [Settings(jobs=1, progress="off", store=rows.Store(chunks=tmp_path, solve=yes)) for yes in (True, False)]
    solved, read = (fairness.run(problems, one) for one in settings)
    table = read.tables["problems"]
    pd.testing.assert_frame_equal(solved.tables["problems"], table)
    for name, array in solved.arrays.items():
        assert np.array_equal(read.arrays[name], array)
    assert len(table) == len(problems) == 7
    assert len(read.arrays["pictures"]) == len(read.arrays["truth"]) == table.pictured.sum() == 4
    truth = i2f.data.load("mnist", 202, split="train")[0].numpy()
    assert np.array_equal(read.arrays["truth"], truth[[200, 201, 200, 201]])
    assert (table.variance[table.part == "equal"] != 1e-5).all()


def test_percentiles_are_those_of_the_numbers_alone():
    values = np.random.default_rng(0).standard_normal((3, 11, 4))
    values[0, :5, 1] = values[2, 3:, 0] = np.nan
    for found, share in zip(fairness.percentiles(values, (90, 37)), (90, 37), strict=True):
        assert found == pytest.approx(np.nanpercentile(values, share, axis=1))
    assert np.isnan(fairness.percentiles(np.full((1, 3, 2), np.nan), (50,))).all()


def test_the_tail_is_averaged_over_seeds_as_a_ratio():
    values = np.arange(1.0, 102.0)
    units = np.stack([values, 5 * values**2], axis=1)[None]
    assert fairness.tail(units)[0] == pytest.approx(np.sqrt(91 / 51 * (91 / 51) ** 2))
    assert fairness.tail(units, 50, 10)[0] == pytest.approx((51 / 11) ** 1.5)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2.0, 0.0), ["holds", "fails", "fails"]),  # unequal samples, of all classes
        ((0.0, 0.5), ["fails", "holds", "holds"]),  # unequal classes
        ((0.0, 0.0), ["fails", "inconclusive", "inconclusive"]),  # all alike
    ],
)
def test_verdicts_follow_the_table(shape, expected):
    assert verdicts(fake(*shape)) == expected


def test_eta_squared_is_that_of_the_images_means():
    table = fake(0.0, 0.5)
    rows = table[table.part == "same"]
    logs = np.log(rows.mse) - np.log(rows.mse).groupby(rows.weight_seed).transform("mean")
    means, labels = logs.groupby(rows.image).mean(), rows.groupby("image").label.first()
    between = (means.groupby(labels).transform("mean") ** 2).sum()
    assert judge(table)["classes"].value == pytest.approx(between / (means**2).sum())
    assert judge(table)["classes"].n == 200


def test_the_class_that_is_predicted_anyway_does_not_decide_about_samples():
    """Noise hides its images; all others are alike."""
    table = fake(0.0)
    lucky = table.label.isin([7, 9])
    table.loc[lucky, ["mse", "rmse"]] *= 1e4
    assert judge(table)["samples"].verdict == "holds"
    table["answered"] = lucky
    found = judge(table)
    assert found["samples"].verdict == "fails"
    assert "(with those whose attack converged: 1" in found["samples"].note  # 1e4
    assert found["classes"].verdict == "holds"
    assert "η² = 0.0" in found["classes"].note
    assert found["samples"].n == 160


def test_an_image_answered_under_one_seed_counts_under_the_others():
    table = fake(0.0)
    one = (table.weight_seed == 1) & (table.image % 4 == 0)
    table.loc[one, ["mse", "rmse"]] *= 1e4
    table["answered"] = one
    found = judge(table)["samples"]
    assert (found.verdict, found.n) == ("fails", 200)


def test_an_attack_that_did_not_finish_decides_nothing():
    table = fake(0.0)
    few = table.image % 15 == 0
    table.loc[few, ["mse", "rmse", "converged"]] = [1e9, 3e4, False]
    assert judge(table)["samples"].value == pytest.approx(judge(table[~few])["samples"].value)
    assert judge(fake(2.0))["samples"].verdict == "holds"
    many = fake(2.0, 1.0).assign(converged=lambda t: t.image % 5 > 0)
    assert set(verdicts(many)) == {"inconclusive"}
    assert "only 80% of the attacks finished" in judge(many)["classes"].note


def test_a_failed_attack_leaves_its_image_to_the_other_seeds():
    table = fake(0.0, 0.5)
    gone = (table.weight_seed == 2) & (table.image < 210)
    spoiled = table.astype({"answered": object, "label": float})
    spoiled.loc[gone, ["mse", "rmse", "converged", "failed", "label", "answered"]] = (
        [np.nan] * 2 + [False, True] + [np.nan] * 2
    )
    found = judge(spoiled)
    assert found["classes"].n == 200
    assert found["classes"].verdict == "holds"
    assert ", 10 failed" in found["classes"].note
    assert found["classes"].value == pytest.approx(judge(table)["classes"].value, abs=0.02)


def test_equalised_compares_the_same_images_and_seeds():
    table = fake(1.0)
    both = fairness.equalised(table)
    assert len(both) == 40
    image, seed = both.index[3]
    rows = table[(table.image == image) & (table.weight_seed == seed)].set_index("part")
    assert both.iloc[3].to_dict() == {part: rows.mse[part] for part in ("same", "equal")}
    assert np.log(both.equal).std() < 0.2 < np.log(both.same).std()


def test_summary_has_a_row_per_part_and_answer():
    table = fake(1.0)
    table["answered"] = table.image % 10 == 3
    shown = fairness.summary(table)
    assert list(shown.attacks) == [900, 100, 900, 100, 36, 4]
    rows = table[(table.part == "same") & ~table.answered]
    assert shown.loc[("same", "misclassified"), "90%"] == pytest.approx(np.percentile(rows.mse, 90))


def test_extremes_are_the_least_and_the_best_protected():
    table = fake(1.0)
    chosen = draw.extremes(table, "same", 2)
    mse = table.mse[table.part == "same"].sort_values()
    assert list(chosen.mse) == [*mse[:2], *mse[-2:]]
    worst = chosen.index[0]
    table.loc[worst, "failed"] = True
    assert worst not in draw.extremes(table, "same", 2).index


def test_the_figure_draws_samples_classes_and_pairs():
    table = fake(1.0)
    table["answered"] = table.image % 10 == 3
    samples, classes, equal = draw.overview(table, 0.0016).axes
    rows = table[(table.part == "strong") & ~table.answered]
    times = rows.mse / rows.groupby("weight_seed").mse.transform("median")
    curve = next(line for line in samples.lines if line.get_label() == "variance 0.001")
    assert np.interp(50, curve.get_ydata(), curve.get_xdata()) == pytest.approx(np.median(times), rel=1e-3)
    assert sum(", predicted class" in line.get_label() for line in samples.lines) == 2
    clouds = [c for c in classes.collections if isinstance(c, PathCollection)]
    assert sum(len(c.get_offsets()) for c in clouds) == 2 * 200
    centred, labels = fairness.by_image(table[table.part == "same"])
    expected = np.exp(centred.mean(axis=1))[labels == 0]
    assert np.asarray(clouds[0].get_offsets())[:, 1] == pytest.approx(expected.to_numpy())
    drawn = [np.asarray(c.get_offsets())[:, 1] for c in equal.collections if isinstance(c, PathCollection)]
    both = fairness.equalised(table)
    assert drawn[0] == pytest.approx(both.same.to_numpy())
    assert drawn[1] == pytest.approx(both.equal.to_numpy())


def test_pictures_stand_next_to_their_truth():
    table = fake(1.0, images=20)
    kept = table[table.pictured].reset_index(drop=True)
    truth = np.broadcast_to(np.linspace(0, 0.9, len(kept))[:, None, None, None], (len(kept), 1, 4, 4))
    found = Results({"problems": table}, {"truth": truth, "pictures": truth + 0.05})
    figures = draw.published(found, {"target": 0.0016, "shown": 2})
    assert set(figures) == {"overview.svg", "pictures.png"}
    figure = figures["pictures.png"]
    same = draw.extremes(kept, "same", 2)
    shown = [float(ax.images[0].get_array()[0, 0]) for ax in figure.axes]
    assert len(shown) == 16
    assert shown[:4] == pytest.approx(list(truth[same.index, 0, 0, 0]))
    assert shown[4:8] == pytest.approx(list(truth[same.index, 0, 0, 0] + 0.05))
    assert figure.axes[4].get_xlabel() == f"MSE {same.mse.iloc[0]:.2g}"
