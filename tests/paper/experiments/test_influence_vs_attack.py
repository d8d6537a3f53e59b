"""I²F against attacks: the problems, the table's columns by another route, verdicts both ways, every row drawn."""

import numpy as np
import pandas as pd
import pytest

import i2f
from i2f import claims
from i2f.paper import estimates, rows
from i2f.paper.attackers import ATTACKERS
from i2f.paper.experiments import influence_vs_attack as experiment
from i2f.paper.figures import influence_vs_attack as draw
from i2f.paper.sweep import Settings

NOBODY = dict.fromkeys(("digits", "first_order_digits", "law_digits", "box_digits", "deep_digits", "photographs"), 0)
CONFIG = NOBODY | {"first_digit": 200, "level": 1e-5, "variances": [1e-7, 1e-5, 1e-3], "box_variance": 1e-3}
CONFIG |= {"deep_network": "cnn8x16 kaiming softplus", "deep_variance": 1e-10, "photograph_variance": 1e-7}
CONFIG |= {"init": "uniform", "weight_seeds": 5, "gauss_newton_steps": 30, "adam_steps": 3}
THRESHOLDS = CONFIG | {"cut": 0.05, "tolerance": 0.1, "same_low": 0.98, "same_high": 1.02, "order": 0.7}
QUIET = Settings(jobs=1, progress="off")


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(estimates.resampled, "__defaults__", (100,))


def test_who_attacks_what():
    parts = {"digits": 7, "first_order_digits": 3, "law_digits": 2, "box_digits": 1, "deep_digits": 1, "photographs": 1}
    tasks = experiment.problems(CONFIG | parts)
    met = {who: [] for who in experiment.WHO}
    for p in tasks:
        if (p["dataset"], p["model"]) == ("mnist", "lenet"):
            met[p["attacker"]].append((p["image"], p["size"]))
            assert p["weight_seed"] == 1 + p["image"] % 5  # in rotation
            assert (p["method"], p["box"]) == tuple(ATTACKERS[p["attacker"]].options.values())
    law = [(image, size) for image in (200, 201) for size in (1e-7, 1e-3)]
    assert sorted(met["gauss-newton"]) == sorted([(image, 1e-5) for image in range(200, 207)] + law)
    assert sorted(met["dgl"]) == sorted(met["gs"]) == [(200, 1e-5), (201, 1e-5), (202, 1e-5)]
    assert met["gauss-newton, box"] == [(200, 1e-3)]
    (deep,) = (p for p in tasks if p["model"] != "lenet")
    assert [deep[name] for name in ("model", "init", "activation", "normalize", "size")] == [
        *CONFIG["deep_network"].split(),
        True,
        1e-10,
    ]
    assert [(p["image"], p["weight_seed"]) for p in tasks if p["dataset"] == "cifar10"] == [(0, s) for s in range(1, 6)]
    assert {p["budget"] for p in tasks if p["attacker"] in ("dgl", "gs")} == {3}


def test_no_two_gradients_share_their_noise_unless_they_are_levels_of_one():
    tasks = experiment.problems(CONFIG | {"digits": 7, "law_digits": 2, "photographs": 2})
    own = {(p["dataset"], p["image"], p["weight_seed"]) for p in tasks}
    assert len({(p["dataset"], p["noise_seed"]) for p in tasks}) == len(own) < len(tasks)


@pytest.fixture(scope="module")
def two():
    """One digit under Gauss–Newton and one step of Adam, on a linear layer in place of LeNet."""
    tasks = experiment.problems(CONFIG | {"digits": 1, "first_order_digits": 1, "first_digit": 0})
    return [{**p, "model": "linear"} for p in tasks if p["attacker"] != "gs"]


def test_the_table_says_what_its_columns_say(two):
    """I²F as the least squares of Jᵀ d = δ by QR."""
    table = experiment.run(two, QUIET).tables["problems"]
    assert list(table.attacker) == ["gauss-newton", "dgl"]
    x, y = i2f.data.load("mnist", 1, split="train")
    model = i2f.models.build("linear", "mnist", "uniform", seed=1, normalize=False).double()
    J = i2f.GradientJacobian(model, x.double(), y)
    delta = i2f.perturb.gaussian(J.gradient, 1e-5, seed=1000).numpy()
    dense = J.dense().numpy()
    Q, R = np.linalg.qr(dense.T)
    exact = np.linalg.solve(R, Q.T @ delta)
    bound = np.linalg.norm(dense @ delta) / np.linalg.eigvalsh(dense @ dense.T)[-1]
    row = table.iloc[0]
    assert row.predicted_rmse == pytest.approx(np.sqrt(np.mean(exact**2)), rel=1e-6)
    assert row.bound_rmse == pytest.approx(bound / 28, rel=2e-3)
    assert row.rmse == pytest.approx(row.predicted_rmse, rel=0.01)  # an inversion lands where I²F says
    assert table.predicted_rmse.nunique() == 1  # both attacks are on one gradient
    assert table.relative_error.to_numpy() == pytest.approx(abs(table.rmse / table.predicted_rmse - 1).to_numpy())
    assert table.dissimilarity.to_numpy() == pytest.approx(1 - table.ssim.to_numpy())
    assert table.rmse_clamped.to_numpy() == pytest.approx(np.sqrt(table.mse_clamped.to_numpy()), rel=1e-4)
    assert table.rmse.iloc[1] > 0.1  # three steps of Adam recover nothing: the rows are not mixed up


