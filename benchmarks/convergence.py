"""Does the attack reach the image, and does I²F say how far noise moves it? Every bundled image, several random starts.

    python benchmarks/convergence.py [--images 20] [--starts 3] [--cifar10 5]

Three tables, written next to this file: `recovery.csv` (no noise: MSE and steps to it), `prediction.csv` (Gaussian
noise of variance 1e-5: measured RMSE over exact I²F) and `machine.txt` (where the seconds were taken).
"""

import argparse
import time

import pandas as pd
import torch
from common import HERE, machine, problem

import i2f
from i2f import metrics, perturb
from i2f.core.progress import bar

VARIANCE = 1e-5
# (data set, MSE to reach, within so many steps): the numbers that the project sets itself
GOALS = {"mnist": (1e-10, 10), "cifar10": (1e-8, 15)}


def recovery(dataset: str, images: int, starts: int) -> list[dict]:
    """No noise: the steps after which the MSE stays below the goal, and where it ends."""
    goal, within = GOALS[dataset]
    rows = []
    for image in bar(range(images), description=f"{dataset}, no noise"):
        J = problem(dataset, image)
        for start in range(starts):
            path: list[float] = []
            began = time.perf_counter()
            found = i2f.invert(
                J.map.model,
                J.gradient,
                J.map.y,
                J.x.shape,
                seed=start,
                callback=lambda at, truth=J.x, path=path: path.append(metrics.mse(at.x, truth).item()),
            )
            seconds = time.perf_counter() - began
            reached = next((step for step, value in enumerate(path) if value <= goal), None)
            rows.append(
                {
                    "dataset": dataset,
                    "image": image,
                    "start": start,
                    "mse": path[-1],
                    "steps_to_goal": reached,
                    "met": reached is not None and reached <= within,
                    "steps": found.steps,
                    "evaluations": found.evaluations,
                    "seconds": seconds,
                    "reason": found.reason,
                }
            )
    return rows


def prediction(images: int) -> list[dict]:
    """Noise of variance 1e-5 on MNIST, from random starts: measured RMSE and exact I²F."""
    rows = []
    for image in range(images):
        J = problem("mnist", image)
        delta = perturb.gaussian(J.gradient, VARIANCE, seed=image)
        found = i2f.invert(J.map.model, J.gradient + delta, J.map.y, J.x.shape, seed=image)
        predicted, measured = i2f.influence(J, delta).rmse, metrics.rmse(found.x, J.x).item()
        bound = i2f.lower_bound(J, delta)
        rows.append(
            {
                "image": image,
                "predicted_rmse": predicted,
                "measured_rmse": measured,
                "ratio": measured / predicted,
                "lower_bound_rmse": bound.rmse,
                "bound_products": bound.products,
                "converged": found.converged,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20, help="MNIST images")
    parser.add_argument("--starts", type=int, default=3, help="random starts for each image")
    parser.add_argument("--cifar10", type=int, default=5, help="CIFAR-10 images")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # small problems: threads that wait for each other cost more than they bring
    (HERE / "machine.txt").write_text(machine(1))
    table = pd.DataFrame(recovery("mnist", arguments.images, arguments.starts))
    table.to_csv(HERE / "recovery.csv", index=False, float_format="%.3g")
    predicted = pd.DataFrame(prediction(arguments.images))
    predicted.to_csv(HERE / "prediction.csv", index=False, float_format="%.5g")
    table = pd.concat([table, pd.DataFrame(recovery("cifar10", arguments.cifar10, arguments.starts))])
    table.to_csv(HERE / "recovery.csv", index=False, float_format="%.3g")
    print(machine(1).strip())
    summary = table.groupby("dataset").agg(
        problems=("met", "size"),
        met=("met", "sum"),
        worst_mse=("mse", "max"),
        most_steps=("steps_to_goal", "max"),
        median_seconds=("seconds", "median"),
    )
    print(summary.to_string())
    off = (predicted.ratio - 1).abs()
    print(f"prediction: measured / predicted RMSE off by at most {off.max():.2%}, median {off.median():.2%}")


if __name__ == "__main__":
    main()
