"""R-GAP (Zhu and Blaschko 2021) beside the recursion, on R-GAP's own network: one row per image in rgap.csv.

    python benchmarks/rgap.py --breaching PATH [--images 5] [--threads 1] [--resume]

PATH is a clone of github.com/JonasGeiping/breaching, whose port of R-GAP is run as its authors' wrapper runs it (its
requirement hydra-core must be installed). CNN6 with LeakyReLU for CIFAR-10, weights drawn by one seed per image, images
in pixels, label unknown. Theirs computes in float32 from a float32 gradient, ours in float64 from a float64 one and,
in a second row, from the float32 gradient too. One attack after another, on the same number of threads.
"""

import argparse
import contextlib
import io
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats  # noqa: F401  before NumPy gets the alias below
import torch
from common import HERE, Partial, machine
from recursive import cnn6
from torch import Tensor, nn
from torch.nn import functional as F

import i2f
from i2f.core.progress import bar


def theirs(model: nn.Module, gradient: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    np.bool = bool  # type: ignore[misc]  # an alias that NumPy dropped and the port uses
    import breaching

    class Metadata:
        modality, classes = "vision", 10
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    Metadata.shape = tuple(shape[1:])  # type: ignore[attr-defined]
    setup = {"device": torch.device("cpu"), "dtype": torch.float}
    with contextlib.redirect_stdout(io.StringIO()):
        config = breaching.get_attack_config("rgap")
        attack = breaching.attacks.prepare_attack(model, nn.CrossEntropyLoss(), config, setup)
        server = [{"parameters": list(model.parameters()), "buffers": [], "metadata": Metadata}]
        user = {"num_data_points": 1, "labels": None, "local_hyperparams": None}
        shared = [{"gradients": gradient, "buffers": None, "metadata": user}]
        found: Tensor = attack.reconstruct(server, shared, {}, dryrun=False)[0]["data"]
    return found


def row(image: int, name: str) -> dict[str, Any]:
    spec = i2f.models.SPECS["cifar10"]
    torch.manual_seed(image)
    model = nn.Sequential(*cnn6(spec.shape, spec.classes)).eval()
    x, y = i2f.data.load("cifar10", n=1, offset=image)
    if name == "recursive, float64":
        model, x = model.double(), x.double()
    gradient = [g.detach() for g in torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))]
    begin = time.perf_counter()
    if name == "R-GAP":
        found = theirs(model, gradient, tuple(x.shape))
    else:
        found = i2f.invert(model, gradient, None, x.shape, method="recursive", polish=False).x
    seconds = time.perf_counter() - begin
    return {"attack": name, "image": image, "mse": float((found - x).double().square().mean()), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--breaching", type=Path, required=True)
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.breaching))
    torch.set_num_threads(arguments.threads)
    names = ("R-GAP", "recursive, float32", "recursive, float64")
    tasks = [(image, name) for image in range(arguments.images) for name in names]
    done = Partial("rgap", arguments.resume)
    for task in bar([t for t in tasks if t not in done.found], description="rgap"):
        done.keep(task, row(*task))
    table = pd.DataFrame(list(done.found.values()))
    table.sort_values(["attack", "image"]).to_csv(HERE / "rgap.csv", index=False, float_format="%.4g")
    (HERE / "rgap_machine.txt").write_text(machine(arguments.threads))
    done.path.unlink()


if __name__ == "__main__":
    main()
