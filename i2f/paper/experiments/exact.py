"""The exact attack on networks with ReLUs: what it recovers without noise, and whether I²F is its error under noise.

The noise of an image is given in units of its first kink: the standard deviation σ₁ at which, along I²F's displacement,
the first of the network's units reaches its kink, min |u|/|A d| over units on their way there, u a pre-activation, A
its derivative by the image and d the displacement for σ = 1. Below, no unit's gate changes.
"""

import json
import math
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from i2f.attacks import Reconstruction, invert_many
from i2f.attacks.recursive import features
from i2f.attacks.recursive.gram import preconditioner
from i2f.attacks.recursive.graph import Graph
from i2f.attacks.recursive.recursion import Recursion
from i2f.attacks.recursive.tangent import Tangent
from i2f.core import perturb
from i2f.core.jacobian import GradientJacobian
from i2f.core.linalg import solve_cg, solve_factored
from i2f.paper import estimates, sweep
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.experiments import problems as shared
from i2f.paper.experiments.gallery import shades
from i2f.paper.results import Config, Results, Tables
from i2f.paper.rows import declare
from i2f.paper.statistics import convergence
from i2f.paper.sweep import Problem, Row, Settings

KEPT = ("rmse", "mse", "label_found", "steps", "converged", "matched", "failed", "reason")  # of an attack's row
KINDS = {"layers": "diagnostic", "stage_images": "shade", "recovered": "diagnostic", "difference": "diagnostic"}
KINDS |= {"predicted_rmse": "converged", "first_kink": "converged", "variance": "converged"}
PICTURES = ("stage_images", "recovered")
SOLVED, MOST = 1e-6, 300  # tolerance and steps of I²F's conjugate gradients
STEPS = 60  # of a search for an image by one layer's activations


def problems(config: Config) -> list[Problem]:
    """The recursion without noise on every network, and under noise on the one named by `law`.

    config: networks: "cifar10 resnet18" -> how many images, of the test split of photographs and the train split of
    digits from first_digit on; weight_seeds, in rotation; law: the network; images: how many of its; below, above: the
    noise, in units of the first kink.
    """
    found = []
    for network, count in config["networks"].items():
        levels = [0.0, config["below"], config["above"]] if network == config["law"] else [0.0]
        dataset, model = network.split()
        first = config["first_digit"] if dataset == "mnist" else 0
        found += [
            {
                "network": network,
                "dataset": dataset,
                "split": "train" if dataset == "mnist" else "test",
                "image": image,
                "model": model,
                "init": "default",
                "normalize": True,
                "weight_seed": weight_seed,
                "noise_seed": 1000 * weight_seed + image,
                "level": level,
                "stages": not level and image == first,
            }
            for image, weight_seed in shared.rotated(first, count, config["weight_seeds"])
            for level in levels
            if not level or image < first + config["images"]
        ]
    return sorted(found, key=lambda p: (not p["level"], p["image"]))


def run(problems: list[Problem], settings: Settings = sweep.DEFAULT) -> Results:
    """One row per attack. predicted_rmse: I²F's; first_kink: σ₁ (see above); variance of the noise; crossed: units on
    another side of their kink than at the truth; difference: ‖x̂ − x₀ − d‖/‖x̂ − x₀‖; layers: name, rank, unknowns of
    each, JSON. Arrays, one per row: stage_images, by what the recursion knows when it has reached a resolution;
    recovered."""
    table = sweep.run(solve, problems, settings, ("network", "image"), at_most=3, description="attacks")
    arrays = {name: np.array([*table.pop(name), None], dtype=object)[:-1] for name in PICTURES}
    return Results({"problems": table.drop(columns="noise_seed")}, arrays)


@declare("problems", defaults=shared.DEFAULTS, kinds=KINDS)
def solve(chunk: list[Problem]) -> list[Row]:
    """The problems of one image under one network."""
    J = shared.jacobian(chunk[0])
    graph = Graph(J.map.model, tuple(J.x.shape))
    xi, d, first = perturb.gaussian(J.gradient, 1.0, chunk[0]["noise_seed"]), torch.zeros_like(J.x), math.nan
    if any(problem["level"] for problem in chunk):
        d = displacement(J, graph, xi)
        first = float(kinks(graph, J.x[0], d[0]).min())
    sigmas = [problem["level"] * first if problem["level"] else 0.0 for problem in chunk]
    sent = [J.gradient + sigma * xi for sigma in sigmas]
    found = invert_many(J.map.model, sent, None, J.x.shape, method="recursive")
    rows = []
    for problem, sigma, one in zip(chunk, sigmas, found, strict=True):
        rows.append(_row(J, graph, problem, sigma * xi, one))
        moved = one.x - J.x
        rows[-1] |= {
            "first_kink": first if sigma else math.nan,
            "variance": sigma**2,
            "predicted_rmse": sigma * float(d.norm()) / d.numel() ** 0.5,
        }
        rows[-1]["difference"] = float((moved - sigma * d).norm() / moved.norm()) if sigma else math.nan
    return rows


def _row(J: GradientJacobian, graph: Graph, problem: Problem, delta: Tensor, found: Reconstruction) -> Row:
    attack = shared.score(J, delta, found)
    layers = [(layer.name, layer.rank, layer.unknowns, layer.completed) for layer in found.layers]
    empty = np.zeros((0, *J.x.shape[1:]), dtype=np.uint8)
    return {
        **{name: attack[name] for name in KEPT},
        "crossed": crossed(graph, J.x[0], found.x[0]),
        "layers": json.dumps(layers),
        "stage_images": stages(J, graph) if problem["stages"] else empty,
        "recovered": shades(found.x),
    }


