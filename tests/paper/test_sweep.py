"""Sweeps: the same table for any number of workers, nothing lost when a run is killed, failures as rows."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
import solvers
import torch

import i2f
from i2f import devices, pipeline, sweep
from i2f.paper import rows, tables, workers
from i2f.paper.rows import Store

ALONE, PAIR = (sweep.Settings(jobs=jobs, progress="off") for jobs in (1, 2))
PROBLEMS = sweep.grid(kind=["a", "b"], number=range(5))


def kept(folder):
    return replace(ALONE, store=Store(chunks=folder))


def squares(folder, chunk):
    """A row each; the folder counts how often a chunk was worked on."""
    (folder / f"{chunk[0]['kind']}{chunk[0]['number']}-{time.monotonic_ns()}").touch()
    return [{"square": p["number"] ** 2, "size": len(chunk)} for p in chunk]


def fails_at(number, chunk):
    if any(p["number"] == number for p in chunk):
        raise ArithmeticError(f"{number} is not to be squared")
    return [{"square": p["number"] ** 2} for p in chunk]


def test_grid_is_every_combination_the_last_axis_fastest():
    assert sweep.grid(a=[1, 2], b="x", c=range(2)) == [
        {"a": 1, "b": "x", "c": 0},
        {"a": 1, "b": "x", "c": 1},
        {"a": 2, "b": "x", "c": 0},
        {"a": 2, "b": "x", "c": 1},
    ]


def test_any_number_of_workers_gives_the_same(tmp_path):
    solve = partial(squares, tmp_path)
    alone, beside = (sweep.run(solve, PROBLEMS, settings, ["kind"], at_most=3) for settings in (ALONE, PAIR))
    pd.testing.assert_frame_equal(alone, beside)
    assert list(alone.square) == [n**2 for n in range(5)] * 2
    assert list(alone["size"]) == [3, 3, 3, 2, 2] * 2  # chunks follow from the problems alone
    assert list(alone.columns[:2]) == ["kind", "number"]


def test_problems_that_differ_stay_apart(tmp_path):
    interleaved = sweep.grid(number=range(3), kind=["a", "b"])
    table = sweep.run(partial(squares, tmp_path), interleaved, ALONE, ["kind"], at_most=9)
    assert list(table["size"]) == [3] * 6
    assert list(table.kind) == ["a", "b"] * 3


def test_a_problem_that_comes_twice_is_solved_once(tmp_path):
    table = sweep.run(partial(squares, tmp_path), sweep.grid(number=[3, 2, 3], kind="a"), PAIR)
    assert list(table.square) == [9, 4, 9]
    assert len(list(tmp_path.iterdir())) == 2


def test_failures_are_rows_with_a_reason():
    table = sweep.run(partial(fails_at, 2), PROBLEMS, ALONE)
    assert list(table.failed) == [False, False, True, False, False] * 2
    assert table.reason[2] == "raised ArithmeticError: 2 is not to be squared"
    assert table.square.isna().sum() == 2


def test_a_sweep_in_which_everything_fails_is_a_mistake():
    with pytest.raises(RuntimeError, match="1 of 1 problems failed; the first: raised Arithmetic"):
        sweep.run(partial(fails_at, 1), sweep.grid(number=[1], kind="a"), ALONE)
    with pytest.raises(ValueError, match="did an axis of the grid have no values"):
        sweep.run(partial(fails_at, 1), sweep.grid(number=[]), ALONE)


@pytest.fixture
def log(tmp_path, monkeypatch):
    """A folder with a file for every chunk that a solver of `solvers` worked on."""
    folder = tmp_path / "log"
    folder.mkdir()
    monkeypatch.setenv(solvers.LOG, str(folder))
    return folder


def solved(log):
    """The numbers of the chunks' first problems since the last call, with how many were in each."""
    found = sorted(tuple(map(int, path.name.split("-")[:2])) for path in log.iterdir())
    for path in log.iterdir():
        path.unlink()
    return found


def test_what_is_known_is_read_and_what_is_missing_is_solved(log, tmp_path):
    """One value more on an axis: only its problems are solved, and the table is that of a run in one go."""
    before, after = sweep.grid(number=[1, 3], power=[2]), sweep.grid(number=[1, 2, 3], power=[2, 3])
    first = sweep.run(solvers.powers, before, kept(tmp_path / "chunks"))
    assert solved(log) == [(1, 1), (3, 1)]
    table = sweep.run(solvers.powers, after, kept(tmp_path / "chunks"), ["power"], at_most=9)
    assert solved(log) == [(1, 3), (2, 1)]  # the three of power 3 in one chunk, the number 2 in another
    pd.testing.assert_frame_equal(table, sweep.run(solvers.powers, after, ALONE))
    pd.testing.assert_frame_equal(table.iloc[[0, 4]].reset_index(drop=True), first)


