"""The lower-bound experiment: its problems, its columns by another route, and verdicts that can go either way."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

import i2f
from i2f.paper import rows
from i2f.paper.experiments import lower_bound
from i2f.paper.experiments import problems as shared
from i2f.paper.figures import lower_bound as draw
from i2f.paper.sweep import Settings

mpl.use("Agg")
pytestmark = pytest.mark.usefixtures("few_draws")
SIZES = [1e-7, 1e-5, 1e-3]
CG = "cg_rmse, 20 steps"
THRESHOLDS = {"tight": 10.0, "order": 0.8, "accuracy": 0.1, "gain": 2.0, "cg_steps": [1, 20]}


CONFIG = {"dataset": "mnist", "images": 3, "inits": ["normal", "uniform"], "linear_inits": ["uniform"]}
CONFIG |= {"variances": SIZES, "attacks": 2, "attacked_variance": 1e-5, "attack_steps": 50, "cg_steps": [1]}


def test_problems_draw_noise_anew_and_attack_the_first_network_only():
    found = pd.DataFrame(lower_bound.problems(CONFIG))
    assert len(found) == 3 * 3 * 3
    for _, network in found.groupby(["model", "init"]):
        assert network.noise_seed.nunique() == 9
    attacked = found[found.attacked]
    assert list(attacked.image) == [0, 1]
    assert set(zip(attacked.model, attacked.init, attacked["size"], strict=True)) == {("lenet", "normal", 1e-5)}


def test_columns_are_what_they_say(mlp, monkeypatch):
    """On a small network, against the singular values of J, which the package never takes."""
    model, x, y = mlp
    J = i2f.GradientJacobian(model, x, y)
    monkeypatch.setattr(shared, "jacobian", lambda problem: J)
    problem = {"noise": "gaussian", "size": 1e-6, "noise_seed": 3, "attacked": False, "cg_steps": [1, 12]}
    (row,) = lower_bound.solve([problem])
    dense = J.dense()
    delta = i2f.perturb.gaussian(J.gradient, 1e-6, seed=3)
    squares = torch.linalg.svdvals(dense).square()
    exact = torch.linalg.lstsq(dense.T, delta, driver="gelsd").solution.norm()  # (J Jᵀ)⁻¹J is the pseudo-inverse of Jᵀ
    image = dense @ delta
    assert row["looseness"] == pytest.approx(float(exact * squares[0] / image.norm()), rel=1e-5)
    assert row["upper_rmse"] == pytest.approx(float(image.norm() / squares[-1]) / 12**0.5, rel=1e-5)
    assert row["expected_rmse"] == pytest.approx(float(1e-6 * squares.reciprocal().mean()) ** 0.5, rel=1e-5)
    assert row["expected_looseness"] == pytest.approx(
        float(squares[0] * (squares.reciprocal().sum() / squares.sum()).sqrt()), rel=1e-5
    )
    first = image.norm() ** 3 / (dense.T @ image).square().sum()  # steepest descent
    assert row["cg_rmse, 1 step"] == pytest.approx(float(first) / 12**0.5, rel=1e-6)
    assert row["bound_rmse"] <= row["cg_rmse, 1 step"] <= row["cg_rmse, 12 steps"] <= row["predicted_rmse"] * (1 + 1e-6)
    assert 1 <= row["directions"] <= 12


def test_rows_are_read_where_they_are_known(tmp_path):
    own = {"images": 1, "inits": ["uniform"], "linear_inits": [], "variances": [1e-5, 1e-7], "attack_steps": 1}
    tables = []
    for solve in (True, False):
        settings = Settings(jobs=1, progress="off", store=rows.Store(chunks=tmp_path, solve=solve))
        found = lower_bound.run(lower_bound.problems(CONFIG | own), settings)
        tables.append(found.tables["problems"])
    pd.testing.assert_frame_equal(*tables)
    assert list(tables[1].attacked) == [True, False]
    assert set(draw.published(found, CONFIG)) == {"overview.svg"}


def test_directions_count_equal_eigenvalues(mlp, monkeypatch):
    J = i2f.GradientJacobian(*mlp)
    monkeypatch.setattr(shared, "jacobian", lambda problem: J)
    values = torch.tensor([1.0, 0.01, 0.01, 0.01]).double()
    monkeypatch.setattr(J, "eigh", lambda: i2f.spectrum.Spectrum(values, torch.eye(4).double()))
    predicted = {"rank": 4, "predicted_rmse": 1.0, "bound_rmse": 0.1, "expected_mse": 1.0}
    problem = {"noise": "gaussian", "size": 1e-6, "attacked": False, "cg_steps": []}
    row = lower_bound._row(problem, predicted)
    assert row["directions"] == pytest.approx(3, rel=0.01)
    assert row["upper_rmse"] == np.inf  # four of twelve: J Jᵀ is singular


def fake(looseness: float, noise: float, error: float, gain: float, images: int = 12) -> pd.DataFrame:
    """A table whose I_lb is I/looseness, its order blurred by `noise`, and whose E[I²] is off by `error`."""
    rng = np.random.default_rng(0)
    rows = []
    for model, init in (("lenet", "uniform"), ("lenet", "normal"), ("lenet", "xavier"), ("linear", "uniform")):
        for image in range(images):
            for k, size in enumerate(SIZES):
                exact = (1 + image) * size**0.5 * {"uniform": 1, "normal": 2, "xavier": 9}[init]
                bound = exact / looseness * float(np.exp(noise * rng.standard_normal()))
                rows.append(
                    {
                        "dataset": "mnist",
                        "model": model,
                        "init": init,
                        "image": image,
                        "size": size,
                        "predicted_rmse": exact,
                        "predicted_mse": exact**2,
                        "bound_rmse": bound,
                        "looseness": exact / bound,
                        "expected_looseness": looseness,
                        "directions": 100.0,
                        "expected_mse": exact**2 * (1 + error),
                        "expected_rmse": exact * (1 + error) ** 0.5,
                        "upper_rmse": 100 * exact,
                        CG: gain * bound,
                        "rmse": exact,
                        "converged": True,
                        "failed": False,
                        "attacked": k == 1 and init == "uniform" and image < 4,
                    }
                )
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("arguments", "failing"),
    [
        ((2, 0.0, 0.01, 3), set()),
        ((200, 0.0, 0.01, 3), {"tight", "tight-linear"}),
        ((0.5, 0.0, 0.5, 1), {"bound", "attack", "trace", "cg"}),
        ((1e40, 20.0, 0.01, 3), {"tight", "tight-linear", "images", "levels", "inits"}),
    ],
)
def test_verdicts_follow_the_table(arguments, failing):
    found = lower_bound.judge({"problems": fake(*arguments)}, THRESHOLDS, "mnist")
    names = {c.id.removeprefix("lower_bound-mnist-"): c.verdict for c in found}
    assert len(names) == len(found) == 10
    assert {name for name, verdict in names.items() if verdict != "holds"} == failing


def test_a_single_network_and_level_has_no_order_over_them():
    table = fake(2, 0.0, 0.01, 3).query("init == 'uniform' and model == 'lenet'")
    table = table[table["size"] == SIZES[0]].assign(attacked=False)
    found = lower_bound.judge({"problems": table}, THRESHOLDS, "mnist")
    assert {"levels", "inits", "tight-linear", "attack"}.isdisjoint(c.id.split("mnist-")[1] for c in found)


def test_median_order_is_spearman_in_every_network_and_level():
    table = fake(2, 1.0, 0.0, 1)
    exact = [spearmanr(g.bound_rmse, g.predicted_rmse).statistic for _, g in table.groupby(["model", "init", "size"])]
    assert lower_bound.median_order(lower_bound.order_over_images(table, "bound_rmse")) == pytest.approx(
        np.median(exact)
    )


def test_summary_takes_medians_of_each_network():
    found = lower_bound.summary(fake(2, 0.0, 0.21, 1.5))
    assert found.index[0] == ("lenet", "uniform")
    assert found["I / I_lb"].tolist() == pytest.approx([2] * 4)
    assert found["√E[I²] / I"].tolist() == pytest.approx([1.1] * 4)
    assert found["I / CG, 20 steps"].tolist() == pytest.approx([4 / 3] * 4)


def test_figure_draws_every_row():
    table = fake(2, 1.0, 0.1, 1.5)
    left, right = draw.overview(table).axes
    drawn = np.concatenate([c.get_offsets() for c in left.collections])
    attacked = table[table.attacked]
    expected = [
        *zip(table.predicted_rmse, table.bound_rmse, strict=True),
        *zip(attacked.rmse, attacked.bound_rmse, strict=True),
    ]
    assert np.array(sorted(map(tuple, drawn))) == pytest.approx(np.array(sorted(expected)))
    assert sum(len(c.get_offsets()) for c in right.collections) == 4 * len(table)  # four estimates of every row
