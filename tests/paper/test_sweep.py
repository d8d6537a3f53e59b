"""Sweeps: the same table for any number of workers, nothing lost when a run is killed, failures as rows."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pandas as pd
import pytest
import torch

import i2f
from i2f import devices, sweep

PROBLEMS = sweep.grid(kind=["a", "b"], number=range(5))


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
    alone, beside = (sweep.run(solve, PROBLEMS, ["kind"], at_most=3, jobs=jobs) for jobs in (1, 2))
    pd.testing.assert_frame_equal(alone, beside)
    assert list(alone.square) == [n**2 for n in range(5)] * 2
    assert list(alone["size"]) == [3, 3, 3, 2, 2] * 2  # chunks follow from the problems alone
    assert list(alone.columns[:2]) == ["kind", "number"]


def test_problems_that_differ_stay_apart(tmp_path):
    interleaved = sweep.grid(number=range(3), kind=["a", "b"])
    table = sweep.run(partial(squares, tmp_path), interleaved, ["kind"], at_most=9, jobs=1)
    assert list(table["size"]) == [3] * 6
    assert list(table.kind) == ["a", "b"] * 3


def test_a_problem_that_comes_twice_is_solved_once(tmp_path):
    table = sweep.run(partial(squares, tmp_path), sweep.grid(number=[3, 2, 3], kind="a"), jobs=2)
    assert list(table.square) == [9, 4, 9]
    assert len(list(tmp_path.iterdir())) == 2


def test_failures_are_rows_with_a_reason():
    table = sweep.run(partial(fails_at, 2), PROBLEMS, jobs=1)
    assert list(table.failed) == [False, False, True, False, False] * 2
    assert table.reason[2] == "raised ArithmeticError: 2 is not to be squared"
    assert table.square.isna().sum() == 2


def test_a_sweep_in_which_everything_fails_is_a_mistake():
    with pytest.raises(RuntimeError, match="1 of 1 problems failed; the first: raised Arithmetic"):
        sweep.run(partial(fails_at, 1), sweep.grid(number=[1], kind="a"), jobs=1)
    with pytest.raises(ValueError, match="did an axis of the grid have no values"):
        sweep.run(partial(fails_at, 1), sweep.grid(number=[]))


def fails_at_first(folder, chunk):
    if chunk[0]["number"] == 2 and not (folder / "seen").exists():
        (folder / "seen").touch()
        raise OSError("not yet")
    return [{"square": p["number"] ** 2} for p in chunk]


def test_what_failed_is_tried_again(tmp_path):
    first, second = (
        sweep.run(partial(fails_at_first, tmp_path), PROBLEMS, jobs=1, store=tmp_path / "store") for _ in range(2)
    )
    assert first.failed.sum() == 1
    assert not second.failed.any()
    assert list(second.square) == [n**2 for n in range(5)] * 2


def test_a_whole_table_has_no_holes():
    assert sweep.run(partial(fails_at, 99), PROBLEMS, jobs=1, whole=True).square.notna().all()
    with pytest.raises(RuntimeError, match="2 of 10 problems failed; the first: raised ArithmeticError: 2 is"):
        sweep.run(partial(fails_at, 2), PROBLEMS, jobs=1, whole=True)


def test_what_is_kept_belongs_to_the_arguments_too(tmp_path):
    """A solver with another budget does not meet the rows of the first."""
    for power in (2, 3):
        table = sweep.run(partial(powers, power), PROBLEMS, jobs=1, store=tmp_path)
        assert list(table.power) == [n**power for n in range(5)] * 2


def powers(power, chunk):
    return [{"power": p["number"] ** power} for p in chunk]


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_sweep
from functools import partial
from i2f import sweep

def slow(folder, chunk):
    time.sleep(0.3)
    return test_sweep.squares(folder, chunk)

slow.__module__, slow.__qualname__ = "test_sweep", "squares"
sweep.run(partial(slow, Path(sys.argv[2])), test_sweep.PROBLEMS, jobs=1, store=sys.argv[3])
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    """kill -9 in the middle: what was finished is not done again, and the table is that of a run in one go."""
    counted, store = tmp_path / "counted", tmp_path / "store"
    counted.mkdir()
    here = os.path.dirname(__file__)
    process = subprocess.Popen([sys.executable, "-c", KILLED, here, str(counted), str(store)])
    deadline = time.monotonic() + 60
    while len(list(store.rglob("*.pickle"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = len(list(store.rglob("*.pickle")))
    assert 3 <= finished < len(PROBLEMS)
    for path in counted.iterdir():
        path.unlink()
    resumed = sweep.run(partial(squares, counted), PROBLEMS, jobs=1, store=store)
    assert len(list(counted.iterdir())) == len(PROBLEMS) - finished
    pd.testing.assert_frame_equal(resumed, sweep.run(partial(squares, tmp_path), PROBLEMS, jobs=1))


def test_the_pipeline_chooses_the_store(tmp_path, monkeypatch):
    monkeypatch.setenv("I2F_STORE", str(tmp_path / "store"))
    sweep.run(partial(squares, tmp_path), PROBLEMS, jobs=1)
    assert len(list((tmp_path / "store").rglob("*.pickle"))) == len(PROBLEMS)


def test_package_travels_to_workers_by_name():
    """A notebook's own function that names i2f is sent with the module in its globals."""
    assert pickle.loads(pickle.dumps(i2f)) is i2f


