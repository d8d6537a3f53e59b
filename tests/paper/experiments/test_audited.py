"""The experiment on audits: its rows are audits, its claims hold and fail as they should."""

from dataclasses import replace

import pandas as pd
import pytest

from i2f.paper import rows
from i2f.paper.experiments import audited
from i2f.paper.figures import audited as draw
from i2f.paper.results import Results
from i2f.paper.sweep import Settings

pytestmark = pytest.mark.usefixtures("few_draws")
CONFIG = {"dataset": "mnist", "model": "lenet", "init": "uniform", "weight_seed": 1}
CONFIG |= {"variances": [1e-6], "targets": [30.0], "gauss_newton_steps": 15}
THRESHOLDS = {"cut": 0.05, "accuracy": 0.2, "within": 1.0}
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


def made_up(off=0.1):
    made = [
        {**p, "predicted_rmse": 0.01, "psnr": 40.0, "label": True, "converged": True, "failed": False, "reason": ""}
        for p in audited.problems(CONFIG | {"images": 5})
    ]
    table = pd.DataFrame(made)
    aim = table.psnr.where(table.part == "predicted", table.asked)
    return table.assign(attacked_psnr=aim + off)


@pytest.mark.parametrize(("off", "verdict"), [(0.1, "holds"), (3.0, "fails")])
def test_claims(off, verdict):
    found = audited.judge({"problems": made_up(off)}, THRESHOLDS, "mnist")
    assert [c.id for c in found] == ["audit-mnist-psnr", "audit-mnist-suggested", "audit-mnist-labels"]
    assert [c.verdict for c in found] == [verdict, verdict, "holds"]


def test_the_figure_has_both_parts():
    (figure,) = draw.published(Results({"problems": made_up()}), CONFIG).values()
    left, right = figure.axes
    assert len(left.collections[0].get_offsets()) == len(right.collections[0].get_offsets()) == 5
