"""Verification: what is true agrees, what was moved is named with both values, and nothing but runs/ is written."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import solvers

from i2f.paper import claims, pipeline, rows, sweep, tables, tolerances, verify
from i2f.paper.__main__ import main
from i2f.paper.rows import Entry, Store
from i2f.paper.tolerances import deviations

NUMBERS = [{"number": n} for n in range(6)]
LONG = [{"number": n, "steps": 9} for n in range(3)]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with two runs, `one` (tables problems and long) and `two` (paths), published."""
    for module in (verify, pipeline):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
        monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(verify, "COSTS", tmp_path / "costs.csv")
    monkeypatch.setattr(pipeline, "runs", lambda: {"one": {}, "two": {}})
    monkeypatch.setenv("I2F_JOBS", "1")
    store = {"one": Store(), "two": Store()}
    settings = {key: sweep.Settings(jobs=1, progress="off", store=mine) for key, mine in store.items()}
    sweep.run(solvers.powers, NUMBERS, settings["one"])
    sweep.run(solvers.long, LONG, settings["one"])
    sweep.run(solvers.paths, NUMBERS, settings["two"])
    for key, mine in store.items():
        tables.save(tmp_path / "results" / key, mine.asked)
    (tmp_path / "costs.csv").write_text("run,table,seconds\none,problems,1\none,long,30\ntwo,paths,1\n")
    return tmp_path


def move(project, key, table, number, column, factor):
    """Publish a value that is not the solver's."""
    folder, store = project / "results" / key, Store()
    for name, about in tables.provenance(folder).items():
        declared = rows.declaration(verify._solver(about["solver"]))
        entries = tables.entries(folder, declared)
        for mark, entry in entries.items():
            if (name, entry.problem["number"]) == (table, number):
                moved = [{**row, column: row[column] * factor} if column in row else row for row in entry.rows]
                entries[mark] = Entry(entry.problem, moved, entry.origin)
        store.asked[name] = (declared, entries)
    tables.save(folder, store.asked)


def run(*words):
    return main(["verify", *words])


def before_and_after(project):
    return {path: path.read_bytes() for path in (project / "results").rglob("*") if path.is_file()}


def test_what_is_true_agrees(project, capsys):
    before = before_and_after(project)
    assert run("--share", "1") == 0
    said = capsys.readouterr().out
    assert "reproduced: 15 of 15 problems agree, tried of 15 published; 0 verdicts changed" in said
    assert before_and_after(project) == before
    assert {p.name for p in (project / "runs").iterdir()} == {"report.html", "verified.json", "verified"}
    assert "Reproduced: 15 of 15" in (project / "runs" / "report.html").read_text()


@pytest.mark.parametrize(
    ("key", "table", "number", "column", "relative"),
    [("one", "problems", 3, "value", 1e-5), ("one", "problems", 2, "noisy", 1e-2), ("two", "paths", 1, "error", 1e-5)],
)
def test_a_row_moved_by_ten_times_its_tolerance_is_reported(project, capsys, key, table, number, column, relative):
    move(project, key, table, number, column, 1 + relative)
    assert run("--share", "1") == 1
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("DISAGREES"))
    assert f"{key}/{table}: {column} was " in line
    assert f"number={number}" in line
    true = {"value": float(number) ** 2, "noisy": number / 3, "error": 1.0 / (1 + number)}[column]
    assert repr(true) in line
    assert repr(true * (1 + relative)) in line
    assert "NOT reproduced" in said
    page = (project / "runs" / "report.html").read_text()
    assert f"{true * (1 + relative)}" in page


def test_a_row_moved_within_its_tolerance_agrees(project):
    move(project, "one", "problems", 3, "value", 1 + 5e-7)
    move(project, "one", "problems", 2, "noisy", 1 + 5e-4)
    move(project, "one", "problems", 2, "steps", 7)  # a diagnostic
    assert run("--share", "1") == 0


def test_every_row_is_tried_once_even_if_cut_off(project, tmp_path, monkeypatch):
    log = tmp_path / "log"
    log.mkdir()
    monkeypatch.setenv(solvers.LOG, str(log))
    run("--share", "1")
    first = len(list(log.iterdir()))
    run("--share", "1")
    assert first == 9
    assert len(list(log.iterdir())) == first


