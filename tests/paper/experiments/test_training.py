"""The training experiment: its checkpoints, its table, its verdicts, its figures."""

import numpy as np
import pandas as pd
import pytest
import torch

import i2f
from i2f.paper import rows
from i2f.paper.experiments import training
from i2f.paper.figures import training as draw
from i2f.paper.sweep import Settings

pytestmark = pytest.mark.usefixtures("few_draws")
RECIPE = {"digits": 100, "held_out": 10, "optimizer": "adam", "learning_rate": 0.003, "batch": 20, "seed": 0}
CONFIG = {
    "dataset": "mnist",
    "root": None,
    "init": "uniform",
    "weight_seed": 1,
    **RECIPE,
    "images": 1,
    "gauss_newton_steps": 1,
}
THRESHOLDS = {"growth": 0.5, "exact": 1e-8, "share": 0.99, "accuracy": 0.02, "tracking": 0.8, "cut": 0.05}


NOISES = {"fixed": [1e-7], "relative": [1e-3]}


@pytest.fixture(scope="module")
def trained():
    """Weights by epoch, and how well they do."""
    (rows,) = training.progress([CONFIG | {"epochs": [0, 2]}])
    return {epoch: training.weights(CONFIG, epoch) for epoch in (0, 2)}, pd.DataFrame(rows)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """One checkpoint, one image, all noises and starts; one step of the attack is enough. Solved, and read again."""
    problems = training.problems(CONFIG | NOISES | {"epochs": [2]})
    chunks = tmp_path_factory.mktemp("chunks")
    stores = [rows.Store(chunks=chunks, solve=yes) for yes in (True, False)]
    return [training.run(problems, Settings(jobs=1, progress="off", store=store)) for store in stores]


@pytest.fixture(scope="module")
def table(found):
    return found[0].tables["problems"]


def test_stored_rows_are_the_solved_ones(found):
    solved, read = found
    for name in ("problems", "progress"):
        pd.testing.assert_frame_equal(solved.tables[name], read.tables[name])
    assert list(read.tables["progress"]) == ["epoch", "train_accuracy", "train_loss", "test_accuracy", "test_loss"]
    assert set(draw.published(read, {"cut": 0.05})) == {"overview.svg"}


def network(weights):
    model = i2f.models.build("lenet", "mnist", init="uniform", seed=1, normalize=False)
    model.load_state_dict(weights)
    return model


def test_training_starts_at_the_released_weights_and_moves_them_downhill(trained):
    weights, progress = trained
    released = i2f.models.build("lenet", "mnist", init="uniform", seed=1, normalize=False).state_dict()
    assert all(torch.equal(weights[0][name], released[name]) for name in released)
    assert list(progress.epoch) == [0, 2]
    assert progress.train_loss[1] < progress.train_loss[0]


def test_progress_is_that_of_the_kept_weights(trained):
    weights, progress = trained
    x, y = i2f.data.load("mnist", 100, split="train")
    logits = network(weights[2])(x)
    assert progress.train_accuracy[1] == pytest.approx(float((logits.argmax(1) == y).float().mean()))
    loss = torch.nn.functional.cross_entropy(logits, y).item()
    assert progress.train_loss[1] == pytest.approx(loss, rel=1e-5)


def test_training_is_the_same_twice_and_another_seed_is_another_training(trained):
    training._course.cache_clear()
    again = training.weights(CONFIG, 2)
    other = training.weights(CONFIG | {"seed": 1}, 2)
    assert all(torch.equal(trained[0][2][name], again[name]) for name in again)
    assert not all(torch.equal(again[name], other[name]) for name in again)


def test_a_training_goes_on_where_it_was_left(trained, monkeypatch):
    training._course.cache_clear()
    begun, original = [], training._epochs
    monkeypatch.setattr(training, "_epochs", lambda recipe: begun.append(0) or original(recipe))
    found = [training.weights(CONFIG, epoch) for epoch in (0, 2, 0)]
    assert len(begun) == 1
    assert all(torch.equal(trained[0][2][name], value) for name, value in found[1].items())
    assert all(torch.equal(trained[0][0][name], value) for name, value in found[2].items())


