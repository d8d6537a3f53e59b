"""The eigenvector experiment: its problems, its table, and verdicts that can go either way."""

import numpy as np
import pandas as pd
import pytest
import torch

import i2f
from i2f import claims
from i2f.paper import rows
from i2f.paper.experiments import eigenvectors
from i2f.paper.figures import eigenvectors as draw
from i2f.paper.sweep import Settings

SPECTRUM = torch.logspace(1, -6, 50, dtype=torch.float64)
CONFIG = {"init": "uniform", "images": 4, "photographs": 4, "first_image": 1, "weight_seeds": 2, "levels": 3}
CONFIG |= {
    "law_norm": 0.01,
    "cut": 0.05,
    "paper_norm": 5.0,
    "paper_indices": [0, 9],
    "end_images": 1,
    "end_norms": [0.1, 1.0],
}
CONFIG |= {"adam_images": 3, "gauss_newton_steps": 30, "adam_steps": 20}
THRESHOLDS = CONFIG | {"slope_low": -1.05, "slope_high": -0.95, "paper_slope_low": -1.15, "paper_slope_high": -0.85}
THRESHOLDS |= {"share": 0.8, "same_low": 0.95, "same_high": 1.05, "excess": 2.0}


def test_who_attacks_what():
    found = pd.DataFrame(eigenvectors.problems(CONFIG))
    assert (found.weight_seed == 1 + found.image % 2).all()
    assert (found.start_seed == found.image).all()
    counted = found.groupby(["dataset", "part", "method"]).image.agg(["min", "max", "size"])
    assert {key: tuple(row) for key, row in zip(counted.index, counted.to_numpy(), strict=True)} == {
        ("mnist", "law", "gauss-newton"): (1, 4, 12),
        ("mnist", "paper", "gauss-newton"): (1, 4, 8),
        ("mnist", "end", "gauss-newton"): (1, 1, 6),
        ("cifar10", "law", "gauss-newton"): (1, 4, 12),
        ("cifar10", "paper", "gauss-newton"): (1, 4, 8),
        ("cifar10", "paper", "dgl"): (1, 3, 3),
    }
    assert set(found[found.method == "dgl"]["index"]) == {0}
    assert set(found[found.part == "end"]["index"]) == {0, 392, 783}
    shown = found[found.shown.eq(True)]
    assert set(zip(shown.dataset, shown.image, shown.part, strict=True)) == {("cifar10", 1, "paper")}
    assert len(shown) == 3


def test_long_attacks_are_verified_by_their_first_steps():
    brief = rows.declaration(eigenvectors.solve).brief
    found = [brief.head(p) for p in eigenvectors.problems(CONFIG | {"adam_steps": 24000})]
    assert {(p["method"], p["until"]) for p in found if p} == {("dgl", 500)}
    assert sum(p is None for p in found) == 46


def test_law_stays_within_the_cut():
    problems = eigenvectors.law(50, levels=6, norm=0.01, cut=0.05)
    indices = [eigenvectors.direction(SPECTRUM, p["share"], p["floor"]) for p in problems]
    chosen = SPECTRUM[indices]
    assert (0.01 / (50 * chosen).sqrt() <= 0.05).all()
    assert indices[0] == 0
    assert len(set(indices)) == 6
    steps = chosen.log().diff()
    assert float(steps.max() / steps.min()) == pytest.approx(1, abs=0.5)  # even, as far as the spectrum lets it


def test_law_takes_the_whole_spectrum_where_the_noise_is_small():
    last = eigenvectors.law(50, levels=6, norm=1e-8, cut=0.05)[-1]
    assert eigenvectors.direction(SPECTRUM, last["share"], last["floor"]) == 49


