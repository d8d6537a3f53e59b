"""The same problem in other implementations: `attacks.py --released PATH --breaching PATH`, PATH a local clone.

    name        clone of                                             its attack                    beside
    released    github.com/illidanlab/inversion-influence-function   l2, Adam                      dgl
    breaching   github.com/JonasGeiping/breaching                    invertinggradients, no TV     gs

Each run of theirs is a process of its own, so that its modules stay out of ours, and takes turns with one of ours: the
released LeNet and the first MNIST test image in pixels, label known, float32, no noise, as many steps. The seconds are
those of the attack alone; theirs hold what their loops measure, store and print on the way. `gauss-newton seconds` are
those that Gauss–Newton (float64) needs in the same turn until its MSE is below theirs. What theirs imports must be
installed (released: lpips; breaching: hydra-core). Run as a script, this file is that process:
others.py NAME CLONE STEPS SEED THREADS ANSWER.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from common import problem

import i2f
from i2f import metrics
from i2f.core.progress import bar

DATASET, PIXELS = "mnist", (0.0, 1.0)  # images stay in pixels: their mean and deviation


def _released(J: i2f.GradientJacobian, steps: int) -> Callable[[], torch.Tensor]:
    import myreconstruction

    mean, deviation = (torch.full((J.x.shape[1], 1, 1), v) for v in PIXELS)
    config = {
        "signed": False,
        "boxed": False,
        "cost_fn": "l2",
        "lr": 0.1,
        "optim": "adam",
        "max_iterations": steps,
        "total_variation": 0.0,
        "init": "randn",
        "lr_decay": False,
        "images_dir": ".",
        "figure_dir": ".",
        "results_dir": ".",
        "log_dir": ".",
        "random_idx": 0,
        "state": "running",
    }
    attack = myreconstruction.GradientReconstructor(J.map.model, J.x.clone(), (mean, deviation), config, num_images=1)
    return lambda: attack.reconstruct(_parts(J), J.map.y, img_shape=J.x.shape[1:])[0]


def _breaching(J: i2f.GradientJacobian, steps: int) -> Callable[[], torch.Tensor]:
    import breaching

    class Metadata:
        modality, shape, classes, normalize = "vision", tuple(J.x.shape[1:]), 10, True
        mean, std = ((v,) * J.x.shape[1] for v in PIXELS)

    config = breaching.get_attack_config("invertinggradients")
    config.optim.max_iterations = steps
    config.regularization.total_variation.scale = 0.0
    setup = {"device": J.device, "dtype": J.dtype}
    attack = breaching.attacks.prepare_attack(J.map.model, torch.nn.CrossEntropyLoss(), config, setup)
    server = [{"parameters": list(J.map.model.parameters()), "buffers": [], "metadata": Metadata}]
    user = {"num_data_points": 1, "labels": J.map.y, "local_hyperparams": None}
    shared = [{"gradients": _parts(J), "buffers": None, "metadata": user}]
    return lambda: attack.reconstruct(server, shared, {}, dryrun=False)[0]["data"]


OTHERS = {
    "released": (_released, "myreconstruction.py", "dgl"),
    "breaching": (_breaching, "breaching/__init__.py", "gs"),
}


def compare(name: str, clone: Path, steps: int, repetitions: int = 3) -> pd.DataFrame:
    """Theirs and ours in turn; `ratio` is their seconds over ours, `gauss-newton ratio` over Gauss–Newton's."""
    _, landmark, method = OTHERS[name]
    if not (clone / landmark).is_file():
        raise SystemExit(f"--{name} {clone}: it has no {landmark}; give the folder of a clone (see others.py)")
    J, rows = problem(DATASET, 0, dtype=torch.float32), []
    for seed in bar(range(repetitions), description=name):
        began = time.perf_counter()
        found = i2f.invert(J.map.model, J.gradient, J.map.y, J.x.shape, method=method, steps=steps, seed=seed)
        seconds = time.perf_counter() - began
        theirs = _ask(name, clone.resolve(), steps, seed)
        second_order = _seconds_below(theirs["mse"], seed)
        rows.append(
            {
                "implementation": name,
                "repetition": seed,
                "steps": steps,
                "seconds": theirs["seconds"],
                "mse": theirs["mse"],
                "method": method,
                "our seconds": seconds,
                "our steps": found.steps,
                "our mse": metrics.mse(found.x, J.x).item(),
                "ratio": theirs["seconds"] / seconds,
                "gauss-newton seconds": second_order,
                "gauss-newton ratio": theirs["seconds"] / second_order,
            }
        )
    return pd.DataFrame(rows)


def _seconds_below(mse: float, seed: int) -> float:
    """Gauss–Newton's seconds until its iterate is nearer to the truth than `mse`; NaN where it never is."""
    J, reached = problem(DATASET, 0), [math.nan]
    began = time.perf_counter()

    def score(at: i2f.attacks.Iterate) -> None:
        if math.isnan(reached[0]) and metrics.mse(at.x, J.x).item() < mse:
            reached[0] = time.perf_counter() - began

    i2f.invert(J.map.model, J.gradient, J.map.y, J.x.shape, seed=seed, callback=score)
    return reached[0]


def _ask(name: str, clone: Path, steps: int, seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:  # what theirs writes on the way stays in it
        answer = Path(folder) / "answer.json"
        arguments = [name, str(clone), str(steps), str(seed), str(torch.get_num_threads()), str(answer)]
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise SystemExit(f"--{name} {clone}: its attack does not run in this environment: {last}")
        return json.loads(answer.read_text())


def _parts(J: i2f.GradientJacobian) -> list[torch.Tensor]:
    return J.map.split(J.gradient)


def _answer(name: str, clone: str, steps: str, seed: str, threads: str, answer: str) -> None:
    os.environ["MPLBACKEND"] = "agg"
    sys.path.insert(0, clone)
    torch.set_num_threads(int(threads))
    J = problem(DATASET, 0, dtype=torch.float32)
    attack = OTHERS[name][0](J, int(steps))
    torch.manual_seed(int(seed))
    began = time.perf_counter()
    x = attack()
    seconds = time.perf_counter() - began
    mse = metrics.mse(x.detach().view_as(J.x), J.x).item()
    Path(answer).write_text(json.dumps({"seconds": seconds, "mse": mse}))


if __name__ == "__main__":
    _answer(*sys.argv[1:])
