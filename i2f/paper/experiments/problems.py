"""What the experiments share: a problem by its plain values, what I²F predicts for it, what an attack finds.

A problem is a dictionary of plain values, so that it can travel to a process, be stored and stand in a table:

    dataset, split, image, batch    which images: `batch` of them from number `image` on, behind one gradient
    model, init, activation, …       the network; see `models.build`
    noise, size, noise_seed         what is added to the gradient: a name of `defense.KINDS`, and its size
    index, norm                     of eigenvector noise: which, and how much
    method, steps, start_seed, …    the attack; see `attack`

What is left out has the value in `DEFAULTS`.
"""

import copy
import itertools
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from i2f.attacks import METHODS, Iterate, Reconstruction, invert_many
from i2f.audit.defense import KINDS, Defense
from i2f.core import checks, metrics, spectrum
from i2f.core.influence import expected_square
from i2f.core.jacobian import GradientJacobian
from i2f.paper import data, devices, models
from i2f.paper.results import Config
from i2f.paper.rows import Brief, declare
from i2f.paper.sweep import Problem, Row

IMAGES: Problem = {"dataset": "mnist", "split": "test", "image": 0, "batch": 1, "root": None}
WEIGHTS: Problem = {"model": "lenet", "init": "uniform", "weight_seed": 1, "normalize": False}
WEIGHTS |= {"activation": None, "weights": None}
SETTING = IMAGES | WEIGHTS
DEFAULTS = {**SETTING, "noise": "none", "size": 0.0, "noise_seed": 0, "method": "gauss-newton", "start_seed": 0}
NETWORK = ("dataset", *WEIGHTS)  # problems that agree in these share a model,
# and those that agree in these a call of `invert_many`
CALL = (
    *NETWORK,
    "split",
    "batch",
    "root",
    "method",
    "budget",
    "steps",
    "box",
    "tv",
    "mask",
    "ridge",
    "known_images",
    "restarts",
    "until",
)  # and an attack
HEAD = 500  # steps after which a first-order attack's objective is kept, so that these alone can be solved anew
ERRORS = ("mse", "mse_clamped", "rmse", "feature_mse")
FLOOR = 1e-20  # an MSE below this is rounding, and differs from machine to machine


def setting(config: Config) -> Problem:
    """Those of an experiment's parameters that say which images and which network: the names of `SETTING`."""
    return {name: config[name] for name in SETTING if name in config}


def rotated(first: int, count: int, weight_seeds: int, crossed: bool = False) -> list[tuple[int, int]]:
    """(image, weight seed): `count` images from number `first` on, under the seeds 1, 2, … in rotation, so that images
    are independent units; or, `crossed`, each under every seed."""
    seeds = range(1, weight_seeds + 1)
    return [(i, s) for s in seeds for i in range(first, first + count) if crossed or s == 1 + i % weight_seeds]


def under_noise(network: str, variance: float, image: int, weight_seed: int, noise_seed: int, budget: int) -> Problem:
    """Gauss–Newton on one image under Gaussian noise. network: "mnist lenet uniform [activation]", whose data set says
    the split: train of MNIST, test of the others."""
    dataset, model, init, *more = network.split()
    return {
        "network": network,
        "dataset": dataset,
        "split": "train" if dataset == "mnist" else "test",
        "image": image,
        "model": model,
        "init": init,
        "weight_seed": weight_seed,
        "activation": more[0] if more else None,
        "noise": "gaussian",
        "size": variance,
        "noise_seed": noise_seed,
        "budget": budget,
        "start_seed": image,
    }


def value(problem: Problem, name: str) -> Any:
    """The problem's own, or the default."""
    return problem.get(name, DEFAULTS[name])


def jacobian(problem: Problem) -> GradientJacobian:
    """J at the problem's images, in float64; the last one asked for is kept, with what it has formed."""
    return _jacobian(devices.current(), *(value(problem, name) for name in SETTING))


@lru_cache(maxsize=1)
def _jacobian(device: torch.device, *setting: Any) -> GradientJacobian:
    problem = dict(zip(SETTING, setting, strict=True))
    dataset, split, image, batch, root = (problem[name] for name in IMAGES)
    x, y = data.load(dataset, n=batch, offset=image, split=split, root=root)
    return GradientJacobian(network(problem), x.to(device), y.to(device))


def network(problem: Problem) -> nn.Module:
    """The problem's network, float64, on the current device; the last two are kept: copy what you change.

    Raises: ValueError for a device without float64.
    """
    return _network(devices.current(), *(value(problem, name) for name in NETWORK))


@lru_cache(maxsize=2)
def _network(device: torch.device, dataset: str, model: str, *others: Any) -> nn.Module:
    if device.type == "mps":
        raise ValueError("device='mps' has no float64, which the experiments work in: choose 'cpu' or 'cuda'")
    return models.build(model, dataset, *others).double().to(device)


