"""Deep networks: what products with J, the lower bound and an attack cost there, and which networks can be inverted.

    python benchmarks/deep.py [--only products bound …] [--device auto|cpu|cuda|mps] [--threads 2] [--resume]

One table per part, written to this folder:

    products   deep_products.csv   seconds of J v and Jᵀ v against one gradient, graphs kept; memory predicted and taken
    bound      deep_bound.csv      λ_max to 1%: Lanczos in input space, ARPACK in parameter space; a process each
    influence  deep_influence.csv  I_lb, damped I²F and, where J Jᵀ fits, exact I²F under one relative noise
    rate       deep_rate.csv       attacks a second: LeNet and ResNet18
    inversion  deep_inversion.csv  Gauss–Newton on one CIFAR-10 image, no noise: the map of what can be inverted
    photos     deep_photos.csv     the lower bound of 20 photographs beside an attack on each, EfficientNet-Lite0

On another device than the CPU the tables are deep_products-cuda.csv and so on; seconds belong to `deep_machine.txt`
(`deep_machine-cuda.txt`).
"""

import argparse
import functools
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import torch
from common import HERE, Partial, machine
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn

import i2f
from i2f import devices, metrics, perturb, spectrum
from i2f.core import linalg
from i2f.core.progress import bar

NETWORKS = {  # name in the tables -> data set, and what `models.build` is told
    "resnet20 gelu": ("cifar10", {"name": "resnet20", "activation": "gelu"}),
    "resnet18 gelu": ("cifar10", {"name": "resnet18", "activation": "gelu"}),
    "resnet18 relu": ("cifar10", {"name": "resnet18"}),
    "resnet18 softplus": ("cifar10", {"name": "resnet18", "activation": "softplus"}),
    "vit": ("cifar10", {"name": "vit"}),
    "efficientnet_lite0": ("imagenet", {"name": "efficientnet_lite0", "weights": "imagenet"}),
    "resnet50": ("imagenet", {"name": "resnet50"}),
    "resnet152": ("imagenet", {"name": "resnet152"}),
}
SMALL = [name for name, (dataset, _) in NETWORKS.items() if dataset != "imagenet"]
LENET = {"name": "lenet", "init": "uniform", "normalize": False}
TOLERANCE = 1e-2
REPETITIONS = 5
BLOCK = 32  # rows of J in float64 at a time: 2.9 GB of a ResNet18
RELATIVE, PIXEL_VARIANCE = 1e-2, 0.06  # ‖δ‖ over ‖g‖, and τ², the variance of a pixel, of the damping σ²/τ²