def test_long_rows_are_tried_in_brief_and_whole_when_all_are(project, tmp_path, monkeypatch):
    move(project, "one", "long", 1, "final", 2)  # follows from the stored array
    assert run("--share", "0.99", "--runs", "one") == 1
    move(project, "one", "long", 1, "final", 0.5)
    seen = []
    monkeypatch.setattr(verify, "check", lambda case, again, brief: seen.append((case.table, brief)) or [])
    run("--share", "0", "--runs", "one")
    assert {brief for table, brief in seen if table == "long"} == {True}
    seen.clear()
    run("--share", "1", "--runs", "one")
    assert {brief for table, brief in seen if table == "long"} == {False}


def test_an_attack_that_ended_early_is_tried_whole(project):
    store = Store()
    settings = sweep.Settings(jobs=1, progress="off", store=store)
    sweep.run(solvers.long, [{"number": 1, "steps": 1}, {"number": 2, "steps": 9}], settings)
    tables.save(project / "results" / "two", store.asked)
    assert run("--share", "0", "--runs", "two") == 0
    move(project, "two", "long", 1, "final", 2)
    assert run("--share", "0", "--runs", "two") == 1


def test_a_brief_solve_that_raises_disagrees(project):
    case = next(case for case in verify.cases(["one"]) if case.table == "long")
    found = verify.check(case, [{"failed": True, "reason": "raised MemoryError: all of it"}], brief=True)
    assert not all(one.agrees for one in found)


def test_the_objective_at_the_end_of_the_brief_part_counts(project):
    for number in range(3):
        move(project, "one", "long", number, "early", 1.5)
    assert run("--share", "0") == 1


def test_samples(project):
    known = verify.cases()
    assert len(known) == 15
    a, b = (verify.sample(known, seed, budget=80) for seed in ("a", "b"))
    for chosen in (a, b):
        tables = [case.name for case in chosen]
        assert all(tables.count(name) >= 2 for name in ("one/problems", "one/long", "two/paths"))
        assert len({id(case) for case in chosen}) == len(chosen)
        assert sum(case.cost for case in chosen) <= 80
    assert [c.problem for c in a] != [c.problem for c in b]
    assert [c.problem for c in a] == [c.problem for c in verify.sample(known, "a", budget=80)]
    assert len(verify.sample(known, "a")) == 15
    assert len(verify.sample(known, "a", share=0.5)) == 8
    assert len(verify.sample(known, "a", share=0)) == 6


def test_every_row_has_its_turn(project):
    known = verify.cases()
    tried = {(case.name, case.problem["number"]) for n in range(60) for case in verify.sample(known, str(n), budget=80)}
    assert len(tried) == 15


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--share", "1.5"), r"share=1.5 is out of range: choose one from 0 \(the least\) to 1"),
        (("--share", "-0.1"), "is out of range"),
        (("--budget", "0.1"), r"budget is too small: 2 rows of each of 3 tables take about 0.5 minutes .* BUDGET="),
        (("--runs", "three"), r"run='three' is unknown: .*'one', 'two'"),
    ],
)
def test_bad_input(project, words, message):
    with pytest.raises(ValueError, match=message):
        run(*words)
    assert not (project / "runs").exists()


def test_what_was_verified_is_recorded_by_the_table(project):
    run("--share", "0", "--seed", "a")
    path = project / "runs" / "verified.json"
    known = json.loads(path.read_text())
    about = tables.provenance(project / "results" / "one")["problems"]
    assert known[about["sha256"]] == {"share": round(2 / 6, 4), "agreed": 1.0}
    run("--share", "1")
    assert json.loads(path.read_text())[about["sha256"]]["share"] == 1.0
    run("--share", "0")
    assert json.loads(path.read_text())[about["sha256"]]["share"] == 1.0  # the most that was tried


def test_verdicts_that_changed(project, capsys):
    claim = claims.Claim("one-a", 1, "paper", "s", "f", "w", "n", 1.0, 0.9, 1.1, 8, "image", "t", "≥ 0.5", "holds")
    for folder, verdict in (("results", "holds"), ("runs/executed", "fails")):
        (project / folder / "one").mkdir(parents=True, exist_ok=True)
        claims.save([replace(claim, verdict=verdict)], project / folder / "one" / "claims.json")
    assert run("--share", "0") == 1
    said = capsys.readouterr().out
    assert "CHANGED   one-a: holds -> fails" in said
    assert "1 verdicts changed" in said


