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
import torch

import i2f
from i2f import devices, pipeline, sweep
from i2f.paper import workers

ALONE, PAIR = (sweep.Settings(jobs=jobs, progress="off") for jobs in (1, 2))
PROBLEMS = sweep.grid(kind=["a", "b"], number=range(5))


def kept(folder):
    return replace(ALONE, store=folder)


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


def fails_at_first(folder, chunk):
    if chunk[0]["number"] == 2 and not (folder / "seen").exists():
        (folder / "seen").touch()
        raise OSError("not yet")
    return [{"square": p["number"] ** 2} for p in chunk]


def test_what_failed_is_tried_again(tmp_path):
    first, second = (sweep.run(partial(fails_at_first, tmp_path), PROBLEMS, kept(tmp_path / "store")) for _ in range(2))
    assert first.failed.sum() == 1
    assert not second.failed.any()
    assert list(second.square) == [n**2 for n in range(5)] * 2


def test_a_whole_table_has_no_holes():
    assert sweep.run(partial(fails_at, 99), PROBLEMS, ALONE, whole=True).square.notna().all()
    with pytest.raises(RuntimeError, match="2 of 10 problems failed; the first: raised ArithmeticError: 2 is"):
        sweep.run(partial(fails_at, 2), PROBLEMS, ALONE, whole=True)


def test_what_is_kept_belongs_to_the_arguments_too(tmp_path):
    """A solver with another budget does not meet the rows of the first."""
    for power in (2, 3):
        table = sweep.run(partial(powers, power), PROBLEMS, kept(tmp_path))
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
sweep.run(partial(slow, Path(sys.argv[2])), test_sweep.PROBLEMS, test_sweep.kept(sys.argv[3]))
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
    resumed = sweep.run(partial(squares, counted), PROBLEMS, kept(store))
    assert len(list(counted.iterdir())) == len(PROBLEMS) - finished
    pd.testing.assert_frame_equal(resumed, sweep.run(partial(squares, tmp_path), PROBLEMS, ALONE))


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
    given = {"JOBS": "3", "STORE": str(tmp_path), "DEVICE": "cpu", "SCHEDULER": "tcp://here:1", "PROGRESS": "text"}
    for name, value in given.items():
        monkeypatch.setenv(f"I2F_{name}", value)
    assert pipeline.settings() == sweep.Settings(3, str(tmp_path), "cpu", "tcp://here:1", "text")
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
    tasks = {str(n): [{"number": n}] for n in range(3)}
    rows = workers.in_processes(1, "cpu", partial(meddles, 9), tasks)
    assert next(rows)[0] == "0"
    assert surroundings() == unusual
    rows.close()
    assert surroundings() == unusual


def test_so_do_processes_beside(unusual):
    assert (sweep.run(partial(meddles, 9), PROBLEMS, PAIR).threads == 1).all()
    assert surroundings() == unusual
