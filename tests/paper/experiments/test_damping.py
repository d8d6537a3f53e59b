"""The damping experiment: its problems, its table, verdicts that can go either way, and its figures."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch

import i2f
from i2f import claims
from i2f.paper import rows
from i2f.paper.attackers import ATTACKERS
from i2f.paper.experiments import damping
from i2f.paper.experiments import problems as shared
from i2f.paper.figures import damping as draw
from i2f.paper.results import Results
from i2f.paper.sweep import Settings

mpl.use("Agg")

pytestmark = pytest.mark.usefixtures("few_draws")
THRESHOLDS = {"cut": 0.05, "accuracy": 0.05, "factor": 2.0, "order": 0.9, "near": 0.5}
CLAIMS = ["none", "map", "pull", "bayes", "weight", "paper", "order", "ranks", "stopping"]
CONFIG = {"dataset": "mnist", "images": 1, "survey_images": 1, "variances": [1e-6], "prior_weights": []}
CONFIG |= {"smallest": 1e-4, "largest": 100.0, "gauss_newton_steps": 40, "adam_steps": 30}
GRID = [0.0, 1e-4, 0.01, 0.1, 1.0, 10.0]
QUIET = Settings(jobs=1, progress="off")


def test_every_attacker_gets_every_gradient_with_its_own_prior():
    spread = shared.pixels("mnist", None)[1]
    config = CONFIG | {"images": 2, "survey_images": 3, "variances": [1e-5, 1e-3], "prior_weights": [0.1, 1, 10]}
    found = damping.problems(config)
    assert len(found["survey"]) == 3 * 2
    tasks = found["problems"]
    assert len(tasks) == 2 * 2 * 6
    ridges = {t["attacker"]: t["ridge"] * spread for t in tasks if t["size"] == 1e-3}
    assert ridges == pytest.approx(
        {"no prior": 0, "MAP, 0.1ε": 1e-4, "MAP": 1e-3, "MAP, 10ε": 1e-2, "MAP, ε = 1": spread, "Adam": 0}
    )
    assert {t["attacker"] for t in tasks if t["method"] == "dgl"} == {"Adam"}
    assert all(t["budget"] == {"gauss-newton": 40, "dgl": 30}[t["method"]] for t in tasks)
    assert set(ridges) <= set(ATTACKERS)


def test_the_grid_holds_what_is_asked_about():
    grid = damping.grid(1e-8, 100)
    assert len(grid) == 1 + 21  # 0.1, 1 and 10 once
    assert grid == sorted(grid)
    assert {0.0, 0.1, 1.0, 10.0} <= set(grid)


@pytest.fixture
def small(mlp, monkeypatch):
    """The experiment on a network small enough to be checked by hand, with a mean image that is not gray."""
    model, x, y = mlp
    J = i2f.GradientJacobian(model, x, y)
    mean = torch.linspace(0.2, 0.7, 12, dtype=torch.float64)[None]
    monkeypatch.setattr(shared, "jacobian", lambda problem: J)
    monkeypatch.setattr(shared, "pixels", lambda dataset, root: (mean, 0.05))
    return J, mean


def solved(problems, settings=QUIET):
    found = damping.run(problems, settings)
    return [found.tables[name] for name in ("problems", "curves", "survey")], found.arrays


def test_the_table_is_what_linear_algebra_says(small, mlp, twin, tmp_path):
    """Predictions against J by finite differences and NumPy's solver, the Bayes error against random draws; the MAP
    attacker goes where the prediction with the pull says, and not where it says without. Rows that are read again are
    the same."""
    J, mean = small
    problems, store = damping.problems(CONFIG), rows.Store(chunks=tmp_path)
    (table, curves, survey), pictures = solved(problems, Settings(jobs=1, progress="off", store=store))
    rows.save(tmp_path / "published", store.asked)
    store = rows.Store([tmp_path / "published"], solve=False)
    tables, again = solved(problems, Settings(jobs=1, progress="off", store=store))
    for read, found in zip(tables, (table, curves, survey), strict=True):
        pd.testing.assert_frame_equal(read, found)
    assert all(np.array_equal(again[name], pictures[name]) for name in pictures)
    A, truth = twin(*mlp).numpy(), J.x[0].numpy()
    gram, pull = A @ A.T, mean[0].numpy() - truth
    delta = i2f.perturb.gaussian(J.gradient, 1e-6, 0).numpy()
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
    assert at.converged[["no prior", "MAP", "MAP, ε = 1"]].all()
    assert np.array_equal(pictures["truth"], truth)
    assert pictures["found"].shape == (4, 12)
    assert pictures["values"] == pytest.approx(np.linalg.eigvalsh(gram)[::-1], rel=1e-5, abs=1e-9)


def test_adam_starts_at_the_mean_and_the_displacement_is_measured_from_the_truth(small):
    J, mean = small
    found = damping.problems(CONFIG | {"gauss_newton_steps": 1, "adam_steps": 1})
    adam = [t | {"dampings": [1e9]} for t in found["problems"] if t["attacker"] == "Adam"]
    (_, curves, _), pictures = solved(found | {"problems": adam})
    found = pictures["found"][0]
    assert np.abs(found - mean[0].numpy()).max() == pytest.approx(0.1, rel=1e-3)  # a step of Adam's, of its lr
    moved, pull = found - J.x[0].numpy(), mean[0].numpy() - J.x[0].numpy()
    last = curves[curves.epsilon == 1e9].iloc[0]
    assert last.pulled_miss == pytest.approx(np.linalg.norm(pull - moved) / np.linalg.norm(moved))
    assert last.damped_miss == pytest.approx(1)


def fake(damped: float, pulled: float, measured: dict[str, float], images: int = 8, settles: bool = True):
    """Tables in which predictions of a MAP attacker at its own ε are its RMSE times `damped` and `pulled`, and an
    attacker's RMSE is that of `measured` times a factor of the image and the noise."""
    rows, lines, survey = [], [], []
    for image in range(images):
        for size in (1e-5, 1e-3):
            scale, bayes = (1 + image / 10) * (size / 1e-5) ** 0.5, size / 0.05
            common = {"image": image, "size": size, "bayes": bayes}
            ridges = {"no prior": 0.0, "MAP": bayes, "MAP, 10ε": 10 * bayes, "MAP, ε = 1": 1.0, "Adam": 0.0}
            for attacker, ridge in ridges.items():
                rmse = measured[attacker] * scale
                factors = (damped, pulled) if ridge else (1.0, 1.0)
                rows.append(
                    {
                        **common,
                        "attacker": attacker,
                        "method": "dgl" if attacker == "Adam" else "gauss-newton",
                        "ridge": ridge,
                        "rmse": rmse,
                        "mse": rmse**2,
                        "damped_rmse": factors[0] * rmse,
                        "pulled_rmse": factors[1] * rmse,
                        "expected_rmse": rmse,
                        "converged": True,
                        "failed": False,
                    }
                )
                for e in sorted({*GRID, bayes}):
                    miss = abs(np.log10((e + 1e-9) / 0.01)) / 5 if settles else 0.9
                    lines.append(
                        {
                            **common,
                            "attacker": attacker,
                            "epsilon": e,
                            "rmse": rmse,
                            "below": 0.5,
                            "damped_rmse": rmse / (1 + 100 * e) if settles else 1.5 / (rmse * (1 + e)),
                            "pulled_rmse": rmse,
                            "expected_rmse": rmse,
                            "damped_miss": 1.0,
                            "pulled_miss": miss,
                        }
                    )
            predicted = {f"predicted_rmse, ε = {e:g}": scale if settles else 1 / scale for e in damping.PAPER}
            survey.append({**common, "predicted_rmse": scale, **predicted})
    return pd.DataFrame(rows), pd.DataFrame(lines), pd.DataFrame(survey)


