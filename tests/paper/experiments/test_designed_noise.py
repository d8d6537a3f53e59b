"""The experiment on designed noise: energies, errors by hand, claims on made-up tables."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import i2f
from i2f import data, models, spectrum, streams, sweep
from i2f.paper import rows, trainings
from i2f.paper.experiments import designed_noise, frontier
from i2f.paper.experiments import problems as shared
from i2f.paper.figures import designed_noise as draw
from i2f.paper.results import Results
from i2f.paper.sweep import Settings
from i2f.paper.trainings import Method

SETTING = {"dataset": "mnist", "model": "lenet", "init": "uniform", "weight_seed": 1, "normalize": False}
CONFIG = SETTING | {"first_image": 0, "weight_seeds": 1, "level": 0.001, "gauss_newton_steps": 10}
CONFIG |= {"methods": {"none": [0]}, "seeds": 1, "reference": 1}
CONFIG |= {"digits": 40, "held_out": 20, "epochs": 1, "batch_size": 20, "lr": 0.003}
THRESHOLDS = {"cut": 0.05, "gain": 10.0, "same_low": 0.8, "same_high": 1.25, "known": 0.5, "unknown": 0.9}
THRESHOLDS |= {"margin": 0.05}
QUIET = Settings(jobs=1, progress="off")


def attacks(images, **more):
    return designed_noise.problems(CONFIG | {"images": images} | more)["problems"]


def attacked(tasks):
    table = sweep.run(designed_noise.solve, tasks, QUIET, designed_noise.TOGETHER, at_most=32)
    return table.drop(columns=["steps", "start_seed"])


def test_a_digit_has_its_own_weights_noise_and_start():
    tasks = attacks(7, first_image=200, weight_seeds=5)
    assert len(tasks) == 7 * (len(designed_noise.KINDS) + len(designed_noise.TOLD))
    assert {(p["image"], p["weight_seed"]) for p in tasks} == {(i, 1 + i % 5) for i in range(200, 207)}
    assert {(p["split"], p["noise_seed"], p["start_seed"]) for p in tasks} == {
        ("train", 1000 * (1 + i % 5) + i, i) for i in range(200, 207)
    }
    assert {p["kind"] for p in tasks if p["told"]} == set(designed_noise.TOLD)


@pytest.fixture(scope="module")
def table():
    return attacked([p for p in attacks(1) if not p["told"]])


@pytest.mark.parametrize("kind", designed_noise.KINDS)
def test_every_kind_has_the_energy(kind):
    J = shared.jacobian({**SETTING, "image": 0})
    defended = designed_noise.noise(kind, 0.5**0.5 / float(J.gradient.norm()))
    shares = defended.variances(J)
    inside = 0.5 * J.shape[0] / J.shape[1] if kind == "isotropic" else 0.5
    assert float(shares.sum()) == pytest.approx(inside)
    deltas = torch.stack([defended.delta(J, seed) for seed in range(6)])
    few = 784 if kind in ("isotropic", "row-space") else 60  # so many directions share the energy, at least
    assert float(deltas.square().sum(1).mean()) == pytest.approx(0.5, rel=4 / (6 * few / 2) ** 0.5)


def test_the_measured_errors_are_the_expected(table):
    rows = table.set_index("kind")
    assert table.converged.all()
    J = shared.jacobian({**SETTING, "split": "train", "image": 0})
    values, vectors = spectrum.decompose(J)
    for kind in designed_noise.KINDS:
        noise = designed_noise.noise(kind, 0.001)
        squares = [((vectors.T @ J.matvec(noise.delta(J, seed))) / values).square() for seed in [1000, *range(30)]]
        assert rows.mse[kind] == pytest.approx(float(squares[0].mean()), rel=0.15)  # of the noise that was drawn
        assert rows.sharpest[kind] == pytest.approx(float(squares[0][:10].mean()), rel=0.15, abs=1e-6)
        assert rows.predicted_mse[kind] == pytest.approx(float(torch.stack(squares).mean()), rel=0.3)
    c = rows.energy["designed"] / float(J.gram().diagonal().sum())
    assert rows.predicted_mse["designed"] == pytest.approx(c)
    assert rows.worst_predicted["designed"] == pytest.approx(c)
    assert rows.worst_predicted.idxmax() in designed_noise.TOLD
    assert rows.bayes["averaged"] >= rows.bayes.max()
    assert rows.sharpest["designed"] > 5 * rows.sharpest["row-space"]


def test_knowing_the_covariance_helps_against_a_linear_draw_alone():
    tasks = [p for p in attacks(1, level=0.01, gauss_newton_steps=4) if p["kind"] in designed_noise.TOLD]
    table = attacked(tasks).set_index(["kind", "told"])
    assert table.rmse["linear", True] < 0.5 * table.rmse["linear", False]
    assert table.rmse["designed", True] > 0.9 * table.rmse["designed", False]
    assert table.evaluations["linear", True] > table.evaluations["linear", False]  # it starts where that one ended


@pytest.mark.parametrize("method", ["none", "isotropic", "designed", "dp", "prune"])
def test_a_defended_mean_is_the_mean_and_noise(method):
    """With a value of nothing (or a clipping norm that nothing reaches), every method is the plain mean gradient."""
    x, y = data.load("mnist", 4)
    model = models.build("lenet", "mnist", "uniform", 1, normalize=False)
    generator = torch.Generator().manual_seed(0)
    plain = trainings.defended(model, x, y, Method("none", 0.0, 1e9), generator)
    found = trainings.defended(model, x, y, Method(method, 0.0, 1e9), generator)
    for a, b in zip(plain, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    if method == "isotropic":
        noisy = trainings.defended(model, x, y, Method(method, 0.1, 1e9), generator)
        noise = torch.cat([(b - a).flatten() for a, b in zip(plain, noisy, strict=True)])
        assert float(noise.std()) == pytest.approx(0.1 / 2, rel=0.05)
    if method == "dp":
        short = trainings.defended(model, x, y, Method(method, 0.0, 1e-3), generator)
        assert float(torch.cat([g.flatten() for g in short]).norm()) <= 1e-3 * (1 + 1e-5)
    if method == "prune":
        one = trainings.defended(model, x[:1], y[:1], Method(method, 0.9, 1e9), generator)
        kept = torch.cat([g.flatten() for g in one]) != 0
        assert float(kept.double().mean()) == pytest.approx(0.1, abs=0.01)


def test_both_tables_are_read_as_they_were_solved(tmp_path):
    tasks = designed_noise.problems(CONFIG | {"images": 1, "gauss_newton_steps": 1})
    tasks["problems"] = [p for p in tasks["problems"] if p["kind"] == "linear"]  # told, and not
    first = Settings(jobs=1, progress="off", store=rows.Store(chunks=tmp_path))
    found = designed_noise.run(tasks, first).tables
    again = designed_noise.run(tasks, replace(first, store=rows.Store(chunks=tmp_path, solve=False))).tables
    assert list(found) == ["problems", "frontier"]
    for name, table in found.items():
        pd.testing.assert_frame_equal(again[name], table)


def test_the_frontier_has_one_row_per_training():
    tasks = frontier.problems(CONFIG | {"methods": {"none": [0], "designed": [0.2]}, "seeds": 2})
    table = frontier.run(tasks, QUIET).tables["frontier"]
    assert len(table) == 4
    privacy = table.groupby("method").privacy.first()
    assert privacy["none"] == 0
    assert 0.05 < privacy["designed"] < 0.2
    assert table.accuracy.between(0, 1).all()


def test_row_space_noise_stays_in_the_row_space():
    x, y = (t[:1] for t in data.load("mnist", 1))
    model = models.build("lenet", "mnist", init="uniform", seed=1, normalize=False)
    drawn = torch.stack([trainings.row_space(model, x, y, torch.Generator().manual_seed(s)) for s in (0, 1)])
    rows = i2f.GradientJacobian(model, x, y).dense().double()
    basis = torch.linalg.qr(rows.T)[0]
    outside = drawn - (drawn @ basis) @ basis.T
    assert float(outside.norm()) < 1e-4 * float(drawn.norm())
    assert (drawn @ basis).square().mean().item() == pytest.approx(1.0, abs=0.2)
    gradients = trainings.defended(model, x, y, Method("row-space", 0.1, 1.0), torch.Generator().manual_seed(0))
    plain = trainings.defended(model, x, y, Method("none", 0.1, 1.0), torch.Generator().manual_seed(0))
    moved = torch.cat([(a - b).flatten() for a, b in zip(gradients, plain, strict=True)])
    assert torch.allclose(moved.double(), 0.1 * drawn[0], atol=1e-5)


def made_up(gain=20.0, told=0.1, off=1.0):
    """Errors that scatter by some percent from image to image."""
    rows = []
    for task in attacks(20):
        predicted = {"row-space": 1e-3, "averaged": 1.0}.get(task["kind"], 1e-4)
        sharpest = {"isotropic": 1e-7, "row-space": 1e-6, "averaged": 0.0}.get(task["kind"], gain * 1e-6)
        scatter = 1 + np.sin(task["image"]) / 50
        factor = told if task["told"] and task["kind"] == "linear" else 1.0
        rows.append(
            task
            | {
                "predicted_mse": predicted,
                "mse": off * predicted * factor**2 * scatter,
                "predicted_sharpest": sharpest,
                "sharpest": sharpest * scatter ** (task["kind"] == "designed"),
                "rmse": predicted**0.5 * factor * scatter ** task["told"],
                "predicted_rmse": predicted**0.5,
                "converged": True,
                "failed": False,
                "reason": "",
            }
        )
    return pd.DataFrame(rows)


def accuracies(better=0.2, cost=1.0):
    rows = []
    for seed in range(1, 9):
        for method, plus, values in (
            ("none", 0.0, (0.0,)),
            ("isotropic", 0.0, (0.1, 0.2, 0.3)),
            ("designed", better, (0.05, 0.15, 0.25)),
        ):
            for value in values:
                accuracy = 0.7 - cost * value + plus + np.sin(seed) / 100 * (method == "designed")
                row = {"method": method, "value": value, "seed": seed, "privacy": value, "accuracy": accuracy}
                rows.append(row)
    return pd.DataFrame(rows)


def verdicts(table, trained):
    found = designed_noise.judge({"problems": table, "frontier": trained}, THRESHOLDS)
    return {c.id.removeprefix("designed-"): c for c in found}


NAMES = ("gain", "prediction", "told-linear", "told-designed", "utility")


def test_claims():
    found = verdicts(made_up(), accuracies())
    assert {name: c.verdict for name, c in found.items()} == dict.fromkeys(NAMES, "holds")
    assert [c.number for c in found.values()] == list(range(44, 49))
    assert {c.ledger for c in found.values()} == {"beyond"}
    assert found["gain"].value == pytest.approx(20, rel=0.01)
    assert found["gain"].note.startswith("200 times that of isotropic noise")
    assert found["prediction"].value == pytest.approx(1, rel=0.01)  # without the kind that leaves the linear regime
    assert found["told-linear"].value == pytest.approx(0.1, rel=0.01)
    assert found["utility"].value == pytest.approx(0.2, abs=0.01)  # at 0.2, between designed noise's values
    assert [found[name].n for name in ("gain", "utility")] == [20, 8]


def test_claims_can_fail():
    found = verdicts(made_up(gain=0.5, told=1.0, off=2.0), accuracies(0.0))
    assert {name for name, c in found.items() if c.verdict == "fails"} == set(NAMES) - {"told-designed"}
    table = made_up()
    mine = table.told & (table.kind == "designed")
    assert verdicts(table.assign(rmse=table.rmse.where(~mine, 1e-3)), accuracies())["told-designed"].verdict == "fails"


@pytest.mark.parametrize(
    ("kind", "told", "open"),
    [
        ("designed", False, {"gain", "told-designed", "prediction"}),
        ("linear", True, {"told-linear"}),
        ("row-space", False, {"gain", "prediction"}),
    ],
)
def test_an_attack_that_did_not_converge_decides_nothing(kind, told, open):
    """Most of one kind's, whether they ended early or failed, and whatever error they report."""
    table = made_up().astype({"converged": object, "failed": object})
    gone = (table.kind == kind) & (table.told == told) & (table.image < 17)
    table.loc[gone & (table.image < 10), "converged"] = False
    table.loc[gone & (table.image >= 10), ["converged", "failed", "mse", "rmse", "sharpest"]] = [
        np.nan,
        True,
        *[9.0] * 3,
    ]
    found = verdicts(table, accuracies())
    assert {name for name, c in found.items() if c.verdict == "inconclusive"} == open
    assert {c.verdict for c in found.values()} == {"holds", "inconclusive"}


