"""The damping experiment: its problems, its table, verdicts that can go either way, and its figures."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch

import i2f
from i2f.paper import rows
from i2f.paper.attackers import ATTACKERS
from i2f.paper.experiments import damping
from i2f.paper.experiments import problems as shared
from i2f.paper.figures import damping as draw
from i2f.paper.results import Results
from i2f.paper.sweep import Settings

mpl.use("Agg")

PAPER = [0.1, 1.0, 10.0]
CONFIG = {"digits": 1, "first_digit": 200, "known_digits": 200, "variances": [1e-6], "paper": PAPER}
CONFIG |= {"init": "uniform", "weight_seeds": 5, "smallest": 1e-4, "largest": 100.0}
CONFIG |= {"gauss_newton_steps": 40, "adam_steps": 30}
THRESHOLDS = CONFIG | {"paper_variance": 1e-5, "same_low": 0.95, "same_high": 1.05}
GRID = [0.0, 1e-4, 0.01, *PAPER]
QUIET = Settings(jobs=1, progress="off")


def test_every_attacker_gets_every_gradient_with_its_own_prior():
    spread = shared.pixels("mnist", None, 200)[1]
    tasks = damping.problems(CONFIG | {"digits": 2, "variances": [1e-5, 1e-3]})
    assert len(tasks) == 2 * 2 * 6
    ridges = {t["attacker"]: t["ridge"] for t in tasks if t["size"] == 1e-3}
    paper = {f"MAP, ε = {e:g}": e for e in PAPER}
    assert ridges == pytest.approx({"no prior": 0, "MAP": 1e-3 / spread, **paper, "Adam": 0})
    assert {t["attacker"] for t in tasks if t["method"] == "dgl"} == {"Adam"}
    assert all(t["budget"] == {"gauss-newton": 40, "dgl": 30}[t["method"]] for t in tasks)
    assert set(ridges) <= set(ATTACKERS)
    assert {(t["image"], t["weight_seed"], t["noise_seed"]) for t in tasks} == {(200, 1, 1200), (201, 2, 2201)}


def test_nobody_who_is_attacked_is_in_the_prior():
    """Each problem names the images that the prior knows, which is part of the key of its row."""
    tasks = damping.problems(CONFIG | {"digits": 3})
    assert all(t["split"] == "train" and t["image"] >= t["known_images"] for t in tasks)
    one, other = (damping.solve.declared.key(tasks[0] | {"known_images": n}) for n in (200, 201))
    assert one != other


def test_the_grid_holds_what_is_asked_about():
    grid = damping.grid(1e-8, 100, PAPER)
    assert len(grid) == 1 + 21  # 0.1, 1 and 10 once
    assert grid == sorted(grid)
    assert {0.0, *PAPER} <= set(grid)


@pytest.fixture
def small(mlp, monkeypatch):
    """The experiment on a network small enough to be checked by hand, with a mean image that is not gray."""
    model, x, y = mlp
    J = i2f.GradientJacobian(model, x, y)
    mean = torch.linspace(0.2, 0.7, 12, dtype=torch.float64)[None]
    monkeypatch.setattr(shared, "jacobian", lambda problem: J)
    monkeypatch.setattr(shared, "pixels", lambda dataset, root, images: (mean, 0.05))
    return J, mean


def solved(problems, settings=QUIET):
    found = damping.run(problems, settings)
    return [found.tables[name] for name in ("problems", "curves")], found.arrays


def test_the_table_is_what_linear_algebra_says(small, mlp, twin, tmp_path):
    """Predictions against J by finite differences and NumPy's solver, the Bayes error against random draws; the MAP
    attacker goes where the prediction with the pull says, and not where it says without. Rows that are read again are
    the same."""
    J, mean = small
    problems, store = damping.problems(CONFIG), rows.Store(chunks=tmp_path)
    (table, curves), pictures = solved(problems, Settings(jobs=1, progress="off", store=store))
    rows.save(tmp_path / "published", store.asked)
    store = rows.Store([tmp_path / "published"], solve=False)
    tables, again = solved(problems, Settings(jobs=1, progress="off", store=store))
    for read, found in zip(tables, (table, curves), strict=True):
        pd.testing.assert_frame_equal(read, found)
    assert all(np.array_equal(again[name], pictures[name]) for name in pictures)
    found = damping.judge({"problems": table, "curves": curves}, THRESHOLDS | {"paper_variance": 1e-6})
    assert [c.n for c in found] == [1, 1, 1, 1]
    A, truth = twin(*mlp).numpy(), J.x[0].numpy()
    gram, pull = A @ A.T, mean[0].numpy() - truth
    delta = i2f.perturb.gaussian(J.gradient, 1e-6, 1200).numpy()
    for row in curves.itertuples():
        inverse = np.linalg.inv(gram + row.epsilon * np.eye(12))
        assert row.damped_rmse == pytest.approx(np.linalg.norm(inverse @ A @ delta) / 12**0.5, rel=1e-4)
        pulled = inverse @ (A @ delta + row.epsilon * pull)
        assert row.pulled_rmse == pytest.approx(np.linalg.norm(pulled) / 12**0.5, rel=1e-4)
        assert row.below == np.mean(np.linalg.eigvalsh(gram) < row.epsilon)
    at = table.set_index("attacker")
    assert at.expected_rmse["MAP"] ** 2 == pytest.approx(1e-6 * np.trace(np.linalg.inv(gram + 2e-5 * np.eye(12))) / 12)
    assert curves.expected_rmse.min() == pytest.approx(at.expected_rmse["MAP"])
    draws, rng = [], np.random.default_rng(0)
    inverse = np.linalg.inv(gram + 0.01 * np.eye(12))
    for _ in range(4000):
        noise = rng.normal(0, 1e-3, A.shape[1])
        draws.append(np.mean((inverse @ (A @ noise + 0.01 * rng.normal(0, 0.05**0.5, 12))) ** 2))
    expected = curves[curves.epsilon == 0.01].expected_rmse.iloc[0]
    assert np.mean(draws) == pytest.approx(expected**2, rel=0.05)

    assert (at.pulled_miss[["no prior", "MAP"]] < 0.1).all()
    assert at.pulled_miss["MAP, ε = 1"] < 0.5 < at.damped_miss["MAP, ε = 1"]
    assert at.converged[["no prior", "MAP", "MAP, ε = 1", "MAP, ε = 10"]].all()
    assert np.array_equal(pictures["truth"], truth)
    assert pictures["found"].shape == (6, 12)
    assert pictures["values"] == pytest.approx(np.linalg.eigvalsh(gram)[::-1], rel=1e-5, abs=1e-9)


def test_adam_starts_at_the_mean_and_the_displacement_is_measured_from_the_truth(small):
    J, mean = small
    found = damping.problems(CONFIG | {"gauss_newton_steps": 1, "adam_steps": 1})
    adam = [t | {"dampings": [1e9]} for t in found if t["attacker"] == "Adam"]
    (_, curves), pictures = solved(adam)
    found = pictures["found"][0]
    assert np.abs(found - mean[0].numpy()).max() == pytest.approx(0.1, rel=1e-3)  # a step of Adam's, of its lr
    moved, pull = found - J.x[0].numpy(), mean[0].numpy() - J.x[0].numpy()
    last = curves[curves.epsilon == 1e9].iloc[0]
    assert last.pulled_miss == pytest.approx(np.linalg.norm(pull - moved) / np.linalg.norm(moved))
    assert last.damped_miss == pytest.approx(1)


def fake(damped: float = 1.0, pulled: float = 1.0, images: int = 20) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables in which the measured RMSE is `pulled` times the prediction with the pull, and without a prior `damped`
    times damped I²F at every ε."""
    table, lines = [], []
    for image in range(images):
        for size in (1e-5, 1e-3):
            bayes = size / 0.05
            for name, ridge in damping.priors(bayes, PAPER).items():
                rmse = (1 + image / 10) * (size / 1e-5) ** 0.5 * (1 + ridge) / 100
                common = {"image": image, "size": size, "bayes": bayes, "attacker": name, "rmse": rmse, "mse": rmse**2}
                common |= {"converged": name != "Adam", "failed": False}
                own = {"ridge": ridge, "damped_rmse": rmse / damped, "pulled_rmse": rmse / pulled, "drawn": image == 0}
                table.append({**common, **own})
                for epsilon in sorted({*GRID, bayes}):
                    errors = {"damped_rmse": rmse / damped, "pulled_rmse": rmse / pulled, "expected_rmse": rmse}
                    misses = {"damped_miss": 1.0, "pulled_miss": 0.1 + epsilon}
                    lines.append({**common, "epsilon": epsilon, **errors, **misses})
    return pd.DataFrame(table), pd.DataFrame(lines)