def perturbation(J: GradientJacobian, problem: Problem) -> Tensor:
    """δ, (d_θ,), of the problem's `noise`."""
    name = checks.one_of("noise", value(problem, "noise"), KINDS)
    own = {"none": (), "eigenvector": (problem.get("index"), problem.get("norm"))}
    return Defense(name, own.get(name, (value(problem, "size"),))).delta(J, value(problem, "noise_seed"))


@declare("predictions", defaults=DEFAULTS)
def predict(problems: list[Problem]) -> list[Row]:
    """What I²F predicts for each problem, per pixel, before any attack.

    predicted_rmse, predicted_mse: Eq. 4 at ε = 0; `predicted_rmse, ε = …` at each of the problem's `dampings`.
    bound_rmse: Eq. 5. expected_mse: σ² tr((J Jᵀ)⁻¹)/d_x for Gaussian noise (NaN for other noise). noise_norm: ‖δ‖.
    lambda_max, lambda_min, rank: of J Jᵀ.
    """
    rows = []
    for problem in problems:
        J = jacobian(problem)
        delta = perturbation(J, problem)
        values, vectors = spectrum.decompose(J)  # one decomposition serves Eq. 4 at every ε, and Eq. 5
        rank = spectrum.rank(J)
        image = vectors.T @ J.matvec(delta).double()
        pixels = J.shape[0] ** 0.5
        exact = float((image / values)[:rank].norm()) / pixels
        gaussian = value(problem, "noise") == "gaussian"
        rows.append(
            {
                "predicted_rmse": exact,
                "predicted_mse": exact**2,
                **{
                    f"predicted_rmse, ε = {e:g}": float((image / (values + e)).norm()) / pixels
                    for e in problem.get("dampings", ())
                },
                "bound_rmse": float(image.norm() / values[0]) / pixels,
                "expected_mse": expected_square(J, value(problem, "size")) / J.shape[0] if gaussian else np.nan,
                "noise_norm": float(delta.norm()),
                "lambda_max": float(values[0]),
                "lambda_min": float(values[-1]),
                "rank": rank,
            }
        )
    return rows


@lru_cache(maxsize=1)
def pixels(dataset: str, root: str | None, images: int) -> tuple[Tensor, float]:
    """What an attacker can know of images before seeing a gradient, from the first so many of the train split, which
    are public: the mean image (1, C, H, W), and τ², the mean variance of a pixel around it."""
    x = data.load(dataset, images, split="train", root=root)[0].double()
    return x.mean(0, keepdim=True), float(x.var(0).mean())


def _budget(problem: Problem, default: int) -> Any:
    """The attack's budget of steps; a problem that stands in a table calls it `budget`, since its row has `steps`."""
    return problem.get("budget", problem.get("steps", default))


def _long(problem: Problem) -> bool:
    """Whether a problem's attack is of first order, and goes beyond `HEAD` steps."""
    method = METHODS[checks.one_of("method", value(problem, "method"), METHODS)]
    return method.together and "until" not in problem and bool(_budget(problem, method.steps) > HEAD)


def _head(problem: Problem) -> Problem | None:
    return {**problem, "until": HEAD} if _long(problem) else None


def _again(problem: Problem, row: Row) -> Row:
    """The errors of the reconstruction that a long attack's row holds."""
    return errors(jacobian(problem), torch.from_numpy(row["reconstruction"]))


@declare("problems", defaults=DEFAULTS, brief=Brief(_head, "objective_head", _again))
def attack(problems: list[Problem], options: dict[str, Any] | None = None, keep: bool = False) -> list[Row]:
    """What an attack finds for each problem of one network: errors per pixel against the truth, and how it ended.

    The problem's own `method`, `budget` (of steps), `start_seed`, `box`, `tv`, `mask` ("zeros": the attacker takes the
    zeros of the gradient for pruned), `ridge` (a Gaussian prior, with the mean of `known_images`, see `pixels`) and
    `until` (stop after so many of the steps) choose the attack; `options` are for all of them. First-order methods run
    together, in float32 as published; the others one after another, in float64.

    A row: `metrics.compare`'s columns; feature_mse (logits); objective_ratio = ‖∇L(x̂) − g‖²/‖δ‖², 1 at the truth;
    relative_residual, steps, evaluations, label_found, converged, matched, failed, reason (see `Reconstruction`);
    `keep`: picture, (n, C, H, W). Of first-order attacks with more than `HEAD` steps: objective_head, the objective
    after that many, and reconstruction, (n, C, H, W), as found.
    """
    rows = []
    for _, alike in itertools.groupby(problems, key=lambda p: [p.get(name) for name in CALL]):
        rows += _attack_alike(list(alike), options or {}, keep)
    return rows


