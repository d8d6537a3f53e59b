"""The experiment on audits: its rows are audits, its claims hold and fail as they should."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from i2f.paper import rows
from i2f.paper.experiments import audited
from i2f.paper.figures import audited as draw
from i2f.paper.results import Results
from i2f.paper.sweep import Settings

CONFIG = {"dataset": "mnist", "model": "lenet", "init": "uniform", "weight_seeds": 5, "first_digit": 200}
CONFIG |= {"variances": [1e-6], "targets": [30.0], "gauss_newton_steps": 15}
THRESHOLDS = CONFIG | {"cut": 0.05, "same_low": -0.2, "same_high": 0.2, "within": 1.0, "share": 0.8}
QUIET = Settings(jobs=1, progress="off")


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    return tmp_path_factory.mktemp("chunks")


@pytest.fixture(scope="module")
def found(chunks):
    kept = replace(QUIET, store=rows.Store(chunks=chunks))
    return audited.run(audited.problems(CONFIG | {"images": 1}), kept)


def test_rows_are_audits_and_attacks(found):
    table = found.tables["problems"].set_index("part")
    assert table.variance["predicted"] == 1e-6
    assert table.attacked_psnr["predicted"] == pytest.approx(table.psnr["predicted"], abs=0.2)
    assert table.expected_psnr["suggested"] == pytest.approx(30, abs=0.01)
    assert table.attacked_psnr["suggested"] == pytest.approx(table.psnr["suggested"], abs=0.2)
    assert table.label.all()


def test_rows_are_read_as_they_were_solved(found, chunks):
    known = replace(QUIET, store=rows.Store(chunks=chunks, solve=False))
    again = audited.run(audited.problems(CONFIG | {"images": 1}), known)
    pd.testing.assert_frame_equal(again.tables["problems"], found.tables["problems"])


def test_an_image_has_one_weight_seed_and_meets_every_noise():
    tasks = audited.problems(CONFIG | {"images": 7, "variances": [1e-7, 1e-5], "targets": [30.0, 34.0]})
    assert {(p["image"], p["weight_seed"]) for p in tasks} == {(i, 1 + i % 5) for i in range(200, 207)}
    parts = [("predicted", 1e-7), ("predicted", 1e-5), ("suggested", 30.0), ("suggested", 34.0)]
    assert [(p["part"], p["asked"]) for p in tasks if p["image"] == 203] == parts


def made_up(off=0.1):
    """off: measured PSNR above the predicted or requested one, in dB."""
    tasks = audited.problems(CONFIG | {"images": 20, "variances": [1e-7, 1e-5], "targets": [30.0, 34.0]})
    table = pd.DataFrame(tasks).assign(predicted_rmse=0.01, psnr=40.0, converged=True, failed=False)
    aim = table.psnr.where(table.part == "predicted", table.asked)
    return table.assign(attacked_psnr=aim + off + 0.01 * np.sin(table.image))


def judged(table):
    found = audited.judge({"problems": table}, THRESHOLDS)
    assert [(c.id, c.number, c.ledger) for c in found] == [
        ("audit-psnr", 42, "beyond"),
        ("audit-recommended", 43, "beyond"),
    ]
    return found


@pytest.mark.parametrize(
    ("off", "verdicts"),
    [(0.1, "holds holds"), (0.2, "inconclusive holds"), (3.0, "fails fails"), (-3.0, "fails holds")],
)
def test_too_little_noise_is_a_fault_and_too_much_is_none(off, verdicts):
    found = judged(made_up(off))
    assert [c.verdict for c in found] == verdicts.split()
    assert [c.n for c in found] == [20, 20]
    assert found[0].value == pytest.approx(-off, abs=0.01)
    assert f"requested {off:+.2f} dB" in found[1].note


def test_an_image_is_protected_at_every_target_or_not_at_all():
    table = made_up()
    table.loc[(table.asked == 34) & (table.image == 203), "attacked_psnr"] = 36.0
    table.loc[(table.asked == 30) & (table.image == 204), "attacked_psnr"] = 32.0
    assert judged(table)[1].value == 0.9


def test_what_lies_beyond_the_linear_regime_is_not_predicted():
    table = made_up()
    far = (table.part == "predicted") & (table.asked == 1e-5)
    table.loc[far, ["predicted_rmse", "attacked_psnr"]] = [0.06, 10.0]
    assert judged(table)[0].verdict == "holds"


def test_an_attack_that_did_not_finish_shows_no_protection():
    table = made_up()
    one = table.image == 203
    table["converged"] = table.converged.astype(object).mask(one)  # NaN: of a problem that raised
    table.loc[one, ["attacked_psnr", "failed"]] = [np.nan, True]
    psnr, recommended = judged(table)
    assert (psnr.verdict, psnr.n) == ("holds", 19)
    assert recommended.value == 0.95
    table.loc[table.image == 204, ["converged", "attacked_psnr"]] = [False, -9.0]
    table.loc[table.image == 205, ["converged", "attacked_psnr"]] = [False, -9.0]
    psnr, recommended = judged(table)
    assert (psnr.verdict, recommended.verdict) == ("inconclusive", "inconclusive")
    assert (recommended.value, "only 85% of the attacks finished" in recommended.note) == (0.85, True)


def test_the_figure_draws_every_attack():
    table = made_up(0.5)
    (figure,) = draw.published(Results({"problems": table}), THRESHOLDS).values()
    left, right = figure.axes
    assert (
        left.collections[0].get_offsets().tolist()
        == table[table.part == "predicted"][["psnr", "attacked_psnr"]].to_numpy().tolist()
    )
    clouds = [np.asarray(c.get_offsets()) for c in right.collections if len(c.get_offsets()) == 20]
    assert len(clouds) == 2
    assert all(cloud[:, 1] == pytest.approx(0.5, abs=0.02) for cloud in clouds)
    assert THRESHOLDS["within"] in [line.get_ydata()[0] for line in right.lines]