def test_equal_seeds_share_no_draw():
    """z of each kind of noise and of an attack's start, 784 numbers each, all with seed 0."""
    J = shared.jacobian({**SETTING, "image": 0})
    values, vectors = spectrum.decompose(J)
    started = []
    i2f.invert(J.map.model, J.gradient, J.map.y, J.x.shape, steps=1, seed=0, callback=lambda at: started.append(at.x))

    def z(kind):
        return (vectors.T @ J.matvec(designed_noise.noise(kind, 1e-9).delta(J, 0))) / values

    draws = torch.stack(
        [
            started[0].flatten(),
            vectors @ z("designed"),
            z("linear"),
            vectors @ z("linear"),
            designed_noise.noise("isotropic", 1.0).delta(J, 0)[:784],
        ]
    )
    assert float((torch.corrcoef(draws) - torch.eye(len(draws))).abs().max()) < 5 / 784**0.5
    expected = torch.randn(784, generator=streams.generator("row-space", 0), dtype=torch.float64)
    assert float(torch.corrcoef(torch.stack([z("linear"), expected]))[0, 1]) == pytest.approx(1)


def test_the_order_of_training_is_the_same_whatever_the_noise(monkeypatch):
    seen = {}
    original = trainings.defended

    def note(model, x, y, method, *rest):
        seen.setdefault(method.name, []).append(x)
        return original(model, x, y, method, *rest)

    monkeypatch.setattr(trainings, "defended", note)
    for method, value in (("none", 0.0), ("isotropic", 0.1)):
        frontier.accuracy(CONFIG | {"method": method, "value": value, "seed": 3, "epochs": 2, "batch_size": 10})
    assert torch.equal(torch.cat(seen["none"]), torch.cat(seen["isotropic"]))