@pytest.fixture
def small():
    """(model, x, y) of six pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 4)).double().eval()
        return model, torch.rand(1, 6, dtype=torch.float64), torch.tensor([1])


def test_attack_gives_a_row_a_problem_and_the_shown_pictures(small, monkeypatch, tmp_path):
    """On a network small enough for the law to be checked against c/√λ; rows that are read again are the same."""
    model, x, y = small
    jacobians = {1: i2f.GradientJacobian(model, x, y), 2: i2f.GradientJacobian(model, x.flip(1), y)}
    monkeypatch.setattr(eigenvectors.shared, "jacobian", lambda p: jacobians[p["image"]])
    monkeypatch.setattr(eigenvectors.data, "load", lambda dataset, n: (x[:n], y[:n]))
    config = CONFIG | {"images": 2, "photographs": 2, "law_norm": 1e-6, "cut": 1.0}
    config |= {"levels": 8}  # more than eigenvalues
    config |= {"paper_indices": [0, 3], "paper_norm": 1e-5, "end_norms": [1e-6]}
    problems, store = eigenvectors.problems(config), rows.Store(chunks=tmp_path)
    found = eigenvectors.run(problems, Settings(jobs=1, progress="off", store=store))
    rows.save(tmp_path / "published", store.asked)
    store = rows.Store([tmp_path / "published"], solve=False)
    again = eigenvectors.run(problems, Settings(jobs=1, progress="off", store=store))
    table, pictures = found.tables["problems"], found.arrays["pictures"]
    pd.testing.assert_frame_equal(again.tables["problems"], table)
    assert np.array_equal(again.arrays["pictures"], pictures)
    laws = table[table.part == "law"]
    assert all(3 < len(mine) <= 6 and mine["index"].is_unique for _, mine in laws.groupby(["dataset", "image"]))
    assert table.groupby(["dataset", "part", "method"]).size().drop("law", level="part").to_dict() == {
        ("mnist", "paper", "gauss-newton"): 4,
        ("mnist", "end", "gauss-newton"): 3,
        ("cifar10", "paper", "gauss-newton"): 4,
        ("cifar10", "paper", "dgl"): 2,
    }
    assert pictures.shape == (1 + 3, 6)  # the truth, two by Gauss–Newton and one by Adam
    assert np.array_equal(pictures[0], x[0].numpy())
    values = {image: i2f.spectrum.decompose(J).values for image, J in jacobians.items()}
    exact = [row.norm**2 / (6 * float(values[row.image][row.index])) for row in table.itertuples(name="Row")]
    assert table.predicted_mse.to_numpy() == pytest.approx(exact, rel=1e-6)
    ours = table[table.method == "gauss-newton"]
    assert ours.mse.to_numpy() == pytest.approx(ours.predicted_mse.to_numpy(), rel=0.02)
    assert np.abs(pictures[1:3] - pictures[0]).max() < 0.01 < np.abs(pictures[3] - pictures[0]).max()
    rivals = eigenvectors.rivals(table)
    assert list(rivals.index) == ["DGL, Adam", "Gauss–Newton"]
    assert rivals["RMSE / predicted"]["Gauss–Newton"] == pytest.approx(1, abs=0.01)
    shown = found._replace(arrays={"pictures": pictures.reshape(-1, 1, 2, 3)})
    assert list(draw.published(shown, config)) == ["overview.svg", "pictures.png"]


def fake(law=-1.0, paper=-1.0, factor=1.001, adam=3.0, images=19) -> pd.DataFrame:
    """A table as attackers would leave it whose squared error is factor·λ^exponent in units of c²/d_x, and Adam's RMSE
    `adam` times the predicted one."""
    found = []
    for dataset in ("mnist", "cifar10"):
        for image in range(1, 1 + images):
            stray = 1 + 1e-4 * np.sin(image)
            for part, norm, exponent in (("law", 0.01, law), ("paper", 5.0, paper)):
                for index, value in enumerate((5.0, 0.5, 0.05, 0.005)):
                    for method in ("gauss-newton", "dgl"):
                        if method == "dgl" and (dataset, part, index) != ("cifar10", "paper", 0):
                            continue
                        predicted = norm**2 / (784 * value)
                        mse = stray * (
                            adam**2 * predicted if method == "dgl" else factor * norm**2 / 784 * value**exponent
                        )
                        found.append(
                            {
                                "dataset": dataset,
                                "part": part,
                                "image": image,
                                "index": index,
                                "norm": norm,
                                "eigenvalue": value,
                                "method": method,
                                "mse": mse,
                                "rmse": mse**0.5,
                                "predicted_mse": predicted,
                                "predicted_rmse": predicted**0.5,
                                "converged": method == "gauss-newton",
                                "failed": False,
                            }
                        )
    return pd.DataFrame(found)


IDS = ["slope-mnist", "slope-cifar10", "slope-paper-mnist", "slope-paper-cifar10", "below"]
IDS += ["bias-gauss-newton", "bias-adam"]


def judged(table: pd.DataFrame) -> dict[str, claims.Claim]:
    found = eigenvectors.judge({"problems": table}, THRESHOLDS)
    assert [c.id.removeprefix("eigenvectors-") for c in found] == IDS
    assert [c.number for c in found] == [15, 15, 16, 16, 17, 18, 18]
    return {c.id.removeprefix("eigenvectors-"): c for c in found}


@pytest.mark.parametrize(
    ("table", "failing"),
    [
        ({}, set()),  # the law
        ({"law": 0.0}, {"slope-mnist", "slope-cifar10"}),  # λ does not matter
        ({"paper": -1.2}, {"slope-paper-mnist", "slope-paper-cifar10", "below", "bias-gauss-newton"}),
        ({"law": -1.1, "paper": -1.1, "factor": 1.2}, {"slope-mnist", "slope-cifar10"}),
        ({"factor": 0.99}, {"below"}),
        ({"factor": 1.5}, {"bias-gauss-newton"}),
        ({"adam": 1.5}, {"bias-adam"}),
    ],
)
def test_verdicts_follow_the_table(table, failing):
    found = judged(fake(**table))
    assert {name for name, c in found.items() if c.verdict == "fails"} == failing
    assert {c.verdict for name, c in found.items() if name not in failing} == {"holds"}
    assert {c.n for c in found.values()} == {19}


def test_an_attack_that_did_not_finish_is_left_out_and_too_many_decide_nothing():
    table = fake()
    photographs = (table.dataset == "cifar10") & (table.part == "paper") & (table.method == "gauss-newton")
    table.loc[photographs & (table.image == 3) & (table["index"] == 0), ["converged", "mse", "rmse"]] = [
        False,
        1e-9,
        1e-9,
    ]
    found = judged(table)
    assert {c.verdict for c in found.values()} == {"holds"}
    assert [found[name].n for name in ("slope-paper-cifar10", "below", "bias-gauss-newton")] == [19, 18, 18]
    assert "75 of 76 attacks converged" in found["below"].note
    table.loc[photographs & (table.image < 4), "converged"] = False
    found = judged(table)
    for name in ("slope-paper-cifar10", "below", "bias-gauss-newton"):
        assert found[name].verdict == "inconclusive"
        assert "of the attacks finished" in found[name].note
    table = fake()
    adam = table.method == "dgl"
    table.loc[adam & (table.image == 3), ["failed", "mse", "rmse"]] = [True, np.nan, np.nan]
    assert (judged(table)["bias-adam"].verdict, judged(table)["bias-adam"].n) == ("holds", 18)
    table.loc[adam & (table.image < 4), "failed"] = True
    assert judged(table)["bias-adam"].verdict == "inconclusive"


def test_photographs_that_nobody_attacked_are_not_run():
    table = fake()
    found = judged(table[table.dataset == "mnist"])
    assert {name for name, c in found.items() if c.verdict == "holds"} == {"slope-mnist", "slope-paper-mnist"}
    assert {c.verdict for c in found.values()} == {"holds", "not run"}
    tasks = eigenvectors.problems(CONFIG | {"photographs": 0})
    assert {p["dataset"] for p in tasks} == {"mnist"}
    assert sum("shown" in p for p in tasks) == 2


def test_adam_that_nobody_ran_is_not_run():
    table = fake()
    found = judged(table[table.method != "dgl"])
    assert found["bias-adam"].verdict == "not run"
    assert found["bias-adam"].note == "cost: 20 steps on each gradient"
    assert {c.verdict for name, c in found.items() if name != "bias-adam"} == {"holds"}


def test_a_problem_that_raised_has_no_say():
    table = fake().astype({"converged": object})
    lost = (table.dataset == "mnist") & (table.image == 3)
    table.loc[lost, ["index", "eigenvalue", "mse", "rmse", "converged"]] = np.nan
    table.loc[lost, "failed"] = True
    found = judged(table)
    assert {c.verdict for c in found.values()} == {"holds"}
    assert found["slope-mnist"].n == 18


def test_figure_draws_every_attack():
    table = fake()
    ends = pd.DataFrame(
        {"image": i, "index": k, "predicted_rmse": [0.01, 0.1], "rmse": [0.01, 0.2]} for i in (1, 2) for k in (0, 5, 9)
    )
    ends = ends.explode(["predicted_rmse", "rmse"]).astype({"predicted_rmse": float, "rmse": float})
    table = pd.concat([table, ends.assign(part="end", dataset="mnist", method="gauss-newton")], ignore_index=True)
    table.loc[table.index[table.method == "gauss-newton"][0], "converged"] = False
    left, middle, right = draw.overview(table, cut=0.05).axes
    for ax, part in ((left, "law"), (middle, "paper")):
        mine = table[table.part == part]
        drawn = np.concatenate([np.asarray(c.get_offsets()) for c in ax.collections])
        assert np.sort(drawn[:, 0]) == pytest.approx(np.sort(mine.eigenvalue))
        assert np.sort(drawn[:, 1]) == pytest.approx(np.sort(mine.mse * 784 / mine.norm**2))
    white = [np.all(face[:3] == 1) for c in left.collections for face in c.get_facecolors()]
    assert sum(white) == 1
    lines = [line for line in right.lines if line.get_marker() == "o"]
    assert len(lines) == 6
    assert lines[0].get_ydata() == pytest.approx([1, 2])


def test_noise_that_leaves_every_direction_outside_the_cut_is_refused():
    (problem, *_) = eigenvectors.law(50, levels=2, norm=50.0, cut=0.05)
    with pytest.raises(ValueError, match="no direction is within the cut: λ_max = 10"):
        eigenvectors.direction(SPECTRUM, problem["share"], problem["floor"])
