"""The initialisation experiment: its problems, its table, its figure, and verdicts that can go either way."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

import i2f
from i2f.paper import rows
from i2f.paper.experiments import initialization
from i2f.paper.figures import initialization as draw
from i2f.paper.sweep import Settings

mpl.use("Agg")

pytestmark = pytest.mark.usefixtures("few_draws")
INITS = ("uniform", "normal", "kaiming", "xavier")
CONFIG = {"dataset": "mnist", "unattacked": ["normal-released"]}
CONFIG |= {"gauss_newton_steps": 2, "dgl_steps": 3, "box_steps": 4, "box_seeds": 0}
THRESHOLDS = {"variances": [1e-3, 1e-5], "share": 0.9, "correlation": 0.8, "accuracy": 0.1, "cut": 0.05}


def test_every_network_meets_every_attacker_with_the_same_noise():
    sizes = {"weight_seeds": 3, "images": 2, "variances": [1e-3, 1e-5], "noise_seeds": 2, "box_seeds": 1}
    found = initialization.problems(CONFIG | {"inits": INITS} | sizes)
    table = pd.DataFrame(found)
    counts = table.groupby(["attacker", "init"]).size().unstack()
    assert (counts.loc["gauss-newton", list(INITS)] == 3 * 2 * 2 * 2).all()
    assert (counts.loc["dgl", list(INITS)] == 3 * 2 * 2 * 2).all()
    assert (counts.loc["gauss-newton, box", list(INITS)] == 1 * 2 * 1 * 2).all()
    assert counts["normal-released"].dropna().to_dict() == {"none": 3 * 2 * 2 * 2}
    bounded = table[table.attacker == "gauss-newton, box"]
    assert set(bounded["size"]) == {1e-3}
    assert set(bounded.budget) == {4}
    assert bounded.box.all()
    assert not table[table.attacker == "dgl"].box.any()


def test_a_run_gives_the_expectation_and_the_errors_of_every_network(tmp_path):
    sizes = {"weight_seeds": 1, "images": 1, "variances": [1e-5], "noise_seeds": 1}
    tasks = initialization.problems(CONFIG | {"inits": ["normal"]} | sizes)
    found, again = (
        initialization.run(tasks, Settings(jobs=1, progress="off", store=rows.Store(chunks=tmp_path, solve=solve)))
        for solve in (True, False)
    )
    table = found.tables["problems"]
    pd.testing.assert_frame_equal(table, again.tables["problems"])  # read where it is known
    assert set(draw.published(found, CONFIG)) == {"overview.svg"}
    assert list(table.attacker) == ["gauss-newton", "dgl", "none"]
    assert list(table.steps[:2]) == [2, 3]
    assert table.mse.isna().tolist() == [False, False, True]
    x, y = i2f.data.load("mnist", 1)
    for row in (table.iloc[0], table.iloc[2]):
        model = i2f.models.build("lenet", "mnist", init=row.init, seed=1, normalize=False).double()
        sigma = np.linalg.svd(i2f.GradientJacobian(model, x.double(), y).dense().numpy(), compute_uv=False)
        assert row.expected_mse == pytest.approx(1e-5 * np.mean(sigma**-2.0), rel=1e-6)
        assert row.mean_inverse_sigma == pytest.approx(np.mean(1 / sigma), rel=1e-6)
    assert (table.mse_clamped[:2] <= table.mse[:2]).all()


def fake(expected: dict[str, float], measured: dict[str, float], seeds: int = 6) -> pd.DataFrame:
    """A table in which an initialisation's MSE is `measured` times its variance, whatever the attacker."""
    rows = []
    for seed in range(1, seeds + 1):
        for init in INITS:
            for size in (1e-3, 1e-5):
                for attacker in ("gauss-newton", "dgl"):
                    own = 1 + 0.01 * seed
                    predicted, mse = own * expected[init] * size, own * measured[init] * size
                    rows.append(
                        {
                            "init": init,
                            "weight_seed": seed,
                            "attacker": attacker,
                            "image": 0,
                            "size": size,
                            "noise_seed": 0,
                            "expected_mse": predicted,
                            "predicted_rmse": predicted**0.5,
                            "mean_inverse_sigma": own * expected[init] ** 0.5,
                            "mse": mse,
                            "rmse": mse**0.5,
                            "mse_clamped": min(mse, 1.0),
                            "lambda_max": 1.0,
                            "lambda_min": 1e-3,
                            "converged": seed < seeds,
                            "failed": False,
                        }
                    )
    return pd.DataFrame(rows)


