"""The recursive attack on networks with ReLUs: what it recovers, and in what time.

    python benchmarks/recursive.py [--only drawn float32 noise plain trained others] [--jobs 2] [--resume]
    python benchmarks/recursive.py --alone [--threads 2]
    python benchmarks/recursive.py --forecast

One row per image in recursive.csv, written as it is found; --resume goes on where a run was cut off. Label unknown.

    drawn    ResNet18 for CIFAR-10, drawn weights, no noise, float64: the 20 images, and 5 weight seeds × 2 images
    float32  the same 20 images, model and gradient in float32
    noise    relative noise of 1e-4, 1e-3 and 1e-2 on every tensor, σ = η‖G‖/√numel: 20 images, without polish;
             predicted: the MSE of I²F, ‖(JJᵀ)⁻¹Jδ‖²/d_x, for the same δ
    plain    cnn{2,4,8,16}x16 for MNIST, 20 images each
    trained  ResNet18 for MNIST after four epochs on bundled digits: 10 others, which it has not seen, without noise
    others   what else was tried: networks of OTHERS, 5 images each

recursive_alone.csv (--alone): ResNet18, no noise, each image in a process of its own, one at a time: its seconds, and
the peak of its memory, GB, of which `before` is PyTorch's own, the network's and its gradient's.

recursive_forecast.csv (--forecast): from shapes alone, the first layer that has too few equations.

Seconds of recursive.csv are those of one process with `--threads` threads beside others (recursive_machine.txt).
"""

import argparse
import copy
import functools
import multiprocessing
import resource
import time
from typing import Any

import joblib
import pandas as pd
import torch
from common import HERE, Partial, machine
from torch import nn
from torch.nn import functional as F

import i2f
from i2f.attacks.recursive import forecast
from i2f.attacks.recursive.graph import Graph
from i2f.core.progress import bar
from i2f.paper import networks
from i2f.paper.experiments import exact

PARTS = ["drawn", "plain", "float32", "trained", "others", "noise"]
DIGITS, HELD_OUT, EPOCHS = 800, 200, 4  # of a training
CNN6 = ((12, 4, 2, 2), (36, 3, 2, 1), (36, 3, 1, 1), (36, 3, 1, 1), (64, 3, 2, 1), (128, 3, 1, 1))
NOISES = (1e-4, 1e-3, 1e-2)
PHOTOGRAPHS = ("resnet18", "resnet34", "resnet50", "resnext50_32x4d", "alexnet", "vgg11", "mobilenet_v2", "densenet121")


def mlp(shape: networks.Shape, classes: int) -> list[nn.Module]:
    n = shape[0] * shape[1] * shape[2]
    return [nn.Flatten(), nn.Linear(n, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, classes)]