def _where(chunk):
    return [{"process": os.getpid()} for _ in chunk]


@pytest.mark.parametrize(("jobs", "here"), [("1", True), ("2", False)])
def test_the_environment_says_how_many_processes(monkeypatch, jobs, here):
    """One: no other process, which would load PyTorch again. An argument comes first."""
    monkeypatch.setenv("I2F_JOBS", jobs)
    assert (sweep.run(_where, sweep.grid(k=range(3))).process == os.getpid()).all() == here
    assert (sweep.run(_where, sweep.grid(k=range(3)), jobs=1).process == os.getpid()).all()


def surroundings():
    """What a sweep must leave as it was: this thread's and a new one's threads, the environment, the precision."""
    fresh = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    precision = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return torch.get_num_threads(), *fresh, environment, precision


@pytest.fixture
def unusual(monkeypatch):
    """Surroundings that no default restores."""
    threads, precision = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32
    monkeypatch.delenv(devices.VARIABLE, raising=False)
    monkeypatch.setenv("I2F_TESTED", "before")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.set_num_threads(3)
    yield surroundings()
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = precision


def meddles(wrong, chunk):
    """Looks around, then changes what it can."""
    seen = {"threads": torch.get_num_threads(), "device": os.environ[devices.VARIABLE]}
    torch.set_num_threads(2)
    torch.backends.cuda.matmul.allow_tf32 = False
    os.environ["I2F_TESTED"] = "changed"
    os.environ["I2F_TESTED_TOO"] = "new"
    if chunk[0]["number"] == wrong:
        raise ArithmeticError("on purpose")
    if chunk[0]["number"] == -1:
        raise KeyboardInterrupt
    return [seen for _ in chunk]


def test_a_sweep_leaves_the_process_as_it_was(unusual):
    table = sweep.run(partial(meddles, 2), PROBLEMS, jobs=1)
    assert surroundings() == unusual
    assert (table.threads.dropna() == 1).all()
    assert (table.device.dropna() == "cpu").all()
    assert table.failed.sum() == 2


def test_so_does_one_that_raises_or_is_interrupted(unusual):
    with pytest.raises(RuntimeError, match="failed"):
        sweep.run(partial(meddles, 1), sweep.grid(number=[1]), jobs=1)
    assert surroundings() == unusual
    with pytest.raises(KeyboardInterrupt):
        sweep.run(partial(meddles, 1), sweep.grid(number=[0, -1, 3]), jobs=1)
    assert surroundings() == unusual


def test_so_does_one_that_is_left_halfway(unusual):
    """Between two chunks too, while the sweep is suspended."""
    tasks = {str(n): [{"number": n}] for n in range(3)}
    rows = sweep._in_processes(1, partial(meddles, 9), tasks)
    assert next(rows)[0] == "0"
    assert surroundings() == unusual
    rows.close()
    assert surroundings() == unusual


def test_so_do_processes_beside(unusual):
    assert (sweep.run(partial(meddles, 9), PROBLEMS, jobs=2).threads == 1).all()
    assert surroundings() == unusual
