"""The leakage experiment: its trajectories, its pictures at equal cost, and verdicts that can go either way."""

import numpy as np
import pandas as pd
import pytest
import torch

import i2f
from i2f.attacks import GENERAL, Iterate
from i2f.paper import rows
from i2f.paper.experiments import leakage
from i2f.paper.experiments import problems as shared
from i2f.paper.figures import leakage as draw
from i2f.paper.sweep import Settings

CONFIG = {
    "dataset": "mnist",
    "image": 0,
    "digits": 2,
    "first_digit": 5,
    "photographs": 0,
    "weight_seeds": 2,
    "gauss_newton_steps": 20,
    "adam_steps": 60,
    "lbfgs_steps": 6,
    "costs": [1, 40, 10_000],
    "start_seed": 0,
}
QUIET = Settings(jobs=1, progress="off")


@pytest.fixture
def jacobian(monkeypatch):
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(1, 3, 3, padding=1), torch.nn.Sigmoid(), torch.nn.Flatten(), torch.nn.Linear(108, 4)
    model = torch.nn.Sequential(*layers).double().eval()
    for p in model.parameters():
        torch.nn.init.uniform_(p, -0.5, 0.5)
    J = i2f.GradientJacobian(model, torch.rand(1, 1, 6, 6, dtype=torch.float64), torch.tensor([2]))
    monkeypatch.setattr(shared, "jacobian", lambda problem: J)
    return J


def at(evaluations, value, loss):
    return Iterate(0, 0, evaluations, torch.full((1, 1, 2, 2), value), loss, evaluations)


def test_trajectory_shows_what_the_attacker_would_hand_in():
    """The best by its own objective, not by the truth (0.5 here), and at a cost what was held when it was spent."""
    trajectory = leakage.Trajectory(torch.full((1, 1, 2, 2), 0.5), costs=[1, 5, 100])
    for iterate in (at(1, 0.0, 9.0), at(4, 1.0, 3.0), at(7, 0.5, 4.0), at(9, 0.75, 1.0)):
        trajectory(iterate)
    assert [row["evaluations"] for row in trajectory.rows] == [1, 4, 7, 9]
    assert [row["mse"] for row in trajectory.rows] == [0.25, 0.25, 0.25, 0.0625]
    found = i2f.attacks.Reconstruction(torch.full((1, 1, 2, 2), 0.8), 0.5, 0.1, 9, 10, False, "")
    trajectory.finish(found)
    assert [float(p.mean()) for p in trajectory.pictures] == pytest.approx([0.0, 1.0, 0.8])
    assert trajectory.rows[-1] == {"evaluations": 10, "mse": pytest.approx(0.09), "loss": 0.5}


def test_every_attacker_has_a_row_and_every_image_is_surveyed(jacobian):
    tables, arrays = found = leakage.run(leakage.problems(CONFIG), QUIET)
    summary, paths, pictures = tables["summary"], tables["paths"], arrays["images"]
    assert tables["survey"].mse.max() <= 1e-12
    assert tables["survey"].label_found.all()  # though it is not told
    assert list(summary.method) == list(GENERAL) == list(dict.fromkeys(paths.method))
    assert pictures.shape == (5, 3, 1, 6, 6)
    assert list(summary.label_given) == [True, True, False, False, True]
    last = paths.groupby("method", sort=False).last()
    assert last.mse.to_numpy() == pytest.approx(summary.mse.to_numpy())
    assert last.evaluations.to_list() == summary.evaluations.to_list()
    for _, path in paths.groupby("method"):
        assert path.evaluations.is_monotonic_increasing
        assert path.loss.is_monotonic_decreasing
    ours = summary.set_index("method").loc["gauss-newton"]
    assert ours.mse == shared.FLOOR
    assert np.allclose(pictures[0, -1], jacobian.x[0].numpy(), atol=1e-6)
    assert ours["evaluations to 1e-10"] <= ours.evaluations
    assert list(leakage.readable(summary).columns) == list(GENERAL)
    (figure,) = draw.published(found, CONFIG).values()
    assert sum(bool(ax.images) and ax.get_visible() for ax in figure.axes) == 1 + 5 * 3


def test_rows_survive_the_store(jacobian, tmp_path):
    short = {"gauss_newton_steps": 2, "adam_steps": 9, "lbfgs_steps": 1, "digits": 1}
    tasks = leakage.problems(CONFIG | short)
    solved, read = (
        leakage.run(tasks, Settings(jobs=1, progress="off", store=rows.Store(chunks=tmp_path, solve=solve)))
        for solve in (True, False)
    )
    for name, table in solved.tables.items():
        pd.testing.assert_frame_equal(table, read.tables[name])
    assert all(np.array_equal(array, read.arrays[name]) for name, array in solved.arrays.items())


def test_an_image_has_one_weight_seed_in_rotation_or_all():
    found = leakage.problems(CONFIG | {"digits": 3, "photographs": 2})
    where = [(p["dataset"], p["split"], p["image"], p["weight_seed"]) for p in found["survey"]]
    digits = [("mnist", "train", 6, 1), ("mnist", "train", 5, 2), ("mnist", "train", 7, 2)]
    assert where == [*digits, *(("cifar10", "test", image, seed) for seed in (1, 2) for image in (0, 1))]


@pytest.mark.parametrize(("lost", "verdicts"), [(0, "holds holds"), (20, "fails holds"), (-1, "inconclusive holds")])
def test_verdicts_follow_the_table(lost, verdicts):
    """An image under several weights counts once, and only if it is recovered under all."""
    digits = pd.DataFrame({"dataset": "mnist", "image": range(400), "mse": 1e-20, "label_found": True})
    digits.loc[: lost - 1 if lost >= 0 else 3, "mse"] = 1e-3 if lost else 1e-20
    photographs = digits[:100].assign(dataset="cifar10", image=list(range(20)) * 5, mse=1e-20, label_found=False)
    thresholds = {"exact": 1e-8, "share": 0.98, "share_cifar10": 0.8, "weight_seeds": 5}
    found = leakage.judge({"survey": pd.concat([digits, photographs])}, thresholds)
    assert [c.verdict for c in found] == verdicts.split()
    assert [(c.number, c.n) for c in found] == [(1, 400), (2, 20)]
    assert "0 of 20 images have their label read" in found[1].note
    photographs.loc[7, "mse"] = 1.0  # one image, under one of five seeds
    again = leakage.judge({"survey": photographs}, thresholds)[0]
    assert again.value == 0.95
