"""I²F against attacks: the problems, the table's columns by another route, verdicts both ways, every row drawn."""

import numpy as np
import pandas as pd
import pytest

import i2f
from i2f import claims
from i2f.paper import rows
from i2f.paper.attackers import ATTACKERS
from i2f.paper.experiments import influence_vs_attack as experiment
from i2f.paper.figures import influence_vs_attack as draw
from i2f.paper.sweep import Settings

pytestmark = pytest.mark.usefixtures("few_draws")
SETTING = {"dataset": "mnist", "init": "uniform", "weight_seed": 1}
CONFIG = SETTING | {"level": 1e-6, "level_images": 1, "dampings": [0.1], "start_seed": 0, "deep_images": 0}
CONFIG |= {"model": "lenet", "images": 1, "linear_images": 0, "variances": [1e-6], "attackers": ["dgl"]}
CONFIG |= {"gauss_newton_steps": 1, "adam_steps": 1}
THRESHOLDS = {"level": 1e-5, "cut": 0.05, "accuracy": 0.01, "tolerance": 0.1}
THRESHOLDS |= {"order": 0.9, "power": 0.9, "images_order": 0.5}
QUIET = Settings(jobs=1, progress="off")


def test_every_variance_for_the_first_images_and_one_level_for_the_others():
    problems = experiment.noisy(SETTING, {"lenet": 2, "linear": 1}, [1e-7, 1e-5], 1e-5, 4)
    assert [(p["model"], p["image"], p["size"]) for p in problems] == [
        ("lenet", 0, 1e-7),
        ("lenet", 0, 1e-5),
        ("lenet", 1, 1e-7),
        ("lenet", 1, 1e-5),
        ("lenet", 2, 1e-5),
        ("lenet", 3, 1e-5),
        ("linear", 0, 1e-7),
        ("linear", 0, 1e-5),
    ]
    assert all(p["noise_seed"] == p["image"] for p in problems)
    with pytest.raises(ValueError, match="level"):
        experiment.noisy(SETTING, {"lenet": 2}, [1e-7, 1e-5], 1e-6, 4)


def test_who_attacks_what():
    config = CONFIG | {"linear_images": 1, "variances": [1e-7, 1e-5], "level": 1e-5, "level_images": 2}
    config |= {"attackers": experiment.WHO, "gauss_newton_steps": 5, "adam_steps": 6}
    tasks = experiment.problems(config)["problems"]
    met = {name: [(t["model"], t["image"]) for t in tasks if t["attacker"] == name] for name in experiment.WHO}
    assert met["gauss-newton"] == [("lenet", 0), ("lenet", 0), ("lenet", 1), ("linear", 0), ("linear", 0)]
    assert met["dgl"] == [("lenet", 0), ("lenet", 0), ("lenet", 1)]
    assert met["gauss-newton, box"] == met["gs"] == [("lenet", 0), ("lenet", 0)]
    assert {(t["method"], t["budget"]) for t in tasks} == {("gauss-newton", 5), ("dgl", 6), ("gs", 6)}


def on_the_linear_model(attackers, settings=QUIET, **steps):
    config = CONFIG | {"model": "linear", "attackers": attackers} | steps
    return experiment.run(experiment.problems(config), settings).tables["problems"]


def test_either_kind_of_attacker_may_come_alone():
    for attacker in ("gauss-newton", "dgl"):
        assert list(on_the_linear_model([attacker]).attacker) == [attacker]


def test_rows_are_read_where_they_are_known(tmp_path):
    known = [rows.Store(chunks=tmp_path, solve=solve) for solve in (True, False)]
    solved, read = (on_the_linear_model(["dgl"], Settings(jobs=1, progress="off", store=store)) for store in known)
    pd.testing.assert_frame_equal(solved, read)
    assert set(known[1].asked) == {"predictions", "problems"}


