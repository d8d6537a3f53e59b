"""I²F on deep networks by products alone: the head of the spectrum, the lower bound, damped I²F, and what noise does on
average.

The noise is in proportion to the gradient, as a defence would choose it: of expected norm `relative`·‖g‖. Its variance
σ² sets the damping ε = σ²/τ² of an attacker who expects pixels of variance τ².
"""

import copy

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from i2f.core import perturb, spectrum, trace
from i2f.core.influence import influence, lower_bound
from i2f.core.jacobian import GradientJacobian
from i2f.core.lanczos import Lanczos
from i2f.paper import data, devices, estimates, sweep
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.rows import declare
from i2f.paper.statistics import convergence
from i2f.paper.sweep import Problem, Row, Settings

VARIANCE = 0.06  # τ²: the variance of a pixel over natural images, for which CIFAR-10 has 0.061
NETWORK = ["dataset", "network"]
FLOAT32 = ["gradient_norm", "variance", "damping", "lambda_max", "bound_rmse", "second", "last"]
FLOAT32 += ["damped_rmse", "bayes_value", "bayes_low", "bayes_high"]
COUNTED = ["products", "solve_products", "trace_products"]
KINDS = dict.fromkeys(FLOAT32, "head") | dict.fromkeys(COUNTED, "unfinished") | {"residual": "diagnostic"}


def problems(config: Config) -> list[Problem]:
    """Every image of every network, with what is to be computed for it.

    config: networks: "cifar10 resnet20 gelu" (data set, model, and the activation or the weights where they are not the
    network's own) -> how many images of it, the costliest first; weight_seed; relative: the expected norm of the noise
    over the gradient's; tolerance: of λ_max; solved: network -> of how many images there is damped I²F; for these
    networks, head: number of eigenvalues; traced: of how many images there is the average over noise, from so many
    probes, random vectors.
    """
    found = []
    for name, images in config["networks"].items():
        dataset, model, *more = name.split()
        if len(more) > 1:
            raise ValueError(f"network {name!r} has too many words: data set, model, then activation or weights")
        options = {"weights": more[0]} if more and more[0] == "imagenet" else {"activation": more[0] if more else None}
        solved = config["solved"].get(name, 0)
        tasks = sweep.grid(
            dataset=dataset,
            network=" ".join([model, *more]),
            model=model,
            init="default",
            normalize=True,
            weight_seed=config["weight_seed"],
            **options,
            image=range(images),
            head=config["head"] if solved else None,
            **{name: config[name] for name in ("relative", "tolerance", "probes")},
        )
        found += [
            p | {"solved": p["image"] < solved, "traced": p["image"] < min(config["traced"], solved)} for p in tasks
        ]
    return found


def run(problems: list[Problem], settings: Settings = sweep.DEFAULT) -> Results:
    """One row per image of a network, in float32.

    d_x, d_theta, gradient_norm, variance (σ²), damping (ε). lambda_max within `tolerance`, and the products that the
    bound took; bound_rmse: I_lb at ε. Where `head`: second, last, the second and the `head`-th eigenvalue over λ_max.
    Where `solved`: damped_rmse, I²F at ε by conjugate gradients, its residual and products. Where `traced`:
    bayes_value, √(σ² Σ 1/(λ+ε)/d_x), what noise leaves an attacker with that prior on average; bayes_low, bayes_high:
    its interval over `probes` random vectors; bayes_settled: whether each of them converged. prior_rmse: τ, what the
    attacker knows beforehand. evaluations: all products. converged: of the bound and of the solve.
    """
    return Results({"problems": sweep.run(solve, problems, settings, description="networks")})


@declare("problems", defaults=shared.DEFAULTS, kinds=KINDS)
def solve(chunk: list[Problem]) -> list[Row]:
    return [_row(problem) for problem in chunk]


