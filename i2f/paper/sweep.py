"""A grid of problems becomes one tidy table: side by side in processes or on a cluster, a row a problem, resumable."""

import hashlib
import itertools
import json
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import joblib
import pandas as pd
import torch

from i2f.core.progress import bar
from i2f.paper import devices

if TYPE_CHECKING:
    from distributed import Client

Problem = dict[str, Any]  # plain values: a problem is the left half of its row
Row = dict[str, Any]
Solve = Callable[[list[Problem]], list[Row]]


def grid(**axes: Any) -> list[Problem]:
    """Every combination of the axes' values, the last axis fastest; a single value is the same for all."""
    lists = [v if isinstance(v, (list, tuple, range)) else [v] for v in axes.values()]
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*lists)]


def run(
    solve: Solve,
    problems: Sequence[Problem],
    together: Iterable[str] = (),
    at_most: int = 1,
    jobs: int | None = None,
    store: Path | str | None = None,
    whole: bool = False,
    description: str = "problems",
    client: "Client | None" = None,
) -> pd.DataFrame:
    """`solve` applied to every problem, in parallel: one row each, the problem's values in front, in their order.

    Args:
        solve: takes a chunk, a list of problems, and returns a row for each; a function of a module (or a `partial` of
            one), since it is sent to other processes. It must depend on nothing but its chunk.
        together: problems that agree in these columns may share a chunk, `at_most` of them; the rest stay apart.
            Chunks follow from the problems alone, so that a table does not depend on `jobs`.
        jobs: processes, one thread in each, so that cores are not oversubscribed; None: the environment variable
            I2F_JOBS, or one a core. With 1 there is no other process.
        store: a folder that keeps every finished chunk; a run that was cut off, however hard, goes on from there.
            None: the environment variable I2F_STORE, which the pipeline sets; without it nothing is kept.
        whole: a table with holes is of no use.
        client: of a Dask cluster (pip install 'i2f[cluster]'), whose workers then solve the chunks, whatever `jobs`
            says. None: the scheduler at the address in the environment variable I2F_SCHEDULER, if it is set. Workers
            need this package, the data, and one thread each; a problem travels as its plain values. What a worker had
            in hand when it died is given to another, thrice.

    A chunk that raises is not the end of the others: its rows say `failed` and why. Raises: RuntimeError where every
    single one did, since that is no finding but a mistake, or where any did of a `whole` table, after all are done;
    ConnectionError where a scheduler does not answer or has no worker; ValueError for workers of several threads.
    """
    problems = list(problems)
    if not problems:
        raise ValueError("problems is empty: a sweep needs at least one (did an axis of the grid have no values?)")
    chunks = _chunks(problems, list(together), at_most)
    kept = _Kept(store or os.environ.get("I2F_STORE"), solve)
    rows: dict[int, Row] = {}
    left: dict[str, list[list[int]]] = {}  # chunks of equal problems are solved once
    for chunk in chunks:
        chosen = [problems[i] for i in chunk]
        found = kept.load(chosen)
        if found is None:
            left.setdefault(_key(chosen), []).append(chunk)
        else:
            rows.update(zip(chunk, found, strict=True))
    todo = {key: [problems[i] for i in alike[0]] for key, alike in left.items()}
    with _cluster(client) as cluster, bar(total=len(problems), initial=len(rows), description=description) as progress:
        for key, found in _on_cluster(cluster, solve, todo) if cluster else _in_processes(jobs, solve, todo):
            if not any(row["failed"] and row["reason"].startswith(RAISED) for row in found):
                kept.save(todo[key], found)
            for chunk in left[key]:
                rows.update(zip(chunk, found, strict=True))
                progress.update(len(chunk))
    table = pd.DataFrame([{**problem, **rows[i]} for i, problem in enumerate(problems)])
    raised = table.reason.astype(str).str.startswith(RAISED) if "reason" in table else pd.Series(False)
    if len(raised) == len(table) and (raised.all() or (whole and raised.any())):
        raise RuntimeError(f"{raised.sum()} of {len(table)} problems failed; the first: {table.reason[raised].iloc[0]}")
    return table


RAISED = "raised "


def _in_processes(jobs: int | None, solve: Solve, todo: dict[str, list[Problem]]) -> Iterator[tuple[str, list[Row]]]:
    """The chunks' rows as they come, from processes of this machine."""
    if not todo:
        return
    tasks = [(key, chunk, solve, str(devices.current())) for key, chunk in todo.items()]
    jobs = jobs or int(os.environ.get("I2F_JOBS") or joblib.cpu_count(only_physical_cores=True))
    jobs = max(1, min(jobs, len(tasks)))
    if jobs == 1:
        yield from itertools.starmap(_solve, tasks)
        return
    calls = [joblib.delayed(_solve)(*task) for task in tasks]
    with joblib.parallel_config("loky", n_jobs=jobs, inner_max_num_threads=1):
        yield from joblib.Parallel(return_as="generator_unordered", batch_size=1)(calls)