def test_the_table_says_what_its_columns_say():
    """On the linear model: I²F as the least squares of Jᵀ d = δ by QR, the damped one as a ridge regression."""
    table = on_the_linear_model(["gauss-newton", "dgl", "gs"], gauss_newton_steps=30, adam_steps=3)
    assert list(table.attacker) == ["gauss-newton", "dgl", "gs"]
    x, y = i2f.data.load("mnist", 1)
    model = i2f.models.build("linear", "mnist", "uniform", seed=1, normalize=False).double()
    J = i2f.GradientJacobian(model, x.double(), y)
    delta = i2f.perturb.gaussian(J.gradient, 1e-6, seed=0).numpy()
    dense = J.dense().numpy()
    Q, R = np.linalg.qr(dense.T)
    exact = np.linalg.solve(R, Q.T @ delta)
    damped = np.linalg.solve(dense @ dense.T + 0.1 * np.eye(784), dense @ delta)
    bound = np.linalg.norm(dense @ delta) / np.linalg.eigvalsh(dense @ dense.T)[-1]
    row = table.iloc[0]
    assert row.predicted_rmse == pytest.approx(np.sqrt(np.mean(exact**2)), rel=1e-6)
    assert row["predicted_rmse, ε = 0.1"] == pytest.approx(np.sqrt(np.mean(damped**2)), rel=1e-6)
    assert row.bound_rmse == pytest.approx(bound / 28, rel=2e-3)
    assert row.rmse == pytest.approx(row.predicted_rmse, rel=0.01)  # an inversion lands where I²F says
    assert table.relative_error.to_numpy() == pytest.approx(abs(table.rmse / table.predicted_rmse - 1).to_numpy())
    assert table.dissimilarity.to_numpy() == pytest.approx(1 - table.ssim.to_numpy())
    assert table.rmse_clamped.to_numpy() == pytest.approx(np.sqrt(table.mse_clamped.to_numpy()), rel=1e-4)
    assert table.rmse.iloc[1] > 0.1  # three steps of Adam recover nothing: the rows are not mixed up


def fake(law=lambda predicted: predicted, images: int = 8) -> pd.DataFrame:
    """A table of attackers whose error is `law` of the predicted one."""
    rows = []
    for model in ("lenet", "linear"):
        for attacker in experiment.WHO if model == "lenet" else ["gauss-newton"]:
            for image in range(images):
                for variance in (1e-7, 1e-5, 1e-3):
                    predicted = 10 * variance**0.5 * (1 + image / images)
                    error = law(predicted)
                    rows.append(
                        {
                            "model": model,
                            "attacker": attacker,
                            "image": image,
                            "variance": variance,
                            "rmse": error,
                            "box": ATTACKERS[attacker].options["box"],
                            "predicted_rmse": predicted,
                            "predicted_rmse, ε = 1": predicted / 2,
                            "bound_rmse": predicted / 100,
                            "relative_error": abs(error / predicted - 1),
                            "rmse_clamped": error,
                            "psnr": -20 * np.log10(error),
                            "ssim": 1 / (1 + error),
                            "dissimilarity": error / (1 + error),
                            "feature_mse": error**2,
                            "converged": True,
                            "failed": False,
                        }
                    )
    return pd.DataFrame(rows)


def judged(table: pd.DataFrame, **further: pd.DataFrame) -> dict[str, claims.Claim]:
    found = experiment.judge({"problems": table, **further}, THRESHOLDS, "mnist")
    assert len({c.id for c in found}) == len(found)
    return {c.id.removeprefix("influence_vs_attack-mnist-"): c for c in found}


def verdicts(table: pd.DataFrame) -> dict[str, str]:
    return {name: claim.verdict for name, claim in judged(table).items()}


def test_everything_holds_where_the_error_is_the_predicted_one():
    assert set(verdicts(fake()).values()) == {"holds"}


def test_everything_fails_where_the_error_has_nothing_to_do_with_it():
    found = verdicts(fake(lambda predicted: 1e-6 / predicted))
    assert set(found.values()) == {"fails"}


def test_the_prediction_may_hold_in_its_regime_alone():
    found = verdicts(fake(lambda predicted: predicted if predicted < 0.06 else 3 * predicted))
    assert found["accuracy"] == "holds only when"  # the worst noise level is off, those below the cut are not
    assert verdicts(fake(lambda predicted: 3 * predicted))["accuracy"] == "fails"
    assert verdicts(fake(lambda p: p if p < 0.02 else 3 * p))["accuracy"] == "fails"  # so is one below the cut
    found = verdicts(fake(lambda predicted: predicted * (1 + (0.005 if predicted < 0.06 else predicted**0.5))))
    assert found["bound-unbounded"] == found["order-dgl"] == "holds"


def test_a_deep_network_has_a_claim_of_its_own():
    def deep(law):
        table = fake(law)
        return judged(fake(), deep=table[table.attacker == "gauss-newton"].assign(model="cnn8x16"))["accuracy-deep"]

    assert deep(lambda predicted: predicted).verdict == "holds"
    assert deep(lambda predicted: 3 * predicted).verdict == "fails"
    assert deep(lambda predicted: predicted).note.startswith("cnn8x16")