def setting(network: str, image: int = 0, **replaced: object) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Model (weights drawn with seed 1 where they are not pretrained), image and label, on the chosen device."""
    dataset, options = NETWORKS[network]
    x, y = i2f.data.load(dataset, n=1, offset=image)
    model = i2f.models.build(**({"dataset": dataset, "seed": 1} | options | replaced))
    return tuple(thing.to(devices.current()) for thing in (model, x, y))


def seconds(work: Callable[[], object]) -> float:
    """The median of a few runs, after one that is not timed."""
    taken = []
    for _ in range(REPETITIONS + 1):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken[1:]))


def products(network: str) -> dict:
    model, x, y = setting(network)
    before = _peak()
    J = i2f.GradientJacobian(model, x, y, method="matrix-free")
    delta, v = torch.randn_like(J.gradient), torch.randn_like(J.x).reshape(-1)
    J.matvec(delta), J.rmatvec(v)
    taken = _peak() - before
    gradient, forward, back = (
        seconds(work) for work in (lambda: J.map(J.x), lambda: J.matvec(delta), lambda: J.rmatvec(v))
    )
    return {
        "gradient, s": gradient,
        "J v, s": forward,
        "Jᵀ v, s": back,
        "pair / gradient": (forward + back) / gradient,
        "foreseen, GB": J.footprint.kept() / 1e9,
        "taken, GB": taken / 1e9,
    }


def bound(network: str) -> dict:
    """λ_max within 1% and the bound for noise of variance 1e-5, from an operator that has done nothing yet."""
    model, x, y = setting(network)
    began = time.perf_counter()
    J = i2f.GradientJacobian(model, x, y, method="matrix-free")
    found = i2f.lower_bound(J, perturb.gaussian(J.gradient, 1e-5), tol=TOLERANCE)
    return {
        "side": "input",
        "d_x": J.shape[0],
        "d_theta": J.shape[1],
        "lambda_max": found.lambda_max,
        "bound, RMSE": found.rmse,
        "products": found.products,
        "seconds": time.perf_counter() - began,
        "peak, GB": _peak() / 1e9,
    }


def arpack(network: str) -> dict:
    """The same eigenvalue where the released code looks for it: JᵀJ in parameter space."""
    model, x, y = setting(network)
    began = time.perf_counter()
    J = i2f.GradientJacobian(model, x, y, method="matrix-free")

    def product(v: np.ndarray) -> np.ndarray:
        vector = torch.from_numpy(v.reshape(-1)).to(J.x)
        return J.rmatvec(J.matvec(vector)).cpu().numpy()

    n = J.shape[1]
    start = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    operator = LinearOperator((n, n), matvec=product, dtype=np.float32)
    (value,), _ = eigsh(operator, k=1, tol=TOLERANCE, v0=start)
    return {
        "side": "parameters, ARPACK",
        "d_x": J.shape[0],
        "d_theta": n,
        "lambda_max": float(value),
        "products": J.products,
        "seconds": time.perf_counter() - began,
        "peak, GB": _peak() / 1e9,
    }


def _peak() -> float:
    """The most memory that this process ever held, in bytes; on CUDA, the device's."""
    if devices.current().type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # this process alone: ru_maxrss starts at what its parent held
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text()).group(1))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def influence(network: str) -> dict:
    """One relative noise. Exact: J Jᵀ in float64, 2 d_x products in blocks, J itself never formed; on a photograph,
    whose J Jᵀ would be 181 GB, damped alone."""
    model, x, y = setting(network)
    J = i2f.GradientJacobian(model, x, y, method="matrix-free")
    variance = (RELATIVE * float(J.gradient.norm())) ** 2 / J.shape[1]
    damping = variance / PIXEL_VARIANCE
    delta = perturb.gaussian(J.gradient, variance, seed=0)
    began = time.perf_counter()
    bound = i2f.lower_bound(J, delta, tol=TOLERANCE)
    row = {
        "d_x": J.shape[0],
        "d_theta": J.shape[1],
        "lambda_max": bound.lambda_max,
        "I_lb": bound.rmse,
        "I_lb: products": bound.products,
        "I_lb: s": time.perf_counter() - began,
    }
    began = time.perf_counter()
    damped = i2f.influence(J, delta, damping, rtol=1e-3, max_steps=400)
    row |= {
        "damping / lambda_max": damping / bound.lambda_max,
        "damped": damped.rmse,
        "residual": damped.residual,
        "damped: products": damped.products,
        "damped: s": time.perf_counter() - began,
    }
    if network not in SMALL:
        return row
    model, x = model.double(), x.double()
    J = i2f.GradientJacobian(model, x, y, method="matrix-free")
    began = time.perf_counter()
    gram = torch.cat([J.matvec(J.rmatvec(some)) for some in torch.eye(J.shape[0]).to(J.x).split(BLOCK)])
    gram = (gram + gram.T) / 2
    values = torch.linalg.eigvalsh(gram).flip(0)
    level = spectrum.zero_level(J)
    b = J.matvec(delta.double())
    exact, same = (linalg.solve_dense(gram, b, eps, level) for eps in (0.0, damping))
    norms = [float(found.u.norm()) / J.shape[0] ** 0.5 for found in (exact, same)]
    return row | {
        "exact": norms[0],
        "damped, dense": norms[1],
        "rank": int((values > level * values[0]).sum()),
        "smallest / lambda_max": float(values[-1] / values[0]),
        "exact: products": J.products,
        "exact: s": time.perf_counter() - began,
    }


def rate(network: str, method: str, attacks: int, steps: int) -> dict:
    """Attacks without noise, label known: each alone for Gauss–Newton, all at once for dgl, as they are fastest."""
    if network == "lenet":
        x, y = i2f.data.load("mnist", n=min(attacks, 20))
        x, y = (t[torch.arange(attacks) % len(t)].to(devices.current()) for t in (x, y))
        model = i2f.models.build(**LENET, dataset="mnist", seed=1).to(x)
    else:
        model, x, y = setting(network)
    if network == "lenet" and method == "gauss-newton":
        model, x = model.double(), x.double()
    sent = torch.stack([i2f.GradientJacobian(model, a[None], b[None]).gradient for a, b in zip(x, y, strict=True)])
    warm = 1 if method == "gauss-newton" else attacks
    i2f.invert_many(model, sent[:warm], y[:warm, None], (1, *x.shape[1:]), method=method, steps=2)
    began = time.perf_counter()
    found = i2f.invert_many(
        model, sent, y[:, None], (1, *x.shape[1:]), method=method, steps=steps, seed=list(range(len(sent)))
    )
    taken = time.perf_counter() - began
    errors = [float(metrics.mse(one.x, a[None])) for one, a in zip(found, x, strict=True)]
    return {
        "dtype": str(x.dtype).removeprefix("torch."),
        "seconds": taken,
        "attacks / s": attacks / taken,
        "evaluations": float(np.median([one.evaluations for one in found])),
        "recovered": float(np.mean(np.array(errors) <= 1e-6)),
        "median mse": float(np.median(errors)),
    }


