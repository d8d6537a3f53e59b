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

RECIPE = {"digits": 100, "held_out": 10, "optimizer": "adam", "learning_rate": 0.003, "batch": 20}
CONFIG = {"dataset": "mnist", "root": None, "init": "uniform", "weight_seed": 1, **RECIPE}
NOISES = {"fixed": 1e-7, "relative": 1e-3}
SIZES = {"weight_seeds": 1, "images": 1, "attacked": 1, "gauss_newton_steps": 1}


@pytest.fixture(scope="module")
def trained():
    """Weights by epoch, and how well they do."""
    (rows,) = training.progress([CONFIG | {"epochs": [0, 2]}])
    return {epoch: training.weights(CONFIG, epoch) for epoch in (0, 2)}, pd.DataFrame(rows)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Two checkpoints, two images, one of which meets one step of the attack, at the second. Solved, and read again."""
    problems = training.problems(CONFIG | NOISES | SIZES | {"epochs": [2], "images": 2})
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
    scores = ["train_accuracy", "train_loss", "test_accuracy", "test_loss"]
    assert list(read.tables["progress"]) == ["weight_seed", "epoch", *scores]
    assert set(draw.published(read, {})) == {"overview.svg"}


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
    assert all(torch.equal(trained[0][2][name], again[name]) for name in again)
    others = training.weights(CONFIG | {"weight_seed": 2}, 2)
    assert not any(torch.equal(again[name], others[name]) for name in again)


def test_weight_seeds_have_their_own_order_of_batches(monkeypatch):
    seen = []

    def note(model, optimizer, digits, batch_size, seed, gradients):
        seen.append(seed)
        return original(model, optimizer, digits, batch_size, seed, gradients)

    original = training.trainings.epochs
    monkeypatch.setattr(training.trainings, "epochs", note)
    for seed in (1, 2):
        training._course.cache_clear()
        training.weights(CONFIG | {"weight_seed": seed}, 1)
    training._course.cache_clear()
    assert seen == [1, 2]


def test_a_training_goes_on_where_it_was_left(trained, monkeypatch):
    training._course.cache_clear()
    begun, original = [], training._epochs
    monkeypatch.setattr(training, "_epochs", lambda recipe: begun.append(0) or original(recipe))
    found = [training.weights(CONFIG, epoch) for epoch in (0, 2, 0)]
    assert len(begun) == 1
    assert all(torch.equal(trained[0][2][name], value) for name, value in found[1].items())
    assert all(torch.equal(trained[0][0][name], value) for name, value in found[2].items())


def test_problems_are_every_checkpoint_image_and_noise_and_few_are_attacked():
    sizes = {"weight_seeds": 2, "epochs": [0, 5, 9], "images": 3, "attacked": 2, "gauss_newton_steps": 50}
    tasks = training.problems(CONFIG | NOISES | sizes)
    assert len(tasks) == 2 * 3 * 3 * 2
    attacked = [(p["weight_seed"], p["epoch"], p["image"], p["noise"]) for p in tasks if p["budget"] == 50]
    wanted = [(1, epoch, image, noise) for epoch in (0, 9) for image in (0, 1) for noise in ("relative", "fixed")]
    assert attacked == wanted
    assert {p["budget"] for p in tasks} == {50, None}
    assert len({p["noise_seed"] for p in tasks}) == 2 * 3  # the same draw at every level and checkpoint


def test_columns_mean_what_they_say(trained, table):
    """Against autograd, finite differences and a trace, at a trained checkpoint."""
    weights, _ = trained
    relative, fixed = (row for _, row in table[table.image == 0].iterrows())
    model = network(weights[2]).double()
    x, y = i2f.data.load("mnist", 1)
    loss = torch.nn.functional.cross_entropy(model(x.double()), y)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])
    assert relative.loss == pytest.approx(loss.item())
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
    assert fixed.bound_rmse < fixed.predicted_rmse


def test_only_attacked_rows_have_an_error(table):
    assert list(table.image) == [0, 0, 1, 1]
    assert list(table.rmse.notna()) == [True, True, False, False]
    assert table.expected_rmse.notna().all()
    assert (table.rmse[:2] > 0.05).all()  # one step from a random start
    assert table.rmse[0] != table.rmse[1]
    summary = training.checked(table.assign(converged=True))
    assert list(summary.attacks) == [1, 1]
    noise = summary.loc[2, "relative"]
    assert noise["measured / predicted"] == pytest.approx(noise["measured RMSE"] / noise["predicted RMSE"])
    assert list(training.checked(table).converged) == [0, 0]
    assert training.checked(table)["measured RMSE"].isna().all()


def fake(slope=0.1, seeds=8, images=3, attacked=2) -> dict[str, pd.DataFrame]:
    """Expected errors that grow by exp(slope) per epoch, a little more in some weight seeds than in others."""
    sizes = {"weight_seeds": seeds, "epochs": [0, 2, 10], "images": images, "attacked": attacked}
    rows = []
    for p in training.problems(CONFIG | NOISES | sizes | {"gauss_newton_steps": 50}):
        own = slope + 0.001 * (p["weight_seed"] - (seeds + 1) / 2)
        predicted = 1e-3 * (1 + p["image"]) * np.exp((own if p["noise"] == "relative" else -own) * p["epoch"])
        spectrum = {"gradient_norm": 1.0, "lambda_max": 1.0, "lambda_median": 0.1, "lambda_min": 0.01}
        row = p | spectrum | {"expected_rmse": predicted, "predicted_rmse": predicted, "failed": False}
        attack = {"rmse": 1.1 * predicted, "mse": (1.1 * predicted) ** 2, "converged": p["image"] != 1}
        rows.append(row | (attack if p["budget"] else {}))
    progress = [
        {"weight_seed": seed, "epoch": epoch, "train_accuracy": 0.1 + 0.08 * epoch, "test_accuracy": 0.1 + 0.07 * epoch}
        for seed in range(1, seeds + 1)
        for epoch in (0, 2, 10)
    ]
    return {"problems": pd.DataFrame(rows), "progress": pd.DataFrame(progress)}


def judged(tables):
    relative, fixed = training.judge(tables, {})
    assert (relative.id, fixed.id) == ("training-relative", "training-fixed")
    assert relative.number == fixed.number == 31
    return relative, fixed


def test_the_claims_are_the_mean_slope_over_weight_seeds():
    relative, fixed = judged(fake(0.1))
    assert (relative.value, fixed.value) == pytest.approx((0.1, -0.1))
    assert (relative.verdict, fixed.verdict) == ("holds", "fails")
    assert (relative.n, relative.unit) == (8, "weight_seed")
    seeds = 0.1 + 0.001 * (np.arange(1, 9) - 4.5)
    half = 2.3646 * seeds.std(ddof=1) / 8**0.5  # Student's t, seven degrees of freedom
    assert (relative.low, relative.high) == pytest.approx((0.1 - half, 0.1 + half), rel=1e-3)
    assert f"a factor of {np.exp(1.0):.2g}" in relative.note
    assert judged(fake(0.0))[0].verdict == "inconclusive"
    assert judged(fake(0.1, seeds=7))[0].verdict == "inconclusive"


def test_a_slope_is_that_of_a_line_through_all_checkpoints():
    rows = fake(0.1, seeds=1, images=1)["problems"]
    rows = rows[rows.noise == "relative"].assign(expected_rmse=np.exp([0.0, 3.0, 1.0]))
    assert training.slopes(rows).item() == pytest.approx(np.polyfit([0, 2, 10], [0.0, 3.0, 1.0], 1)[0])


def test_a_training_that_did_not_learn_is_left_out():
    tables = fake(0.1, seeds=9)
    tables["progress"].loc[tables["progress"].weight_seed == 9, "train_accuracy"] = 0.4
    relative, _ = judged(tables)
    assert relative.n == 8
    assert "8 of 9 trainings learn" in relative.note
    tables["progress"].loc[tables["progress"].weight_seed == 8, "train_accuracy"] = 0.4
    assert judged(tables)[0].verdict == "inconclusive"


def test_a_checkpoint_that_is_unknown_decides_nothing():
    tables = fake(0.1)
    tables["problems"].loc[0, "expected_rmse"] = np.nan
    assert [c.verdict for c in judged(tables)] == ["inconclusive", "fails"]


def test_figure_draws_every_seed_and_attack():
    tables = fake()
    figure = draw.overview(tables["problems"], tables["progress"])
    learning, spectra, risk, attacks = figure.axes
    assert len(learning.lines) == 2
    assert len(spectra.lines) == 4
    assert len(risk.lines) == 2 * (8 + 1)
    assert sum(len(c.get_offsets()) for c in attacks.collections) == tables["problems"].budget.notna().sum() == 8