def judge(table: pd.DataFrame, curves: pd.DataFrame):
    return damping.judge({"problems": table, "curves": curves}, THRESHOLDS)


@pytest.mark.parametrize(
    ("damped", "pulled", "expected"),
    [(9.0, 1.01, "holds holds fails fails fails"), (0.98, 0.9, "fails fails holds holds holds")],
)
def test_verdicts_follow_the_table(damped, pulled, expected):
    found = judge(*fake(damped, pulled))
    names = ["pull-1e-5", "pull-1e-3", "paper-0.1", "paper-1", "paper-10"]
    assert [(c.id, c.number, c.n) for c in found] == [(f"damping-{name}", 28, 20) for name in names]
    assert [c.verdict for c in found] == expected.split()
    assert [c.value for c in found] == pytest.approx([pulled] * 2 + [damped] * 3)


def test_each_claim_is_about_its_own_rows():
    """The MAP attacker at its noise; the attacker without a prior at the paper's noise and ε."""
    table, curves = fake()
    table.loc[(table.attacker == "MAP") & (table["size"] == 1e-3), "rmse"] *= 2
    table.loc[table.attacker == "MAP, ε = 1", "rmse"] *= 3
    curves.loc[(curves.attacker == "no prior") & (curves.epsilon == 1) & (curves["size"] == 1e-5), "rmse"] *= 4
    curves.loc[(curves.attacker == "MAP") | (curves["size"] == 1e-3), "rmse"] *= 5
    assert [c.value for c in judge(table, curves)] == pytest.approx([1, 2, 1, 4, 1])


