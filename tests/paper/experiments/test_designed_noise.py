"""The experiment on designed noise: energies, errors by hand, claims on made-up tables."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import i2f
from i2f import data, models, spectrum, statistics, streams, sweep
from i2f.paper import rows, trainings
from i2f.paper.experiments import designed_noise, frontier
from i2f.paper.experiments import problems as shared
from i2f.paper.figures import designed_noise as draw
from i2f.paper.results import Results
from i2f.paper.sweep import Settings
from i2f.paper.trainings import Method

pytestmark = pytest.mark.usefixtures("few_draws")
SETTING = {"dataset": "mnist", "model": "lenet", "init": "uniform", "weight_seed": 1, "normalize": False}
CONFIG = SETTING | {"draws": 1, "told": 0, "gauss_newton_steps": 10, "start_seed": 0}
CONFIG |= {"methods": {"none": [0]}, "seeds": 1}
CONFIG |= {"reference": 1, "digits": 40, "held_out": 20, "epochs": 1, "batch_size": 20, "lr": 0.003}
THRESHOLDS = {"gain": 10.0, "accuracy": 0.25, "margin": 0.05}
QUIET = Settings(jobs=1, progress="off")


def attacks(images, levels, **more):
    return designed_noise.problems(CONFIG | {"images": images, "levels": levels} | more)["problems"]


def attacked(tasks):
    table = sweep.run(designed_noise.solve, tasks, QUIET, designed_noise.TOGETHER, at_most=32)
    return table.drop(columns=["steps", "start_seed"])


@pytest.fixture(scope="module")
def table():
    return attacked(attacks(1, [0.001]))


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
    for kind in designed_noise.KINDS:
        assert rows.mse[kind] == pytest.approx(rows.predicted_mse[kind], rel=0.3)
    J = shared.jacobian({**SETTING, "image": 0})
    c = rows.energy["designed"] / float(J.gram().diagonal().sum())
    assert rows.predicted_mse["designed"] == pytest.approx(c)
    assert rows.worst_predicted["designed"] == pytest.approx(c)
    assert rows.worst_predicted.idxmax() in designed_noise.TOLD
    assert rows.bayes["averaged"] >= rows.bayes.max()
    assert float(designed_noise.gains(table).sharpest.iloc[0]) > 5


def test_knowing_the_covariance_helps_against_a_linear_draw_alone():
    tasks = [p for p in attacks(1, [0.01], told=1, gauss_newton_steps=4) if p["kind"] in designed_noise.TOLD]
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
    tasks = designed_noise.problems(CONFIG | {"images": 1, "levels": [0.001], "gauss_newton_steps": 1})
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


def made_up(gain=20.0, told=0.1, bayes=1.5):
    rows = []
    for task in attacks(4, [0.003], draws=2, told=4):
        predicted = {"isotropic": 1e-4, "row-space": 1e-3, "linear": 1e-4, "designed": 1e-4, "averaged": 2e-3}[
            task["kind"]
        ]
        sharpest = {"isotropic": 1e-7, "row-space": 1e-6, "averaged": 0.0}.get(task["kind"], gain * 1e-6)
        factor = told if task["told"] and task["kind"] == "linear" else 1.0
        rows.append(
            task
            | {
                "predicted_mse": predicted,
                "mse": predicted * factor**2,
                "sharpest": sharpest * (1 + task["image"] / 50),
                "bayes": bayes if task["kind"] == "averaged" else 1.0,
                "rmse": predicted**0.5 * factor,
                "predicted_rmse": predicted**0.5,
                "converged": True,
                "failed": False,
                "reason": "",
            }
        )
    return pd.DataFrame(rows)


def accuracies(better=0.2):
    rows = []
    for seed in range(4):
        for value in (0.1, 0.2, 0.3):
            for method, plus in (("isotropic", 0.0), ("designed", better)):
                rows.append(
                    {
                        "method": method,
                        "value": value,
                        "seed": seed,
                        "privacy": value,
                        "accuracy": 0.7 - value + plus + seed / 1000,
                    }
                )
    return pd.DataFrame(rows)


def verdicts(table, trained):
    found = designed_noise.judge({"problems": table, "frontier": trained}, THRESHOLDS, "mnist")
    return {c.id.removeprefix("designed-mnist-"): c for c in found}


def test_claims():
    found = verdicts(made_up(), accuracies())
    names = ("gain", "gain-isotropic", "averaged", "prediction", "told-linear", "told-designed", "utility")
    assert {name: c.verdict for name, c in found.items()} == dict.fromkeys(names, "holds")
    assert found["gain"].value == pytest.approx(20, rel=0.05)
    assert found["utility"].value == pytest.approx(0.2)


def test_claims_can_fail():
    found = verdicts(made_up(gain=2.0, told=1.0, bayes=0.9), accuracies(0.0))
    assert {found[name].verdict for name in ("gain", "averaged", "told-linear", "utility")} == {"fails"}


def test_an_image_drawn_twice_counts_twice_in_the_prediction():
    """Errors are off by 0.1, 0.2 and 0.6: of the sample 1, 3, 3 the median is 0.6, and would be 0.35 if merged."""
    rows = [
        {"image": image, "kind": "linear", "level": 0.1, "predicted_mse": 1.0, "mse": 1 + off, "draw": draw}
        for image, off in enumerate((0.1, 0.2, 0.6))
        for draw in (0, 1)
    ]
    found = []
    statistics.bootstrap(
        lambda t: found.append(designed_noise._off(t)) or 0.0, pd.DataFrame(rows), "image", 10, least=3
    )
    medians = [0.1, 0.1, 0.1, 0.2, 0.2, 0.6, 0.2, 0.2, 0.6, 0.6]  # of 111, 112, 113, 122, 123, 133, 222, 223, 233, 333
    assert sorted(found[1:]) == pytest.approx(sorted(medians))


def test_an_attack_that_failed_is_infinitely_far_off():
    table = made_up()
    gone = (table.kind == "linear") & ~table.told
    table.loc[gone, ["failed", "mse", "rmse"]] = [True, np.nan, np.nan]
    assert verdicts(table, accuracies())["prediction"].value == np.inf


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


def test_trainings_that_learnt_nothing_are_not_compared():
    trained = pd.concat([accuracies(), pd.DataFrame([{"method": "none", "value": 0, "seed": 0, "accuracy": 0.2}])])
    assert verdicts(made_up(), trained)["utility"].verdict == "inconclusive"


def test_where_isotropic_noise_costs_nothing_there_is_nothing_to_gain():
    plain = pd.DataFrame([{"method": "none", "value": 0.0, "seed": seed, "privacy": 0.0} for seed in range(4)])
    for accuracy, verdict in ((0.8, "holds"), (0.51, "inconclusive")):  # isotropic noise leaves 0.5 at its middle
        table = pd.concat([accuracies(), plain.assign(accuracy=accuracy)])
        found = verdicts(made_up(), table)["utility"]
        assert found.verdict == verdict
        assert ("less to gain" in found.note) == (verdict == "inconclusive")


def test_the_figure_has_every_kind(table):
    found = Results({"problems": table, "frontier": accuracies()})
    left, _, right = draw.published(found, CONFIG)["overview.svg"].axes
    assert len(left.lines) == len(designed_noise.KINDS)
    assert len(right.lines) == 2
    assert np.isfinite(left.lines[0].get_ydata()).all()


def test_trainings_of_one_noise_alone_are_not_compared():
    alone = pd.DataFrame(
        {"method": ["none", "designed"], "value": [0.0, 0.1], "seed": 0, "privacy": [0.0, 0.1], "accuracy": [0.9, 0.8]}
    )
    assert frontier.judge({"frontier": alone}, THRESHOLDS, "mnist") == []