UP = {"uniform": 1.0, "normal": 2.0, "kaiming": 400.0, "xavier": 900.0}
DOWN = {"uniform": 900.0, "normal": 400.0, "kaiming": 2.0, "xavier": 1.0}


@pytest.mark.parametrize(
    ("expected", "measured", "holding"),
    [
        (UP, UP, {"riskiest": 5, "normal": 0, "anomaly": 4, "order": 4, "prediction": 1}),
        (DOWN, DOWN, {"riskiest": 0, "normal": 2, "anomaly": 0, "order": 4, "prediction": 1}),
        (DOWN, UP, {"riskiest": 4, "normal": 2, "anomaly": 4, "order": 0, "prediction": 0}),
    ],
)
def test_verdicts_follow_the_table(expected, measured, holding):
    found = initialization.judge({"problems": fake(expected, measured)}, THRESHOLDS, "mnist")
    assert len({c.id for c in found}) == len(found) == 5 + 2 + 4 + 4 + 1
    held = [c.id.split("-")[2] for c in found if c.verdict == "holds"]
    assert {name: held.count(name) for name in holding} == holding


def test_a_ranking_that_only_small_noise_shows_holds_only_there():
    table = fake(UP, UP)
    table.loc[(table["size"] == 1e-3) & (table.init == "uniform"), ["mse", "mse_clamped"]] = 5.0
    found = {c.id: c for c in initialization.judge({"problems": table}, THRESHOLDS, "mnist")}
    claim = found["initialization-mnist-riskiest-dgl"]
    assert claim.sentence == "holds only when the noise has variance 1e-05"
    assert claim.value == 0


def test_a_tie_and_an_unknown_error_are_no_lead():
    seeds = pd.DataFrame(
        {"weight_seed": range(4), "normal": [2.0, 2, 2, 2], "uniform": [1.0, 1, np.nan, 3], "xavier": [3.0, 1, 3, 3]}
    )
    assert initialization.leader_share(seeds) == 0.25


def test_medians_are_those_of_their_draws():
    table = fake(UP, DOWN)
    shown = initialization.medians(table)
    assert shown.loc[(1e-3, "kaiming"), "E[I²]/dₓ"] == pytest.approx(1e-3 * 400 * 1.035)
    assert shown.loc[(1e-3, "uniform"), "dgl, raw"] == pytest.approx(1e-3 * 900 * 1.035)
    assert initialization.spectra(table).loc["normal", "mean 1/λ"] == pytest.approx(2 * 1.035)


def test_the_figure_draws_every_attack():
    table = fake(UP, DOWN)
    figure = draw.overview(table)
    assert len(figure.axes) == 4
    for ax, attacker, column in zip(
        figure.axes, ("gauss-newton", "gauss-newton", "dgl", "dgl"), ("mse", "mse_clamped") * 2, strict=True
    ):
        rows = table[table.attacker == attacker]
        drawn = np.concatenate([c.get_offsets() for c in ax.collections])
        there = np.sqrt(rows[["expected_mse", column]].to_numpy())
        assert np.allclose(sorted(map(tuple, drawn)), sorted(map(tuple, there)))
    hollow = [c for c in figure.axes[0].collections if (c.get_facecolors()[:, :3] == 1).all(axis=1).any()]
    assert len(hollow) == len(INITS) * 2