def displacement(J: GradientJacobian, graph: Graph, xi: Tensor) -> Tensor:
    """(J Jᵀ)⁻¹Jξ in the image's shape: what I²F predicts for noise of standard deviation one."""
    values = graph.values(J.x[0])
    logits = values[graph.output][None].requires_grad_()
    (signal,) = torch.autograd.grad(J.map.loss_of(logits), logits)
    factor = preconditioner(graph, values, signal[0])

    def precondition(r: Tensor) -> Tensor:
        return r if factor is None else solve_factored(factor, r.float()).double()

    found = solve_cg(lambda v: J.matvec(J.rmatvec(v)), J.matvec(xi), 0.0, SOLVED, MOST, precondition)
    if not found.converged:
        raise RuntimeError(f"I²F is not found: {found.reason}")
    return found.u.reshape(J.x.shape)


def kinks(graph: Graph, x: Tensor, d: Tensor) -> Tensor:
    """The t > 0 at which each unit that moves towards its kink along x + t d reaches it, to first order, rising."""
    values, below = graph.values(x), [node.inputs[0] for node in graph.nodes.values() if node.kind == "relu"]
    moved = Tangent(graph, below, values)(d)
    t = torch.cat([(-values[name] / moved[name]).flatten() for name in below])
    return t[torch.isfinite(t) & (t > 0)].sort().values


def crossed(graph: Graph, x: Tensor, other: Tensor) -> int:
    """How many units stand on different sides of their kinks at two images."""
    one, two = graph.values(x), graph.values(other.to(x))
    below = [node.inputs[0] for node in graph.nodes.values() if node.kind == "relu"]
    return sum(int(((one[name] > 0) != (two[name] > 0)).sum()) for name in below)


def stages(J: GradientJacobian, graph: Graph) -> NDArray[np.uint8]:
    """(k, C, H, W): for each resolution that the recursion has reached, an image with those activations, found from
    gray; which one among many is left open at the coarse ones."""
    parts = dict(zip(J.map.parameters, J.map.split(J.gradient), strict=True))
    recursion = Recursion(graph, parts).run()
    found, seen = [], set()
    for name, value in recursion.value.items():
        if value.ndim == 3 and value.shape[1:] not in seen and graph.nodes[name].kind == "relu":
            seen.add(value.shape[1:])
            asked = features.Features(graph, [features.Values(name, value, recursion.spread[name])])
            gray = torch.full_like(J.x[0], 0.5)
            found.append(shades(features.solve(asked, gray, STEPS, float(asked.size)).x[None]))
    return np.stack(found) if found else np.zeros((0, *J.x.shape[1:]), dtype=np.uint8)


def summary(table: pd.DataFrame, exact: float) -> pd.DataFrame:
    """Without noise: the share recovered, and MSE, by network."""
    its = table[table.level == 0]
    groups = its.assign(recovered=its.mse <= exact).groupby("network", sort=False)
    return groups.agg(
        images=("image", "size"),
        recovered=("recovered", "sum"),
        median=("mse", "median"),
        largest=("mse", "max"),
        labels=("label_found", "sum"),
    )


def law(table: pd.DataFrame) -> pd.DataFrame:
    """Under noise, by level: medians over the images of which the attack converged, and how many did."""
    its = table[table.level > 0].assign(error=_error)
    groups = its[its.converged.eq(True)].groupby("level")
    medians = groups[["predicted_rmse", "rmse", "error", "difference", "crossed"]].median()
    return medians.assign(converged=its.groupby("level").converged.sum(), attacks=its.groupby("level").size())


def _error(table: pd.DataFrame) -> pd.Series:
    return (table.rmse / table.predicted_rmse - 1).abs()


def judge(tables: Tables, thresholds: Thresholds) -> list[Claim]:
    """The experiment's claims; the unit is the image."""
    table = tables["problems"]
    judged, found = Judge.of("exact", "exact", thresholds), []
    for network, its in table[table.level == 0].groupby("network", sort=False):
        about: dict[str, Any] = {"network": network, "converged": convergence(its), "seeds": its.weight_seed.nunique()}
        recovered = estimates.share(its.mse <= thresholds["exact"])  # one that is not found counts as such
        found.append(judged("recovered", recovered, suffix=f"-{str(network).replace(' ', '-')}", **about))
    noisy = table[table.level > 0]
    if noisy.empty:
        return found
    for name, level in (("law", thresholds["below"]), ("beyond", thresholds["above"])):
        its = noisy[noisy.level == level]
        done = its[its.converged.eq(True)]
        about = {"converged": convergence(its), "largest": float(_error(done).max()), "crossed": done.crossed.median()}
        found.append(judged(name, estimates.median(_error(done)), len(done) / max(len(its), 1), **about))
    across = noisy[noisy.converged.eq(True)].pivot(index="image", columns="level", values="crossed").dropna()
    right = (across[thresholds["below"]] == 0) & (across[thresholds["above"]] > 0)
    finished = len(across) / noisy.image.nunique()
    return [*found, judged("kink", estimates.share(right), finished, converged=convergence(noisy))]