@pytest.mark.parametrize(("accuracy", "verdict"), [(0.8, "holds"), (0.2, "inconclusive")])
def test_trainings_that_learnt_nothing_are_not_compared(accuracy, verdict):
    trained = accuracies()
    trained.loc[trained.method == "none", "accuracy"] = accuracy
    assert verdicts(made_up(), trained)["utility"].verdict == verdict


def test_beyond_the_reach_of_designed_noise_nothing_is_compared():
    trained = accuracies()
    trained.loc[(trained.method == "isotropic") & (trained.value == 0.2), "privacy"] = 0.26
    found = verdicts(made_up(), trained)["utility"]
    assert found.verdict == "inconclusive"
    assert np.isfinite(found.value)
    assert "0 of 8 seeds" in found.note


def test_where_isotropic_noise_costs_nothing_there_is_nothing_to_gain():
    found = verdicts(made_up(), accuracies(better=0.0, cost=0.0))["utility"]
    assert found.verdict == "fails"
    assert "isotropic noise costs 0.000" in found.note


def test_trainings_of_one_noise_alone_are_not_compared():
    trained = accuracies()
    assert frontier.judge({"frontier": trained[trained.method != "isotropic"]}, THRESHOLDS) == []


def test_the_figure_has_every_image_kind_and_training():
    table, trained = made_up(), accuracies()
    left, middle, right = draw.published(Results({"problems": table, "frontier": trained}), CONFIG)["overview.svg"].axes

    def clouds(ax):
        return [len(c.get_offsets()) for c in ax.collections if len(c.get_offsets()) > 1]

    assert clouds(left) == [20] * 4  # water-filled noise leaves the sharpest directions alone
    assert clouds(middle) == [20] * (len(designed_noise.KINDS) + len(designed_noise.TOLD))
    assert [len(c.lines[0].get_xdata()) for c in right.containers] == [1, 3, 3]