def _row(problem: Problem) -> Row:
    J = _jacobian(problem)
    norm = float(J.gradient.norm())
    variance = (problem["relative"] * norm) ** 2 / J.shape[1]
    damping = variance / VARIANCE
    delta = perturb.gaussian(J.gradient, variance, seed=problem["image"])
    bound = lower_bound(J, delta, damping, problem["tolerance"])
    row: Row = {
        "d_x": J.shape[0],
        "d_theta": J.shape[1],
        "gradient_norm": norm,
        "variance": variance,
        "damping": damping,
        "lambda_max": bound.lambda_max,
        "products": bound.products,
        "bound_rmse": bound.rmse,
        "prior_rmse": VARIANCE**0.5,
        "converged": bound.converged,
    }
    if problem["head"]:
        values = _head(J, problem["head"])
        row |= {"second": float(values[1] / values[0]), "last": float(values[-1] / values[0])}
    if problem["solved"]:
        solved = influence(J, delta, damping, rtol=1e-2, max_steps=400)
        row |= {
            "damped_rmse": solved.rmse,
            "residual": solved.residual,
            "solve_products": solved.products,
            "converged": bound.converged and solved.converged,
            "reason": solved.reason,
        }
    if problem["traced"]:
        traced = trace.bayes_error(J, variance, damping, probes=problem["probes"], tol=1e-2)
        ends = {"value": traced.value, "low": traced.low, "high": traced.high}
        row |= {f"bayes_{name}": (max(square, 0.0) / J.shape[0]) ** 0.5 for name, square in ends.items()}
        row |= {"trace_products": traced.products, "bayes_settled": traced.converged}
    return row | {"evaluations": J.products}


def _jacobian(problem: Problem) -> GradientJacobian:
    """J in float32, which is what such networks run in, and enough for a bound to 1%."""
    device = devices.current()
    x, y = data.load(problem["dataset"], n=1, offset=problem["image"])
    model = copy.deepcopy(shared.network(problem)).float()  # the cached one stays as it is
    return GradientJacobian(model, x.to(device), y.to(device), method="matrix-free")


def _head(J: GradientJacobian, k: int) -> NDArray[np.float64]:
    """The k ≥ 2 largest Ritz values after 2k Lanczos steps, descending."""
    process = Lanczos(lambda v: J.matvec(J.rmatvec(v)), spectrum.random_start(J))
    while len(process) < 2 * k and not process.exhausted:
        process.step()
    return process.ritz()[0][::-1][:k]


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row per network: medians over images, RMSE per pixel; a dash where it was not asked for."""
    columns = {  # in the table -> in words, of the images, cells
        "image": ("images", "size", "{:,.0f}"),
        "d_x": ("d_x", "first", "{:,.0f}"),
        "d_theta": ("d_θ", "first", "{:,.0f}"),
        "lambda_max": ("λ_max", "median", "{:.2g}"),
        "second": ("λ₂/λ_max", "median", "{:.2g}"),
        "bound_rmse": ("I_lb", "median", "{:.2g}"),
        "products": ("products", "max", "{:,.0f}"),
        "damped_rmse": ("damped I²F", "median", "{:.2g}"),
        "solve_products": ("products of it", "max", "{:,.0f}"),
        "bayes_value": ("expected, Bayes", "median", "{:.2g}"),
    }
    groups = table.reindex(columns=[*NETWORK, *columns]).groupby(NETWORK, sort=False)
    shown = {}
    for column, (words, of, cell) in columns.items():
        shown[words] = groups[column].agg(of).map(lambda v, cell=cell: "–" if pd.isna(v) else cell.format(v))
    return pd.DataFrame(shown)


def judge(tables: Tables, thresholds: Thresholds) -> list[Claim]:
    """The claim about photographs, which was not run; the cost of I_lb, an image counting by its costliest network; and
    how tight it is, of each network with damped I²F of enough images."""
    table = tables["problems"]
    judged = Judge.of("deep_networks", "deep_networks", thresholds)
    found = [judged("photographs", None, spread=spread(table[table.dataset == "imagenet"].bound_rmse))]
    cheap = (table.products <= thresholds["products"]).groupby([table.dataset, table.image]).all()
    found.append(judged("products", estimates.share(cheap), networks=", ".join(table.network.unique())))
    for network, rows in table[table.solved.astype(bool)].groupby("network", sort=False):
        if len(rows) >= estimates.LEAST:
            done = rows[rows.converged.astype(float) == 1]  # a solve that was cut off has too small a norm
            tight = estimates.geometric_mean(done.damped_rmse / done.bound_rmse)
            about = {"network": network, "solves": convergence(rows).replace("attacks", "solves")}
            found.append(judged("tight", tight, len(done) / len(rows), suffix=f"-{network}".replace(" ", "-"), **about))
    return found


def spread(bounds: pd.Series) -> str:
    """In words: the geometric mean over images, and the 90th over the 10th percentile."""
    if not len(bounds):
        return "no photograph"
    low, high = bounds.quantile([0.1, 0.9])
    mean = float(np.exp(np.log(bounds).mean()))
    return f"geometric mean {mean:.2g} per pixel, 90th over 10th percentile {high / low:.2g}, {len(bounds)} photographs"