def test_defaults_are_known_by_their_value(log, tmp_path):
    sweep.run(solvers.powers, sweep.grid(number=[1, 2]), kept(tmp_path / "chunks"))
    solved(log)
    table = sweep.run(solvers.powers, sweep.grid(number=[2.0, 1], power=2), kept(tmp_path / "chunks"))
    assert solved(log) == []
    assert list(table.value) == [4, 1]


def test_published_rows_and_finished_chunks_are_both_known(log, tmp_path):
    store = Store()
    sweep.run(solvers.powers, sweep.grid(number=[1, 2]), replace(ALONE, store=store))
    tables.save(tmp_path / "published", store.asked)
    sweep.run(solvers.powers, sweep.grid(number=[3]), kept(tmp_path / "chunks"))
    solved(log)
    both = Store([tmp_path / "published", tmp_path / "nowhere"], tmp_path / "chunks", solve=False)
    assert list(sweep.run(solvers.powers, sweep.grid(number=[3, 2, 1]), replace(ALONE, store=both)).value) == [9, 4, 1]
    assert solved(log) == []
    with pytest.raises(LookupError, match=r"1 of 2 problems of the table 'problems' .* the first: \{'number': 4\}"):
        sweep.run(solvers.powers, sweep.grid(number=[4, 2]), replace(ALONE, store=both))


def test_what_a_sweep_asked_for_is_what_is_published(tmp_path):
    """Each once, in the order of its problems, whatever was known; nothing that no one asked for."""
    sweep.run(solvers.powers, sweep.grid(number=[5, 3]), kept(tmp_path))
    settings = kept(tmp_path)
    sweep.run(solvers.powers, sweep.grid(number=[1, 3, 2, 3]), settings)
    declared, entries = settings.store.asked["problems"]
    assert declared.table == "problems"
    assert [entry.problem["number"] for entry in entries.values()] == [1, 3, 2]


def test_a_solver_that_is_not_declared_keeps_nothing(tmp_path):
    for solve in (partial(solvers.powers), powers):
        with pytest.raises(ValueError, match=r"is no declared solver: .*@rows.declare"):
            sweep.run(solve, PROBLEMS, kept(tmp_path))


def powers(chunk):
    return [{"square": p["number"] ** 2} for p in chunk]


def test_a_problem_of_several_rows():
    table = sweep.run(solvers.paths, sweep.grid(number=[2, 1]), ALONE)
    assert list(table.number) == [2, 2, 2, 1, 1, 1]
    assert list(table.step) == [1, 2, 3] * 2
    assert not table.failed.any()


def none_at_all(chunk):
    return [[] for _ in chunk]


def test_a_problem_without_a_row_is_a_mistake():
    with pytest.raises(RuntimeError, match="rows for 0 of 1 problems"):
        sweep.run(none_at_all, sweep.grid(number=[1]), ALONE)


@rows.declare("problems")
def fails_once(chunk):
    seen = solvers.Path(os.environ[solvers.LOG], "seen")
    if chunk[0]["number"] == 2 and not seen.exists():
        seen.touch()
        raise OSError("not yet")
    return [{"square": p["number"] ** 2} for p in chunk]


def test_what_failed_is_tried_again(tmp_path, log):
    first, second = (sweep.run(fails_once, PROBLEMS, kept(tmp_path / "store")) for _ in range(2))
    assert first.failed.sum() == 1
    assert not second.failed.any()
    assert list(second.square) == [n**2 for n in range(5)] * 2


def test_a_whole_table_has_no_holes():
    assert sweep.run(partial(fails_at, 99), PROBLEMS, ALONE, whole=True).square.notna().all()
    with pytest.raises(RuntimeError, match="2 of 10 problems failed; the first: raised ArithmeticError: 2 is"):
        sweep.run(partial(fails_at, 2), PROBLEMS, ALONE, whole=True)


KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
import solvers, test_sweep
from i2f import sweep

