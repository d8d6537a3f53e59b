"""The pruning experiment: its problems, its table, verdicts that can go either way, and its figures."""

import copy

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

import i2f
from i2f.paper import rows
from i2f.paper.experiments import problems as shared
from i2f.paper.experiments import pruning
from i2f.paper.figures import pruning as draw
from i2f.paper.results import Results
from i2f.paper.sweep import Settings

mpl.use("Agg")

pytestmark = pytest.mark.usefixtures("few_draws")
THRESHOLDS = {"cut": 0.05, "accuracy": 0.05, "order": 0.9, "exact": 1e-8, "share": 0.99, "far": 0.7}
CONFIG = {"dataset": "mnist"}
QUIET = Settings(jobs=1, progress="off")
RATIOS = [0.1, 0.3, 0.5, 0.7, 0.9]
CLAIMS = ["protects", "protects-adam", "prediction", "bound", "mask-50", "mask-90", "reach", "rank"]


def test_every_attacker_gets_every_gradient():
    tasks = pruning.problems(CONFIG | {"images": 2, "ratios": [0.1, 0.9], "gauss_newton_steps": 7, "adam_steps": 9})
    assert len(tasks) == 3 * 2 * 2
    assert {(t["method"], t["mask"], t["budget"]) for t in tasks} == {
        ("gauss-newton", "none", 7),
        ("gauss-newton", "zeros", 7),
        ("dgl", "none", 9),
    }
    assert {(t["image"], t["size"]) for t in tasks} == {(0, 0.1), (0, 0.9), (1, 0.1), (1, 0.9)}
    assert all(t["noise"] == "prune" for t in tasks)


@pytest.fixture
def small(mlp, monkeypatch):
    """The experiment on a network small enough to be checked by hand, instead of the LeNet."""
    model, x, y = mlp
    J = i2f.GradientJacobian(model, x, y)
    monkeypatch.setattr(shared, "jacobian", lambda problem: J)
    monkeypatch.setattr(shared, "network", lambda *names: copy.deepcopy(model))
    return J


def test_the_table_is_what_pseudo_inverses_say(small, mlp, twin, tmp_path):
    """Predictions against J by finite differences and NumPy's pseudo-inverse; recovery against rank; rows that are read
    again are the same."""
    config = CONFIG | {"images": 1, "ratios": [0.1, 0.5, 0.98], "gauss_newton_steps": 30, "adam_steps": 5}
    found = pruning.run(pruning.problems(config), Settings(jobs=1, progress="off", store=rows.Store(chunks=tmp_path)))
    store = rows.Store(chunks=tmp_path, solve=False)
    again = pruning.run(pruning.problems(config), Settings(jobs=1, progress="off", store=store))
    rows.save(tmp_path / "published", store.asked)
    store = rows.Store([tmp_path / "published"], solve=False)
    for known in (again, pruning.run(pruning.problems(config), Settings(jobs=1, progress="off", store=store))):
        pd.testing.assert_frame_equal(known.tables["problems"], found.tables["problems"])
        assert np.array_equal(known.arrays["pictures"], found.arrays["pictures"])
    table, pictures = found.tables["problems"], found.arrays["pictures"]
    assert pictures.shape == (1 + 9, 12)
    truth = small.x[0].numpy()
    assert np.array_equal(pictures[0], truth)
    J, gradient = twin(*mlp).numpy(), small.gradient.numpy()
    for row in table.itertuples():
        smallest = np.argsort(np.abs(gradient))[: int(row.size * len(gradient))]
        keeps = np.ones(len(gradient), bool)
        keeps[smallest] = False
        if row.attacker == "reads":
            columns = J[:, keeps]
            unseen = np.eye(12) - columns @ np.linalg.pinv(columns, rcond=1e-6)
            assert row.rank == np.linalg.matrix_rank(columns, tol=1e-6)
            assert row.predicted_rmse == pytest.approx(np.linalg.norm(unseen @ (0.5 - truth)) / 12**0.5, abs=1e-6)
            assert row.last_layer == pytest.approx(keeps[-85:].sum() / keeps.sum())
            assert (row.mse <= 1e-8) == (row.rank == 12)
        else:
            moved = np.linalg.pinv(J.T) @ np.where(keeps, 0, -gradient)
            assert row.predicted_rmse == pytest.approx(np.linalg.norm(moved) / 12**0.5, rel=1e-4)
    ranks = table[table.attacker == "reads"]["rank"]
    assert ranks.iloc[0] == 12
    assert ranks.iloc[-1] < 12
    assert list(pruning.predicted(table).index) == [0.1, 0.5, 0.98]


