"""The damping ε of I²F: what each choice leaves out, and which attacker it describes.

Damped I²F is the displacement  d_ε = (J Jᵀ + εI)⁻¹ J δ  (Eq. 4). An attacker who minimises  ‖∇L(x) − g‖² + ε‖x − m‖²
moves, to first order, by  (J Jᵀ + εI)⁻¹ (J δ + ε(m − x₀)):  d_ε is the part that noise makes, and leaves out the pull
of the prior, which errs without any noise. For noise of variance σ² and pixels N(m, τ²) the expected squared error
is  Σ (σ²λ + ε²τ²)/(λ + ε)², least at ε = σ²/τ², the Bayes choice, where it is  σ² Σ 1/(λ + ε).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import Tensor

from i2f.attacks import invert
from i2f.core import spectrum
from i2f.core.jacobian import GradientJacobian
from i2f.paper import claims, sweep
from i2f.paper.experiments import problems as shared
from i2f.paper.sweep import Problem, Row

PAPER = (0.1, 1.0, 10.0)  # the paper's ε
DAMPED, PULLED = "damped_rmse", "pulled_rmse"


def attackers(bayes: float, weights: Sequence[float]) -> dict[str, tuple[str, float]]:
    """Name in tables -> method, and the ε of its prior; `weights` are in units of `bayes`, 1 always among them."""
    weighed = {"MAP" if w == 1 else f"MAP, {w:g}ε": ("gauss-newton", w * bayes) for w in sorted({1, *weights})}
    return {"no prior": ("gauss-newton", 0.0), **weighed, "MAP, ε = 1": ("gauss-newton", 1.0), "Adam": ("dgl", 0.0)}


def problems(
    setting: dict[str, Any], images: int, variances: list[float], weights: list[float], steps: dict[str, int]
) -> list[Problem]:
    """Every attacker on the same noisy gradients; `bayes` is σ²/τ², `ridge` the attacker's own ε."""
    spread = shared.pixels(setting["dataset"], setting.get("root"))[1] ** 2
    return [
        {**problem, "bayes": problem["size"] / spread, "attacker": name, "method": method, "ridge": ridge,
         "steps": steps[method]}
        for problem in sweep.grid(**setting, noise="gaussian", image=range(images), size=list(variances))
        for name, (method, ridge) in attackers(problem["size"] / spread, weights).items()
    ]  # fmt: skip


def grid(low: float, high: float, a_decade: int = 2) -> list[float]:
    """0, the paper's ε, and `a_decade` values a decade from `low` to `high`; ascending."""
    count = round(a_decade * np.log10(high / low)) + 1
    return sorted({0.0, *PAPER, *np.geomspace(low, high, count).round(14).tolist()})


def attack(
    tasks: list[Problem], dampings: Sequence[float], jobs: int | None = None
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, np.ndarray]]:
    """A row an attack: `problems.score`'s columns, and `predictions` at the attacker's own ε.

    Also a row an attack and ε, of `dampings` and the Bayes choice, with `predictions`' columns. And of the first image:
    `truth`, `found`, the recoveries clamped to [0, 1] in the first table's order, and `values`, the spectrum of J Jᵀ.
    """
    solve = partial(_solve, list(dampings), tasks[0]["image"])
    together = ("image", "size")  # they share J and δ
    table = sweep.run(solve, tasks, together, at_most=len(tasks), jobs=jobs, whole=True, description="attacks")
    of_first = table.pop("picture").dropna(), table.pop("spectrum").dropna().iloc[0]
    frames = table.pop("curves").dropna()
    keys = shared.lost(table).loc[frames.index, ["image", "size", "attacker", "bayes", "rmse"]]
    curves = pd.concat(
        [pd.DataFrame(frame).assign(**key) for frame, key in zip(frames, keys.to_dict("records"), strict=True)],
        ignore_index=True,
    )
    truth = shared.jacobian(tasks[0]).x[0].cpu().numpy()
    return table, curves, {"truth": truth, "found": np.stack([*of_first[0]]), "values": of_first[1]}


