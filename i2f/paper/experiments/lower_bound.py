"""How loose the lower bound I_lb = ‖J δ‖/λ_max is, whether it keeps the order of I, and what would be tighter."""

import math

import numpy as np
import pandas as pd

from i2f.core import linalg, spectrum
from i2f.paper import sweep
from i2f.paper.claims import Claim, Judge
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.rows import declare
from i2f.paper.statistics import convergence, rank_correlation, spearman
from i2f.paper.sweep import Problem, Row, Settings

NETWORK = ["model", "init"]
CG = "cg_rmse, "  # what the names of conjugate gradients' columns begin with


def problems(config: Config) -> list[Problem]:
    """Gaussian noise of one variance on digits of MNIST's train split, each under one of `weight_seeds`, in rotation.

    Two levels would show nothing more: I and I_lb are both proportional to σ.

    config: digits, from first_digit on; weight_seeds; inits of LeNet, linear_inits of one linear layer; variance;
    cg_steps.
    """
    networks = [("lenet", init) for init in config["inits"]] + [("linear", init) for init in config["linear_inits"]]
    return [
        {
            "dataset": "mnist",
            "split": "train",
            "model": model,
            "init": init,
            "weight_seed": weight_seed,
            "image": image,
            "noise": "gaussian",
            "size": config["variance"],
            "noise_seed": 1000 * weight_seed + image,
            "cg_steps": list(config["cg_steps"]),
        }
        for model, init in networks
        for image, weight_seed in shared.rotated(config["first_digit"], config["digits"], config["weight_seeds"])
    ]


def run(problems: list[Problem], settings: Settings = sweep.DEFAULT) -> Results:
    """One row per problem: `problems.predict`'s columns, all per pixel, and

    looseness: I/I_lb. upper_rmse: ‖Jδ‖/(λ_min √d_x), infinite where J Jᵀ is singular. expected_rmse: √expected_mse.
    expected_looseness: λ_max (tr((J Jᵀ)⁻¹)/tr(J Jᵀ))^½, from the spectrum alone.
    directions: (Σ 1/λ)²/Σ 1/λ², how many eigenvectors carry I²: its relative spread under Gaussian noise is
    (2/directions)^½. "cg_rmse, k steps": ‖u_k‖/√d_x of conjugate gradients on J Jᵀ u = Jδ from u₀ = 0. ‖u_k‖ grows to
    I with k (Steihaug 1983), and ‖u₁‖ ≥ I_lb: every step is a lower bound, tighter than Eq. 5, for two products.
    """
    table = sweep.run(solve, problems, settings, ("model", "init", "weight_seed"), at_most=20, description="predictions")
    return Results({"problems": table.drop(columns="cg_steps")})


@declare("problems", defaults=shared.DEFAULTS, kinds={CG.rstrip(", "): "krylov"})
def solve(chunk: list[Problem]) -> list[Row]:
    return [_row(p, *shared.predict([p])) for p in chunk]  # one by one, since a single J is kept


def _row(problem: Problem, predicted: Row) -> Row:
    J = shared.jacobian(problem)
    gram, image = J.gram(), J.matvec(shared.perturbation(J, problem)).double()
    values = spectrum.decompose(J).values[: predicted["rank"]]
    row = {
        **predicted,
        "looseness": predicted["predicted_rmse"] / predicted["bound_rmse"],
        "upper_rmse": float(image.norm() / values[-1]) / J.shape[0] ** 0.5 if len(values) == J.shape[0] else math.inf,
        "expected_rmse": predicted["expected_mse"] ** 0.5,
        "expected_looseness": float(values[0] * (values.reciprocal().sum() / values.sum()).sqrt()),
        "directions": float(values.reciprocal().sum() ** 2 / values.reciprocal().square().sum()),
    }
    for steps in problem["cg_steps"]:
        u = linalg.solve_cg(lambda v: gram @ v, image, max_steps=steps).u
        row[CG + _steps(steps)] = float(u.norm()) / J.shape[0] ** 0.5
    return row


