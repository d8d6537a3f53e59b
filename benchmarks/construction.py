"""What it costs to make J, before any product: one table, construction.csv.

    python benchmarks/construction.py [--against CHECKOUT] [--repetitions 10]

Each network in a process of its own, one thread; seconds are the process's own (CPU), the least of many. `gradients`:
over one forward and backward of the bare module. With --against, another checkout of the project takes turns with this
one, and `ratio` is this one's least over the other's.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
from common import HERE

CASES = [("lenet", "mnist", "float32"), ("lenet", "mnist", "float64"), ("resnet18", "cifar10", "float32")]
MEASURE = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import torch
from torch.nn import functional as F
from i2f import GradientJacobian, models

torch.set_num_threads(1)
name, dataset, dtype = sys.argv[2:5]
model = models.build(name, dataset).to(getattr(torch, dtype))
x, y = torch.rand(1, *models.SPECS[dataset].shape, dtype=getattr(torch, dtype)), torch.tensor([1])


def least(act, times):
    found = []
    for _ in range(times):
        began = time.process_time()
        act()
        found.append(time.process_time() - began)
    return min(found)


construct = least(lambda: GradientJacobian(model, x, y), 8)
gradient = least(lambda: torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters())), 16)
print(json.dumps([construct, gradient]))
"""


def measure(checkout: Path, case: tuple[str, str, str]) -> tuple[float, float]:
    """CPU seconds of the construction of J, and of one gradient."""
    call = [sys.executable, "-W", "ignore", "-c", MEASURE, str(checkout), *case]
    return tuple(json.loads(subprocess.run(call, check=True, capture_output=True, text=True, cwd="/").stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout, to compare with")
    parser.add_argument("--repetitions", type=int, default=10, help="turns of each")
    arguments = parser.parse_args()
    here, other = HERE.parent, arguments.against and arguments.against.resolve()
    rows = []
    for case in CASES:
        turns = [(measure(here, case), measure(other, case) if other else None) for _ in range(arguments.repetitions)]
        ours = [min(column) for column in zip(*(turn[0] for turn in turns), strict=True)]
        row = {"network": case[0], "dataset": case[1], "dtype": case[2], "seconds": ours[0]}
        row |= {"gradients": ours[0] / ours[1]}
        if other:
            theirs = min(turn[1][0] for turn in turns)
            row |= {"before": theirs, "ratio": ours[0] / theirs}
        rows.append(row)
    table = pd.DataFrame(rows)
    table.to_csv(HERE / "construction.csv", index=False, float_format="%.3g")
    print(table.to_string(index=False, float_format="{:.3g}".format))


if __name__ == "__main__":
    main()
