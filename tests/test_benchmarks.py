"""The benchmarks run, at a size that takes seconds; what they measure is for `make bench`."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def attacks(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("attacks", "common"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import attacks

    return attacks


def test_speed_orders_what_it_reaches(attacks):
    table = attacks.speed(("mnist",), {"gauss-newton": 20, "dgl": 30, "idlg": 3, "gs": 3, "dlg": 2})
    assert list(table.method) == list(attacks.METHODS)
    ours = table.set_index("method").loc["gauss-newton"]
    seconds = [ours[f"seconds to {goal:g}"] for goal in attacks.GOALS]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    assert seconds[-1] <= ours.seconds
    assert ours.best_mse <= 1e-10
    (row,) = attacks.ratios(table).to_dict("records")
    assert row["dgl mse"] >= row["dgl best mse"]
    assert row["budget"] > 0
    assert row["way"] > 0


def test_knowledge_and_batches_are_rows(attacks):
    pruned = attacks._knowledge("pruned 0.5, mask", 0)
    assert pruned["mse"] <= 1e-8
    assert pruned["rank"] == 784
    linear = attacks._knowledge("linear model", 0)
    assert linear["largest_difference"] <= 1e-10


def test_success_is_a_row(attacks):
    row = attacks._success("mnist", "default", 0, 0)
    assert row["success"] == (row["mse"] <= 1e-8)


def test_together_and_recognisable_are_tables(attacks):
    table = attacks.together(problems=2, steps=2, repetitions=1)
    assert list(table.dtype) == ["torch.float32", "torch.float64"]
    assert (table.ratio > 0).all()
    table = attacks.recognisable(images=1, steps={"dgl": 2, "gs": 2, "dlg": 1})
    assert list(table.method) == ["dgl", "gs", "dlg"]
    assert not table.met.any()


def test_dense_attack_finds_what_ours_finds(attacks):
    import torch

    J = attacks.problem("mnist", 0)
    x, steps = attacks._dense_attack(J, torch.full_like(J.x, 0.5), steps=15)
    assert float(((x - J.x) ** 2).mean()) <= 1e-20
    assert steps <= 10


def test_readme_shows_the_committed_table(attacks):
    import common
    import pandas as pd

    table = common.readme_table(pd.read_csv(FOLDER / "attacks.csv"))
    assert table in (FOLDER.parent / "README.md").read_text()
    assert all(f"`{method}`" in table for method in attacks.METHODS)
