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

CONFIG = {"digits": 7, "first_digit": 200, "half": 0.5, "law_digits": 2, "ratios": [0.5, 0.9], "init": "uniform"}
CONFIG |= {"weight_seeds": 5, "gauss_newton_steps": 9, "patient_steps": 11}
THRESHOLDS = CONFIG | {"exact": 1e-8, "share": 0.95, "more": 0.5}


def test_who_meets_which_gradient():
    tasks = pruning.problems(CONFIG)
    met = {who: sorted((t["image"], t["size"]) for t in tasks if t["attacker"] == who) for who in pruning.WHO}
    both = [(image, size) for image in (200, 201) for size in (0.5, 0.9)]
    assert met["ignores"] == both
    assert met["reads"] == both + [(image, 0.5) for image in range(202, 207)]
    assert {t["attacker"]: (t["method"], t["mask"]) for t in tasks} == {
        "ignores": ("gauss-newton", "none"),
        "reads": ("gauss-newton", "zeros"),
    }
    assert all(t["weight_seed"] == 1 + t["image"] % 5 and t["start_seed"] == t["image"] for t in tasks)
    assert {t["image"] for t in tasks if t["drawn"]} == {200}
    assert {(t["noise"], t["split"]) for t in tasks} == {("prune", "train")}
    patient = [t for t in tasks if t["budget"] == 11]
    assert {(t["attacker"], t["size"]) for t in patient} == {("ignores", 0.9)}
    assert {t["budget"] for t in tasks if t not in patient} == {9}


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
    config = CONFIG | {"digits": 1, "law_digits": 1, "ratios": [0.1, 0.5, 0.98], "gauss_newton_steps": 30}
    found = pruning.run(pruning.problems(config), Settings(jobs=1, progress="off", store=rows.Store(chunks=tmp_path)))
    store = rows.Store(chunks=tmp_path, solve=False)
    again = pruning.run(pruning.problems(config), Settings(jobs=1, progress="off", store=store))
    rows.save(tmp_path / "published", store.asked)
    store = rows.Store([tmp_path / "published"], solve=False)
    for known in (again, pruning.run(pruning.problems(config), Settings(jobs=1, progress="off", store=store))):
        pd.testing.assert_frame_equal(known.tables["problems"], found.tables["problems"])
        assert np.array_equal(known.arrays["pictures"], found.arrays["pictures"])
    table, pictures = found.tables["problems"], found.arrays["pictures"]
    assert pictures.shape == (1 + 6, 12)
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


def fake(growth: float, recovered: float = 1.0, images: int = 40) -> pd.DataFrame:
    """RMSE ~ ratio^growth for who ignores the mask; whoever reads it recovers that share of the images."""
    found = []
    for image in range(images):
        for size in (0.5, 0.7, 0.9):
            predicted, hit = 0.04 * (1 + image / images) * size**4, image < recovered * images
            common = {"image": image, "size": size, "last_layer": size, "converged": True, "failed": False}
            common["drawn"] = image == 0
            rmse = 0.04 * size**growth
            found.append({**common, "attacker": "ignores", "predicted_rmse": predicted, "rank": 784, "rmse": rmse})
            found.append({**common, "attacker": "reads", "predicted_rmse": 0.0, "rank": 700, "rmse": 0.3 * 1e-9**hit})
    table = pd.DataFrame(found)
    return table.assign(mse=table.rmse**2)


def judge(table: pd.DataFrame):
    return pruning.judge({"problems": table}, THRESHOLDS)


@pytest.mark.parametrize(
    ("table", "verdicts", "values"),
    [
        (fake(4), ["holds", "holds"], [1, 1]),
        (fake(-1, 0.5), ["fails", "fails"], [0, 0.5]),
        (fake(0), ["fails", "holds"], [0, 1]),  # an equal error is not a larger one
    ],
    ids=["as claimed", "the other way round", "no effect"],
)
def test_verdicts_follow_the_table(table, verdicts, values):
    table = pd.concat([table, fake(4, images=100).assign(image=lambda t: t.image + 1000).query("attacker == 'reads'")])
    table = table if values[1] == 1 else table[table.image < 1000]
    found = judge(table)
    assert [(c.id, c.number) for c in found] == [("pruning-more", 26), ("pruning-mask", 27)]
    assert [c.verdict for c in found] == verdicts
    assert [c.value for c in found] == values
    assert found[0].n == 40


def test_attacks_that_failed_never_speak_for_a_claim():
    """At the largest ratio they are left out, at the smaller one they have an infinite error; the reader's recovered
    nothing."""
    table, gone = fake(4), {"failed": True, "rmse": np.nan, "mse": np.nan, "converged": False}
    table.loc[(table.attacker == "ignores") & (table.image == 0) & (table["size"] == 0.9), list(gone)] = gone.values()
    table.loc[(table.attacker == "ignores") & (table.image == 1) & (table["size"] == 0.5), list(gone)] = gone.values()
    table.loc[(table.attacker == "reads") & (table.image == 2) & (table["size"] == 0.5), list(gone)] = gone.values()
    more, mask = judge(table)
    assert (more.n, more.value) == (39, pytest.approx(38 / 39))
    assert (mask.n, mask.value) == (40, pytest.approx(39 / 40))


def test_attacks_that_did_not_finish_decide_nothing():
    table = fake(4)
    table.loc[(table.attacker == "ignores") & (table.image < 9) & (table["size"] == 0.9), "converged"] = False
    more, _ = judge(table)
    assert more.verdict == "inconclusive"
    assert "only 89% of the attacks finished" in more.note


def test_the_overview_draws_every_attack():
    table = fake(4, 0.5)
    table.loc[table.image == 3, "converged"] = False
    left, middle, right = draw.overview(table, 1e-8).axes
    ignores, reads = table[table.attacker == "ignores"], table[table.attacker == "reads"]
    medians = {tuple(line.get_ydata()) for line in left.lines}
    assert medians == {tuple(rows.groupby("size").rmse.median()) for rows in (ignores, reads)}
    drawn = np.concatenate([c.get_offsets() for c in middle.collections if len(c.get_offsets())])
    assert sorted(map(tuple, drawn)) == sorted(zip(ignores.predicted_rmse, ignores.rmse, strict=True))
    assert sum((c.get_facecolor()[:, :3].min(1) == 1).sum() for c in middle.collections if len(c.get_offsets())) == 3
    half = right.lines[0]
    assert list(half.get_xdata())[1:] == sorted(reads[reads["size"] == 0.5].mse)
    assert half.get_ydata()[20] == 0.5  # the share that is recovered


def test_published_figures_are_those_of_what_was_found():
    levels = np.linspace(0, 1, 1 + 6)
    images = np.stack([np.full((1, 4, 4), level) for level in levels])
    drawn = draw.published(Results({"problems": fake(4, images=2)}, {"pictures": images}), THRESHOLDS)
    assert list(drawn) == ["overview.svg", "pictures.png"]
    shown = [float(ax.images[0].get_array().max()) for ax in drawn["pictures.png"].axes]
    assert shown == pytest.approx([0, *levels[[1, 3, 5]], 0, *levels[[2, 4, 6]]])
