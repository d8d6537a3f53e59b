"""I²F on deep networks by products alone: the head of the spectrum, the lower bound, damped I²F, and what noise does on
average.

The noise is in proportion to the gradient, as a defence would choose it: of expected norm `relative`·‖g‖. Its variance
σ² sets the damping ε = σ²/τ² of an attacker who expects pixels of variance τ².
"""

import copy
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from i2f.core import perturb, spectrum, trace
from i2f.core.influence import influence, lower_bound
from i2f.core.jacobian import GradientJacobian
from i2f.core.lanczos import Lanczos
from i2f.paper import claims, data, devices, sweep
from i2f.paper.experiments import problems as shared
from i2f.paper.sweep import Problem, Row

SPREAD = 0.06  # τ²: the variance of a pixel over natural images, for which CIFAR-10 has 0.061
NETWORK = ["dataset", "network"]


def problems(networks: dict[str, int], weight_seed: int) -> list[Problem]:
    """networks: "cifar10 resnet20 gelu" (data set, model, and the activation or the weights where they are not the
    network's own) -> how many images of it. The costliest should come first."""
    found = []
    for name, images in networks.items():
        dataset, model, *more = name.split()
        if len(more) > 1:
            raise ValueError(f"network {name!r} has too many words: data set, model, then activation or weights")
        options = {"weights": more[0]} if more and more[0] == "imagenet" else {"activation": more[0] if more else None}
        found += sweep.grid(
            dataset=dataset, network=" ".join([model, *more]), model=model, init="default", normalize=True,
            weight_seed=weight_seed, **options, image=range(images),
        )  # fmt: skip
    return found


def measure(
    tasks: list[Problem], relative: float, tol: float, head: int, solved: int, traced: int, probes: int,
    jobs: int | None = None,
) -> pd.DataFrame:  # fmt: skip
    """A row an image of a network, in float32.

    d_x, d_theta, gradient_norm, variance (σ²), damping (ε). lambda_max within `tol`, and the products that the bound
    took; bound_rmse: I_lb at ε. second, last: the second and the `head`-th eigenvalue over λ_max. Of the first
    `solved` images: damped_rmse, I²F at ε by conjugate gradients, its residual and products. Of the first `traced`:
    bayes_value, √(σ² Σ 1/(λ+ε)/d_x), what noise leaves an attacker with that prior on average; bayes_low, bayes_high:
    its interval over `probes` random vectors; bayes_settled: whether each of them settled. prior_rmse: τ, what the
    attacker knows beforehand. converged: of the bound and of the solve.
    """
    solve = partial(_solve, relative, tol, head, solved, traced, probes)
    return sweep.run(solve, tasks, jobs=jobs, description="networks")


def _solve(
    relative: float, tol: float, head: int, solved: int, traced: int, probes: int, chunk: list[Problem]
) -> list[Row]:
    return [_row(p, relative, tol, head, p["image"] < solved, p["image"] < traced, probes) for p in chunk]


def _row(problem: Problem, relative: float, tol: float, head: int, solved: bool, traced: bool, probes: int) -> Row:
    J = _jacobian(problem)
    norm = float(J.gradient.norm())
    variance = (relative * norm) ** 2 / J.shape[1]
    damping = variance / SPREAD
    delta = perturb.gaussian(J.gradient, variance, seed=problem["image"])
    bound, values = lower_bound(J, delta, damping, tol), _head(J, head)
    row: dict[str, Any] = {
        "d_x": J.shape[0], "d_theta": J.shape[1], "gradient_norm": norm, "variance": variance, "damping": damping,
        "lambda_max": bound.lambda_max, "products": bound.products, "bound_rmse": bound.rmse,
        "second": float(values[1] / values[0]), "last": float(values[-1] / values[0]), "prior_rmse": SPREAD**0.5,
        "converged": bound.converged,
    }  # fmt: skip
    if solved:
        found = influence(J, delta, damping, rtol=1e-2, max_steps=400)
        row |= {"damped_rmse": found.rmse, "residual": found.residual, "solve_products": found.products,
                "converged": bound.converged and found.converged, "reason": found.reason}  # fmt: skip
    if traced:
        found = trace.bayes_error(J, variance, damping, probes=probes, tol=1e-2)
        row |= {
            f"bayes_{name}": (max(getattr(found, name), 0.0) / J.shape[0]) ** 0.5 for name in ("value", "low", "high")
        }
        row |= {"trace_products": found.products, "bayes_settled": found.converged}
    return row


