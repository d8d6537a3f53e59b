"""Sweeps on a Dask cluster: a real scheduler and real worker processes, on this machine's loopback."""

import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import psutil
import pytest

from i2f import devices, sweep
from i2f.paper import workers
from i2f.paper.rows import Store, declare

distributed = pytest.importorskip("distributed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of the cluster's own parts, when it is killed

PROBLEMS = sweep.grid(number=range(12), kind=["a", "b"])
ALONE = sweep.Settings(jobs=1, progress="off")
HERE = str(Path(__file__).parent)


def on(scheduler, **more):
    return sweep.Settings(scheduler=scheduler, progress="off", **more)


def measured(folder, wait, chunk):
    """A row each; leaves a file with the process's number for every chunk that it begins."""
    for problem in chunk:
        Path(folder, f"{problem['number']}{problem['kind']}-{os.getpid()}-{time.time_ns()}").touch()
    time.sleep(wait)
    return [{"cube": p["number"] ** 3 + len(p["kind"]) / 3} for p in chunk]


def where(chunk):
    return [{"device": devices.chosen(), "process": os.getpid()} for _ in chunk]


@pytest.fixture(scope="module")
def scheduler():
    """The address of a scheduler with two workers, each a process that the `dask` command starts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": HERE, "DASK_DISTRIBUTED__WORKER__DAEMON": "False"}
    environment["DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES"] = "1"  # each death is a process to be started anew
    quiet = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    dask = [sys.executable, "-m", "dask"]
    port = address.rsplit(":", 1)[1]
    processes = [
        subprocess.Popen([*dask, "scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard"], **quiet)
    ]
    worker = [*dask, "worker", address, "--nworkers", "2", "--nthreads", "1", "--no-dashboard"]
    processes.append(subprocess.Popen(worker, **quiet))
    with distributed.Client(address, timeout=60) as client:
        client.wait_for_workers(2, timeout=120)
    yield address
    for process in reversed(processes):
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(30)
        for child in children:
            if child.is_running():
                child.kill()


@pytest.fixture
def client(scheduler):
    with distributed.Client(scheduler) as client:
        client.wait_for_workers(2, timeout=120)
        yield client


def test_the_table_is_the_local_one(client, tmp_path):
    solve = partial(measured, str(tmp_path), 0.0)
    local = sweep.run(solve, PROBLEMS, ALONE, ["kind"], at_most=5)
    pd.testing.assert_frame_equal(sweep.run(solve, PROBLEMS, on(client), ["kind"], at_most=5), local)


def test_the_work_is_done_on_the_workers(client):
    table = sweep.run(where, PROBLEMS, on(client, device="auto"))
    assert set(table.process) <= set(client.run(os.getpid).values())
    assert set(table.device) == {"auto"}


def test_an_address_will_do(scheduler):
    assert os.getpid() not in set(sweep.run(where, PROBLEMS, on(scheduler)).process)


@declare("problems")
def kept(chunk):
    return measured(chunk[0]["folder"], 0.1, chunk)


def test_a_killed_worker_loses_nothing(client, tmp_path):
    """One of two workers dies in the middle; what it had in hand is done by the other, what it had done is not."""
    begun, store = tmp_path / "begun", tmp_path / "store"
    begun.mkdir()
    victim = next(iter(client.run(os.getpid).values()))
    watcher = subprocess.Popen(
        [sys.executable, "-c", WATCHER, str(begun), str(victim)], stdout=subprocess.PIPE, text=True
    )
    problems = [{**problem, "folder": str(begun)} for problem in PROBLEMS]
    table = sweep.run(kept, problems, on(client, store=Store(chunks=store))).drop(columns="folder")
    assert watcher.communicate(timeout=60)[0].strip() == "killed"
    pd.testing.assert_frame_equal(table, sweep.run(partial(measured, str(begun), 0.0), PROBLEMS, ALONE))
    assert len(list(store.glob("[!.]*"))) == len(PROBLEMS)


WATCHER = """
import os, signal, sys, time
from pathlib import Path
folder, victim = Path(sys.argv[1]), int(sys.argv[2])
deadline = time.monotonic() + 60
while time.monotonic() < deadline:
    if sum(f"-{victim}-" in file.name for file in folder.iterdir()) >= 2:
        os.kill(victim, signal.SIGKILL)
        print("killed")
        break
    time.sleep(0.02)
"""


def test_a_chunk_that_kills_its_workers_is_not_tried_for_ever(client):
    """Dask may suspect a neighbour that waited on the same worker too; it says so, and the rest is right."""
    table = sweep.run(partial(kills_at, 3), sweep.grid(number=range(12), kind="a"), on(client))
    assert table.failed[3]
    assert table.reason[table.failed].str.startswith("raised KilledWorker").all()
    assert (table.square[~table.failed] == table.number[~table.failed] ** 2).all()
    assert not table.failed.all()


def kills_at(number, chunk):
    if any(p["number"] == number for p in chunk):
        os.kill(os.getpid(), signal.SIGKILL)
    return [{"square": p["number"] ** 2} for p in chunk]


def test_no_scheduler_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 0.2)
    with pytest.raises(ConnectionError, match=r"no Dask scheduler answers at tcp://127.0.0.1:9 .*dask scheduler"):
        sweep.run(where, PROBLEMS, on("tcp://127.0.0.1:9"))


def test_an_address_that_is_none(monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 0.2)
    with pytest.raises(ConnectionError, match="tcp://HOST:PORT"):
        sweep.run(where, PROBLEMS, on("here"))


def test_workers_of_many_threads_are_refused():
    class Threaded:
        def nthreads(self):
            return {"tcp://127.0.0.1:1": 1, "tcp://127.0.0.1:2": 4}

    with pytest.raises(ValueError, match="--nthreads 1"):
        sweep.run(where, PROBLEMS, on(Threaded()))


def test_a_scheduler_without_workers_is_refused():
    class Idle:
        scheduler = type("Address", (), {"addr": "tcp://127.0.0.1:1"})

        def nthreads(self):
            return {}

    with pytest.raises(ConnectionError, match=r"dask worker tcp://127\.0\.0\.1:1"):
        sweep.run(where, PROBLEMS, on(Idle()))
