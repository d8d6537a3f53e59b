"""The attackers against each other and against their own promises: time, success, knowledge, batches.

    python benchmarks/attacks.py [--only speed success …] [--threads 2] [--resume]

One table per part, written to this folder:

    speed         attacks.csv       seconds and gradient evaluations of every method to MSE 1e-2 … 1e-10
    success       success.csv       Gauss–Newton: images × starts × {uniform, default initialisation} × data sets
    knowledge     knowledge.csv     pruned gradients with their mask known, the linear model's closed form
    batches       batches.csv       four and eight images behind one gradient
    kinks         kinks.csv         ReLU networks, ResNet18 among them: what Gauss–Newton makes of kinks
    recognisable  recognisable.csv  the published attacks at their published settings: SSIM of ten digits
    together      together.csv      32 problems at once against one after another
    step          step.csv          a Gauss–Newton step against one with a dense J and a float64 Gram matrix
    others        others.csv        other implementations, where their clones are given (see others.py)

Seconds are stored nowhere else; `machine.txt` says whose they are. Use them as ratios within one table.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import joblib
import others
import pandas as pd
import torch
import torchvision
from common import HERE, Partial, machine, problem, show

import i2f
from i2f import metrics, perturb
from i2f.attacks import GENERAL
from i2f.core.dense import forward_over_reverse, outer_gram
from i2f.core.gradient import GradientMap
from i2f.core.progress import bar

GOALS = (1e-2, 1e-4, 1e-6, 1e-10)
SUCCESS = 1e-8


def speed(datasets: tuple[str, ...] = ("mnist", "cifar10"), steps: dict[str, int] | None = None) -> pd.DataFrame:
    """Every method at its published settings on the first test image, float64, no noise. `mse` is that of the iterate
    with the lowest objective so far; scoring it is not timed."""
    rows = []
    for dataset in datasets:
        J = problem(dataset, 0)
        for method in bar(GENERAL, description=dataset):
            path: list[tuple[float, int, float]] = []
            best, apart, began = [math.inf], [0.0], time.perf_counter()

            def score(at, path=path, best=best, apart=apart, began=began, truth=J.x):
                now = time.perf_counter()
                if at.loss <= best[0]:
                    best[0] = at.loss
                    path.append((now - began - apart[0], at.evaluations, metrics.mse(at.x, truth).item()))
                apart[0] += time.perf_counter() - now

            y = None if method in ("dlg", "idlg") else J.map.y
            budget = (steps or {}).get(method)
            found = i2f.invert(J.map.model, J.gradient, y, J.x.shape, method=method, steps=budget, callback=score)
            seconds = time.perf_counter() - began - apart[0]
            best_at, _, best_mse = min(path, key=lambda p: p[2])
            row = {"dataset": dataset, "method": method, "steps": found.steps, "evaluations": found.evaluations}
            row |= {"seconds": seconds, "mse": path[-1][2], "best_mse": best_mse, "seconds_to_best": best_at}
            row |= {"ssim": metrics.compare(found.x, J.x)["ssim"], "failed": found.failed}
            for goal in GOALS:
                reached = next(((s, e) for s, e, mse in path if mse <= goal), (math.nan, math.nan))
                row |= {f"seconds to {goal:g}": reached[0], f"evaluations to {goal:g}": reached[1]}
            row["path"] = path
            rows.append(row)
    return pd.DataFrame(rows)


def ratios(table: pd.DataFrame) -> pd.DataFrame:
    """dgl's seconds over Gauss–Newton's: `budget`, dgl's whole budget against reaching a better MSE than it ends with;
    `way`, both to twice the best MSE that dgl reaches on the way."""
    rows = []
    for dataset, rival in table[table.method == "dgl"].set_index("dataset").iterrows():
        ours = table[(table.dataset == dataset) & (table.method == "gauss-newton")].path.iloc[0]
        ours_to = {
            goal: next((s for s, _, mse in ours if mse < goal), math.nan) for goal in (rival.mse, rival.best_mse)
        }
        way = next(s for s, _, mse in rival.path if mse <= 2 * rival.best_mse)
        rows.append(
            {
                "dataset": dataset,
                "dgl mse": rival.mse,
                "dgl best mse": rival.best_mse,
                "budget": rival.seconds / ours_to[rival.mse],
                "way": way / ours_to[rival.best_mse],
            }
        )
    return pd.DataFrame(rows)


def _parallel(function: Callable, tasks: list[tuple], part: str, resume: bool) -> list[dict]:
    partial = Partial(part, resume)
    left = [task for task in tasks if task not in partial.found]
    calls = [joblib.delayed(function)(*task) for task in left]
    with joblib.parallel_config("loky", n_jobs=joblib.cpu_count(only_physical_cores=True), inner_max_num_threads=1):
        found = joblib.Parallel(return_as="generator", batch_size=1)(calls)
        for task, row in zip(left, bar(found, total=len(calls), description=part), strict=True):
            partial.keep(task, row)
    return [partial.found[task] for task in tasks]


def _success(dataset: str, init: str, image: int, start: int) -> dict:
    torch.set_num_threads(1)
    J = problem(dataset, image, init)
    found = i2f.invert(J.map.model, J.gradient, J.map.y, J.x.shape, seed=start)
    mse = metrics.mse(found.x, J.x).item()
    return {
        "dataset": dataset,
        "init": init,
        "image": image,
        "start": start,
        "mse": mse,
        "success": mse <= SUCCESS,
        "steps": found.steps,
        "evaluations": found.evaluations,
        "converged": found.converged,
        "failed": found.failed,
        "reason": found.reason,
    }


def success(
    images: int = 20, starts: int = 3, datasets: tuple[str, ...] = ("mnist", "cifar10"), resume: bool = False
) -> pd.DataFrame:
    tasks = [
        (d, i, k, s) for d in datasets for i in ("uniform", "default") for k in range(images) for s in range(starts)
    ]
    return pd.DataFrame(_parallel(_success, tasks, "success", resume))


def _knowledge(case: str, image: int) -> dict:
    torch.set_num_threads(1)
    J = problem("mnist", image)
    if case == "linear model":
        x, y = i2f.data.load("mnist", n=1, offset=image)
        J = i2f.GradientJacobian(i2f.models.build("linear", "mnist", "uniform", 1, False).double(), x, y)
        found = i2f.invert(J.map.model, J.gradient, J.map.y, J.x.shape)
        W, b = J.map.split(J.gradient)
        closed = (W / b[:, None])[int(b.abs().argmax())]
        difference = float((found.x.reshape(-1) - closed).abs().max())
        mse = metrics.mse(found.x, J.x).item()
        return {"case": case, "image": image, "mse": mse, "largest_difference": difference, "reason": found.reason}
    ratio = float(case.split()[1].rstrip(","))
    shared = J.gradient + perturb.prune(J.gradient, ratio)
    mask = shared != 0 if "mask" in case else None
    steps = 50 if ratio < 0.8 else 30
    found = i2f.invert(J.map.model, shared, J.map.y, J.x.shape, mask=mask, box="box" in case, steps=steps)
    values = torch.linalg.eigvalsh(outer_gram(J.dense() if mask is None else J.dense()[:, mask]))
    rank = int((values > 1e-13 * values[-1]).sum())
    return {
        "case": case,
        "image": image,
        "mse": metrics.mse(found.x, J.x).item(),
        "d_x": J.shape[0],
        "rank": rank,
        "smallest_over_largest": float(values[0] / values[-1]),
        "relative_residual": found.relative_residual,
        "steps": found.steps,
        "converged": found.converged,
        "reason": found.reason,
    }


def knowledge(images: int = 10, resume: bool = False) -> pd.DataFrame:
    """Ranks count eigenvalues of the kept columns' Gram matrix above 1e-13 of the largest."""
    cases = ("pruned 0.5", "pruned 0.5, mask", "pruned 0.9, mask", "linear model")
    tasks = [(case, image) for case in cases for image in range(images)]
    return pd.DataFrame(_parallel(_knowledge, tasks, "knowledge", resume))