def inversion(network: str, image: int, way: str, steps: int) -> dict:
    """One attack from the gray start, float32. `way`: "plain"; "homotopy", the same gradient matched by softer and
    sharper softplus networks before the ReLU; "adam first", 300 steps of dgl before; "tv", a total-variation prior."""
    model, x, y = setting(network, image)
    sent = i2f.GradientJacobian(model, x, y, method="matrix-free").gradient
    began, spent, start = time.perf_counter(), 0, None
    first: list[float] = []  # the error of the gray start, whatever comes first
    path: list[tuple[int, float]] = []

    def look(at: i2f.attacks.Iterate) -> None:
        if not first:
            first.append(float(metrics.mse(at.x, x)))

    if way == "homotopy":
        for beta in (5.0, 20.0, 80.0):
            soft, _, _ = setting(network, image, activation=functools.partial(nn.Softplus, beta=beta))
            part = i2f.invert(soft, sent, y, x.shape, steps=steps // 4, start=start, callback=look)
            start, spent = part.x, spent + part.evaluations
        steps -= 3 * (steps // 4)
    if way == "adam first":
        part = i2f.invert(model, sent, y, x.shape, method="dgl", steps=300, start="gray", callback=look)
        start, spent = part.x, spent + part.evaluations

    def score(at: i2f.attacks.Iterate) -> None:
        look(at)
        path.append((at.evaluations, float(metrics.mse(at.x, x))))

    found = i2f.invert(
        model, sent, y, x.shape, steps=steps, start=start, tv=1e-6 if way == "tv" else 0.0, callback=score
    )
    reached = [cost for cost, mse in path if mse <= 1e-6]
    return {
        "start mse": first[0],
        "mse": float(metrics.mse(found.x, x)),
        "relative_residual": found.relative_residual,
        "steps": found.steps,
        "evaluations": spent + found.evaluations,
        "evaluations to 1e-6": spent + reached[0] if reached else None,
        "seconds": time.perf_counter() - began,
        "reason": found.reason,
    }


TASKS: dict[str, list[tuple]] = {
    "products": [(network,) for network in NETWORKS],
    "bound": [(network,) for network in NETWORKS],
    "influence": [(network,) for network in NETWORKS],
    "rate": [("lenet", "gauss-newton", 10, 50), ("lenet", "dgl", 40, 500), ("resnet18 gelu", "gauss-newton", 1, 36)],
    "inversion": [
        ("resnet18 gelu", 1, "plain", 36),
        ("resnet18 gelu", 0, "plain", 36),
        ("resnet18 gelu", 2, "plain", 36),
        ("resnet18 softplus", 0, "plain", 24),
        ("vit", 0, "plain", 36),
        ("resnet20 gelu", 0, "plain", 36),
        *(("resnet18 relu", 0, way, 24) for way in ("plain", "homotopy", "adam first", "tv")),
    ],
    "photos": [(image, 60) for image in range(20)],
}
ON_A_GPU: dict[str, list[tuple]] = {  # in the place of these, where there is more to spend
    "rate": [("lenet", "gauss-newton", 20, 50), ("lenet", "dgl", 200, 500), ("resnet18 gelu", "gauss-newton", 1, 36)],
    "inversion": [
        *(("resnet18 gelu", image, "plain", 60) for image in range(10)),
        *(("vit", image, "plain", 120) for image in range(2)),
        *(("resnet18 relu", image, way, 60) for image in range(2) for way in ("plain", "homotopy", "adam first", "tv")),
        *(("resnet20 gelu", image, "plain", 120) for image in range(2)),
        *(("resnet18 softplus", image, "plain", 60) for image in range(10)),
    ],
    "photos": [(image, 2000) for image in range(20)],
}


def photos(image: int, steps: int) -> dict:
    """Gaussian noise of variance 1e-8 on the gradient of one photograph, and `dgl` from gray, cut off early: a step of
    Gauss–Newton takes a hundred products, which depthwise convolutions make as dear as so many steps of Adam."""
    model, x, y = setting("efficientnet_lite0", image)
    J = i2f.GradientJacobian(model, x, y, method="matrix-free")
    delta = perturb.gaussian(J.gradient, 1e-8, seed=image)
    found = i2f.lower_bound(J, delta, tol=TOLERANCE)
    attack = i2f.invert(model, J.gradient + delta, y, x.shape, method="dgl", start="gray", lr=0.01, steps=steps)
    flat = float(metrics.rmse(torch.full_like(x, 0.5), x))
    return {
        "label": int(y),
        "lambda_max": found.lambda_max,
        "bound_rmse": found.rmse,
        "products": found.products,
        "rmse": float(metrics.rmse(attack.x, x)),
        "rmse of gray": flat,
        "relative_residual": attack.relative_residual,
        "steps": attack.steps,
        "evaluations": attack.evaluations,
        "gradient norm": float(J.gradient.norm()),
    }


NAMES = {
    "products": ["network"],
    "bound": ["network"],
    "inversion": ["network", "image", "way", "steps allowed"],
    "photos": ["image", "steps allowed"],
    "influence": ["network"],
    "rate": ["network", "method", "attacks", "steps allowed"],
}
ALONE = ("products", "bound", "influence", "rate")  # timed one after another; on the CPU in a process each


def in_a_process(function: str, task: tuple, threads: int) -> dict:
    """The row of one task, computed by another process, so that its peak is its own; here on CUDA, which can start a
    peak anew."""
    if devices.current().type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return globals()[function](*task)
    command = [sys.executable, __file__, "--task", function, json.dumps(task), "--threads", str(threads)]
    command += ["--device", devices.chosen()]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _side_by_side(function: Callable, task: tuple, device: str) -> tuple[tuple, dict]:
    torch.set_num_threads(1)
    devices.use(device)
    return task, function(*task)


def run(part: str, threads: int, resume: bool) -> pd.DataFrame:
    partial = Partial(f"deep_{part}{_suffix()}", resume)
    tasks = ON_A_GPU.get(part, TASKS[part]) if devices.current().type == "cuda" else TASKS[part]
    left = [task for task in tasks if task not in partial.found]
    if part in ALONE:
        functions = ["bound", "arpack"] if part == "bound" else [part]
        for task in bar(left, description=part):
            # the parameter side keeps 20 vectors of d_θ: where they do not fit, it has no row
            mine = [f for f in functions if not (f == "arpack" and NETWORKS[task[0]][0] == "imagenet")]
            partial.keep(task, [in_a_process(function, task, threads) for function in mine])
    else:
        calls = [joblib.delayed(_side_by_side)(globals()[part], task, devices.chosen()) for task in left]
        with joblib.parallel_config("loky", n_jobs=threads, inner_max_num_threads=1):
            found = joblib.Parallel(return_as="generator_unordered", batch_size=1)(calls)
            for task, row in bar(found, total=len(left), description=part):
                partial.keep(task, [row])
    rows = [{**dict(zip(NAMES[part], task, strict=True)), **row} for task in tasks for row in partial.found[task]]
    table = pd.DataFrame(rows)
    table.to_csv(HERE / f"deep_{part}{_suffix()}.csv", index=False, float_format="%.4g")
    partial.path.unlink(missing_ok=True)
    return table


def _suffix() -> str:
    kind = devices.current().type
    return "" if kind == "cpu" else f"-{kind}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), help="which parts to run")
    parser.add_argument("--device", choices=devices.NAMES, default="cpu", help="default: the CPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="or processes, of one thread each")
    parser.add_argument("--resume", action="store_true", help="go on with what was cut off")
    parser.add_argument("--task", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    devices.use(arguments.device)
    torch.set_num_threads(arguments.threads)
    if arguments.task:
        function, task = arguments.task
        print(json.dumps(globals()[function](*json.loads(task))))
        return
    name = f"{torch.cuda.get_device_name()}; " if devices.current().type == "cuda" else ""
    (HERE / f"deep_machine{_suffix()}.txt").write_text(name + machine(arguments.threads))
    for part in arguments.only:
        print(f"\n{part}\n{run(part, arguments.threads, arguments.resume).to_string()}")


if __name__ == "__main__":
    main()