ERRORS = {"no prior": 0.02, "MAP": 0.01, "MAP, 10ε": 0.05, "MAP, ε = 1": 0.09, "Adam": 0.03}


def judge(tables) -> list[claims.Claim]:
    return damping.judge(dict(zip(("problems", "curves", "survey"), tables, strict=True)), THRESHOLDS, "mnist")


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        (fake(0.5, 1.01, ERRORS), "holds fails holds holds holds fails holds holds holds"),
        (
            fake(1.01, 0.5, {**ERRORS, "MAP": 0.06}, settles=False),
            "holds holds fails holds fails fails fails fails fails",
        ),
    ],
    ids=["the pull counts", "it does not"],
)
def test_verdicts_follow_the_table(tables, expected):
    found = judge(tables)
    assert [c.id for c in found] == [f"damping-mnist-{name}" for name in CLAIMS]
    assert [c.verdict for c in found] == expected.split()
    assert all(c.n == 8 for c in found)


def judged(tables, name):
    (found,) = (c for c in judge(tables) if c.id.endswith(f"-{name}"))
    return found


def test_each_claim_is_about_the_right_number():
    table, curves, survey = fake(0.5, 1.01, ERRORS)
    assert judged((table, curves, survey), "weight").value == pytest.approx((0.01 / 0.02) ** 2)
    assert judged((table, curves, survey), "stopping").value == pytest.approx(0, abs=1e-6)
    assert judged((table, curves, survey), "paper").value == pytest.approx(11)
    louder = table.assign(expected_rmse=np.where(table["size"] == 1e-3, table.rmse / 2, table.rmse))
    assert judged((louder, curves, survey), "bayes").value == pytest.approx(4)
    off = table.copy()
    off.loc[(off.attacker == "no prior") & (off["size"] == 1e-3), "rmse"] *= 9
    blind = judged((off, curves, survey), "none")
    assert blind.verdict == "holds only when"
    assert blind.within[0] == pytest.approx(0)