def test_problems_are_every_checkpoint_image_and_noise():
    sizes = {"epochs": [0, 5], "images": 3, "fixed": [1e-7, 1e-5], "relative": [1e-3]}
    tasks = training.problems(CONFIG | sizes)
    assert len(tasks) == 2 * 3 * 4 * 2
    assert {p["start"] for p in tasks} == {"random", "near"}
    assert {(p["noise"], p["size"]) for p in tasks} == {
        ("none", 0.0),
        ("fixed", 1e-7),
        ("fixed", 1e-5),
        ("relative", 1e-3),
    }


def test_columns_mean_what_they_say(trained, table):
    """Against autograd, finite differences and a trace, at a trained checkpoint."""
    weights, _ = trained
    none, fixed, relative = (row for _, row in table[table.start == "random"].iterrows())
    model = network(weights[2]).double()
    x, y = i2f.data.load("mnist", 1)
    loss = torch.nn.functional.cross_entropy(model(x.double()), y)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])
    assert none.loss == pytest.approx(loss.item())
    assert fixed.gradient_norm == pytest.approx(float(gradient.norm()))
    J = i2f.GradientJacobian(model, x, y).dense()
    values = torch.linalg.svdvals(J).square()
    assert fixed.lambda_max == pytest.approx(float(values[0]))
    assert fixed.lambda_median == pytest.approx(float(values.median()))
    assert fixed.lambda_min == pytest.approx(float(values[-1]), rel=1e-4)
    assert fixed.expected_rmse == pytest.approx(float((1e-7 * (1 / values).sum() / 784).sqrt()), rel=1e-4)
    assert relative.noise_norm == pytest.approx(1e-3 * float(gradient.norm()), rel=0.05)
    assert fixed.predicted_rmse / fixed.expected_rmse == pytest.approx(1, abs=0.9)
    assert relative.predicted_rmse / fixed.predicted_rmse == pytest.approx(relative.noise_norm / fixed.noise_norm)
    assert np.isnan(none.predicted_rmse)
    assert none.noise_norm == 0
    assert fixed.bound_rmse < fixed.predicted_rmse


def test_each_row_has_the_attack_of_its_own_start_and_noise(table):
    """One step from near the truth ends near it; one from a random start does not."""
    assert list(table.start) == ["random", "near"] * 3
    assert (table.rmse[table.start == "near"] < 0.05).all()
    assert (table.rmse[table.start == "random"] > 0.05).all()
    assert (table.objective_ratio.notna() == (table.noise != "none")).all()
    assert table.rmse.is_unique


def test_the_controls_start_is_no_draw_of_the_noise(monkeypatch):
    """Seed and image 0: what is added to the gradient, and what moves the start from the truth."""
    calls = {}

    def note(model, gradients, y, shape, **options):
        calls["near" if options["start"] is not None else "random"] = (gradients, options["start"])
        return original(model, gradients, y, shape, **options)

    original = training.invert_many
    monkeypatch.setattr(training, "invert_many", note)
    training.solve(training.problems(CONFIG | {"epochs": [2], "fixed": [1e-7], "relative": []}))
    gradients, start = calls["near"]
    moved = (start - i2f.data.load("mnist", 1)[0]).flatten()
    assert float(moved.square().mean().sqrt()) == pytest.approx(training.NEAR, rel=0.1)
    noise = (gradients[1] - gradients[0])[:784]
    assert abs(np.corrcoef(moved, noise)[0, 1]) < 5 / 784**0.5