def test_rows_are_read_where_they_are_known(two, tmp_path):
    known = [rows.Store(chunks=tmp_path, solve=solve) for solve in (True, False)]
    tasks = [p for p in two if p["attacker"] == "dgl"]
    solved, read = (
        experiment.run(tasks, Settings(jobs=1, progress="off", store=store)).tables["problems"] for store in known
    )
    pd.testing.assert_frame_equal(solved, read)
    assert set(known[1].asked) == {"predictions", "problems"}


def fake(law=lambda predicted, image: predicted, images: int = 40) -> pd.DataFrame:
    """A table of attackers whose error is `law` of the predicted one and of the image."""
    found = []
    for subject, attackers in (("digits", experiment.WHO), ("digits, deep", ["gauss-newton"])):
        for attacker in attackers:
            for image in range(200, 200 + images):
                for variance in (1e-7, 1e-5, 1e-3):
                    predicted = 10 * variance**0.5 * (1 + (image - 200) / images)
                    error = law(predicted, image)
                    found.append(
                        {
                            "subject": subject,
                            "dataset": "mnist",
                            "attacker": attacker,
                            "image": image,
                            "weight_seed": 1 + image % 5,
                            "variance": variance,
                            "rmse": error,
                            "predicted_rmse": predicted,
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
    return pd.DataFrame(found)


def judged(table: pd.DataFrame) -> dict[str, claims.Claim]:
    found = experiment.judge({"problems": table}, THRESHOLDS)
    assert len({c.id for c in found}) == len(found)
    return {c.id.removeprefix("influence_vs_attack-"): c for c in found}


def noisy(predicted, image):
    """A law that scatters by 1% around the prediction."""
    return predicted * (1 + 0.01 * np.sin(image))


def test_everything_holds_where_the_error_is_the_predicted_one():
    found = judged(fake(noisy, images=200))
    verdicts = {name: claim.verdict for name, claim in found.items()}
    assert verdicts.pop("accuracy-resnet18") == "not run"
    assert verdicts.pop("box") == "inconclusive"  # no better, and no worse
    assert set(verdicts.values()) == {"holds"}
    assert [found[f"order-{who}"].number for who in ("gauss-newton", "dgl", "gs")] == [9, 10, 11]
    assert found["end"].value > 0.4  # not within the levels
    assert found["accuracy"].n == 200
    assert judged(fake(noisy))["bound"].verdict == "inconclusive"  # 40 images cannot show a share below 2%


def test_everything_fails_where_the_error_has_nothing_to_do_with_it():
    found = judged(fake(lambda predicted, image: 1e-6 / predicted))
    failed = {name for name, claim in found.items() if claim.verdict == "fails"}
    assert failed == set(found) - {"accuracy-resnet18", "box"}
    assert found["box"].verdict == "holds"
    assert found["end"].value == 0.0


@pytest.mark.parametrize(
    ("shift", "verdict"), [(1.01, "holds"), (1.05, "fails"), (0.95, "fails"), (1.02, "inconclusive")]
)
def test_equal_means_that_the_whole_interval_is_within_the_margin(shift, verdict):
    found = judged(fake(lambda predicted, image: shift * noisy(predicted, image)))["accuracy"]
    assert found.verdict == verdict
    assert found.value == pytest.approx(shift, rel=2e-3)


def test_what_lies_beyond_the_regime_does_not_count_for_equality_and_ends_the_law():
    found = judged(fake(lambda predicted, image: predicted if predicted < 0.06 else 3 * predicted))
    assert found["accuracy"].verdict == "holds"
    assert 0.06 < found["end"].value < 0.4
    found = judged(fake(lambda predicted, image: predicted if predicted < 0.02 else 3 * predicted))
    assert found["accuracy"].verdict == found["end"].verdict == "fails"


def test_an_attack_that_did_not_finish_decides_nothing():
    table = fake(noisy)
    mine = (table.attacker == "gauss-newton") & (table.subject == "digits")
    few = table.copy()
    few.loc[mine & (few.image == 200), ["converged", "rmse"]] = [False, 9.0]
    assert judged(few)["accuracy"].verdict == "holds"
    assert judged(few)["accuracy"].n == 39
    many = table.copy()
    many.loc[mine & (many.image < 210), ["converged", "rmse"]] = [False, 9.0]
    assert judged(many)["accuracy"].verdict == "inconclusive"
    assert "only 69% of the attacks finished" in judged(many)["accuracy"].note
    adam = table.assign(converged=table.converged & (table.attacker != "dgl"))
    assert judged(adam)["order-dgl"].verdict == "holds"  # at its published budget


@pytest.mark.parametrize("rmse", [np.nan, 1e-3], ids=["no image", "a best image"])
def test_failed_attacks_recovered_nothing(rmse):
    table = fake(noisy)
    table.loc[(table.attacker == "dgl") & (table.image < 204), ["failed", "converged", "rmse"]] = [True, False, rmse]
    found = judged(table)
    assert found["order-dgl"].n == 40  # they are the worst of all
    assert "failed" in found["order-dgl"].note
    assert found["bound"].value == 0.0  # an image that was not recovered is not nearer than the bound


def test_an_attacker_that_nobody_ran_is_not_run():
    table = fake(noisy, images=200)
    found = judged(table[~table.attacker.isin(["dgl", "gs"])])
    assert [found[f"order-{who}"].verdict for who in ("gauss-newton", "dgl", "gs")] == ["holds", "not run", "not run"]
    assert found["order-gs"].note == "cost: 3 steps on each gradient"


def test_the_end_of_the_law_lies_between_the_levels_that_it_separates():
    """Relative errors of 0.01, 0.1·10^½ and 1 at predictions of 0.01, 0.1 and 1: it passes 0.1 a share in between."""
    table = pd.DataFrame(
        {
            "image": 0,
            "variance": [1, 2, 3],
            "predicted_rmse": [0.01, 0.1, 1.0],
            "relative_error": [0.01, 0.1 * 10**0.5, 1.0],
            "converged": True,
        }
    )
    assert experiment.ends(table, 0.1).end[0] == pytest.approx(0.01 * 10 ** (1 / 1.5))
    assert experiment.ends(table, 0.001).end[0] == 0.0  # held nowhere
    assert list(experiment.ends(table, 2.0).loc[0]) == [pytest.approx(1.0), True]  # never ended: the highest level
    lost = table.assign(converged=[True, False, True])
    assert list(experiment.ends(lost, 10.0).loc[0]) == [pytest.approx(0.01), False]  # nobody knows what came next
    late = table.assign(converged=[True, True, False])
    assert list(experiment.ends(late, 0.1).loc[0]) == [pytest.approx(0.01 * 10 ** (1 / 1.5)), True]
    unknown = table.assign(relative_error=[0.01, np.nan, 0.01])
    assert experiment.ends(unknown, 0.1).end[0] == pytest.approx(0.01)


def test_correlations_are_those_of_a_perfect_and_of_a_reversed_ranking():
    assert experiment.correlations(fake())[["I²F", "I_lb"]].to_numpy() == pytest.approx(1)
    reverse = experiment.correlations(fake(lambda predicted, image: 1e-6 / predicted))
    assert reverse["I²F"].to_numpy() == pytest.approx(-1)
    assert (reverse["σ² alone"] > -1).all()


def test_figures_draw_every_attack():
    table = fake(noisy)
    left, middle, right = draw.overview(table, 1e-5, 0.05, 0.1).axes
    digits = table[table.subject == "digits"]
    drawn = sum(len(c.get_offsets()) for c in left.collections)
    assert drawn == 2 * len(digits) + (table.subject != "digits").sum()  # digits with their lower bounds
    assert sum(len(c.get_offsets()) for c in right.collections) == len(digits) // 3
    gauss_newton, boxed = (line for line in middle.lines if len(line.get_xdata()) == 3)
    assert gauss_newton.get_ydata() == pytest.approx(boxed.get_ydata())
    level = digits[digits.variance == 1e-5]
    for ax, column in zip(draw.measures(table, 1e-5).axes, ("psnr", "ssim", "feature_mse"), strict=True):
        drawn = np.concatenate([np.asarray(c.get_offsets()[:, 1]) for c in ax.collections])
        assert np.sort(drawn) == pytest.approx(np.sort(level[column].to_numpy()))
