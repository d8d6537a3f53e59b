"""Predicted pictures by a dense solve, claims on made-up tables, and the rows as they are stored."""

import numpy as np
import pandas as pd
import pytest

import i2f
from i2f.paper import rows
from i2f.paper.experiments import gallery
from i2f.paper.figures import gallery as draw
from i2f.paper.sweep import Settings

LINEAR, SOFT = "mnist linear uniform", "mnist cnn2x16 kaiming softplus"
CONFIG = {"networks": {LINEAR: [1e-6, 1e-2]}, "digits": 1, "first_digit": 200, "photographs": 1}
CONFIG |= {"gauss_newton_steps": 30, "cut": 0.05, "alike": 0.95}


def test_problems_have_a_network_in_words():
    networks = {SOFT: [1e-7], "cifar10 lenet uniform": [1e-9, 1e-8]}
    tasks = gallery.problems(CONFIG | {"networks": networks, "digits": 2})
    names = ("dataset", "split", "model", "activation", "image", "size", "noise_seed", "start_seed")
    assert [tuple(t[name] for name in names) for t in tasks] == [
        ("mnist", "train", "cnn2x16", "softplus", 200, 1e-7, 1200, 200),
        ("mnist", "train", "cnn2x16", "softplus", 201, 1e-7, 1201, 201),
        ("cifar10", "test", "lenet", None, 0, 1e-9, 1000, 0),
        ("cifar10", "test", "lenet", None, 0, 1e-8, 1000, 0),
    ]


def stored(folder, solve=True):
    return Settings(jobs=1, progress="off", store=rows.Store(chunks=folder, solve=solve))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """One digit on a linear layer under little and much noise, solved, and the same read again."""
    folder = tmp_path_factory.mktemp("chunks")
    solved = gallery.run(gallery.problems(CONFIG), stored(folder))
    again = gallery.run(gallery.problems(CONFIG), stored(folder, solve=False))
    pd.testing.assert_frame_equal(solved.tables["problems"], again.tables["problems"])
    for name in gallery.PICTURES:
        for a, b in zip(solved.arrays[name], again.arrays[name], strict=True):
            assert a.dtype == b.dtype == np.uint8
            assert np.array_equal(a, b)
    return solved


def test_the_predicted_picture_is_the_truth_and_a_least_squares_solution(found):
    x, y = i2f.data.load("mnist", 1, offset=200, split="train")
    model = i2f.models.build("linear", "mnist", "uniform", seed=1, normalize=False).double()
    J = i2f.GradientJacobian(model, x.double(), y)
    moved = []
    for k, variance in enumerate((1e-6, 1e-2)):
        delta = i2f.perturb.gaussian(J.gradient, variance, seed=1200).numpy()
        moved.append(np.linalg.lstsq(J.dense().numpy().T, delta, rcond=None)[0])
        expected = np.clip(x.numpy().ravel() + moved[-1], 0, 1) * 255
        assert np.abs(found.arrays["predicted"][k].ravel() - expected).max() <= 0.51
        assert found.tables["problems"].predicted_rmse[k] == pytest.approx(np.sqrt(np.mean(moved[-1] ** 2)), rel=1e-6)
    table = found.tables["problems"]
    assert table.converged.all()
    assert table.cosine[0] > max(0.999, table.cosine[1])
    gap = np.abs(found.arrays["recovered"][0].astype(int) - found.arrays["predicted"][0])
    assert gap.max() <= 2  # the attack ends where it was said to


def fake(cosine=0.99, converged=True, images=10):
    """Three levels per image, the last beyond the cut and all wrong."""
    return pd.DataFrame(
        {
            "network": network,
            "image": image,
            "variance": variance,
            "predicted_rmse": predicted,
            "rmse": predicted,
            "ssim": 1.0,
            "cosine": (cosine + 0.001 * np.sin(image)) if predicted < 0.05 else -1.0,
            "converged": converged,
            "failed": False,
        }
        for network in (LINEAR, SOFT)
        for image in range(images)
        for variance, predicted in ((1e-7, 0.01), (1e-6, 0.04), (1e-3, 1.0))
    )


@pytest.mark.parametrize(("cosine", "verdict"), [(0.99, "holds"), (0.95, "inconclusive"), (0.5, "fails")])
def test_verdicts_are_about_the_linear_regime(cosine, verdict):
    judged = gallery.judge({"problems": fake(cosine)}, CONFIG)
    assert [c.id for c in judged] == [f"gallery-picture-{name.replace(' ', '-')}" for name in (LINEAR, SOFT)]
    assert {(c.verdict, c.n) for c in judged} == {(verdict, 10)}
    assert "(mnist linear uniform)" in judged[0].statement


def test_few_images_are_not_judged_and_unfinished_attacks_decide_nothing():
    assert gallery.judge({"problems": fake(images=7)}, CONFIG) == []
    table = fake()
    table.loc[table.image < 2, "converged"] = False
    assert {c.verdict for c in gallery.judge({"problems": table}, CONFIG)} == {"inconclusive"}
    assert gallery.summary(table).converged.tolist() == pytest.approx([0.8] * 6)


def test_figures_draw_every_attack(found):
    figures = draw.published(found, CONFIG)
    images = [image for ax in figures["pictures.png"].axes for image in ax.images]
    assert len(images) == 2 * (1 + 2)  # the private one, then the levels, predicted and recovered
    assert np.allclose(images[1].get_array(), found.arrays["predicted"][0][0] / 255)
    left, right = figures["overview.svg"].axes
    for ax, column in ((left, "rmse"), (right, "cosine")):
        drawn = np.concatenate([np.asarray(c.get_offsets()[:, 1], dtype=float) for c in ax.collections])
        assert np.sort(drawn) == pytest.approx(np.sort(found.tables["problems"][column]))