def _jacobian(problem: Problem) -> GradientJacobian:
    """J in float32, which is what such networks run in, and enough for a bound to 1%."""
    device = devices.current()
    x, y = data.load(problem["dataset"], n=1, offset=problem["image"])
    network = [shared.value(problem, name) for name in shared.NETWORK]
    model = copy.deepcopy(shared.network(*network)).float()  # the cached one stays as it is
    return GradientJacobian(model, x.to(device), y.to(device), method="matrix-free")


def _head(J: GradientJacobian, k: int) -> np.ndarray:
    """The k ≥ 2 largest Ritz values after 2k Lanczos steps, descending."""
    process = Lanczos(lambda v: J.matvec(J.rmatvec(v)), spectrum.random_start(J))
    while len(process) < 2 * k and not process.exhausted:
        process.step()
    return process.ritz()[0][::-1][:k]


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """A row a network: medians over images, RMSE per pixel; a dash where it was not asked for."""
    table = table.reindex(
        columns=[*table.columns, *({"damped_rmse", "solve_products", "bayes_value"} - {*table.columns})]
    )
    found = table.groupby(NETWORK, sort=False).agg(
        **{
            "images": ("image", "size"), "d_x": ("d_x", "first"), "d_θ": ("d_theta", "first"),
            "λ_max": ("lambda_max", "median"), "λ₂/λ_max": ("second", "median"), "I_lb": ("bound_rmse", "median"),
            "products": ("products", "max"), "damped I²F": ("damped_rmse", "median"),
            "products of it": ("solve_products", "max"), "expected, Bayes": ("bayes_value", "median"),
        }
    )  # fmt: skip
    whole = ("images", "d_x", "d_θ", "products", "products of it")
    cells = {name: "{:,.0f}".format if name in whole else "{:.2g}".format for name in found}
    shown = {name: [("–" if pd.isna(v) else cells[name](v)) for v in found[name]] for name in found}
    return pd.DataFrame(shown, index=found.index)


def judge(table: pd.DataFrame, products: int, order: float, tight: float) -> list[claims.Claim]:
    """The experiment's claims. The thresholds are the notebook's parameters."""
    common: dict[str, Any] = {"attacker": "none: predictions are compared", "source": "Eq. 5, the ImageNet experiment"}
    measured = table[~table.failed.astype(bool)]
    names = ", ".join(dict.fromkeys(measured.dataset + " " + measured.network))
    failed = f"; {len(table) - len(measured)} failed" if len(measured) < len(table) else ""
    found = [
        claims.judge(
            table, lambda t: float(t.products.to_numpy().max()), "image", at_most=products, **common,
            id="deep_networks-products", statement="On deep networks too, I_lb needs only a few dozen products.",
            statistic="most products on any network and image, λ_max within 1%", note=names + failed,
        )
    ]  # fmt: skip
    if "damped_rmse" not in table:
        return found
    for (dataset, network), rows in table[table.damped_rmse.notna()].groupby(NETWORK, sort=False):
        tag = f"{dataset}-{network}".replace(" ", "-")
        note = f"ε = σ²/τ²; {claims.settled(rows)}".replace("attacks", "solves")
        found.append(
            claims.judge(
                rows, lambda t: claims.rank_correlation(t, "bound_rmse", "damped_rmse"), "image", at_least=order,
                least=claims.LEAST_RANKED, **common, id=f"deep_networks-images-{tag}", note=note,
                statement=f"{network}: I_lb ranks images as damped I²F does, at one level of relative noise.",
                statistic="Spearman over images",
            )
        )  # fmt: skip
        found.append(
            claims.judge(
                rows, lambda t: float((t.damped_rmse / t.bound_rmse).median()), "image", at_most=tight, **common,
                id=f"deep_networks-tight-{tag}", note=note,
                statement=f"{network}: I_lb is within a factor of {tight:g} of damped I²F.",
                statistic="median ratio of the two at the same ε",
            )
        )  # fmt: skip
    return found


def judge_photos(table: pd.DataFrame, order: float) -> list[claims.Claim]:
    """The claim about photographs, of the benchmark's table (`benchmarks/deep.py`, part photos)."""
    return [
        claims.judge(
            table, lambda t: claims.rank_correlation(t, "bound_rmse", "rmse"), "image", at_least=order,
            least=claims.LEAST_RANKED, id="deep_networks-photos",
            statement="I_lb ranks photographs as an attack does that is cut off early.",
            source="the ImageNet experiment; the released log has Spearman −0.4 over four photographs",
            attacker=f"dgl: knows model and label, no prior, gray start, {table['steps allowed'].max()} steps",
            statistic="Spearman of RMSE with I_lb over photographs",
            note=f"the best of them leaves a relative residual of {table.relative_residual.min():.2g}",
        )
    ]  # fmt: skip