def lenet5(shape: networks.Shape, classes: int) -> list[nn.Module]:
    """LeNet-5 with ReLUs and max pooling, for 28 pixels."""
    convolutions = [nn.Conv2d(shape[0], 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    convolutions += [nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return [*convolutions, nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes)]


def vgg11(shape: networks.Shape, classes: int) -> list[nn.Module]:
    """VGG11 for 32 pixels: its convolutions and one linear layer."""
    layers: list[nn.Module] = []
    channels = shape[0]
    for width in (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"):
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return [*layers, nn.Flatten(), nn.Linear(512, classes)]


def cnn6(shape: networks.Shape, classes: int) -> list[nn.Module]:
    """R-GAP's network (Zhu and Blaschko 2021): six convolutions with LeakyReLU and without biases, one linear layer."""
    layers: list[nn.Module] = []
    channels, side = shape[0], shape[1]
    for width, kernel, stride, padding in CNN6:
        convolution = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        layers, channels = [*layers, convolution, nn.LeakyReLU(0.2)], width
        side = (side + 2 * padding - kernel) // stride + 1
    return [*layers[:-1], nn.Flatten(), layers[-1], nn.Linear(channels * side**2, classes)]


OTHERS: dict[str, tuple[str, Any]] = {  # name -> data set, and its layers or the name that `models.build` knows
    "mlp": ("mnist", mlp),
    "lenet5": ("mnist", lenet5),
    "cnn6 leaky": ("cifar10", cnn6),
    "vgg11": ("cifar10", vgg11),
    "resnet34": ("cifar10", networks.resnet("resnet34")),
    "resnet50": ("cifar10", "resnet50"),
    "resnet20": ("cifar10", "resnet20"),
}


def model_of(network: str, dataset: str, seed: int) -> nn.Module:
    layers = OTHERS[network][1] if network in OTHERS else network
    if isinstance(layers, str):
        return i2f.models.build(layers, dataset, seed=seed)
    spec = i2f.models.SPECS[dataset]
    torch.manual_seed(seed)
    normalize = i2f.models.build("linear", dataset)[0]
    return nn.Sequential(normalize, *layers(spec.shape, spec.classes)).eval()


@functools.cache
def trained(network: str, dataset: str, seed: int) -> tuple[nn.Module, float]:
    """A network after `EPOCHS` of Adam on bundled images, and its accuracy on `HELD_OUT` others."""
    model = i2f.models.build(network, dataset, seed=seed)
    x, y = i2f.data.load(dataset, n=DIGITS + HELD_OUT, split="train")
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(EPOCHS):
        for some in torch.randperm(DIGITS, generator=generator).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(x[some]), y[some]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        right = [model(part).argmax(1) for part in x[DIGITS:].split(100)]
    return model, float((torch.cat(right) == y[DIGITS:]).double().mean())


def problem(
    part: str, network: str, dataset: str, image: int, seed: int, noise: float
) -> tuple[nn.Module, torch.Tensor, torch.Tensor, list[torch.Tensor], float | None]:
    """Model, image, label, what is shared, and the accuracy of a trained model."""
    dtype = torch.float32 if part == "float32" else torch.float64
    x, y = i2f.data.load(dataset, n=1, offset=image)
    model, accuracy = trained(network, dataset, seed) if part == "trained" else (model_of(network, dataset, seed), None)
    model, x = copy.deepcopy(model).to(dtype), x.to(dtype)
    sent = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    generator = torch.Generator().manual_seed(1000 * seed + image)
    return model, x, y, [g + perturbation(g, noise, generator) if noise else g for g in sent], accuracy


def perturbation(g: torch.Tensor, noise: float, generator: torch.Generator) -> torch.Tensor:
    return noise * g.norm() / g.numel() ** 0.5 * torch.randn(g.shape, generator=generator, dtype=g.dtype)


def predicted(network: str, dataset: str, image: int, seed: int) -> float:
    """The MSE of I²F for a relative noise of one, to which that of any other is proportional, by its square."""
    model, x, y, sent, _ = problem("noise", network, dataset, image, seed, 1.0)
    J = i2f.GradientJacobian(model, x, y, method="matrix-free")
    d = exact.displacement(J, Graph(J.map.model, tuple(x.shape)), i2f.flatten_gradient(model, sent) - J.gradient)
    return float(d.square().mean())


def solve(part: str, network: str, dataset: str, image: int, seed: int, noise: float) -> dict[str, Any]:
    if part == "influence":
        return {"part": part, "image": image, "seed": seed, "predicted": predicted(network, dataset, image, seed)}
    model, x, _, sent, accuracy = problem(part, network, dataset, image, seed, noise)
    begin = time.perf_counter()
    row = {"part": part, "network": network, "image": image, "seed": seed, "noise": noise, "accuracy": accuracy}
    try:
        found = i2f.invert(model, sent, None, x.shape, method="recursive", polish=False)
    except ValueError as error:
        return row | {"seconds": time.perf_counter() - begin, "reason": str(error)}
    row["seconds"] = time.perf_counter() - begin
    mse = float((found.x - x).double().square().mean())
    layers = {"rank": found.layers[-1].rank, "unknowns": found.layers[-1].unknowns} if found.layers else {}
    return row | {"mse": mse, "residual": found.relative_residual, "steps": found.steps,
                  "evaluations": found.evaluations, **layers, "reason": found.reason}  # fmt: skip


def alone(image: int, threads: int) -> dict[str, Any]:
    """One attack in a process of its own."""
    torch.set_num_threads(threads)
    model, x, _, sent, _ = problem("drawn", "resnet18", "cifar10", image, image % 5, 0.0)
    before, begin = _peak(), time.perf_counter()
    found = i2f.invert(model, sent, None, x.shape, method="recursive", polish=False)
    seconds, mse = time.perf_counter() - begin, float((found.x - x).square().mean())
    return {"image": image, "seconds": seconds, "peak, GB": _peak(), "before": before, "mse": mse}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def tasks(parts: list[str]) -> list[tuple]:
    found: list[tuple] = []
    photographs = range(20)
    if "drawn" in parts:
        found += [("drawn", "resnet18", "cifar10", i, i % 5, 0.0) for i in photographs]
        found += [("drawn", "resnet18", "cifar10", i, s, 0.0) for s in range(5) for i in (0, 1) if s != i % 5]
    if "plain" in parts:
        found += [("plain", f"cnn{d}x16", "mnist", i, i % 5, 0.0) for i in range(20) for d in (2, 4, 8, 16)]
    if "float32" in parts:
        found += [("float32", "resnet18", "cifar10", i, i % 5, 0.0) for i in photographs]
    if "trained" in parts:
        found += [("trained", "resnet18", "mnist", i, 0, 0.0) for i in range(10)]
    if "others" in parts:
        others = [(name, dataset, i) for name, (dataset, _) in OTHERS.items() for i in range(5)]
        found += [("others", name, dataset, i, i, 0.0) for name, dataset, i in others]
    if "noise" in parts:
        found += [("noise", "resnet18", "cifar10", i, i % 5, noise) for noise in NOISES for i in photographs]
        found += [("influence", "resnet18", "cifar10", i, i % 5, 1.0) for i in photographs]
    return found


def beside_prediction(table: pd.DataFrame) -> pd.DataFrame:
    """The attacks under noise with the MSE of I²F, which grows with the noise's square."""
    ours, noisy = table.part == "influence", table.part == "noise"
    if ours.any():
        one = table[ours].set_index(["image", "seed"]).predicted
        places = pd.MultiIndex.from_frame(table.loc[noisy, ["image", "seed"]])
        table.loc[noisy, "predicted"] = table.noise[noisy] ** 2 * one.reindex(places).to_numpy()
    return table[~ours]


def forecasts() -> pd.DataFrame:
    """The first layer, from the top, that the recursion cannot read by its own equations; for a network that it cannot
    read at all, why."""
    import torchvision

    ours = [(name, dataset) for name, (dataset, _) in OTHERS.items()] + [("resnet18", "cifar10"), ("cnn16x16", "mnist")]
    networks_ = [(name, model_of(name, data, 0), (1, *i2f.models.SPECS[data].shape)) for name, data in ours]
    networks_ += [(name, torchvision.models.get_model(name, weights=None), (1, 3, 224, 224)) for name in PHOTOGRAPHS]
    rows = []
    for name, model, shape in networks_:
        row: dict[str, Any] = {"network": name, "pixels": f"{shape[2]}×{shape[3]}"}
        try:
            found = forecast(model.eval(), shape)
        except ValueError as error:
            rows.append(row | {"first short": str(error).removesuffix(": give method='gauss-newton' or another")})
            continue
        short = next((k for k, layer in enumerate(found) if layer.short), len(found))
        row["layers"], row["before"] = len(found), short
        if short < len(found):
            layer = found[short]
            row |= {
                "first short": layer.layer.strip("_"),
                "what": layer.what,
                "rank": layer.rank,
                "unknowns": layer.unknowns,
            }
        rows.append(row)
    whole = dict.fromkeys(("layers", "before", "rank", "unknowns"), "Int64")
    return pd.DataFrame(rows).astype(whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=PARTS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="seconds and memory of single attacks")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--forecast", action="store_true", help="the forecast alone: seconds")
    arguments = parser.parse_args()
    if arguments.forecast:
        forecasts().to_csv(HERE / "recursive_forecast.csv", index=False, float_format="%.4g")
        return
    if arguments.alone:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            rows = pool.starmap(alone, [(i, arguments.threads) for i in range(5)], chunksize=1)
        pd.DataFrame(rows).to_csv(HERE / "recursive_alone.csv", index=False, float_format="%.4g")
        (HERE / "recursive_alone_machine.txt").write_text(machine(arguments.threads))
        return
    done = Partial("recursive", arguments.resume)
    open_ = [task for task in tasks(arguments.only) if task not in done.found]
    calls = [joblib.delayed(_alone)(task, arguments.threads) for task in open_]
    with joblib.parallel_config("loky", n_jobs=arguments.jobs, inner_max_num_threads=arguments.threads):
        answers = joblib.Parallel(return_as="generator_unordered", batch_size=1)(calls)
        for task, row in bar(answers, total=len(open_), description="recursive"):
            done.keep(task, row)
    order = {task: place for place, task in enumerate(tasks(PARTS))}
    table = pd.DataFrame([row for task, row in sorted(done.found.items(), key=lambda found: order[found[0]])])
    table = beside_prediction(table)
    table.to_csv(HERE / "recursive.csv", index=False, float_format="%.4g")
    (HERE / "recursive_machine.txt").write_text(machine(arguments.threads))
    done.path.unlink()


def _alone(task: tuple, threads: int) -> tuple[tuple, dict[str, Any]]:
    torch.set_num_threads(threads)
    return task, solve(*task)


if __name__ == "__main__":
    import recursive  # by name, so that the other processes find its functions

    recursive.main()