def _solve(dampings: list[float], pictured: int, chunk: list[Problem]) -> list[Row]:
    rows = []
    for p in chunk:
        J = shared.jacobian(p)
        delta = shared.perturbation(J, p)
        mean, tau = shared.pixels(p["dataset"], p.get("root"))
        spread = tau**2
        # Adam's prior is its start, the same mean image: it is stopped before it has left it altogether
        start = mean if p["method"] == "dgl" else None
        found = invert(
            J.map.model, J.gradient + delta, J.map.y, J.x.shape, method=p["method"], steps=p["steps"],
            ridge=p["ridge"], mean=mean, start=start,
        )  # fmt: skip
        foresee = partial(predictions, J, delta, mean, p["size"], spread, moved=found.x.to(J.x) - J.x)
        (own,) = foresee([p["ridge"]]).to_dict("records")
        row = {name: own[name] for name in own if name not in ("epsilon", "below")} | shared.score(J, delta, found)
        row["curves"] = foresee(sorted({*dampings, p["bayes"]})).to_dict("list")
        if p["image"] == pictured:
            row |= {
                "picture": found.x[0].clamp(0, 1).cpu().numpy(),
                "spectrum": spectrum.decompose(J).values.cpu().numpy(),
            }
        rows.append(row)
    return rows


def predictions(
    J: GradientJacobian, delta: Tensor, mean: Tensor, variance: float, spread: float, dampings: Sequence[float],
    moved: Tensor,
) -> pd.DataFrame:  # fmt: skip
    """What is foretold at each ε of `dampings`, per pixel; at ε = 0 the pseudo-inverse's answers.

    below: the share of eigenvalues less than ε.
    damped_rmse: ‖d_ε‖/√d_x. pulled_rmse: with the pull ε(m − x₀) to `mean`. expected_rmse: root of the expected squared
    error of a MAP attacker with this ε, under noise of this variance and pixels N(mean, spread). damped_miss,
    pulled_miss: the distance of either displacement from the one found, `moved`, over that one's length.
    """
    values, vectors = spectrum.decompose(J)
    noise, pull, moved = (
        vectors.T @ v.double().reshape(-1) for v in (J.matvec(delta), mean.to(J.x) - J.x, moved)
    )  # in the eigenbasis every equation is a scalar one
    epsilon = torch.tensor(dampings, dtype=values.dtype, device=values.device)[:, None]
    inverse = 1 / (values + epsilon)
    inverse[:, spectrum.rank(J) :] *= epsilon > 0
    damped, pulled = noise * inverse, (noise + epsilon * pull) * inverse
    expected = (variance * values + epsilon**2 * spread) * inverse.square()
    columns = {
        "epsilon": epsilon[:, 0],
        "below": (values < epsilon).double().mean(1),
        DAMPED: damped.square().mean(1).sqrt(),
        PULLED: pulled.square().mean(1).sqrt(),
        "expected_rmse": expected.mean(1).sqrt(),
        "damped_miss": (damped - moved).norm(dim=1) / moved.norm(),
        "pulled_miss": (pulled - moved).norm(dim=1) / moved.norm(),
    }
    return pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})


def survey(setting: dict[str, Any], images: int, variances: list[float], jobs: int | None = None) -> pd.DataFrame:
    """`problems.predict` at ε = 0 and the paper's, on more images than are attacked."""
    tasks = sweep.grid(**setting, noise="gaussian", image=range(images), size=list(variances))
    solve = partial(shared.predict, dampings=PAPER)
    return sweep.run(solve, tasks, together=("image",), at_most=len(variances), jobs=jobs, description="predictions")


def medians(curves: pd.DataFrame) -> pd.DataFrame:
    """By noise, attacker and ε, over the images. damped_off, pulled_off: the factor by which the measured RMSE is
    mispredicted, exp median |log(predicted/measured)|; infinite for an attack that failed."""
    measured = np.log(curves.rmse)
    off = {name.replace("rmse", "off"): (np.log(curves[name]) - measured).abs() for name in (DAMPED, PULLED)}
    by = ["size", "attacker", "epsilon"]
    found = curves.assign(**off).drop(columns="image").groupby(by, sort=False).median().reset_index()
    return found.assign(**{name: np.exp(found[name]) for name in off})


def foretold(middle: pd.DataFrame) -> pd.DataFrame:
    """Of `medians`, what is known before any attack, by noise and ε: the Bayes choice, the paper's, and 0."""
    rows = middle[
        (middle.attacker == "no prior") & (middle.epsilon.isin([0, *PAPER]) | (middle.epsilon == middle.bayes))
    ]
    names = {
        "below": "share of λ below ε", DAMPED: "damped I²F", PULLED: "with pull", "expected_rmse": "expected with prior"
    }  # fmt: skip
    where = np.where(rows.epsilon == rows.bayes, "σ²/τ² = ", "") + rows.epsilon.map("{:.2g}".format)
    index = pd.MultiIndex.from_arrays([rows["size"].map("{:g}".format), where], names=["noise variance", "ε"])
    return rows[list(names)].rename(columns=names).set_axis(index)