def test_deep_problems_are_of_the_network_named():
    config = CONFIG | {"deep_network": "cnn8x16 kaiming softplus", "deep_images": 2, "deep_variances": [1e-12, 1e-10]}
    tasks = experiment.problems(config | {"deep_steps": 3})["deep"]
    assert len(tasks) == 4
    assert {(t["model"], t["init"], t["activation"], t["normalize"]) for t in tasks} == {
        ("cnn8x16", "kaiming", "softplus", True)
    }
    assert {(t["method"], t["budget"]) for t in tasks} == {("gauss-newton", 3)}


@pytest.mark.parametrize("rmse", [np.nan, 1e-3], ids=["no image", "a best image"])
def test_failed_attacks_recovered_nothing(rmse):
    spoiled = fake()
    mine = (spoiled.model == "lenet") & (spoiled.attacker == "gauss-newton") & (spoiled.variance == 1e-5)
    spoiled.loc[mine, ["failed", "rmse"]] = [True, rmse]
    found = judged(spoiled)
    assert found["accuracy"].value == np.inf
    assert found["accuracy"].verdict == "fails"
    assert found["order-gauss-newton"].value < 1
    assert np.isfinite(found["power-gauss-newton"].value)
    assert f"{mine.sum()} failed" in found["images-gauss-newton"].note
    assert np.isfinite(found["accuracy-box"].value)


def test_the_end_of_the_law_lies_between_the_levels_that_it_separates():
    """Relative errors of 0.01, 0.1·10^½ and 1 at predictions of 0.01, 0.1 and 1: it passes 0.1 a share in between."""
    table = pd.DataFrame(
        {"variance": [1, 2, 3], "predicted_rmse": [0.01, 0.1, 1.0], "relative_error": [0.01, 0.1 * 10**0.5, 1.0]}
    )
    assert experiment.end_of_law(table, 0.1) == (pytest.approx(0.01 * 10 ** (1 / 1.5)), True)
    assert experiment.end_of_law(table, 0.001) == (0.0, True)  # held nowhere
    assert experiment.end_of_law(table, 2.0) == (pytest.approx(1.0), False)  # never ended
    lost = table.assign(relative_error=[0.01, np.inf, np.inf])
    assert experiment.end_of_law(lost, 0.1) == (pytest.approx(0.01), True)  # the last level at which it held
    unknown = table.assign(relative_error=[0.01, np.nan, 0.01])
    assert experiment.end_of_law(unknown, 0.1) == (pytest.approx(0.01), True)


def test_a_law_that_holds_nowhere_does_not_reach_far():
    """Off by half at every level, the lowest of them far beyond the cut."""
    table = fake(lambda predicted: 1.5 * predicted)
    table[["predicted_rmse", "rmse"]] *= 100
    end = judged(table)["end"]
    assert (end.value, end.verdict) == (0.0, "fails")


def test_levels_that_stay_below_the_cut_do_not_ask_whether_the_law_reaches_it():
    table = fake()
    (end,) = (
        c
        for c in experiment.judge({"problems": table[table.variance < 1e-5]}, THRESHOLDS, "mnist")
        if c.id.endswith("-end")
    )
    assert np.isnan(end.value)
    assert end.verdict == "inconclusive"


def test_correlations_are_those_of_a_perfect_and_of_a_reversed_ranking():
    assert experiment.correlations(fake())[["I²F", "I_lb", "I²F, ε = 1"]].to_numpy() == pytest.approx(1)
    reverse = experiment.correlations(fake(lambda predicted: 1e-6 / predicted))
    assert reverse["I²F"].to_numpy() == pytest.approx(-1)
    assert (reverse["σ² alone"] > -1).all()


def test_figures_draw_every_attack():
    table = fake()
    left, middle, right = draw.overview(table, 1e-5, 0.05, 0.1).axes
    main = table[table.model == "lenet"]
    assert sum(len(c.get_offsets()) for c in left.collections) == 2 * len(main)  # each with its lower bound
    assert sum(len(c.get_offsets()) for c in right.collections) == len(main) // 3
    second = table[table.attacker.str.startswith("gauss-newton")]
    assert sum(len(line.get_xdata()) for line in middle.lines if len(line.get_xdata()) == 3) == len(second)
    for ax, column in zip(draw.measures(table).axes, ("psnr", "ssim", "feature_mse"), strict=True):
        drawn = np.concatenate([np.asarray(c.get_offsets()[:, 1]) for c in ax.collections])
        assert np.sort(drawn) == pytest.approx(np.sort(main[column].to_numpy()))