def study(project):
    store = Store([project / "results" / "one"], solve=False)
    mine = pipeline.Run("one", {}, sweep.Settings(jobs=1, progress="off", store=store))
    sweep.run(solvers.powers, NUMBERS, mine.settings)
    return mine


def test_live_rows_agree(project, capsys):
    verify.live(study(project), 4)
    assert capsys.readouterr().out == "4 of 4 rows agree\n"
    verify.live(study(project), 4, number=3)
    assert capsys.readouterr().out == "1 of 1 rows agree\n"
    with pytest.raises(LookupError, match=r"no row of this notebook has \{'number': 77\}"):
        verify.live(study(project), 4, number=77)


def test_live_rows_that_disagree_raise(project, capsys):
    move(project, "one", "problems", 3, "value", 1.1)
    with pytest.raises(AssertionError, match=r"value was 9\.9\d*, is 9\.0, .* times its tolerance \(prediction\)"):
        verify.live(study(project), 6)
    assert capsys.readouterr().out == "5 of 6 rows agree\n"


def only(published, again, column="value", own=None, **more):
    (found,) = [
        d for d in deviations({column: published, **more}, {column: again, **more}, own or {}) if d.column == column
    ]
    return found


@pytest.mark.parametrize(
    ("published", "again", "agree"),
    [
        (1.0, 1.0 + 5e-7, True),
        (1.0, 1.0 + 2e-6, False),
        (math.nan, math.nan, True),
        (math.nan, 1.0, False),
        (math.inf, math.inf, True),
        (math.inf, 1.0, False),
        (3, 3, True),
        (3, 4, False),
        ("a", "b", False),
        (None, 1.0, False),
        (None, None, True),
        (True, False, False),
        ([1.0, 2.0], [1.0, 2.0 + 1e-7], True),
        ([1.0, 2.0], [1.0, 2.1], False),
        ([1.0, 2.0], [1.0], False),
        (np.ones(3), np.ones(3) * (1 + 1e-7), True),
        (np.ones(3), np.zeros(3), False),
    ],
)
def test_tolerance_of_a_prediction(published, again, agree):
    assert only(published, again).agrees == agree
    assert only(again, published).agrees == agree


def test_tolerances_by_kind():
    assert only(1.0, 1.0005, "rmse", converged=True).agrees
    assert not only(1.0, 1.005, "rmse", converged=True).agrees
    assert only(1.0, 1.3, "rmse", converged=False).agrees
    assert not only(1.0, 3.0, "rmse", converged=False).agrees
    assert only(1e-20, 1e-16, "mse", converged=True).agrees  # both are rounding
    assert only(250.0, 180.0, "psnr", converged=True).agrees
    assert not only(30.0, 30.1, "psnr", converged=True).agrees
    assert only("a", "b", "reason").agrees
    assert only(1.0, 1.0005, "mine", {"mine": "converged"}).agrees
    assert only(1.0, 1.004, "cg, 20 steps", {"cg": "krylov"}).agrees
    assert not only(1.0, 1.004, "cg, 20 steps").agrees
    with pytest.raises(ValueError, match=r"kind of the column mine='convergd' is unknown: did you mean 'converged'"):
        only(1.0, 1.0, "mine", {"mine": "convergd"})


def test_every_kind_says_why():
    for name, about in tolerances.KINDS.items():
        assert about["why"], name
        assert about["relative"] >= 0
    named = {*tolerances.TABLE["columns"].values(), *tolerances.TABLE["unfinished"].values()}
    assert named <= set(tolerances.KINDS)


def test_effort_counts_the_networks_size_where_it_is_known():
    assert verify.effort([]) == verify.effort([{"rmse": 2.0}]) == 1
    assert verify.effort([{"evaluations": 20}, {"evaluations": 30, "d_theta": 100}, {"d_theta": math.nan}]) == 3000
    assert verify.effort([{"steps": 7, "d_theta": 10}, {"steps": 0}]) == 70
    assert verify.effort([{"steps": 0}]) == 1
