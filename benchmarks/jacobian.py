"""J formed by the layers' own rules against naive `vmap(jvp(grad))`, in its own best chunk: one table, jacobian.csv.

    python benchmarks/jacobian.py [--threads 2] [--repetitions 15]

The two take turns. `ratio` is that of the best seconds of each; `median`, `lowest` and `highest` are of the ratios turn
by turn, which whatever else the machine does moves both ways.
GFLOP are those of the matrix products and convolutions really made (PyTorch's own counter); `matmul` is the rate of a
square product of 1,536 just before, the limit that both stand under.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import pandas as pd
import torch
from common import HERE, machine, problem
from torch.utils.flop_counter import FlopCounterMode

from i2f._fast.chain import chain_jacobian
from i2f.core.dense import forward_over_reverse
from i2f.core.progress import bar

CHUNKS = (64, 96, 128, 192, 256, 384, 512)
SQUARE = 1536
TRIES = 3  # of each chunk


def seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def gflop(act: Callable[[], object]) -> float:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the counter sees its own thread alone
    with FlopCounterMode(display=False) as counter:
        act()
    torch.set_num_threads(threads)
    return counter.get_total_flops() / 1e9


def compare(dataset: str, dtype: torch.dtype, repetitions: int, chunks: tuple[int, ...] = CHUNKS) -> dict:
    J = problem(dataset, 0, dtype=dtype)
    square = torch.rand(SQUARE, SQUARE, dtype=dtype)

    def ours() -> torch.Tensor:
        return chain_jacobian(J.map.model, J.map.loss_of, J.x)

    def naive() -> torch.Tensor:
        return forward_over_reverse(J.map, J.x, chunk)

    found = ours()
    difference = float(torch.dist(found, forward_over_reverse(J.map, J.x)) / torch.linalg.norm(found))
    tried = {}
    for chunk in bar(chunks, description=f"{dataset}, {dtype}: naive chunks"):
        tried[chunk] = min(seconds(naive) for _ in range(TRIES))
    chunk = min(tried, key=tried.get)
    best_square = min(seconds(lambda: square @ square) for _ in range(5))
    turns = [(seconds(ours), seconds(naive)) for _ in range(repetitions)]
    ratios = [theirs / our for our, theirs in turns]
    best, best_naive = (min(column) for column in zip(*turns, strict=True))
    work, naive_work = gflop(ours), gflop(naive)
    return {
        "dataset": dataset,
        "dtype": str(dtype).removeprefix("torch."),
        "d_x": J.shape[0],
        "d_theta": J.shape[1],
        "threads": torch.get_num_threads(),
        "seconds": best,
        "naive seconds": best_naive,
        "naive chunk": chunk,
        "ratio": best_naive / best,
        "median": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "relative difference": difference,
        "GFLOP": work,
        "naive GFLOP": naive_work,
        "GFLOP/s": work / best,
        "naive GFLOP/s": naive_work / best_naive,
        "matmul GFLOP/s": 2e-9 * SQUARE**3 / best_square,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()], help="one part each")
    parser.add_argument("--repetitions", type=int, default=15, help="turns of each")
    arguments = parser.parse_args()
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for dataset in ("mnist", "cifar10"):
            rows += [compare(dataset, dtype, arguments.repetitions) for dtype in (torch.float32, torch.float64)]
    table = pd.DataFrame(rows)
    table.to_csv(HERE / "jacobian.csv", index=False, float_format="%.3g")
    print(f"{machine(max(arguments.threads))}{table.T.to_string(float_format='{:.3g}'.format)}")


if __name__ == "__main__":
    main()
