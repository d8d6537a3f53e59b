"""What it costs to import the package: seconds of a fresh process over those of an empty one, medians.

python benchmarks/imports.py        # writes imports.csv
"""

import statistics
import subprocess
import sys
import time

import pandas as pd
from common import HERE

CODE = {
    "python": "pass",
    "import i2f": "import i2f",
    "i2f.GradientJacobian": "import i2f; i2f.GradientJacobian",
    "import torch": "import torch",
    "i2f --help": "from i2f import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass",
}
ROUNDS = 7


def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in CODE}
    for _ in range(ROUNDS):  # in turn, so that a busy machine slows all alike
        for name, code in CODE.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    rows = [
        {"what": name, "seconds": median, "over import torch": median / medians["import torch"]}
        for name, median in medians.items()
    ]
    table = pd.DataFrame(rows)
    table.to_csv(HERE / "imports.csv", index=False, float_format="%.3g")
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
