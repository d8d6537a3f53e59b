"""How loose the lower bound I_lb = ‖J δ‖/λ_max is, whether it keeps the order of I, and what would be tighter."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from i2f.core import linalg, spectrum
from i2f.paper import claims, sweep
from i2f.paper.experiments import problems as shared
from i2f.paper.sweep import Problem, Row

NETWORK = ["model", "init"]
Measure = Callable[[pd.DataFrame], float]


def problems(
    dataset: str, split: str, images: int, inits: list[str], linear_inits: list[str], variances: list[float],
    attacks: int, attacked_variance: float, weight_seed: int = 1,
) -> list[Problem]:  # fmt: skip
    """Gaussian noise of every variance σ² on every image of LeNet with `inits` and of one linear layer.

    Noise is drawn anew for each image and variance: I and I_lb are both proportional to σ, so that one draw would
    count an image once for every variance. The first `attacks` images of LeNet with the first of `inits` are attacked
    too, under noise of `attacked_variance`.
    """
    found = []
    for model, names in (("lenet", inits), ("linear", linear_inits)):
        found += sweep.grid(
            dataset=dataset, split=split, weight_seed=weight_seed, model=model, init=names, image=range(images),
            noise="gaussian", size=variances,
        )  # fmt: skip
    for p in found:
        p["noise_seed"] = len(variances) * p["image"] + variances.index(p["size"])
        ours = p["model"] == "lenet" and p["init"] == inits[0]
        p["attacked"] = ours and p["image"] < attacks and math.isclose(p["size"], attacked_variance)
    return found


def compare(
    problems: list[Problem], cg_steps: list[int], attack_steps: int, jobs: int | None = None
) -> tuple[pd.DataFrame, list[str]]:
    """A row a problem: `problems.predict`'s columns, all per pixel, and beside them

    looseness: I/I_lb. upper_rmse: ‖Jδ‖/(λ_min √d_x), infinite where J Jᵀ is singular. expected_rmse: √expected_mse.
    expected_looseness: λ_max (tr((J Jᵀ)⁻¹)/tr(J Jᵀ))^½, from the spectrum alone.
    directions: (Σ 1/λ)²/Σ 1/λ², how many eigenvectors carry I²: its relative spread under Gaussian noise is
    (2/directions)^½. "cg_rmse, k steps": ‖u_k‖/√d_x of conjugate gradients on J Jᵀ u = Jδ from u₀ = 0. ‖u_k‖ grows to
    I with k (Steihaug 1983), and ‖u₁‖ ≥ I_lb: every step is a lower bound, tighter than Eq. 5, for two products.
    rmse, converged, failed, reason: of the Gauss–Newton attack, where there was one.

    Also returns the names of the "cg_rmse, …" columns.
    """
    table = sweep.run(
        partial(_solve, cg_steps, attack_steps), problems, together=("model", "init", "image"), at_most=64, jobs=jobs,
        description="predictions",
    )  # fmt: skip
    return table, [_name(steps) for steps in cg_steps]


def _name(steps: int) -> str:
    return f"cg_rmse, {steps} step{'s' * (steps > 1)}"


def _solve(cg_steps: list[int], attack_steps: int, chunk: list[Problem]) -> list[Row]:
    return [
        _row(p, predicted, cg_steps, attack_steps) for p, predicted in zip(chunk, shared.predict(chunk), strict=True)
    ]


def _row(problem: Problem, predicted: Row, cg_steps: list[int], attack_steps: int) -> Row:
    J = shared.jacobian(problem)
    gram, image = J.gram(), J.matvec(shared.perturbation(J, problem)).double()
    values = spectrum.decompose(J).values[: predicted["rank"]]
    row: dict[str, Any] = {
        **predicted,
        "looseness": predicted["predicted_rmse"] / predicted["bound_rmse"],
        "upper_rmse": float(image.norm() / values[-1]) / J.shape[0] ** 0.5 if len(values) == J.shape[0] else math.inf,
        "expected_rmse": predicted["expected_mse"] ** 0.5,
        "expected_looseness": float(values[0] * (values.reciprocal().sum() / values.sum()).sqrt()),
        "directions": float(values.reciprocal().sum() ** 2 / values.reciprocal().square().sum()),
    }
    for steps in cg_steps:
        u = linalg.solve_cg(lambda v: gram @ v, image, max_steps=steps).u
        row[_name(steps)] = float(u.norm()) / J.shape[0] ** 0.5
    if problem["attacked"]:
        (found,) = shared.attack([{**problem, "steps": attack_steps}])
        row |= {name: found[name] for name in ("rmse", "converged", "matched", "failed", "reason")}
    return row


def summary(table: pd.DataFrame, cg_steps: list[str]) -> pd.DataFrame:
    """A row a network: medians of each estimate over I, and the least I/I_lb."""
    ratios = pd.DataFrame(
        {
            "I / I_lb, least": table.looseness,
            "I / I_lb": table.looseness,
            "from the spectrum": table.expected_looseness,
            **{name.replace("cg_rmse", "I / CG"): table.predicted_rmse / table[name] for name in cg_steps},
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
    """A row an image: `estimate` and I of every network and variance, as `median_order` takes them."""
    wide = table.pivot(index="image", columns=[*NETWORK, "size"], values=[estimate, "predicted_rmse"])
    wide.columns = range(wide.shape[1])
    return wide.reset_index()


def median_order(wide: pd.DataFrame) -> float:
    """Spearman's correlation over images of `order_over_images`' two halves, the median over their columns."""
    ranks = rankdata(wide.drop(columns="image").to_numpy(), axis=0)
    ranks = ranks - ranks.mean(0)
    norms = np.linalg.norm(ranks, axis=0)
    first, second = np.split(ranks, 2, axis=1)
    scale = np.prod(np.split(norms, 2), axis=0)
    if not (scale > 0).any():
        return np.nan  # a resampling of one image many times has no order
    return float(np.median((first * second).sum(0)[scale > 0] / scale[scale > 0]))


def order_within_images(table: pd.DataFrame, over: str) -> pd.DataFrame:
    """Spearman of I_lb with I `over` "size" or "init", for each image (and each of the other): (image, value)."""
    within = ["image", "init" if over == "size" else "size"]
    rows = [(key[0], claims.rank_correlation(g, "bound_rmse", "predicted_rmse")) for key, g in table.groupby(within)]
    return pd.DataFrame(rows, columns=["image", "value"])


def judge(
    table: pd.DataFrame, cg_steps: str, dataset: str, tight: float, order: float, accuracy: float, gain: float
) -> list[claims.Claim]:
    """The experiment's claims. The thresholds are the notebook's parameters; `cg_steps` is one of the CG columns."""
    lenet, linear = table[table.model == "lenet"], table[table.model == "linear"]
    attacked = table[table.attacked.astype(bool)]
    found = []

    def add(
        name: str,
        statement: str,
        statistic: str,
        rows: pd.DataFrame,
        measure: Measure,
        source: str = "Eq. 5",
        **more: Any,
    ) -> None:
        words = {"attacker": "none: predictions are compared", "statement": statement, "statistic": statistic}
        words |= {"id": f"lower_bound-{dataset}-{name}", "source": source} | more
        found.append(claims.judge(rows, measure, "image", **words))

    gaussian = "the initialisation experiment, E[I²]"
    add("bound", "I_lb is never above I.", "least I/I_lb", _of(table, table.looseness), _least, at_least=1.0)
    add("tight", f"LeNet: I_lb is within a factor of {tight:g} of I.", "median I/I_lb",
        _of(lenet, lenet.looseness), _median, at_most=tight)  # fmt: skip
    if len(linear):
        add("tight-linear", f"One linear layer: I_lb is within a factor of {tight:g} of I.", "median I/I_lb",
            _of(linear, linear.looseness), _median, at_most=tight)  # fmt: skip
    over_images = "Spearman over images, median over initialisations and variances"
    add("images", "LeNet: I_lb ranks images as I does, at one noise level.", over_images,
        order_over_images(lenet, "bound_rmse"), median_order, at_least=order, least=claims.LEAST_RANKED)  # fmt: skip
    if lenet["size"].nunique() > 2:
        add("levels", "LeNet: I_lb ranks noise levels as I does.", "Spearman over variances, median over images",
            order_within_images(lenet, "size"), _median, at_least=order,
            note="a matter of course: both are proportional to the noise")  # fmt: skip
    if lenet.init.nunique() > 2:
        add("inits", "LeNet: I_lb ranks initialisations as I does, image by image.",
            "Spearman over initialisations, median over images and variances", order_within_images(lenet, "init"),
            _median, at_least=order, note="one weight seed")  # fmt: skip
    add("trace", "LeNet: E[I²] = σ² tr((J Jᵀ)⁻¹) predicts I² of a single draw.", "median relative error of E[I²]",
        _of(lenet, (lenet.expected_mse / lenet.predicted_mse - 1).abs()), _median, at_most=accuracy,
        source=gaussian)  # fmt: skip
    add("trace-images", "LeNet: E[I²] ranks images as I does, at one noise level.", over_images,
        order_over_images(lenet, "expected_rmse"), median_order, at_least=order, source=gaussian,
        least=claims.LEAST_RANKED)  # fmt: skip
    add("cg", f"LeNet: conjugate gradients, cut off after {cg_steps.split(', ')[1]}, bound I from below {gain:g} "
        "times as tightly as I_lb.", "median ratio of the two bounds",
        _of(lenet, lenet[cg_steps] / lenet.bound_rmse), _median, at_least=gain, source="ours")  # fmt: skip
    if len(attacked):
        add("attack", "Gauss–Newton without a prior comes no nearer than I_lb.", "least measured RMSE / I_lb per pixel",
            _of(attacked, attacked.rmse / attacked.bound_rmse), _least, at_least=1.0,
            attacker=shared.PERFECT, note=claims.settled(attacked))  # fmt: skip
    return found


def _of(table: pd.DataFrame, value: pd.Series) -> pd.DataFrame:
    return pd.DataFrame({"image": table.image, "value": value})


def _median(t: pd.DataFrame) -> float:
    return float(np.median(t.value))


def _least(t: pd.DataFrame) -> float:
    return float(t.value.min())
