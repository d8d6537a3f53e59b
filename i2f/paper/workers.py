"""Who solves the chunks of a sweep: this process, other processes of this machine, or a Dask cluster's workers."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import joblib
import torch

from i2f.paper import devices

Problem = dict[str, Any]  # plain values: a problem is the left half of its row
Row = dict[str, Any]
Solve = Callable[[list[Problem]], Sequence[Row | list[Row]]]
Task = tuple[str, list[Problem], Solve]  # a chunk, its name in front
Solved = tuple[str, list[list[Row]]]  # that name, and every problem's rows
Client = Any  # a `distributed.Client`, of an optional package

PATIENCE = 10  # seconds for a scheduler to answer
RAISED = "raised "  # what the reason of a row begins with that a chunk's exception left


def in_processes(jobs: int | None, device: str, tasks: Sequence[Task]) -> Iterator[Solved]:
    """The chunks' rows as they come, from processes of this machine."""
    jobs = max(1, min(jobs or joblib.cpu_count(only_physical_cores=True), len(tasks)))
    if jobs == 1:
        yield from itertools.starmap(solve_alone, [(*task, device) for task in tasks])
        return
    calls = [joblib.delayed(solve_alone)(*task, device) for task in tasks]
    with joblib.parallel_config("loky", n_jobs=jobs, inner_max_num_threads=1):
        yield from joblib.Parallel(return_as="generator_unordered", batch_size=1)(calls)


def on_cluster(client: Client, device: str, tasks: Sequence[Task]) -> Iterator[Solved]:
    """The chunks' rows as they come, from a Dask cluster's workers; a chunk whose worker dies goes to another, thrice.

    device: by its name, so that "auto" is each worker's own.
    """
    from distributed import as_completed  # an optional package
    from distributed.scheduler import KilledWorker

    futures = client.map(solve_alone, *zip(*tasks, strict=True), device=device, pure=False)
    chunks = dict(zip(futures, tasks, strict=True))
    try:
        for future in as_completed(futures):
            try:
                yield future.result()  # computed anew where the worker died with it
            except KilledWorker as error:  # its workers died again and again
                name, chunk, _ = chunks[future]
                yield name, _raised(error, chunk)
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


def solve_alone(name: str, chunk: list[Problem], solve: Solve, device: str) -> Solved:
    """The chunk's name and rows, solved on one thread; where it raises, rows that say `failed` and why."""
    try:
        with _alone(device):
            found = [one if isinstance(one, list) else [one] for one in solve(chunk)]
        if len(found) != len(chunk) or not all(found):
            raise RuntimeError(f"rows for {sum(map(bool, found))} of {len(chunk)} problems")
        return name, [[{"failed": False, "reason": "", **row} for row in rows] for rows in found]
    except Exception as error:  # a solver may raise anything
        return name, _raised(error, chunk)


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


def _raised(error: BaseException, chunk: list[Problem]) -> list[list[Row]]:
    return [[{"failed": True, "reason": f"{RAISED}{type(error).__name__}: {error}"}] for _ in chunk]
