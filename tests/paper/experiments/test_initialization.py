"""The initialisation experiment: its problems, its table, its figure, and verdicts that can go either way."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection

import i2f
from i2f import claims
from i2f.paper import rows
from i2f.paper.experiments import initialization
from i2f.paper.figures import initialization as draw
from i2f.paper.sweep import Settings

mpl.use("Agg")

INITS = ("uniform", "normal", "kaiming", "xavier")
CONFIG = {"inits": [*INITS, "normal-released"], "first_digit": 200, "variances": [1e-3, 1e-6]}
CONFIG |= {"attacked": {"gauss-newton": INITS, "dgl": INITS}, "gauss_newton_steps": 2, "adam_steps": 3}


def test_every_network_meets_every_attacker_with_the_same_noise():
    table = pd.DataFrame(initialization.problems(CONFIG | {"weight_seeds": 3, "digits": 2}))
    counts = table.groupby(["attacker", "init"]).size().unstack()
    for attacker in ("gauss-newton", "dgl"):
        assert (counts.loc[attacker, list(INITS)] == 3 * 2 * 2).all()
    assert counts["normal-released"].dropna().to_dict() == {"none": 3 * 2 * 2}
    assert table.groupby(["image", "weight_seed"]).noise_seed.nunique().max() == 1
    assert table.noise_seed.nunique() == 3 * 2
    attacked = table[table.attacker != "none"]
    assert (attacked.start_seed == attacked.image).all()
    assert not attacked.box.any()
    assert attacked.groupby("attacker").budget.unique().to_dict() == {"gauss-newton": [2], "dgl": [3]}


def test_a_run_gives_the_expectation_and_the_errors_of_every_network(tmp_path):
    sizes = {"weight_seeds": 1, "digits": 1, "variances": [1e-5], "inits": ["normal", "normal-released"]}
    sizes["attacked"] = {"gauss-newton": ["normal"], "dgl": ["normal"]}
    tasks = initialization.problems(CONFIG | sizes)
    known = [rows.Store(chunks=tmp_path, solve=solve) for solve in (True, False)]
    found, again = (initialization.run(tasks, Settings(jobs=1, progress="off", store=store)) for store in known)
    table = found.tables["problems"]
    pd.testing.assert_frame_equal(table, again.tables["problems"])  # read where it is known
    assert set(known[1].asked) == {"predictions", "problems"}
    assert list(table.attacker) == ["gauss-newton", "dgl", "none"]
    assert list(table.steps[:2]) == [2, 3]
    assert table.mse.isna().tolist() == [False, False, True]
    x, y = i2f.data.load("mnist", 1, offset=200, split="train")
    for row in (table.iloc[0], table.iloc[2]):
        model = i2f.models.build("lenet", "mnist", init=row.init, seed=1, normalize=False).double()
        sigma = np.linalg.svd(i2f.GradientJacobian(model, x.double(), y).dense().numpy(), compute_uv=False)
        assert row.expected_mse == pytest.approx(1e-5 * np.mean(sigma**-2.0), rel=1e-6)
        assert row.lambda_max / row.lambda_min == pytest.approx((sigma[0] / sigma[-1]) ** 2, rel=1e-6)
    assert (table.mse_clamped[:2] <= table.mse[:2]).all()


def fake(measured: dict[str, float], expected: dict[str, float], condition: dict[str, float]) -> pd.DataFrame:
    """Twenty weight seeds, two images: an initialisation's MSE is `measured` times its variance, and 10 times that for
    Gauss–Newton, but for a draw of the weights."""
    random, found = np.random.default_rng(0), []
    for seed in range(1, 21):
        for init in (*INITS, "normal-released"):
            own, name = np.exp(0.1 * random.standard_normal()), init.removesuffix("-released")
            for attacker in ("gauss-newton", "dgl") if init in INITS else ("none",):
                found += [
                    {
                        "init": init,
                        "weight_seed": seed,
                        "image": image,
                        "attacker": attacker,
                        "size": size,
                        "expected_mse": own * expected[name] * size,
                        "mse": own * measured[name] * size * (10 if attacker == "gauss-newton" else 1) * (image - 199),
                        "rmse": 1.0,
                        "lambda_max": own * condition[name],
                        "lambda_min": 1.0,
                        "converged": attacker == "gauss-newton",
                        "failed": False,
                    }
                    for image in (200, 201)
                    for size in (1e-6, 1e-3)
                ]
    table = pd.DataFrame(found)
    attack = ["mse", "rmse", "converged", "failed"]
    table[attack] = table[attack].astype(object).where(table.attacker != "none")
    return table.astype({"mse": float, "rmse": float})


UP = {"uniform": 1.0, "normal": 2.0, "kaiming": 400.0, "xavier": 900.0}
DOWN = {"uniform": 900.0, "normal": 400.0, "kaiming": 2.0, "xavier": 1.0}
VIEWS = ("gauss-newton-released", "dgl-released", "gauss-newton", "dgl")


def judge(table: pd.DataFrame) -> dict[str, claims.Claim]:
    found = initialization.judge({"problems": table}, CONFIG)
    assert [c.number for c in found] == [22] * 4 + [23] * 4 + [24] * 4 + [25]
    return {c.id.removeprefix("initialization-"): c for c in found}


def test_everything_holds_as_the_paper_says_and_fails_the_other_way():
    found = judge(fake(UP, DOWN, UP))
    assert set(found) == {f"{name}-{view}" for name in ("uniform", "normal", "anomaly") for view in VIEWS} | {
        "singular"
    }
    assert {c.verdict for c in found.values()} == {"holds"}
    assert {c.verdict for c in judge(fake(DOWN, UP, DOWN)).values()} == {"fails"}
    assert {c.verdict for c in judge(fake(*[dict.fromkeys(UP, 1.0)] * 3)).values()} == {"inconclusive"}


def test_a_difference_is_that_of_the_seeds_mean_logarithms():
    found = judge(fake(UP, DOWN, UP))
    for view in VIEWS:
        assert found[f"uniform-{view}"].value == pytest.approx(np.log(600), abs=0.1)  # geometric mean of 400 and 900
        assert found[f"normal-{view}"].value == pytest.approx(np.log(300), abs=0.1)
        assert found[f"anomaly-{view}"].value == pytest.approx(np.log(2), abs=0.1)
        assert "E[I²]'s own difference -0." in found[f"anomaly-{view}"].note
    assert found["singular"].value == pytest.approx(np.log(600), abs=0.1)
    assert {c.n for c in found.values()} == {20}


def test_a_view_sees_its_own_attacker_and_variance_alone():
    table = fake(UP, DOWN, UP)
    small = (table.attacker == "dgl") & (table["size"] == 1e-6) & (table.init == "uniform")
    table.loc[small, "mse"] = 1e9
    found = judge(table)
    changed = {name for name, claim in found.items() if claim.verdict != "holds"}
    assert changed == {"uniform-dgl-released", "anomaly-dgl-released"}
    assert "under noise of variance 1e-06" in found["uniform-dgl-released"].statement
    assert "as a standard deviation" in found["uniform-dgl-released"].note
    assert "dgl" in found["uniform-dgl-released"].attacker


def test_unfinished_attacks_decide_nothing_but_at_the_published_budget():
    table = fake(UP, DOWN, UP)
    table.loc[(table.init == "xavier") & (table.weight_seed <= 10), "converged"] = False
    found = judge(table)
    for name in ("uniform", "normal"):
        assert found[f"{name}-gauss-newton"].verdict == "inconclusive"
        assert "finished" in found[f"{name}-gauss-newton"].note
        assert found[f"{name}-dgl"].verdict == "holds"
    assert found["anomaly-gauss-newton"].verdict == "holds"


def test_failed_attacks_have_no_logarithm_and_too_many_of_them_no_verdict():
    table = fake(UP, DOWN, UP)
    few = (table.attacker != "none") & (table.init == "uniform") & (table.weight_seed == 1) & (table.image == 200)
    table.loc[few, ["mse", "rmse", "converged", "failed"]] = [np.nan, np.nan, False, True]
    found = judge(table)
    assert found["uniform-dgl"].n == 20
    assert {c.verdict for c in found.values()} == {"holds"}
    assert "120 attacks of 3 steps, 1 failed" in found["uniform-dgl"].note
    assert "119 of 120 attacks converged, 1 failed" in found["uniform-gauss-newton"].note
    many = (table.attacker != "none") & (table.init == "uniform") & (table.image == 200)
    table.loc[many, ["mse", "rmse", "converged", "failed"]] = [np.nan, np.nan, False, True]
    assert judge(table)["anomaly-dgl"].verdict == "inconclusive"


def test_medians_are_those_of_their_draws():
    table = fake(UP, DOWN, UP)
    shown = initialization.errors(table)
    rows = table[(table.init == "kaiming") & (table["size"] == 1e-3)]
    assert shown.loc[(1e-3, "kaiming"), "E[I²]/dₓ"] == pytest.approx(rows.expected_mse.median())
    assert shown.loc[(1e-3, "kaiming"), "dgl, MSE"] == pytest.approx(rows.mse[rows.attacker == "dgl"].median())
    assert shown["gauss-newton, converged"].tolist() == [1.0] * 8
    spectra = initialization.spectra(table)
    assert spectra.loc["normal", "mean 1/λ"] == pytest.approx(400, rel=0.1)
    assert spectra.loc["normal-released", "λ_max/λ_min"] == pytest.approx(2, rel=0.1)


def test_the_figure_draws_every_seed():
    table = fake(UP, DOWN, UP)
    newton, adam, condition = draw.overview(table).axes
    for ax, attacker in ((newton, "gauss-newton"), (adam, "dgl")):
        logs = table[table.attacker == attacker].assign(log=lambda t: np.log(t.mse) / 2)
        there = np.exp(logs.groupby(["init", "size", "weight_seed"]).log.mean())
        drawn = np.concatenate([np.asarray(c.get_offsets())[:, 1] for c in ax.collections])
        assert np.sort(drawn) == pytest.approx(np.sort(there))
    drawn = np.concatenate(
        [np.asarray(c.get_offsets())[:, 1] for c in condition.collections if isinstance(c, PathCollection)]
    )
    networks = table[(table.init != "normal-released")].drop_duplicates(["init", "weight_seed"])
    assert np.sort(drawn) == pytest.approx(np.sort(networks.lambda_max))


def test_an_attacker_who_was_not_run_leaves_its_claims_open():
    tasks = initialization.problems(CONFIG | {"attacked": {"gauss-newton": INITS[:2]}, "weight_seeds": 2, "digits": 1})
    assert {(task["attacker"], task["init"]) for task in tasks} == {
        *(("gauss-newton", init) for init in INITS[:2]),
        *(("none", init) for init in (*INITS[2:], "normal-released")),
    }
    table = fake(UP, DOWN, UP)
    found = judge(table[table.attacker != "dgl"])
    for name, claim in found.items():
        assert claim.verdict == ("not run" if "dgl" in name else "holds"), name
    assert found["uniform-dgl"].note == "cost: 3 steps on each gradient"
    few = judge(table[(table.attacker != "gauss-newton") | table.init.isin(INITS[:2])])
    assert {name for name, claim in few.items() if claim.verdict == "not run"} == {
        f"{name}-gauss-newton{suffix}" for name in ("uniform", "normal") for suffix in ("", "-released")
    }
    assert len(draw.overview(table[table.attacker != "dgl"]).axes) == 2