def test_an_attack_that_failed_counts_against_its_prediction():
    table, curves, survey = fake(0.5, 1.01, ERRORS)
    table.loc[table.attacker == "MAP", ["rmse", "mse", "failed"]] = [np.nan, np.nan, True]
    curves.loc[curves.attacker == "Adam", ["rmse", "pulled_miss"]] = [np.inf, np.nan]
    assert judged((table, curves, survey), "pull").verdict == "fails"
    assert judged((table, curves, survey), "weight").verdict == "fails"
    assert judged((table, curves, survey), "stopping").verdict == "fails"
    middle = damping.medians(curves)
    assert (middle[middle.attacker == "Adam"].damped_off > 1e6).all()


def test_choices_name_the_epsilon_that_comes_nearest():
    _, curves, _ = fake(0.5, 1.01, ERRORS)
    free = curves.attacker == "no prior"
    curves.loc[free, "damped_rmse"] = curves.rmse * np.where(curves.epsilon == 0.01, 1.25, 8.0)
    found = damping.choices(damping.medians(curves)).loc[("0.001", "no prior")]
    assert found["best ε, damped"] == 0.01
    assert found["off by, damped"] == pytest.approx(1.25)
    assert found["off by, ε = 1"] == found["off by, ε = 0"] == pytest.approx(8)
    known = damping.predicted(damping.medians(curves))
    assert list(known.loc["1e-05"].index) == ["0", "σ²/τ² = 0.0002", "0.1", "1", "10"]


def test_the_overview_draws_every_attack():
    table, curves, _ = fake(0.5, 1.01, ERRORS, images=2)
    middle = damping.medians(curves)
    figure = draw.overview(table, middle, np.geomspace(1e-4, 5, 12))
    quiet, loud, miss, scatter = figure.axes
    weighed = table[table.ridge > 0]
    drawn = [*zip(table.pulled_rmse, table.rmse, strict=True), *zip(weighed.damped_rmse, weighed.rmse, strict=True)]
    assert points(scatter) == sorted(drawn)
    for ax, size in ((quiet, 1e-5), (loud, 1e-3)):
        medians = weighed[weighed["size"] == size].groupby("ridge").rmse.median()
        assert points(ax) == sorted(medians.items())
        levels = {line.get_ydata()[0] for line in ax.lines if len(line.get_ydata()) == 2}
        free = table[(table.ridge == 0) & (table["size"] == size)].groupby("attacker").rmse.median()
        assert set(free) <= levels
    adam = middle[(middle.attacker == "Adam") & (middle["size"] == 1e-3) & (middle.epsilon > 0)]
    assert any(list(line.get_ydata()) == list(adam.pulled_miss) for line in miss.lines)


def test_other_weights_of_the_prior_are_drawn_too():
    table, curves, _ = fake(0.5, 1.01, ERRORS, images=2)
    table.loc[table.attacker == "MAP, 10ε", "attacker"] = "MAP, 3ε"
    loud = draw.overview(table, damping.medians(curves), np.geomspace(1e-4, 5, 12)).axes[3]
    assert "MAP, 3 σ²/τ²" in [text.get_text() for text in loud.get_legend().get_texts()]


def points(ax) -> list[tuple[float, float]]:
    drawn = [c.get_offsets() for c in ax.collections if len(c.get_offsets())]
    return sorted(map(tuple, np.concatenate(drawn).tolist()))


def test_published_figures_are_those_of_what_was_found():
    table, curves, _ = fake(0.5, 1.01, ERRORS, images=2)
    levels = np.linspace(0.1, 1, 10)
    images = np.stack([np.full((1, 4, 4), level) for level in levels])
    arrays = {"truth": np.zeros((1, 4, 4)), "found": images, "values": np.geomspace(1e-4, 5, 16)}
    found = Results({"problems": table, "medians": damping.medians(curves)}, arrays)
    drawn = draw.published(found, THRESHOLDS)
    assert list(drawn) == ["overview.svg", "pictures.png"]
    shown = [float(ax.images[0].get_array().max()) for ax in drawn["pictures.png"].axes]
    assert shown == pytest.approx([0, *levels[[0, 1, 3, 4]], 0, *levels[[5, 6, 8, 9]]])
