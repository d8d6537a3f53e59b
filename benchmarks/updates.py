"""What several local steps give away: attacks on updates of LeNet on MNIST, float64, without noise unless it is said.

    python benchmarks/updates.py [--only single sets law] [--jobs 2] [--resume]
    python benchmarks/updates.py --jacobian [--threads 2]

One row per attack in updates.csv, written as it is found; --resume goes on where a run was cut off. Gauss-Newton from
gray, labels known.

    single  one image, K = 5 and 20 steps at rates of 0.1 and 0.5, 20 images each; K = 100 at 0.1, 5 images
    sets    four images, two epochs in batches of two in an order drawn anew for each epoch: known to the attacker, who
            has three starts, or taken to be that of the first images first; 10 sets each
    law     one image, K = 5 at 0.1, noise of a relative norm of 1e-6: I²F beside the attack from the truth, 20 images

updates_jacobian.csv (--jacobian): seconds of J at K = 20, by the layers' rules, by function transforms, and as one
backward pass per pixel through the unrolled steps (of which a sixteenth is timed).
"""

import argparse
import time
from typing import Any

import joblib
import pandas as pd
import torch
from common import HERE, Partial, machine

import i2f
from i2f.core.gradient import GradientMap
from i2f.core.linearization import Linearization
from i2f.core.progress import bar

PARTS = ["single", "sets", "law"]
RELATIVE = 1e-6  # norm of the noise over that of the update


def network(seed: int) -> torch.nn.Module:
    return i2f.models.build("lenet", "mnist", init="uniform", seed=seed, normalize=False).double()


def images(first: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = i2f.data.load("mnist", n=n, offset=first)
    return x.double(), y


def single(first: int, seed: int, steps: int, lr: float) -> dict[str, Any]:
    (x, y), model, message = images(first, 1), network(seed), i2f.LocalSteps(lr=lr, steps=steps)
    sent = GradientMap(model, y).sending(message)(x)
    return attacked(model, sent, x, y, message)


def sets(first: int, seed: int, known: bool) -> dict[str, Any]:
    x, y = images(4 * first, 4)
    model, message = network(seed), i2f.LocalSteps(lr=0.1, epochs=2, batch_size=2, shuffle=first)
    sent = GradientMap(model, y).sending(message)(x)
    guess = message if known else i2f.LocalSteps(lr=0.1, epochs=2, batch_size=2)
    return attacked(model, sent, x, y, guess, restarts=3 if known else 1, steps=100)


def attacked(
    model: torch.nn.Module, sent: torch.Tensor, x: torch.Tensor, y: torch.Tensor, message: i2f.LocalSteps, **how: Any
) -> dict[str, Any]:
    begin = time.perf_counter()
    found = i2f.invert(model, sent, y, x.shape, message=message, **how)
    mse = float((i2f.metrics.assign(found.x, x) - x).square().mean())
    cost = {"steps": found.steps, "evaluations": found.evaluations, "seconds": time.perf_counter() - begin}
    return {"mse": mse, "residual": found.relative_residual, **cost, "reason": found.reason}


def law(first: int, seed: int) -> dict[str, Any]:
    (x, y), message = images(first, 1), i2f.LocalSteps(lr=0.1, steps=5)
    J = i2f.GradientJacobian(network(seed), x, y, message=message)
    norm = RELATIVE * float(J.gradient.norm())
    delta = i2f.perturb.gaussian(J.gradient, norm**2 / J.shape[1], seed=1000 + first)
    predicted = i2f.influence(J, delta)
    found = i2f.invert(J.map.model, J.gradient + delta, y, x.shape, message=message, start=x)
    measured = float((found.x - x).norm())
    return {
        "predicted": predicted.rmse,
        "measured": measured / x.numel() ** 0.5,
        "error": abs(measured / predicted.norm - 1),
        "converged": found.converged,
        "reason": found.reason,
    }


def tasks(parts: list[str]) -> list[tuple]:
    found: list[tuple] = []
    if "law" in parts:
        found += [("law", i, i % 5) for i in range(20)]
    if "single" in parts:
        found += [("single", i, i % 5, steps, lr) for i in range(20) for steps in (5, 20) for lr in (0.1, 0.5)]
        found += [("single", i, i % 5, 100, 0.1) for i in range(5)]
    if "sets" in parts:
        found += [("sets", i, i % 5, known) for i in range(10) for known in (True, False)]
    return found


def solve(part: str, *task: Any) -> dict[str, Any]:
    names = {"single": ["image", "seed", "K", "lr"], "sets": ["image", "seed", "known"], "law": ["image", "seed"]}
    functions: dict[str, Any] = {"single": single, "sets": sets, "law": law}
    return {"part": part, **dict(zip(names[part], task, strict=True)), **functions[part](*task)}


def alone(task: tuple, threads: int) -> tuple[tuple, dict[str, Any]]:
    torch.set_num_threads(threads)
    return task, solve(*task)


def jacobians() -> pd.DataFrame:
    """Seconds of J at K = 20 by each way, the second of two runs."""
    (x, y), model, rows = images(0, 1), network(0), []
    for dtype in (torch.float64, torch.float32):
        gmap, at = GradientMap(model.to(dtype), y).sending(MESSAGE), x.to(dtype)
        for name, (way, times) in WAYS.items():
            for _ in range(2):
                begin = time.perf_counter()
                way(gmap, at)
                seconds = time.perf_counter() - begin
            rows.append({"way": name, "dtype": str(dtype), "seconds": seconds * times})
    return pd.DataFrame(rows)


def transforms(gmap: GradientMap, x: torch.Tensor) -> None:
    path = list(MESSAGE.path(gmap, x))
    for some in torch.eye(x.numel(), dtype=x.dtype).split(49):
        MESSAGE.along(gmap, x, path, some.view(-1, *x.shape))


def unrolled(gmap: GradientMap, x: torch.Tensor) -> None:
    there = Linearization(gmap, x)
    for unit in torch.eye(x.numel(), dtype=x.dtype)[::SHARE]:
        there.rmatvec(unit)


MESSAGE, SHARE = i2f.LocalSteps(lr=0.1, steps=20), 16
WAYS: dict[str, tuple[Any, int]] = {  # and the share of the work that is timed
    "layers' rules": (MESSAGE.dense, 1),
    "function transforms": (transforms, 1),
    "one pass per pixel": (unrolled, SHARE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--jacobian", action="store_true", help="seconds of J alone")
    arguments = parser.parse_args()
    if arguments.jacobian:
        torch.set_num_threads(arguments.threads)
        jacobians().to_csv(HERE / "updates_jacobian.csv", index=False, float_format="%.3g")
        (HERE / "updates_jacobian_machine.txt").write_text(machine(arguments.threads))
        return
    done = Partial("updates", arguments.resume)
    calls = [joblib.delayed(alone)(task, arguments.threads) for task in tasks(arguments.only) if task not in done.found]
    with joblib.parallel_config("loky", n_jobs=arguments.jobs, inner_max_num_threads=arguments.threads):
        answers = joblib.Parallel(return_as="generator_unordered", batch_size=1)(calls)
        for task, row in bar(answers, total=len(calls), description="updates"):
            done.keep(task, row)
    order = {task: place for place, task in enumerate(tasks(PARTS))}
    table = pd.DataFrame([row for _, row in sorted(done.found.items(), key=lambda found: order[found[0]])])
    table.to_csv(HERE / "updates.csv", index=False, float_format="%.4g")
    (HERE / "updates_machine.txt").write_text(machine(arguments.threads))
    done.path.unlink()


if __name__ == "__main__":
    import updates  # by name, so that the other processes find its functions

    updates.main()