def fake(growth: float, factor: float = 1.0, recovered: float = 1e-12) -> pd.DataFrame:
    """Predictions that multiply by `growth` from checkpoint to checkpoint; errors `factor` times as large."""
    rows = []
    sizes = {"epochs": [0, 10, 20], "images": 4, "fixed": [1e-7, 1e-3], "relative": [1e-3]}
    tasks = training.problems(CONFIG | sizes)
    for p in tasks:
        predicted = 1e-4 * (1 + p["image"]) * growth ** (p["epoch"] // 10)
        predicted *= 1e3 if p["noise"] == "fixed" and p["size"] > 1e-4 else 1
        none = p["noise"] == "none"
        rmse = recovered**0.5 if none else factor * predicted
        rows.append(
            {
                **p,
                "loss": 1.0,
                "gradient_norm": 1.0,
                "lambda_max": 1.0,
                "lambda_median": 0.1,
                "lambda_min": 0.01,
                "rmse": rmse,
                "mse": rmse**2,
                "predicted_rmse": np.nan if none else predicted,
                "expected_rmse": np.nan if none else predicted,
                "bound_rmse": np.nan if none else 0.01 * predicted,
                "converged": p["image"] != 1,
                "failed": False,
            }
        )
    return pd.DataFrame(rows)


def verdicts(table: pd.DataFrame) -> dict[str, str]:
    found = training.judge({"problems": table}, THRESHOLDS, "mnist")
    assert len({c.id for c in found}) == len(found)
    return {c.id.removeprefix("training-mnist-"): c.verdict for c in found}


ALL = ("fixed", "relative", "bound", "without-noise", "prediction", "without-noise-near", "prediction-near")


@pytest.mark.parametrize(
    ("table", "failing"),
    [
        (fake(10.0, 1.001), ()),
        (fake(0.1, 2.0, recovered=1.0), tuple(name for name in ALL if name != "bound")),
        (fake(10.0).assign(bound_rmse=lambda t: 1 / t.predicted_rmse), ("bound",)),
    ],
)
def test_verdicts_follow_the_table(table, failing):
    assert verdicts(table) == {name: "fails" if name in failing else "holds" for name in ALL}


def test_prediction_may_hold_only_in_the_linear_regime():
    table = fake(3.0)
    beyond = table.predicted_rmse > 0.05
    table.loc[beyond, "rmse"] *= 3
    table = pd.concat([table, *[table[beyond]] * 3])
    found = training.judge({"problems": table}, THRESHOLDS, "mnist")
    prediction = next(c for c in found if c.id == "training-mnist-prediction")
    assert prediction.verdict == "holds only when"
    assert prediction.condition == "the predicted RMSE is at most 0.05"


def test_one_checkpoint_where_the_attack_from_a_random_start_is_lost_is_seen_and_separated_from_the_control():
    table = fake(2.0)
    lost = (table.epoch == 20) & (table.start == "random")
    table.loc[lost, ["rmse", "mse"]] = np.nan
    found = verdicts(table)
    assert (found["prediction"], found["without-noise"]) == ("fails", "fails")
    assert (found["prediction-near"], found["without-noise-near"]) == ("holds", "holds")


def test_the_summary_counts_every_attack():
    table = training.summary(fake(2.0))
    assert table.attacks.sum() == 3 * 4 * 4 * 2
    assert (table.not_converged == 1).all()


def test_figure_draws_every_row():
    table = fake(3.0)
    progress = pd.DataFrame({"epoch": [0, 10, 20], "train_accuracy": [0.1, 0.5, 0.9], "test_accuracy": [0.1, 0.4, 0.8]})
    figure = draw.overview(table, progress, cut=0.05)
    learning, gradients, spectra, risk, without, scatter = figure.axes
    assert len(learning.lines) == 2
    assert len(gradients.lines) == 4 + 1
    assert len(spectra.lines) == 3 * (4 + 1)
    assert len(risk.lines) == 2 * (4 + 1)
    assert sum(len(c.get_offsets()) for c in without.collections) == (table.noise == "none").sum()
    assert sum(len(c.get_offsets()) for c in scatter.collections) == (table.noise != "none").sum()
