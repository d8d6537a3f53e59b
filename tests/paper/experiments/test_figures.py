"""Figures: what is drawn is what is in the table, and the same drawing gives the same bytes."""

import inspect
from importlib import import_module

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from i2f import claims, figures, pipeline
from i2f.attacks import GENERAL
from i2f.paper import estimates
from i2f.paper.attackers import ATTACKERS
from i2f.paper.figures import eigenvectors, leakage, verdicts
from i2f.paper.results import Results

mpl.use("Agg")


@pytest.mark.parametrize("experiment", sorted({entry["experiment"] for entry in pipeline.runs().values()}))
def test_figures_are_drawn_from_what_was_found_and_the_parameters(experiment):
    """Never from files: those of a notebook that solved more are not the published ones."""
    published = import_module(f"i2f.paper.figures.{experiment}").published
    assert list(inspect.signature(published).parameters) == ["found", "config"]


@pytest.fixture
def table() -> pd.DataFrame:
    found = []
    for part, c in (("law", 0.01), ("paper", 5.0), ("end", 0.1), ("end", 1.0)):
        for index, value in ((0, 4.0), (50, 0.1), (99, 0.001)):
            for method in ("gauss-newton", "dgl"):
                predicted = c**2 / (784 * value)
                found.append(
                    {
                        "dataset": "cifar10",
                        "part": part,
                        "image": 1,
                        "index": index,
                        "eigenvalue": value,
                        "norm": c,
                        "method": method,
                        "predicted_mse": predicted,
                        "predicted_rmse": predicted**0.5,
                        "mse": 1.1 * predicted,
                        "rmse": (1.1 * predicted) ** 0.5,
                        "converged": index < 99,
                    }
                )
    return pd.DataFrame(found).sort_values("method", ascending=False, kind="stable")


def test_the_same_drawing_gives_the_same_bytes(table, tmp_path):
    for name in ("a", "b"):
        figure = eigenvectors.overview(table, cut=0.05)
        for ending in ("svg", "png"):
            figures.save(figure, tmp_path / f"{name}.{ending}")
    for ending in ("svg", "png"):
        first, second = ((tmp_path / f"{name}.{ending}").read_bytes() for name in ("a", "b"))
        assert first == second
        assert (b"max-width: 100%" in first) == (ending == "svg")  # a page shows it whole


def test_pictures_hold_the_pixels(table):
    truth, found = np.zeros((3, 8, 8)), [np.full((3, 8, 8), v) for v in (0.2, 0.4, 2.0, 0.2, 0.4, 2.0)]
    results = Results({"problems": table}, {"pictures": np.stack([truth, *found])})
    drawn = eigenvectors.published(results, {"cut": 0.05, "first_image": 1, "photographs": 1})
    assert list(drawn) == ["overview.svg", "pictures.png"]
    shown = [ax.images[0].get_array() for ax in drawn["pictures.png"].axes]
    assert len(shown) == 8
    assert shown[0].max() == 0
    assert shown[-1].max() == 1  # clamped for display
    assert [ax.get_ylabel() for ax in drawn["pictures.png"].axes if ax.get_ylabel()] == ["Gauss–Newton", "DGL, Adam"]


def test_leakage_draws_every_path_and_every_picture():
    paths = pd.DataFrame(
        [(m, cost, 0.5 / cost) for m in GENERAL for cost in (1, 10, 100)],
        columns=["method", "evaluations", "mse"],
    )
    truth, images = np.full((1, 8, 8), 0.1), np.linspace(0, 2, 5 * 3 * 64).reshape(5, 3, 1, 8, 8)
    found = Results({"paths": paths}, {"truth": truth, "images": images})
    (figure,) = leakage.published(found, {"costs": [5, 50, 500]}).values()
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    for who in (ATTACKERS[name] for name in GENERAL):
        assert list(lines[f"{who.label} (knows {who.told})"].get_ydata()) == [0.5, 0.05, 0.005]
    shown = [ax for ax in figure.axes[1:] if ax.get_visible()]
    assert len(shown) == 1 + 5 * 3
    assert np.array_equal(shown[1].images[0].get_array(), images[0, 0, 0])
    assert shown[-1].images[0].get_array().max() == 1
    assert [ax.get_title() for ax in shown[:4]] == ["private", "5", "50", "500"]


def test_every_method_has_its_colour():
    assert len({(ATTACKERS[name].colour, ATTACKERS[name].marker) for name in GENERAL}) == len(GENERAL)


def test_verdicts_are_counted_by_experiment():
    entry = {"number": 1, "statement": "s", "source": "p", "attacker": "none", "statistic": "m", "unit": "image"}
    found = [
        claims.Judge({name: entry}, experiment, {})(name, estimates.mean(np.arange(1.0, 10)), at_least=least)
        for experiment, name, least in (("one", "a", 0.0), ("one", "b", 0.0), ("two", "a", 20.0))
    ]
    ax = verdicts.bars(found)
    drawn = {c.get_label(): [bar.get_width() for bar in c] for c in ax.containers}
    assert drawn == {"holds": [2, 0], "fails": [0, 1]}
    assert set(verdicts.COLOURS) == set(claims.VERDICTS)


def test_a_cloud_of_points_becomes_pixels(tmp_path):
    weights = {}
    for count in (50, 5000):
        figure, ax = plt.subplots()
        ax.scatter(np.linspace(0, 1, count), np.linspace(0, 1, count))
        figures.save(figure, tmp_path / f"{count}.svg")
        weights[count] = (tmp_path / f"{count}.svg").read_text()
    assert "<image" in weights[5000]
    assert "<image" not in weights[50]
    assert len(weights[5000]) < 200_000