class _Watch:
    """A callback that keeps each problem's objective after `HEAD` steps, and stops all after `until`."""

    def __init__(self, until: int | None):
        self.until, self.objectives = until, dict[int, float]()

    def __call__(self, at: Iterate) -> None:
        if self.until is not None and at.step > self.until:
            raise KeyboardInterrupt
        if at.step == HEAD and at.restart == 0:
            self.objectives[at.problem] = at.loss


def _attack_alike(problems: list[Problem], options: dict[str, Any], keep: bool) -> list[Row]:
    first = problems[0]
    method = value(first, "method")
    dtype = torch.float32 if METHODS[checks.one_of("method", method, METHODS)].together else torch.float64
    jacobians = [jacobian(p) for p in problems]
    deltas = [perturbation(J, p) for J, p in zip(jacobians, problems, strict=True)]
    gradients = torch.stack([J.gradient + delta for J, delta in zip(jacobians, deltas, strict=True)]).to(dtype)
    labels = None if method == "idlg" else torch.stack([J.map.y for J in jacobians])
    own: dict[str, Any] = {name: first[name] for name in ("box", "tv", "restarts") if name in first}
    own["steps"] = _budget(first, METHODS[method].steps)
    if first.get("mask") == "zeros":
        own["mask"] = gradients != 0
    if first.get("ridge"):
        mean, _ = pixels(value(first, "dataset"), value(first, "root"), first["known_images"])
        own |= {"ridge": first["ridge"], "mean": mean}
    watch, long = _Watch(first.get("until")), _long(first)
    if long or watch.until is not None:
        own["callback"] = watch
    model = copy.deepcopy(jacobians[0].map.model).to(dtype)
    seeds = [value(p, "start_seed") for p in problems]
    found = invert_many(model, gradients, labels, jacobians[0].x.shape, method=method, seed=seeds, **own, **options)
    rows = [score(J, delta, one, keep) for J, delta, one in zip(jacobians, deltas, found, strict=True)]
    for number, (row, one) in enumerate(zip(rows, found, strict=True)):
        if number in watch.objectives:
            row["objective_head"] = watch.objectives[number]
        if long and number in watch.objectives:
            row["reconstruction"] = one.x.cpu().numpy()
    return rows


def score(J: GradientJacobian, delta: Tensor, found: Reconstruction, keep: bool = False) -> Row:
    """One reconstruction compared with the truth, at which J was taken; see `attack`."""
    x = found.x.to(J.x)
    energy, total = float(delta.square().sum()), float((J.gradient + delta).square().sum())
    labels = None if found.y is None else torch.equal(found.y.sort().values, J.map.y.sort().values)
    return {
        **errors(J, x),
        "objective_ratio": found.relative_residual**2 * total / energy if energy else np.nan,
        "relative_residual": found.relative_residual,
        "steps": found.steps,
        "evaluations": found.evaluations,
        "label_found": bool(labels),
        "converged": found.converged,
        "matched": found.matched,
        "failed": found.failed,
        "reason": found.reason,
        **({"picture": _ordered(J, x).detach().clamp(0, 1).cpu().numpy().astype(np.float32)} if keep else {}),
    }


def errors(J: GradientJacobian, x: Tensor) -> Row:
    """`metrics.compare`'s columns and feature_mse, of images x against the truth, at which J was taken; NaN where a
    pixel is not finite."""
    x = x.to(J.x)
    if not torch.isfinite(x).all():
        return dict.fromkeys(("mse", "mse_clamped", "rmse", "psnr", "ssim", "feature_mse"), np.nan)
    return {
        **metrics.compare(x, J.x),
        "feature_mse": float(metrics.feature_mse(J.map.model, _ordered(J, x), J.x).mean()),
    }


def _ordered(J: GradientJacobian, x: Tensor) -> Tensor:
    """Several images in the order of the true ones."""
    return metrics.assign(x, J.x) if len(x) > 1 and torch.isfinite(x).all() else x


def scored(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that have an error to compare: those of attacks that did not fail. For claims that take logarithms."""
    return table[~_lost(table)]


def lost(table: pd.DataFrame) -> pd.DataFrame:
    """The table with an infinite error for every attack that failed: it recovered nothing. For all other claims."""
    gone = _lost(table)
    return table.assign(**{name: table[name].mask(gone, np.inf) for name in ERRORS if name in table})


def relative_error(table: pd.DataFrame, predicted: str = "predicted_rmse") -> pd.Series:
    """|RMSE − predicted|/predicted, one per row; infinite for an attack that failed, whatever was predicted."""
    return (table.rmse / table[predicted] - 1).abs().mask(_lost(table), np.inf)


def _lost(table: pd.DataFrame) -> pd.Series:
    return table.failed.astype(bool) | table.rmse.isna()