def fake(growth: float, error: float, recovered: float, images: int = 5) -> pd.DataFrame:
    """RMSE ~ ratio^growth for who ignores the mask, off its prediction by the factor 1 + `error`; whoever reads it
    recovers the image up to the ratio `recovered`, while the rank is full up to 0.7."""
    rows = []
    for image in range(images):
        for size in RATIOS:
            predicted = 0.04 * size**4
            for attacker in ("ignores", "ignores, Adam"):
                rmse = 0.04 * size**growth * (1 + error) if growth != 4 else predicted * (1 + error)
                rows.append(
                    {
                        "attacker": attacker,
                        "image": image,
                        "size": size,
                        "predicted_rmse": predicted,
                        "bound_rmse": predicted / 100,
                        "rmse": rmse,
                        "mse": rmse**2,
                        "mse_clamped": rmse**2,
                        "rank": 784,
                        "last_layer": np.nan,
                        "converged": size < 0.9,
                        "failed": False,
                    }
                )
            full, rmse = size <= 0.7, 1e-10 if size <= recovered else 0.3
            rows.append(
                {
                    "attacker": "reads",
                    "image": image,
                    "size": size,
                    "predicted_rmse": 0.0 if full else 0.3,
                    "rmse": rmse,
                    "mse": rmse**2,
                    "mse_clamped": rmse**2,
                    "rank": 784 if full else 600,
                    "last_layer": size,
                    "converged": size < 0.9,
                    "failed": False,
                }
            )
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (fake(4, 0.01, 0.7), ["holds", "holds", "holds", "holds", "holds", "fails", "holds", "holds"]),
        (fake(-1, 0.01, 0.9), ["fails", "fails", "fails", "fails", "holds", "holds", "holds", "fails"]),
        (fake(4, 0.2, 0.3), ["holds", "holds", "fails", "holds", "fails", "fails", "fails", "fails"]),
    ],
    ids=["as predicted", "pruning helps the attacker", "a weak attacker"],
)
def test_verdicts_follow_the_table(table, expected):
    found = pruning.judge({"problems": table}, THRESHOLDS, "mnist")
    assert [c.id for c in found] == [f"pruning-mnist-{name}" for name in CLAIMS]
    assert [c.verdict for c in found] == expected


def test_a_problem_of_unknown_rank_agrees_with_nothing():
    """Rows of problems that raised have neither an image nor a rank."""
    table = fake(4, 0.01, 0.7)
    gone = (table.attacker == "reads") & (table.image == 0)
    table.loc[gone, ["failed", "rmse", "mse", "predicted_rmse"]] = [True, np.nan, np.nan, np.nan]
    (found,) = (c for c in pruning.judge({"problems": table}, THRESHOLDS, "mnist") if c.id.endswith("-rank"))
    assert found.value == pytest.approx(0.8)


def test_the_prediction_is_judged_a_second_time_within_the_linear_regime():
    table = fake(4, 0.01, 0.7)
    ignores = table.attacker.str.startswith("ignores")
    table.loc[ignores & (table["size"] > 0.4), ["predicted_rmse", "rmse"]] = [0.5, 2.0]
    (found,) = (c for c in pruning.judge({"problems": table}, THRESHOLDS, "mnist") if c.id.endswith("prediction"))
    assert found.verdict == "holds only when"
    assert found.within[0] == pytest.approx(0.01)


def test_reach_ends_at_the_first_ratio_that_resists():
    table = pd.DataFrame(
        {"image": [0, 0, 0, 1, 1, 1], "size": [0.1, 0.5, 0.9] * 2, "mse": [1e-20, 1, 1e-20, 1e-20, 1e-20, np.nan]}
    )
    assert list(pruning.reach(table, 1e-8)) == [0.1, 0.5]
    assert list(pruning.reach(table.assign(mse=1.0), 1e-8)) == [0, 0]


def test_reach_is_judged_at_a_ratio_that_was_tried():
    table = fake(4, 0.01, 0.7)
    for resists, expected in ((0.4, "holds"), (0.2, "fails")):
        tried = table[table["size"] != 0.7].copy()
        tried.loc[(tried.attacker == "reads") & (tried["size"] > resists + 0.2), "mse"] = 1.0
        (found,) = (c for c in pruning.judge({"problems": tried}, THRESHOLDS, "mnist") if c.id.endswith("reach"))
        assert found.holds_when == "≥ 0.5"
        assert found.verdict == expected


def test_knowledge_is_the_share_of_the_error_that_the_mask_takes_away():
    table = fake(4, 0.0, 0.7)
    table.loc[(table.attacker == "ignores") & (table["size"] == 0.9), "mse_clamped"] = 0.36
    assert pruning.knowledge(table).ignorance[0.9] == pytest.approx(1 - 0.09 / 0.36)


def test_the_overview_draws_every_row_and_says_what_has_not_converged():
    table = fake(4, 0.01, 0.7, images=2)
    figure = draw.overview(table, 0.05)
    left, middle, right = figure.axes
    assert points(left) == sorted(zip(table["size"], table.rmse, strict=True))
    blind, sees = table[table.attacker != "reads"], table[table.attacker == "reads"]
    assert points(middle) == sorted(zip(blind.predicted_rmse, blind.rmse, strict=True))
    assert list(right.lines[0].get_ydata()) == list(sees["rank"])
    assert "not converged" in [t.get_text() for t in left.get_legend().get_texts()]


def points(ax) -> list[tuple[float, float]]:
    drawn = [c.get_offsets() for c in ax.collections if len(c.get_offsets())]
    return sorted(map(tuple, np.concatenate(drawn).tolist()))


def test_published_figures_are_those_of_what_was_found():
    levels = np.linspace(0, 1, 1 + 15)
    images = np.stack([np.full((1, 4, 4), level) for level in levels])
    found = Results({"problems": fake(4, 0.01, 0.7, images=2)}, {"pictures": images})
    drawn = draw.published(found, THRESHOLDS)
    assert list(drawn) == ["overview.svg", "pictures.png"]
    shown = [float(ax.images[0].get_array().max()) for ax in drawn["pictures.png"].axes]
    assert len(shown) == 3 * (1 + 5)
    assert sorted(set(shown)) == pytest.approx(levels)