def test_attacks_that_did_not_converge_decide_nothing():
    table, curves = fake()
    for rows_of in (table, curves):
        gone = rows_of.image < 3
        rows_of.loc[gone, "converged"] = False
        rows_of.loc[gone, "rmse"] = np.inf
    assert {(c.verdict, c.n, round(c.value, 9)) for c in judge(table, curves)} == {("inconclusive", 17, 1.0)}


def test_the_factors_are_those_of_each_attacker_and_epsilon():
    _, curves = fake()
    here = (curves.attacker == "Adam") & (curves["size"] == 1e-3)
    curves.loc[here & (curves.epsilon == 1), "damped_rmse"] /= 8
    curves.loc[here & (curves.epsilon == curves.bayes), "damped_rmse"] *= 4
    curves.loc[here, "pulled_rmse"] = np.inf
    found = damping.off(curves, PAPER)
    assert list(found.columns) == ["ε = 0", "ε = σ²/τ²", "ε = 0.1", "ε = 1", "ε = 10"]
    assert list(found.loc[("0.001", "Adam")]) == pytest.approx([1, 4, 1, 8, 1])
    assert found.drop(index=("0.001", "Adam")).to_numpy() == pytest.approx(1)
    assert np.isinf(damping.off(curves, PAPER, damping.PULLED).loc[("0.001", "Adam")]).all()


def test_the_overview_draws_every_attack():
    table, curves = fake(3.0)
    quiet, loud, miss, scatter = draw.overview(table, curves, np.geomspace(1e-4, 5, 12), PAPER).axes
    weighed = table[table.ridge > 0]
    drawn = [*zip(table.pulled_rmse, table.rmse, strict=True), *zip(weighed.damped_rmse, weighed.rmse, strict=True)]
    assert points(scatter) == sorted(drawn)
    for ax, size in ((quiet, 1e-5), (loud, 1e-3)):
        assert points(ax) == sorted(weighed[weighed["size"] == size].groupby("ridge").rmse.median().items())
        levels = {line.get_ydata()[0] for line in ax.lines if len(line.get_ydata()) == 2}
        assert set(table[(table.ridge == 0) & (table["size"] == size)].groupby("attacker").rmse.median()) <= levels
    adam = curves[(curves.attacker == "Adam") & (curves["size"] == 1e-5) & (curves.epsilon > 0)]
    assert any(list(line.get_ydata()) == list(adam.groupby("epsilon").pulled_miss.median()) for line in miss.lines)


def points(ax) -> list[tuple[float, float]]:
    drawn = [c.get_offsets() for c in ax.collections if len(c.get_offsets()) and hasattr(c, "get_sizes")]
    return sorted(tuple(point) for point in np.concatenate(drawn).tolist() if point != [0.0, 0.0])


def test_published_figures_are_those_of_what_was_found():
    table, curves = fake(images=2)
    levels = np.linspace(0.1, 1, 12)
    images = np.stack([np.full((1, 4, 4), level) for level in levels])
    arrays = {"truth": np.zeros((1, 4, 4)), "found": images, "values": np.geomspace(1e-4, 5, 16)}
    drawn = draw.published(Results({"problems": table, "curves": curves}, arrays), THRESHOLDS)
    assert list(drawn) == ["overview.svg", "pictures.png"]
    shown = [float(ax.images[0].get_array().max()) for ax in drawn["pictures.png"].axes]
    assert shown == pytest.approx([0, *levels[:6], 0, *levels[6:]])