def _batch(size: int, number: int) -> dict:
    torch.set_num_threads(1)
    x, y = i2f.data.load("mnist", n=size, offset=size * number, split="train")
    J = i2f.GradientJacobian(i2f.models.build("lenet", "mnist", "uniform", 1, False).double(), x, y)
    found = i2f.invert(J.map.model, J.gradient, y, J.x.shape)
    errors = metrics.mse(metrics.assign(found.x, J.x), J.x)
    values = torch.linalg.eigvalsh(outer_gram(J.dense()))
    return {
        "images": size,
        "batch": number,
        "worst_mse": float(errors.max()),
        "d_x": J.shape[0],
        "rank": int((values > 1e-13 * values[-1]).sum()),
        "relative_residual": found.relative_residual,
        "steps": found.steps,
        "evaluations": found.evaluations,
        "reason": found.reason,
    }


def batches(four: int = 10, eight: int = 3, resume: bool = False) -> pd.DataFrame:
    tasks = [(4, k) for k in range(four)] + [(8, k) for k in range(eight)]
    return pd.DataFrame(_parallel(_batch, tasks, "batches", resume))


def _recognisable(method: str, dtype: torch.dtype, images: int, steps: int | None) -> list[dict]:
    jacobians = [problem("mnist", image, dtype=dtype) for image in range(images)]
    y = None if method == "dlg" else torch.stack([J.map.y for J in jacobians])
    found = i2f.invert_many(
        jacobians[0].map.model,
        torch.stack([J.gradient for J in jacobians]),
        y,
        jacobians[0].x.shape,
        method=method,
        seed=list(range(images)),
        steps=steps,
        progress=True,
    )
    rows = []
    for image, (J, one) in enumerate(zip(jacobians, found, strict=True)):
        scores = metrics.compare(one.x, J.x)
        rows.append(
            {
                "method": method,
                "image": image,
                "mse": scores["mse"],
                "ssim": scores["ssim"],
                "met": scores["ssim"] >= 0.9,
                "label_found": bool(torch.equal(one.y, J.map.y)),
                "relative_residual": one.relative_residual,
                "steps": one.steps,
                "failed": one.failed,
                "reason": one.reason,
            }
        )
    return rows