def _on_cluster(client: "Client", solve: Solve, todo: dict[str, list[Problem]]) -> Iterator[tuple[str, list[Row]]]:
    """The chunks' rows as they come, from a Dask cluster's workers."""
    from distributed import as_completed
    from distributed.scheduler import KilledWorker

    device = os.environ.get(devices.VARIABLE, "cpu")  # by its name: a worker's "auto" is its own
    futures = client.map(_solve, todo.keys(), todo.values(), solve=solve, device=device, pure=False)
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
def _cluster(client: "Client | None") -> Iterator["Client | None"]:
    """A client that is ready: the one given, or one for the scheduler that the environment names; None without."""
    address = os.environ.get("I2F_SCHEDULER")
    if client is None and not address:
        yield None
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise ModuleNotFoundError("a cluster needs Dask: pip install 'i2f[cluster]'") from error
    own = None
    if client is None:
        try:
            client = own = Client(address, timeout=PATIENCE)
        except (OSError, ValueError) as error:
            raise ConnectionError(
                f"no Dask scheduler answers at {address} ({error}): start one with `dask scheduler`, workers with "
                "`dask worker ADDRESS --nthreads 1`, and give its address as tcp://HOST:PORT"
            ) from error
    try:
        threads = client.nthreads()
        if not threads:
            raise ConnectionError(f"the Dask scheduler at {client.scheduler.addr} has no worker: start some with "
                                  f"`dask worker {client.scheduler.addr} --nthreads 1`")  # fmt: skip
        if max(threads.values()) > 1:
            raise ValueError("a Dask worker has several threads, which would share a model: start workers with "
                             "--nthreads 1, and --nworkers for several on one machine")  # fmt: skip
        yield client
    finally:
        if own is not None:
            own.close()


PATIENCE = 10  # seconds for a scheduler to answer


@contextmanager
def _alone(device: str) -> Iterator[None]:
    """One thread, and `device` in use. Afterwards the process is as it was: its environment, threads and precision."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    cuda = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.set_num_threads(1)
        devices.use(device)
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = cuda
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})


def _solve(key: str, chunk: list[Problem], solve: Solve, device: str) -> tuple[str, list[Row]]:
    try:
        with _alone(device):
            rows = solve(chunk)
        if len(rows) != len(chunk):
            raise RuntimeError(f"{len(rows)} rows for {len(chunk)} problems")
        return key, [{"failed": False, "reason": "", **row} for row in rows]
    except Exception as error:
        return key, _raised(error, chunk)


def _raised(error: BaseException, chunk: list[Problem]) -> list[Row]:
    return [{"failed": True, "reason": f"{RAISED}{type(error).__name__}: {error}"} for _ in chunk]


def _chunks(problems: list[Problem], together: list[str], at_most: int) -> list[list[int]]:
    """Positions of the problems, in chunks; a chunk's place is that of its first problem."""
    if at_most < 1:
        raise ValueError(f"at_most={at_most} is out of range: a chunk holds at least 1 problem")
    if not together:
        return [[i] for i in range(len(problems))]
    groups: dict[str, list[int]] = {}
    for i, problem in enumerate(problems):
        groups.setdefault(_key([{name: problem.get(name) for name in together}]), []).append(i)
    return sorted(group[k : k + at_most] for group in groups.values() for k in range(0, len(group), at_most))


def _key(chunk: list[Problem]) -> str:
    return hashlib.sha256(json.dumps(chunk, sort_keys=True, default=repr).encode()).hexdigest()[:24]


class _Kept:
    """Finished chunks on disk: a file each, complete or absent."""

    def __init__(self, folder: Path | str | None, solve: Solve):
        named, fixed = getattr(solve, "func", solve), (getattr(solve, "args", ()), getattr(solve, "keywords", {}))
        name = f"{named.__module__}.{named.__qualname__}-{joblib.hash(fixed)[:12]}"
        self.folder = Path(folder) / name if folder else None

    def load(self, chunk: list[Problem]) -> list[Row] | None:
        path = self.folder and self.folder / f"{_key(chunk)}.pickle"
        return pickle.loads(path.read_bytes()) if path and path.exists() else None

    def save(self, chunk: list[Problem], rows: list[Row]) -> None:
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{_key(chunk)}.pickle"
            scratch = path.with_suffix(f".{os.getpid()}")
            scratch.write_bytes(pickle.dumps(rows))
            scratch.replace(path)  # a kill in the middle leaves no half file under the chunk's name
