"""Who solves the chunks of a sweep: this process, other processes of this machine, or a Dask cluster's workers."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import joblib
import torch

from i2f.paper import devices

Problem = dict[str, Any]  # plain values: a problem is the left half of its row
Row = dict[str, Any]
Solve = Callable[[list[Problem]], list[Row]]
Chunks = Mapping[str, list[Problem]]  # by key
Client = Any  # a `distributed.Client`, of an optional package

PATIENCE = 10  # seconds for a scheduler to answer
RAISED = "raised "  # what the reason of a row begins with that a chunk's exception left


def in_processes(jobs: int | None, device: str, solve: Solve, todo: Chunks) -> Iterator[tuple[str, list[Row]]]:
    """The chunks' rows as they come, from processes of this machine."""
    tasks = [(key, chunk, solve, device) for key, chunk in todo.items()]
    jobs = max(1, min(jobs or joblib.cpu_count(only_physical_cores=True), len(tasks)))
    if jobs == 1:
        yield from itertools.starmap(solve_alone, tasks)
        return
    calls = [joblib.delayed(solve_alone)(*task) for task in tasks]
    with joblib.parallel_config("loky", n_jobs=jobs, inner_max_num_threads=1):
        yield from joblib.Parallel(return_as="generator_unordered", batch_size=1)(calls)


def on_cluster(client: Client, device: str, solve: Solve, todo: Chunks) -> Iterator[tuple[str, list[Row]]]:
    """The chunks' rows as they come, from a Dask cluster's workers; a chunk whose worker dies goes to another, thrice.

    device: by its name, so that "auto" is each worker's own.
    """
    from distributed import as_completed  # an optional package
    from distributed.scheduler import KilledWorker

    futures = client.map(solve_alone, todo.keys(), todo.values(), solve=solve, device=device, pure=False)
    keys = dict(zip(futures, todo, strict=True))
    try:
        for future in as_completed(futures):
            try:
                yield future.result()  # computed anew where the worker died with it
            except KilledWorker as error:  # its workers died again and again
                yield keys[future], _raised(error, todo[keys[future]])
    finally:
        client.cancel(futures)


@contextmanager
def cluster(scheduler: Client | str) -> Iterator[Client]:
    """A client that is ready: the one given, or one for the scheduler at that address; None for "".

    Raises: ModuleNotFoundError without Dask; ConnectionError where no scheduler answers, or has no worker; ValueError
    for workers of several threads.
    """
    if not scheduler:
        yield None
        return
    client = _connected(scheduler) if isinstance(scheduler, str) else scheduler
    try:
        threads = client.nthreads()
        if not threads:
            address = client.scheduler.addr
            raise ConnectionError(
                f"the Dask scheduler at {address} has no worker: start some with `dask worker {address} --nthreads 1`"
            )
        if max(threads.values()) > 1:
            raise ValueError(
                "a Dask worker has several threads, which would share a model: start workers with --nthreads 1, and "
                "--nworkers for several on one machine"
            )
        yield client
    finally:
        if client is not scheduler:
            client.close()


def _connected(address: str) -> Client:
    try:
        from distributed import Client as Connect
    except ImportError as error:
        raise ModuleNotFoundError("a cluster needs Dask: pip install 'i2f[cluster]'") from error
    try:
        return Connect(address, timeout=PATIENCE)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"no Dask scheduler answers at {address} ({error}): start one with `dask scheduler`, workers with "
            "`dask worker ADDRESS --nthreads 1`, and give its address as tcp://HOST:PORT"
        ) from error


def solve_alone(key: str, chunk: list[Problem], solve: Solve, device: str) -> tuple[str, list[Row]]:
    """The chunk's key and rows, solved on one thread; where it raises, rows that say `failed` and why."""
    try:
        with _alone(device):
            rows = solve(chunk)
        if len(rows) != len(chunk):
            raise RuntimeError(f"{len(rows)} rows for {len(chunk)} problems")
        return key, [{"failed": False, "reason": "", **row} for row in rows]
    except Exception as error:  # a solver may raise anything
        return key, _raised(error, chunk)


@contextmanager
def _alone(device: str) -> Iterator[None]:
    """One thread, and `device` in use. Afterwards the process is as it was: its device, threads and precision."""
    before, threads = devices.chosen(), torch.get_num_threads()
    cuda = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.set_num_threads(1)
        devices.use(device)
        yield
    finally:
        devices.use(before)
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = cuda


def _raised(error: BaseException, chunk: list[Problem]) -> list[Row]:
    return [{"failed": True, "reason": f"{RAISED}{type(error).__name__}: {error}"} for _ in chunk]