def recognisable(images: int = 10, steps: dict[str, int] | None = None, resume: bool = False) -> pd.DataFrame:
    """dgl and gs in float32, as published; dlg in float64."""
    partial = Partial("recognisable", resume)
    for method, dtype in (("dgl", torch.float32), ("gs", torch.float32), ("dlg", torch.float64)):
        if (method,) not in partial.found:
            partial.keep((method,), _recognisable(method, dtype, images, (steps or {}).get(method)))
    return pd.DataFrame([row for rows in partial.found.values() for row in rows])


def together(problems: int = 32, steps: int = 100, repetitions: int = 3) -> pd.DataFrame:
    """Adam on MNIST: problem-steps a second, all at once against one after another, interleaved."""
    rows = []
    for dtype in (torch.float32, torch.float64):
        jacobians = [problem("mnist", k % 20, dtype=dtype) for k in range(problems)]
        model, shape = jacobians[0].map.model, jacobians[0].x.shape
        gradients, y = torch.stack([J.gradient for J in jacobians]), torch.stack([J.map.y for J in jacobians])
        i2f.invert_many(model, gradients, y, shape, method="dgl", steps=2)  # what is loaded once is not timed
        for repetition in bar(range(repetitions), description=f"together, {dtype}"):
            began = time.perf_counter()
            i2f.invert_many(model, gradients, y, shape, method="dgl", steps=steps, seed=list(range(problems)))
            middle = time.perf_counter()
            for k in range(problems):
                i2f.invert(model, gradients[k], y[k], shape, method="dgl", steps=steps, seed=k)
            seconds = middle - began, time.perf_counter() - middle
            rows.append(
                {
                    "dtype": str(dtype),
                    "repetition": repetition,
                    "problems": problems,
                    "steps": steps,
                    "together": problems * steps / seconds[0],
                    "one after another": problems * steps / seconds[1],
                    "ratio": seconds[1] / seconds[0],
                }
            )
    return pd.DataFrame(rows)