def choices(middle: pd.DataFrame) -> pd.DataFrame:
    """Of `medians`, by noise and attacker: the measured RMSE, the ε whose prediction comes nearest to it and the factor
    that remains, for damped I²F and with the pull; then damped I²F's factor at ε = 0 and at the paper's ε."""
    by = [middle["size"].map("{:g}".format).rename("noise variance"), middle.attacker]
    found = {"RMSE": middle.groupby(by, sort=False).rmse.first()}
    for words, off in (("damped", "damped_off"), ("with pull", "pulled_off")):
        best = middle.loc[middle.groupby(by, sort=False)[off].idxmin()].set_axis(found["RMSE"].index)
        found |= {f"best ε, {words}": best.epsilon, f"off by, {words}": best[off]}
    for e in (0.0, *PAPER):
        rows = middle[middle.epsilon == e]
        found[f"off by, ε = {e:g}"] = rows.set_index([b[rows.index] for b in by]).damped_off
    return pd.DataFrame(found)


def judge(
    table: pd.DataFrame, curves: pd.DataFrame, surveyed: pd.DataFrame, dataset: str, cut: float, accuracy: float,
    factor: float, order: float, near: float,
) -> list[claims.Claim]:  # fmt: skip
    """The experiment's claims. The thresholds are the notebook's parameters: `cut` on the predicted RMSE bounds the
    linear regime, `accuracy` is a relative error, `near` a relative distance of displacements."""
    errors = {name: shared.relative_error(table, column) for name, column in (("damped", DAMPED), ("pulled", PULLED))}
    table = shared.lost(table).assign(**errors)
    curves = curves.assign(pulled_miss=curves.pulled_miss.mask(np.isinf(curves.rmse), np.inf))
    free, bayes = (table[table.attacker == name].select_dtypes("number") for name in ("no prior", "MAP"))
    eq4, ours, released = ({"source": s} for s in ("Eq. 4", "ours: the Bayes choice of ε", "the released sweep of ε"))
    knows = "gauss-newton: knows model and label"
    blind = {"attacker": f"{knows}, no prior"}
    believes = {"attacker": f"{knows}, the noise's variance, the pixels' mean and variance (MAP, ε = σ²/τ²)"}
    note = "noise variances " + ", ".join(f"{v:g}" for v in sorted(table["size"].unique()))
    paper = ", ".join(f"{e:g}" for e in PAPER)
    off = curves[curves.epsilon.isin(PAPER)]
    off = off.assign(
        choice=off.attacker + off.epsilon.map(", {:g}".format), off=(np.log(off[DAMPED]) - np.log(off.rmse)).abs()
    )
    weighed = table[table.method == "gauss-newton"]
    others = sorted(weighed.attacker.unique())
    ours_among = others.index("MAP")
    others.remove("MAP")
    squares = bayes.assign(bayes=bayes.expected_rmse**2).melt(["image", "size"], ["bayes", "mse"], "what")
    foreseen = ["predicted_rmse", *(f"predicted_rmse, ε = {e:g}" for e in PAPER)]
    surveyed = surveyed.melt(["image", "size"], foreseen, "what")
    unit = curves[(curves.attacker == "no prior") & (curves.epsilon == 1)]
    unit = unit.melt(["image", "size"], [DAMPED, "rmse"], "what")
    # ε that every noise variance has, that damp at all, and below every λ_max: beyond, nothing has left the start
    inside = curves.groupby("epsilon").below.transform("max") < 1
    adam = curves[(curves.attacker == "Adam") & (curves.epsilon != curves.bayes) & (curves.epsilon > 0) & inside]

    def worst(error: str) -> Callable[[pd.DataFrame], float]:
        return lambda t: claims.worst(t, "size", error)

    def over_bayes(cube: np.ndarray) -> float:
        ratios = np.divide(*cube.mean(0).T[::-1])
        return ratios[np.abs(np.log(ratios)).argmax()]

    def over_best(cube: np.ndarray) -> float:
        means = cube.mean(0)
        return (means[:, ours_among] / np.delete(means, ours_among, axis=1).min(1)).max()

    def orders(cube: np.ndarray) -> np.ndarray:
        """`claims.rank_correlation` of the images, by the first name and by each other, all at once."""
        ranks = rankdata(cube, axis=0)
        ranks -= ranks.mean(0)
        with np.errstate(invalid="ignore"):  # one image has no order: NaN
            ranks /= np.linalg.norm(ranks, axis=0)
        return (ranks[..., :1] * ranks[..., 1:]).sum(0)

    error = "median relative error of the predicted RMSE, at the worst noise variance"
    note_free, note_map = (f"{note}; {claims.settled(table[table.attacker == who])}" for who in ("no prior", "MAP"))
    return [
        claims.judge(
            free, worst("damped"), "image", at_most=accuracy, id=f"damping-{dataset}-none", note=note_free, **eq4,
            **blind,
            only=(f"the predicted RMSE is at most {cut:g}", free[free[DAMPED] <= cut]),
            statement="I²F with ε = 0 predicts the attacker who has no prior.", statistic=error,
        ),
        claims.judge(
            bayes, worst("damped"), "image", at_most=accuracy, id=f"damping-{dataset}-map", **eq4, **believes,
            statement="Damped I²F predicts the MAP attacker with the same ε.", statistic=error, note=note_map,
        ),
        claims.judge(
            bayes, worst("pulled"), "image", at_most=accuracy, id=f"damping-{dataset}-pull", **ours, **believes,
            statement="Damped I²F with the prior's pull predicts the MAP attacker with the same ε.", statistic=error,
            note=note_map,
        ),
        _judge(
            squares, "what", "value", over_bayes, at_least=1 / factor, at_most=factor, id=f"damping-{dataset}-bayes",
            statement="The Bayes error is the MAP attacker's squared error, on average over images.",
            statistic="mean MSE over mean Bayes error, at the worst noise variance", note=note, **ours, **believes,
        ),
        _judge(
            weighed, "attacker", "mse", over_best, at_most=1.0, id=f"damping-{dataset}-weight", note=note, **ours,
            attacker=f"{knows}, the pixels' mean; MAP with several ε, and no prior",
            statement="ε = σ²/τ² is the best of the weights tried for the attacker's prior.",
            statistic=f"mean MSE over that of the best other ({', '.join(others)}), at the worst noise variance",
        ),
        _judge(
            off, "choice", "off", lambda cube: np.exp(np.median(cube, axis=(0, 1)).min()), at_most=factor,
            id=f"damping-{dataset}-paper", note=note, **released, attacker="whichever is predicted best",
            statement=f"At the paper's ε ({paper}) damped I²F predicts the error of some attacker.",
            statistic="factor by which the RMSE is off, median, at the best of these ε for the best of the attackers",
        ),
        _judge(
            surveyed, "what", "value", lambda cube: np.min(orders(cube)), at_least=order,
            id=f"damping-{dataset}-order", note=note, **released, attacker="none: predictions alone",
            least=claims.LEAST_RANKED,
            statement=f"ε hardly changes the order of images: {paper} against 0.",
            statistic="lowest Spearman correlation of the predictions over ε and noise variances",
        ),
        _judge(
            unit, "what", "value", lambda cube: np.mean(orders(cube)), at_least=order, id=f"damping-{dataset}-ranks",
            least=claims.LEAST_RANKED,
            statement="Damped I²F with ε = 1 puts images in the order of their errors.", note=note, **released, **blind,
            statistic="Spearman correlation of RMSE with the prediction, mean over noise variances",
        ),
        _judge(
            adam, "epsilon", "pulled_miss", lambda cube: np.median(cube, axis=0).min(1).max(), at_most=near,
            id=f"damping-{dataset}-stopping", note=note, **ours,
            attacker="dgl: knows model and label, starts from the pixels' mean, stops early",
            statement="Stopping early acts like damping: for some ε the pull to the start tells where Adam ends.",
            statistic="relative distance of predicted and found displacement, median, best ε, worst noise variance",
        ),
    ]  # fmt: skip


def _judge(
    table: pd.DataFrame, name: str, value: str, measure: Callable[[np.ndarray], float], **words: Any
) -> claims.Claim:
    """`claims.judge` of a measure on the cube of values, (images, noise variances, names), names in their order."""
    wide = table.pivot(index="image", columns=["size", name], values=value).sort_index(axis=1)
    shape = (-1, *(len(level) for level in wide.columns.levels))
    flat = pd.DataFrame(np.column_stack([wide.index, wide])).rename(columns={0: "image"})
    return claims.judge(flat, lambda t: float(measure(t.to_numpy()[:, 1:].reshape(shape))), "image", **words)
