"""How loose the lower bound I_lb = ‖J δ‖/λ_max is, whether it keeps the order of I, and what would be tighter."""

import math

import pandas as pd

from i2f.core import linalg, spectrum
from i2f.paper import estimates, sweep
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.estimates import Estimate
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.rows import declare
from i2f.paper.sweep import Problem, Row, Settings

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
    table = sweep.run(
        solve, problems, settings, ("model", "init", "weight_seed"), at_most=20, description="predictions"
    )
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


def named(table: pd.DataFrame) -> dict[str, str]:
    """The estimates of I in the table: name -> column."""
    cg = {name.replace("cg_rmse", "CG"): name for name in table if name.startswith(CG)}
    return {"I_lb, Eq. 5": "bound_rmse", **cg, "√E[I²]": "expected_rmse", "‖Jδ‖/λ_min": "upper_rmse"}


def order(rows: pd.DataFrame, estimate: str) -> Estimate:
    """Spearman's correlation of an estimate with I over the images of a weight seed, averaged over the seeds."""
    return estimates.rank_correlation([(one.predicted_rmse, one[estimate]) for _, one in rows.groupby("weight_seed")])


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row per network: the geometric mean of each estimate over I, how each ranks images, and the spectrum's
    "looseness" and "directions"."""
    found, names = {}, named(table)
    for network, rows in table.groupby(["model", "init"], sort=False):
        ratios = rows[list(names.values())].div(rows.predicted_rmse, axis=0)
        own = {"looseness": "expected_looseness", "directions": "directions"}
        found[network] = {
            **{("estimate / I", name): _typical(ratios[column]) for name, column in names.items()},
            **{("Spearman with I", name): order(rows, column).value for name, column in names.items()},
            **{("spectrum", name): _typical(rows[column]) for name, column in own.items()},
        }
    return pd.DataFrame(found).T.rename_axis(["model", "init"])


def _typical(values: pd.Series) -> float:
    return estimates.geometric_mean(values).value


def judge(tables: Tables, thresholds: Thresholds) -> list[Claim]:
    """The experiment's claims, about LeNet with the first of `inits`. Of the thresholds, the second of `cg_steps` is
    where conjugate gradients are cut off."""
    table = tables["problems"]
    rows = table[(table.model == "lenet") & (table.init == thresholds["inits"][0])]
    judged = Judge.of("lower_bound", "lower_bound", thresholds)
    low, high = estimates.resampled(estimates.ordered, rows[["predicted_rmse", "bound_rmse"]]).interval
    gain = rows[CG + _steps(thresholds["cg_steps"][1])] / rows.bound_rmse
    return [
        judged("tight", estimates.geometric_mean(rows.looseness)),
        judged("order", order(rows, "bound_rmse"), bca=f"[{low:.2f}, {high:.2f}]"),
        judged("cg", estimates.geometric_mean(gain)),
    ]
