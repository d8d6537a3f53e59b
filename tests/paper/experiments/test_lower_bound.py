"""The lower-bound experiment: its problems, its columns by another route, and verdicts that can go either way."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

import i2f
from i2f.paper import estimates, rows
from i2f.paper.experiments import lower_bound
from i2f.paper.experiments import problems as shared
from i2f.paper.figures import lower_bound as draw
from i2f.paper.sweep import Settings

mpl.use("Agg")
CG = "cg_rmse, 20 steps"
CONFIG = {"digits": 3, "first_digit": 200, "weight_seeds": 5, "inits": ["normal", "uniform"]}
CONFIG |= {"linear_inits": ["uniform"], "variance": 1e-5, "cg_steps": [1, 20]}
THRESHOLDS = CONFIG | {"tight": 10.0, "order": 0.7, "gain": 2.0, "inits": ["uniform"]}


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(estimates.resampled, "__defaults__", (100,))


def test_every_network_meets_the_same_digits_under_seeds_in_rotation():
    found = pd.DataFrame(lower_bound.problems(CONFIG | {"digits": 7}))
    networks = found.groupby(["model", "init"], sort=False)
    assert list(networks.groups) == [("lenet", "normal"), ("lenet", "uniform"), ("linear", "uniform")]
    for _, mine in networks:
        assert sorted(mine.image) == list(range(200, 207))
        assert (mine.weight_seed == 1 + mine.image % 5).all()
        assert mine.noise_seed.nunique() == 7
    assert set(found["size"]) == {1e-5}


def test_columns_are_what_they_say(mlp, monkeypatch):
    """On a small network, against the singular values of J, which the package never takes."""
    model, x, y = mlp
    J = i2f.GradientJacobian(model, x, y)
    monkeypatch.setattr(shared, "jacobian", lambda problem: J)
    problem = {"noise": "gaussian", "size": 1e-6, "noise_seed": 3, "cg_steps": [1, 12]}
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
    tables = []
    for solve in (True, False):
        settings = Settings(jobs=1, progress="off", store=rows.Store(chunks=tmp_path, solve=solve))
        found = lower_bound.run(lower_bound.problems(CONFIG | {"inits": [], "digits": 2}), settings)
        tables.append(found.tables["problems"])
    pd.testing.assert_frame_equal(*tables)
    assert list(tables[1].image) == [200, 201]
    assert set(draw.published(found, CONFIG)) == {"overview.svg"}


def test_directions_count_equal_eigenvalues(mlp, monkeypatch):
    J = i2f.GradientJacobian(*mlp)
    monkeypatch.setattr(shared, "jacobian", lambda problem: J)
    values = torch.tensor([1.0, 0.01, 0.01, 0.01]).double()
    monkeypatch.setattr(J, "eigh", lambda: i2f.spectrum.Spectrum(values, torch.eye(4).double()))
    predicted = {"rank": 4, "predicted_rmse": 1.0, "bound_rmse": 0.1, "expected_mse": 1.0}
    problem = {"noise": "gaussian", "size": 1e-6, "cg_steps": []}
    row = lower_bound._row(problem, predicted)
    assert row["directions"] == pytest.approx(3, rel=0.01)
    assert row["upper_rmse"] == np.inf  # four of twelve: J Jᵀ is singular


def fake(looseness=5.0, noise=0.0, gain=3.0, images=100) -> pd.DataFrame:
    """A table whose I_lb is I/looseness, the order of images blurred by `noise`; gain: of conjugate gradients."""
    rng = np.random.default_rng(0)
    found = []
    for model, init in (("lenet", "uniform"), ("lenet", "normal"), ("linear", "uniform")):
        for image in range(images):
            exact = 0.01 * (1 + image / images) * {"uniform": 1, "normal": 2}[init]
            bound = exact / looseness * float(np.exp(noise * rng.standard_normal()))
            found.append(
                {
                    "model": model,
                    "init": init,
                    "image": image,
                    "weight_seed": 1 + image % 5,
                    "predicted_rmse": exact,
                    "bound_rmse": bound,
                    "looseness": exact / bound,
                    "expected_looseness": looseness,
                    "directions": 100.0,
                    "expected_rmse": exact * 1.1,
                    "upper_rmse": 100 * exact,
                    CG: gain * bound,
                }
            )
    return pd.DataFrame(found)


@pytest.mark.parametrize(
    ("table", "verdicts"),
    [
        ({}, "holds holds holds"),
        ({"looseness": 50.0}, "fails holds holds"),
        ({"gain": 1.5}, "holds holds fails"),
        ({"noise": 9.0, "looseness": 1e9}, "fails fails holds"),
        ({"images": 5}, "inconclusive inconclusive inconclusive"),
    ],
)
def test_verdicts_follow_the_table(table, verdicts):
    found = lower_bound.judge({"problems": fake(**table)}, THRESHOLDS)
    assert [c.id for c in found] == ["lower_bound-tight", "lower_bound-order", "lower_bound-cg"]
    assert [(c.number, c.ledger) for c in found] == [(13, "paper"), (14, "paper"), (33, "beyond")]
    assert " ".join(c.verdict for c in found) == verdicts


def test_claims_are_about_the_first_network_alone():
    table = fake()
    others = (table.init != "uniform") | (table.model != "lenet")
    table.loc[others, "looseness"] = 1e3
    assert {c.verdict for c in lower_bound.judge({"problems": table}, THRESHOLDS)} == {"holds"}
    found = lower_bound.judge({"problems": table}, THRESHOLDS | {"inits": ["normal"]})
    assert found[0].verdict == "fails"
    assert "normal weights" in found[0].statement


def test_order_is_spearmans_within_a_weight_seed():
    """Seeds may differ in level."""
    table = fake(noise=0.2).query("model == 'lenet' and init == 'uniform'")
    exact = [spearmanr(one.bound_rmse, one.predicted_rmse).statistic for _, one in table.groupby("weight_seed")]
    shifted = table.assign(bound_rmse=table.bound_rmse / 1000.0**table.weight_seed)
    assert 0.3 < np.mean(exact) < 0.99
    for one in (table, shifted):
        assert lower_bound.order(one, "bound_rmse").value == pytest.approx(np.mean(exact))


def test_summary_takes_the_geometric_means_of_each_network():
    table = fake(looseness=2.0, gain=1.5)
    table["bound_rmse"] *= np.where(table.image % 2, 4.0, 1.0)
    found = lower_bound.summary(table)
    assert found.index[0] == ("lenet", "uniform")
    assert found["estimate / I"]["I_lb, Eq. 5"].tolist() == pytest.approx([1] * 3)
    assert found["estimate / I"]["√E[I²]"].tolist() == pytest.approx([1.1] * 3)
    assert found["estimate / I"]["CG, 20 steps"].tolist() == pytest.approx([0.75] * 3)
    assert found["Spearman with I"]["√E[I²]"].tolist() == pytest.approx([1] * 3)
    assert found["spectrum"]["directions"].tolist() == pytest.approx([100] * 3)


def test_figure_draws_every_image_and_the_medians_of_every_estimate():
    table = fake(noise=0.3)
    left, right = draw.overview(table).axes
    drawn = np.concatenate([c.get_offsets() for c in left.collections])
    expected = zip(table.predicted_rmse, table.bound_rmse, strict=True)
    assert np.array(sorted(map(tuple, drawn))) == pytest.approx(np.array(sorted(expected)))
    medians = sorted(float(line.get_xdata()[0]) for line in right.lines[1:])
    ratios = table[list(lower_bound.named(table).values())].div(table.predicted_rmse, axis=0)
    assert medians == pytest.approx(np.sort(ratios.groupby([table.model, table.init]).median().to_numpy().ravel()))
    singular = draw.overview(table.assign(upper_rmse=np.inf)).axes[1]
    assert len(singular.lines) == len(right.lines) - 3