def _dense_attack(J: i2f.GradientJacobian, start: torch.Tensor, steps: int = 20) -> tuple[torch.Tensor, int]:
    """Levenberg–Marquardt as one would first write it: float64 J, float64 Gram matrix, Cholesky, at every iterate."""
    gmap = GradientMap(J.map.model, J.map.y)
    x, mu, growth = start, None, 2.0
    residual = gmap(x) - J.gradient
    for step in range(steps):  # noqa: B007 - the count is returned
        if float(residual.norm()) <= 1e-14 * float(J.gradient.norm()):
            break
        A = forward_over_reverse(gmap, x)
        gram, slope = A @ A.T, A @ residual
        if mu is None:
            mu = 1e-4 * float(gram.diagonal().max())
        while True:
            shifted = gram.clone()
            shifted.diagonal().add_(mu)
            s = torch.cholesky_solve(-slope[:, None], torch.linalg.cholesky(shifted))[:, 0]
            trial = x + s.view_as(x)
            new = gmap(trial) - J.gradient
            promised = -float((2 * residual + s @ A) @ (s @ A))
            gain = float(residual @ residual - new @ new) / promised if promised > 0 else -1.0
            if gain > 1e-4 or mu > 1e10:
                break
            mu, growth = mu * growth, growth * 2
        if gain <= 1e-4:
            break
        x, residual, growth = trial, new, 2.0
        mu *= max(0.1, 1 - (2 * gain - 1) ** 3)
    return x, step


