"""The experiment on designed noise: energies, errors by hand, claims on made-up tables."""

import numpy as np
import pandas as pd
import pytest
import torch

import i2f
from i2f import claims, data, models, spectrum, streams
from i2f.paper.experiments import designed_noise
from i2f.paper.experiments import problems as shared
from i2f.paper.figures import designed_noise as draw

SETTING = {"dataset": "mnist", "model": "lenet", "init": "uniform", "weight_seed": 1, "normalize": False}


@pytest.fixture(scope="module")
def table():
    tasks = designed_noise.problems(SETTING, 1, [0.001], draws=1, told=0)
    return designed_noise.run(tasks, 10, 0, jobs=1)


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


def test_who_is_told_the_covariance_learns_more_of_a_linear_draw_alone():
    tasks = [p for p in designed_noise.problems(SETTING, 1, [0.01], 1, 1) if p["kind"] in designed_noise.TOLD]
    table = designed_noise.run(tasks, 8, 0, jobs=1).set_index(["kind", "told"])
    assert table.rmse["linear", True] < 0.5 * table.rmse["linear", False]
    assert table.rmse["designed", True] > 0.9 * table.rmse["designed", False]


@pytest.mark.parametrize("method", ["none", "isotropic", "designed", "dp", "prune"])
def test_a_defended_mean_is_the_mean_and_noise(method):
    """With a value of nothing (or a clipping norm that nothing reaches), every method is the plain mean gradient."""
    x, y = data.load("mnist", 4)
    model = models.build("lenet", "mnist", "uniform", 1, normalize=False)
    generator = torch.Generator().manual_seed(0)
    plain = designed_noise.defended(model, x, y, "none", 0.0, 1e9, generator)
    found = designed_noise.defended(model, x, y, method, 0.0, 1e9, generator)
    for a, b in zip(plain, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    if method == "isotropic":
        noisy = designed_noise.defended(model, x, y, method, 0.1, 1e9, generator)
        noise = torch.cat([(b - a).flatten() for a, b in zip(plain, noisy, strict=True)])
        assert float(noise.std()) == pytest.approx(0.1 / 2, rel=0.05)
    if method == "dp":
        short = designed_noise.defended(model, x, y, method, 0.0, 1e-3, generator)
        assert float(torch.cat([g.flatten() for g in short]).norm()) <= 1e-3 * (1 + 1e-5)
    if method == "prune":
        one = designed_noise.defended(model, x[:1], y[:1], method, 0.9, 1e9, generator)
        kept = torch.cat([g.flatten() for g in one]) != 0
        assert float(kept.double().mean()) == pytest.approx(0.1, abs=0.01)


def test_utility_is_a_row_a_training():
    methods = {"none": [0], "designed": [0.2]}
    table = designed_noise.utility(SETTING, methods, 40, 20, 1, 20, 0.003, 2, 1, jobs=1)
    assert len(table) == 4
    privacy = table.groupby("method").privacy.first()
    assert privacy["none"] == 0
    assert 0.05 < privacy["designed"] < 0.2
    assert table.accuracy.between(0, 1).all()


def test_row_space_noise_stays_in_the_row_space():
    x, y = (t[:1] for t in data.load("mnist", 1))
    model = models.build("lenet", "mnist", init="uniform", seed=1, normalize=False)
    drawn = torch.stack([designed_noise._row_space(model, x, y, torch.Generator().manual_seed(s)) for s in (0, 1)])
    rows = i2f.GradientJacobian(model, x, y).dense().double()
    basis = torch.linalg.qr(rows.T)[0]
    beside = drawn - (drawn @ basis) @ basis.T
    assert float(beside.norm()) < 1e-4 * float(drawn.norm())
    assert (drawn @ basis).square().mean().item() == pytest.approx(1.0, abs=0.2)
    gradients = designed_noise.defended(model, x, y, "row-space", 0.1, 1.0, torch.Generator().manual_seed(0))
    plain = designed_noise.defended(model, x, y, "none", 0.1, 1.0, torch.Generator().manual_seed(0))
    moved = torch.cat([(a - b).flatten() for a, b in zip(gradients, plain, strict=True)])
    assert torch.allclose(moved.double(), 0.1 * drawn[0], atol=1e-5)


def made_up(gain=20.0, told=0.1, bayes=1.5):
    rows = []
    for task in designed_noise.problems(SETTING, 4, [0.003], 2, 4):
        predicted = {"isotropic": 1e-4, "row-space": 1e-3, "linear": 1e-4, "designed": 1e-4, "averaged": 2e-3}[
            task["kind"]
        ]
        sharpest = {"isotropic": 1e-7, "row-space": 1e-6, "averaged": 0.0}.get(task["kind"], gain * 1e-6)
        factor = told if task["told"] and task["kind"] == "linear" else 1.0
        rows.append(task | {
            "predicted_mse": predicted, "mse": predicted * factor**2, "sharpest": sharpest * (1 + task["image"] / 50),
            "bayes": bayes if task["kind"] == "averaged" else 1.0, "rmse": predicted**0.5 * factor,
            "predicted_rmse": predicted**0.5, "converged": True, "failed": False, "reason": "",
        })  # fmt: skip
    return pd.DataFrame(rows)


def frontier(better=0.2):
    rows = []
    for seed in range(4):
        for value in (0.1, 0.2, 0.3):
            for method, plus in (("isotropic", 0.0), ("designed", better)):
                rows.append({"method": method, "value": value, "seed": seed, "privacy": value,
                             "accuracy": 0.7 - value + plus + seed / 1000})  # fmt: skip
    return pd.DataFrame(rows)


def verdicts(table, trained):
    found = designed_noise.judge(table, trained, "mnist", 10.0, 0.25, 0.05)
    return {c.id.removeprefix("designed-mnist-"): c for c in found}


def test_claims():
    found = verdicts(made_up(), frontier())
    names = ("gain", "gain-isotropic", "averaged", "prediction", "told-linear", "told-designed", "utility")
    assert {name: c.verdict for name, c in found.items()} == dict.fromkeys(names, "holds")
    assert found["gain"].value == pytest.approx(20, rel=0.05)
    assert found["utility"].value == pytest.approx(0.2)


def test_claims_can_fail():
    found = verdicts(made_up(gain=2.0, told=1.0, bayes=0.9), frontier(0.0))
    assert {found[name].verdict for name in ("gain", "averaged", "told-linear", "utility")} == {"fails"}


def test_an_image_drawn_twice_counts_twice_in_the_prediction():
    """Errors are off by 0.1, 0.2 and 0.6: of the sample 1, 3, 3 the median is 0.6, and would be 0.35 if merged."""
    rows = [{"image": image, "kind": "linear", "level": 0.1, "predicted_mse": 1.0, "mse": 1 + off, "draw": draw}
            for image, off in enumerate((0.1, 0.2, 0.6)) for draw in (0, 1)]  # fmt: skip
    found = []
    claims.bootstrap(lambda t: found.append(designed_noise._off(t)) or 0.0, pd.DataFrame(rows), "image", 10, least=3)
    medians = [0.1, 0.1, 0.1, 0.2, 0.2, 0.6, 0.2, 0.2, 0.6, 0.6]  # of 111, 112, 113, 122, 123, 133, 222, 223, 233, 333
    assert sorted(found[1:]) == pytest.approx(sorted(medians))


def test_an_attack_that_failed_is_infinitely_far_off():
    table = made_up()
    gone = (table.kind == "linear") & ~table.told
    table.loc[gone, ["failed", "mse", "rmse"]] = [True, np.nan, np.nan]
    assert verdicts(table, frontier())["prediction"].value == np.inf


def test_equal_seeds_share_no_draw():
    """z of each kind of noise and of an attack's start, 784 numbers each, all with seed 0."""
    J = shared.jacobian({**SETTING, "image": 0})
    values, vectors = spectrum.decompose(J)
    started = []
    i2f.invert(J.map.model, J.gradient, J.map.y, J.x.shape, steps=1, seed=0, callback=lambda at: started.append(at.x))

    def z(kind):
        return (vectors.T @ J.matvec(designed_noise.noise(kind, 1e-9).delta(J, 0))) / values

    draws = torch.stack([
        started[0].flatten(), vectors @ z("designed"), z("linear"), vectors @ z("linear"),
        designed_noise.noise("isotropic", 1.0).delta(J, 0)[:784],
    ])  # fmt: skip
    assert float((torch.corrcoef(draws) - torch.eye(len(draws))).abs().max()) < 5 / 784**0.5
    expected = torch.randn(784, generator=streams.generator("row-space", 0), dtype=torch.float64)
    assert float(torch.corrcoef(torch.stack([z("linear"), expected]))[0, 1]) == pytest.approx(1)


def test_the_order_of_training_is_the_same_whatever_the_noise(monkeypatch):
    seen = {}
    original = designed_noise.defended

    def note(model, x, y, method, *rest):
        seen.setdefault(method, []).append(x)
        return original(model, x, y, method, *rest)

    monkeypatch.setattr(designed_noise, "defended", note)
    for method, value in (("none", 0.0), ("isotropic", 0.1)):
        designed_noise.train({**SETTING, "method": method, "value": value, "seed": 3}, 40, 20, 2, 10, 0.003)
    assert torch.equal(torch.cat(seen["none"]), torch.cat(seen["isotropic"]))


def test_trainings_that_learnt_nothing_are_not_compared():
    trained = pd.concat([frontier(), pd.DataFrame([{"method": "none", "value": 0, "seed": 0, "accuracy": 0.2}])])
    assert verdicts(made_up(), trained)["utility"].verdict == "inconclusive"


def test_where_isotropic_noise_costs_nothing_there_is_nothing_to_gain():
    plain = pd.DataFrame([{"method": "none", "value": 0.0, "seed": seed, "privacy": 0.0} for seed in range(4)])
    for accuracy, verdict in ((0.8, "holds"), (0.51, "inconclusive")):  # isotropic noise leaves 0.5 at its middle
        table = pd.concat([frontier(), plain.assign(accuracy=accuracy)])
        found = verdicts(made_up(), table)["utility"]
        assert found.verdict == verdict
        assert ("less to gain" in found.note) == (verdict == "inconclusive")


def test_the_figure_has_every_kind(table):
    left, _, right = draw.overview(table, frontier()).axes
    assert len(left.lines) == len(designed_noise.KINDS)
    assert len(right.lines) == 2
    assert np.isfinite(left.lines[0].get_ydata()).all()


def test_trainings_of_one_noise_alone_are_not_compared():
    alone = pd.DataFrame({"method": ["none", "designed"], "value": [0.0, 0.1], "seed": 0, "privacy": [0.0, 0.1],
                          "accuracy": [0.9, 0.8]})  # fmt: skip
    assert designed_noise.judge_trainings(alone, "mnist", 0.05) == []
