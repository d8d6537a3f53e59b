"""The eigenvector experiment: its problems, its table, and verdicts that can go either way."""

import numpy as np
import pandas as pd
import pytest
import torch

import i2f
from i2f.paper import rows
from i2f.paper.experiments import eigenvectors
from i2f.paper.figures import eigenvectors as draw
from i2f.paper.sweep import Settings

pytestmark = pytest.mark.usefixtures("few_draws")
SPECTRUM = torch.logspace(1, -6, 50, dtype=torch.float64)
THRESHOLDS = {"slope_low": -1.05, "slope_high": -0.95, "accuracy": 0.01, "inequality": 100.0, "excess": 2.0}


def test_law_stays_within_the_cut():
    problems = eigenvectors.law(1, 50, levels=6, norm=0.01, cut=0.05)
    indices = [eigenvectors.direction(SPECTRUM, p["share"], p["floor"]) for p in problems]
    chosen = SPECTRUM[indices]
    assert (0.01 / (50 * chosen).sqrt() <= 0.05).all()
    assert indices[0] == 0
    assert len(set(indices)) == 6
    steps = chosen.log().diff()
    assert float(steps.max() / steps.min()) == pytest.approx(1, abs=0.5)  # even, as far as the spectrum lets it


def test_law_takes_the_whole_spectrum_where_the_noise_is_small():
    last = eigenvectors.law(1, 50, levels=6, norm=1e-8, cut=0.05)[-1]
    assert eigenvectors.direction(SPECTRUM, last["share"], last["floor"]) == 49


@pytest.fixture
def small():
    """(model, x, y) of six pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 4)).double().eval()
        return model, torch.rand(1, 6, dtype=torch.float64), torch.tensor([1])


def test_attack_gives_a_row_a_problem_and_the_pictures_of_the_papers_row(small, monkeypatch, tmp_path):
    """On a network small enough for the law to be checked against c/√λ; rows that are read again are the same."""
    model, x, y = small
    jacobians = [i2f.GradientJacobian(model, x, y), i2f.GradientJacobian(model, x.flip(1), y)]
    monkeypatch.setattr(eigenvectors.shared, "jacobian", lambda p: jacobians[p["image"]])
    monkeypatch.setattr(eigenvectors.data, "load", lambda dataset, n: (x[:n], y[:n]))
    config = {"dataset": "mnist", "start_seed": 0, "gauss_newton_steps": 30, "adam_steps": 20, "adam_images": 1}
    config |= {"images": 1, "levels": 20, "law_norm": 1e-6, "cut": 1.0}  # more levels than eigenvalues
    config |= {"paper_images": 2, "paper_indices": [0, 3], "paper_norm": 1e-5, "end_images": 1, "end_norms": [1e-6]}
    problems, store = eigenvectors.problems(config), rows.Store(chunks=tmp_path)
    found = eigenvectors.run(problems, Settings(jobs=1, progress="off", store=store))
    rows.save(tmp_path / "published", store.asked)
    store = rows.Store([tmp_path / "published"], solve=False)
    again = eigenvectors.run(problems, Settings(jobs=1, progress="off", store=store))
    table, pictures = found.tables["problems"], found.arrays["pictures"]
    pd.testing.assert_frame_equal(again.tables["problems"], table)
    assert np.array_equal(again.arrays["pictures"], pictures)
    laws = table[table.part == "law"]
    assert all(3 < len(rows) <= 6 and rows["index"].is_unique for _, rows in laws.groupby("method"))
    table = table[table.part != "law"]
    assert list(table.part) == ["paper"] * 4 + ["end"] * 3 + ["paper"] * 2
    assert list(table.method) == ["gauss-newton"] * 7 + ["dgl"] * 2
    assert pictures.shape == (1 + 4, 6)  # the truth, two by each attacker
    assert np.array_equal(pictures[0], x[0].numpy())
    values = [i2f.spectrum.decompose(J).values for J in jacobians]
    exact = [row.norm**2 / (6 * float(values[row.image][row.index])) for row in table.itertuples(name="Row")]
    assert table.predicted_mse.to_numpy() == pytest.approx(exact, rel=1e-6)
    ours = table[table.method == "gauss-newton"]
    assert ours.mse.to_numpy() == pytest.approx(ours.predicted_mse.to_numpy(), rel=0.02)
    assert list(eigenvectors.rivals(table).index) == ["paper"]
    shown = found._replace(arrays={"pictures": pictures.reshape(-1, 1, 2, 3)})
    assert list(draw.published(shown, config)) == ["overview.svg", "pictures.png"]


def fake(exponent: float, factor: float) -> pd.DataFrame:
    """A table as an attacker would leave it whose error is `factor` (λ^exponent) instead of 1/λ."""
    rows = []
    for part, norm in (("law", 0.01), ("paper", 5.0)):
        for image in range(5):
            for value in (5.0, 0.5, 0.05, 0.005):
                predicted = norm**2 / (784 * value)
                mse = factor * norm**2 / 784 * value**exponent
                rows.append(
                    {
                        "part": part,
                        "image": image,
                        "norm": norm,
                        "eigenvalue": value,
                        "method": "gauss-newton",
                        "mse": mse,
                        "rmse": mse**0.5,
                        "predicted_mse": predicted,
                        "predicted_rmse": predicted**0.5,
                        "converged": True,
                        "failed": False,
                    }
                )
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("exponent", "factor", "expected"),
    [
        (-1.0, 1.0001, ["holds", "holds", "holds", "holds", "holds", "fails"]),  # the law
        (0.0, 1.0, ["fails", "fails", "fails", "fails", "fails", "fails"]),  # λ does not matter
        (-1.0, 5.0, ["holds", "fails", "holds", "holds", "holds", "holds"]),  # an attacker that stops early
    ],
)
def test_verdicts_follow_the_table(exponent, factor, expected):
    found = eigenvectors.judge({"problems": fake(exponent, factor)}, THRESHOLDS, "mnist")
    assert [c.verdict for c in found] == expected
    assert len({c.id for c in found}) == 6


def test_an_attack_that_failed_is_left_out_and_counted():
    table = fake(-1.0, 1.0001)
    table.loc[2, ["failed", "converged", "mse", "rmse"]] = [True, False, np.nan, np.nan]
    table.loc[1, ["failed", "converged", "mse"]] = [True, False, 1e-30]  # it ended with a best image
    found = eigenvectors.judge({"problems": table}, THRESHOLDS, "mnist")
    assert [c.verdict for c in found] == ["holds", "holds", "holds", "holds", "holds", "fails"]
    assert "18 of 20 attacks converged, 2 failed" in found[0].note
    table.loc[(table.part == "law") & (table.image < 3), "failed"] = True  # it predicts nothing of three images in five
    assert eigenvectors.judge({"problems": table}, THRESHOLDS, "mnist")[1].value == np.inf


def test_noise_that_leaves_every_direction_outside_the_cut_is_refused():
    (problem, *_) = eigenvectors.law(1, 50, levels=2, norm=50.0, cut=0.05)
    with pytest.raises(ValueError, match="no direction is within the cut: λ_max = 10"):
        eigenvectors.direction(SPECTRUM, problem["share"], problem["floor"])