def step(images: int = 2) -> pd.DataFrame:
    """CIFAR-10, no noise, the same start; seconds of a step are those of the attack over its steps."""
    rows = []
    for image in bar(range(images), description="step"):
        J = problem("cifar10", image)
        start = 0.5 + 0.1 * torch.randn(J.x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        began = time.perf_counter()
        ours = i2f.invert(J.map.model, J.gradient, J.map.y, J.x.shape, start=start)
        middle = time.perf_counter()
        x, steps = _dense_attack(J, start)
        seconds = (middle - began) / ours.steps, (time.perf_counter() - middle) / steps
        rows.append(
            {
                "image": image,
                "seconds a step": seconds[0],
                "dense": seconds[1],
                "ratio": seconds[1] / seconds[0],
                "steps": ours.steps,
                "dense steps": steps,
                "mse": metrics.mse(ours.x, J.x).item(),
                "dense mse": metrics.mse(x, J.x).item(),
            }
        )
    return pd.DataFrame(rows)


def _kinked(network: str) -> tuple[str, torch.nn.Module]:
    """The data set that a network with kinks is for, and the network: float64, weights drawn with seed 0."""
    if network == "resnet18":
        torch.manual_seed(0)
        return "cifar10", torchvision.models.resnet18(num_classes=10).double().eval()
    model = i2f.models.build("lenet", "mnist", "uniform", 0, False).double()
    return "mnist", torch.nn.Sequential(*(torch.nn.ReLU() if isinstance(m, torch.nn.Sigmoid) else m for m in model))


def _kinks(network: str, image: int, steps: int) -> dict:
    torch.set_num_threads(1)
    dataset, model = _kinked(network)
    x, y = i2f.data.load(dataset, n=1, offset=image)
    J = i2f.GradientJacobian(model, x, y, method="matrix-free")
    trace: list[tuple[float, float]] = []

    def score(at):
        trace.append((at.loss, metrics.mse(at.x, J.x).item()))

    found = i2f.invert(model, J.gradient, y, x.shape, steps=steps, callback=score)
    losses = [loss for loss, _ in trace]
    return {
        "network": network,
        "image": image,
        "objective at start": losses[0],
        "objective": found.loss,
        "never worse": losses == sorted(losses, reverse=True) and found.loss <= losses[0],
        "mse at start": trace[0][1],
        "mse": metrics.mse(found.x, J.x).item(),
        "steps": found.steps,
        "evaluations": found.evaluations,
        "converged": found.converged,
        "failed": found.failed,
        "reason": found.reason,
    }


def kinks(lenets: int = 5, resnets: int = 2, resume: bool = False) -> pd.DataFrame:
    """ReLU in LeNet (uniform initialisation) and in ResNet18: J jumps from one linear piece to the next."""
    tasks = [("resnet18", k, 6) for k in range(resnets)] + [("lenet with ReLU", k, 50) for k in range(lenets)]
    return pd.DataFrame(_parallel(_kinks, tasks, "kinks", resume))


PARTS: dict[str, Callable[[], pd.DataFrame]] = {
    "together": together,
    "step": step,
    "speed": speed,
    "batches": batches,
    "knowledge": knowledge,
    "success": success,
    "kinks": kinks,
    "recognisable": recognisable,
}
TIMED = ("together", "step", "speed")
LONG = ("batches", "knowledge", "success", "kinks", "recognisable")
SUMMARY: dict[str, Callable[[pd.DataFrame], object]] = {
    "success": lambda t: t.groupby(["dataset", "init"]).success.agg(["mean", "size"]),
    "knowledge": lambda t: t.groupby("case").mse.agg([lambda m: (m <= SUCCESS).sum(), "size", "median", "max"]),
    "batches": lambda t: t.groupby("images").worst_mse.agg([lambda m: (m <= 1e-6).sum(), "size", "max"]),
    "recognisable": lambda t: t.groupby("method")[["met", "failed"]].sum(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="which parts to run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the timed parts")
    parser.add_argument("--resume", action="store_true", help=f"go on with what was cut off: {', '.join(LONG)}")
    for name in others.OTHERS:
        parser.add_argument(f"--{name}", type=Path, metavar="PATH", help="a local clone to time against ours, alone")
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=[2000],
        help="of those clones' attacks and ours beside them, a part each",
    )
    parser.add_argument("--repetitions", type=int, default=3, help="of each of those parts")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clones = {name: getattr(arguments, name) for name in others.OTHERS if getattr(arguments, name)}
    if clones or set(TIMED) & set(arguments.only):
        (HERE / "machine.txt").write_text(machine(arguments.threads))
    if clones:
        parts = [(name, path, steps) for name, path in clones.items() for steps in arguments.steps]
        table = pd.concat([others.compare(*part, arguments.repetitions) for part in parts])
        _save(table, "others")
        return
    for part in arguments.only:
        table = PARTS[part](resume=arguments.resume) if part in LONG else PARTS[part]()
        _save(table, part)


def _save(table: pd.DataFrame, part: str) -> None:
    """The part's table in this folder, and its summary on the screen."""
    name = "attacks" if part == "speed" else part
    table.drop(columns="path", errors="ignore").to_csv(HERE / f"{name}.csv", index=False, float_format="%.3g")
    (HERE / f"{part}.partial.jsonl").unlink(missing_ok=True)
    print(f"\n{part}\n{SUMMARY.get(part, lambda t: t.drop(columns='path', errors='ignore').to_string())(table)}")
    if part == "speed":
        ratios(table).to_csv(HERE / "ratios.csv", index=False, float_format="%.3g")
        print(ratios(table).to_string())
    if part in ("speed", "others"):
        show()


if __name__ == "__main__":
    main()