def _steps(count: float) -> str:
    return f"{count:g} step{'s' * (count > 1)}"


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row per network: medians of each estimate over I, and the least I/I_lb."""
    cg = {
        name.replace("cg_rmse", "I / CG"): table.predicted_rmse / table[name] for name in table if name.startswith(CG)
    }
    ratios = pd.DataFrame(
        {
            "I / I_lb, least": table.looseness,
            "I / I_lb": table.looseness,
            "from the spectrum": table.expected_looseness,
            **cg,
            "upper bound / I": table.upper_rmse / table.predicted_rmse,
            "√E[I²] / I": table.expected_rmse / table.predicted_rmse,
            "directions": table.directions,
            "model": table.model,
            "init": table.init,
        }
    )
    rules = {name: "median" for name in ratios if name not in NETWORK} | {"I / I_lb, least": "min"}
    return ratios.groupby(NETWORK, sort=False).agg(rules)


def order_over_images(table: pd.DataFrame, estimate: str) -> pd.DataFrame:
    """One row per image: `estimate` and I of every network and variance, as `median_order` takes them."""
    wide = table.pivot(index="image", columns=[*NETWORK, "size"], values=[estimate, "predicted_rmse"])
    wide.columns = range(wide.shape[1])
    return wide.reset_index()


def median_order(wide: pd.DataFrame) -> float:
    """Spearman's correlation over images of `order_over_images`' two halves, the median over their columns."""
    found = spearman(*np.split(wide.drop(columns="image").to_numpy(), 2, axis=1))
    found = found[~np.isnan(found)]
    return float(np.median(found)) if len(found) else np.nan  # a resampling of one image many times has no order


def order_within_images(table: pd.DataFrame, over: str) -> pd.DataFrame:
    """Spearman of I_lb with I `over` "size" or "init", for each image (and each of the other): (image, value)."""
    within = ["image", "init" if over == "size" else "size"]
    rows = [(key[0], rank_correlation(g, "bound_rmse", "predicted_rmse")) for key, g in table.groupby(within)]
    return pd.DataFrame(rows, columns=["image", "value"])


def judge(tables: Tables, thresholds: Config, dataset: str) -> list[Claim]:
    """The experiment's claims. The second of `cg_steps` is where conjugate gradients are cut off."""
    table = tables["problems"]
    lenet, linear = table[table.model == "lenet"], table[table.model == "linear"]
    attacked = table[table.attacked.astype(bool)]
    judged = Judge.of("lower_bound", f"lower_bound-{dataset}", thresholds)
    found = [
        judged("bound", _of(table, table.looseness), _least),
        judged("tight", _of(lenet, lenet.looseness), _median, network="LeNet"),
    ]
    if len(linear):
        found.append(
            judged("tight", _of(linear, linear.looseness), _median, suffix="-linear", network="One linear layer")
        )
    found.append(judged("images", order_over_images(lenet, "bound_rmse"), median_order))
    if lenet["size"].nunique() > 2:
        found.append(judged("levels", order_within_images(lenet, "size"), _median))
    if lenet.init.nunique() > 2:
        found.append(judged("inits", order_within_images(lenet, "init"), _median))
    missed = (lenet.expected_mse / lenet.predicted_mse - 1).abs()
    steps = _steps(thresholds["cg_steps"][1])
    found += [
        judged("trace", _of(lenet, missed), _median),
        judged("trace-images", order_over_images(lenet, "expected_rmse"), median_order),
        judged("cg", _of(lenet, lenet[CG + steps] / lenet.bound_rmse), _median, steps=steps),
    ]
    if len(attacked):
        ratio = _of(attacked, attacked.rmse / attacked.bound_rmse)
        found.append(judged("attack", ratio, _least, converged=convergence(attacked)))
    return found


def _of(table: pd.DataFrame, value: pd.Series) -> pd.DataFrame:
    return pd.DataFrame({"image": table.image, "value": value})


def _median(table: pd.DataFrame) -> float:
    return float(np.median(table.value))


def _least(table: pd.DataFrame) -> float:
    return float(table.value.min())