sweep.run(solvers.slow, test_sweep.PROBLEMS, test_sweep.kept(test_sweep.solvers.Path(sys.argv[2])))
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path, log):
    """kill -9 in the middle: what was finished is not done again, and the table is that of a run in one go."""
    store = tmp_path / "store"
    command = [sys.executable, "-c", KILLED, os.path.dirname(__file__), str(store)]
    process = subprocess.Popen(command, env=os.environ | {solvers.WAIT: "0.3"})
    deadline = time.monotonic() + 60
    while len(list(store.glob("[!.]*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = len(list(store.glob("[!.]*")))
    assert 3 <= finished < len(PROBLEMS)
    solved(log)
    resumed = sweep.run(solvers.slow, PROBLEMS, kept(store))
    assert len(solved(log)) == len(PROBLEMS) - finished
    pd.testing.assert_frame_equal(resumed, sweep.run(solvers.slow, PROBLEMS, ALONE))


def test_package_travels_to_workers_by_name():
    """A notebook's own function that names i2f is sent with the module in its globals."""
    scope = {"i2f": i2f, "__name__": "__main__"}
    exec("def solve(chunk): return [{'version': i2f.__version__} for _ in chunk]", scope)
    assert (sweep.run(scope["solve"], sweep.grid(k=range(3)), PAIR).version == i2f.__version__).all()


def _where(chunk):
    return [{"process": os.getpid()} for _ in chunk]


@pytest.mark.parametrize(("settings", "here"), [(ALONE, True), (PAIR, False)])
def test_settings_say_how_many_processes(settings, here):
    """One: no other process, which would load PyTorch again."""
    assert (sweep.run(_where, sweep.grid(k=range(3)), settings).process == os.getpid()).all() == here


def test_the_pipeline_reads_settings_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("I2F_MISSING")  # the tests' own
    given = {"JOBS": "3", "DEVICE": "cpu", "SCHEDULER": "tcp://here:1", "PROGRESS": "text"}
    for name, value in given.items():
        monkeypatch.setenv(f"I2F_{name}", value)
    assert pipeline.settings() == sweep.Settings(3, None, "cpu", "tcp://here:1", "text")
    assert pipeline.settings([tmp_path]).store == Store([tmp_path], pipeline.RUNS / "rows", True)
    monkeypatch.setenv("I2F_CHUNKS", str(tmp_path / "{key}" / "pending"))
    monkeypatch.setenv("I2F_MISSING", "refuse")
    assert pipeline.settings([], "one").store == Store([], tmp_path / "one" / "pending", False)
    for name in given:
        monkeypatch.delenv(f"I2F_{name}")
    assert pipeline.settings() == sweep.DEFAULT
    monkeypatch.setenv("I2F_DEVICE", "nowhere")
    with pytest.raises(ValueError, match="device='nowhere'"):
        pipeline.settings()


def surroundings():
    """What a sweep must leave as it was: this thread's and a new one's threads, the device, the precision."""
    fresh = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    precision = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    return torch.get_num_threads(), *fresh, devices.chosen(), precision


@pytest.fixture
def unusual(monkeypatch):
    """Surroundings that no default restores."""
    threads, precision = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32
    monkeypatch.setattr(devices, "_chosen", "auto")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.set_num_threads(3)
    yield surroundings()
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = precision


def meddles(wrong, chunk):
    """Looks around, then changes what it can."""
    seen = {"threads": torch.get_num_threads(), "device": devices.chosen()}
    torch.set_num_threads(2)
    torch.backends.cuda.matmul.allow_tf32 = False
    devices.use("cpu")
    if chunk[0]["number"] == wrong:
        raise ArithmeticError("on purpose")
    if chunk[0]["number"] == -1:
        raise KeyboardInterrupt
    return [seen for _ in chunk]


def test_a_sweep_leaves_the_process_as_it_was(unusual):
    table = sweep.run(partial(meddles, 2), PROBLEMS, ALONE)
    assert surroundings() == unusual
    assert (table.threads.dropna() == 1).all()
    assert (table.device.dropna() == "auto").all()
    assert table.failed.sum() == 2


def test_so_does_one_that_raises_or_is_interrupted(unusual):
    with pytest.raises(RuntimeError, match="failed"):
        sweep.run(partial(meddles, 1), sweep.grid(number=[1]), ALONE)
    assert surroundings() == unusual
    with pytest.raises(KeyboardInterrupt):
        sweep.run(partial(meddles, 1), sweep.grid(number=[0, -1, 3]), ALONE)
    assert surroundings() == unusual


def test_so_does_one_that_is_left_halfway(unusual):
    """Between two chunks too, while the sweep is suspended."""
    tasks = [(str(n), [{"number": n}], partial(meddles, 9)) for n in range(3)]
    found = workers.in_processes(1, "cpu", tasks)
    assert next(found)[0] == "0"
    assert surroundings() == unusual
    found.close()
    assert surroundings() == unusual


def test_so_do_processes_beside(unusual):
    assert (sweep.run(partial(meddles, 9), PROBLEMS, PAIR).threads == 1).all()
    assert surroundings() == unusual


@rows.declare("problems")
def clashes(chunk):
    return [{"number": 2 * p["number"]} for p in chunk]


def test_a_column_with_the_name_of_a_problems_value_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'number' is a value of .*clashes's problems and a column of its rows"):
        sweep.run(clashes, sweep.grid(number=[1]), kept(tmp_path))
