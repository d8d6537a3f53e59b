"""Noise that is spent where it protects: the same energy, four covariances, and what each costs to training.

All but the isotropic noise lie in the row space of J = U Λ^½ Vᵀ: δ = V (√s ∘ z), Σ s_i = E. There the attacker has as
many equations as unknowns, so that knowing the covariance changes nothing to first order: the error along u_i is
s_i/λ_i.

    isotropic   E/d_θ in every coordinate: (E/d_θ)/λ_i, and nearly all of it lies where nobody looks
    row-space   s_i = E/d_x
    linear      s_i = E λ_i/tr(J Jᵀ): the same error in every direction, drawn as √c Jᵀz
    designed    the same to first order, as the gradient of the input with noise on it; `noise.designed`
    averaged    the largest mean error for an attacker with a prior; `noise.averaged`
"""

import math
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from i2f.attacks import LowRank, invert, invert_many
from i2f.attacks.prior import TAU
from i2f.audit import audit, clamped_square
from i2f.audit.defense import Defense
from i2f.core import perturb, spectrum, streams
from i2f.core.jacobian import GradientJacobian
from i2f.paper import claims, data, devices, models, sweep
from i2f.paper.experiments import problems as shared
from i2f.paper.sweep import Problem, Row

KINDS = ("isotropic", "row-space", "linear", "designed", "averaged")
TOLD = ("linear", "designed")  # whose covariance an attacker is told
SHARPEST = 10  # directions, the least protected ones by isotropic noise
FLOOR = 1e-6  # of the isotropic variance: what the attacker who is told the covariance allows for outside the row space


def problems(setting: dict[str, Any], images: int, levels: list[float], draws: int, told: int) -> list[Problem]:
    """Every image under every kind, level (‖δ‖ over ‖g‖) and draw. told: of how many images also the attacker who is
    told the covariance of the noise, of the kinds `TOLD`, at the last level."""
    tasks = sweep.grid(**setting, image=range(images), level=levels, kind=KINDS, noise_seed=range(draws), told=False)
    return tasks + sweep.grid(**setting, image=range(told), level=levels[-1:], kind=list(TOLD), noise_seed=[0],
                              told=True)  # fmt: skip


def run(tasks: list[Problem], steps: int, seed: int, jobs: int | None = None) -> pd.DataFrame:
    """A row a problem. predicted_mse, and predicted_sharpest: the mean squared error per pixel, and along the
    `SHARPEST` eigenvectors of largest λ, over draws; mse, sharpest: the attack's; worst_predicted: the smallest error
    of any direction; bayes: the mean error left to an attacker who has a prior and knows the covariance; energy: E."""
    solve = partial(_solve, steps, seed)
    return sweep.run(solve, tasks, together=("image",), at_most=32, jobs=jobs, description="attacks")


def _solve(steps: int, seed: int, chunk: list[Problem]) -> list[Row]:
    """A chunk has one image. Who is told the covariance goes on from the attack that was not."""
    J = shared.jacobian(chunk[0])
    values, vectors = spectrum.decompose(J)
    sent = list(dict.fromkeys(map(_sent, chunk)))
    gradients = [J.gradient + noise(kind, level).delta(J, draw) for kind, level, draw in sent]
    labels = J.map.y.expand(len(sent), -1)
    attacks = invert_many(J.map.model, torch.stack(gradients), labels, J.x.shape, seed=seed, steps=steps)
    rows = []
    for p in chunk:
        shares = noise(p["kind"], p["level"]).variances(J)
        energy = (p["level"] * float(J.gradient.norm())) ** 2
        at = sent.index(_sent(p))
        found = attacks[at]
        x = found.x
        if p["told"]:
            x = knowing_covariance(J, gradients[at], shares, FLOOR * energy / J.shape[1], x, steps)
        along = (vectors.T @ (x - J.x).reshape(-1).double()).square()
        errors = shares / values
        rows.append({
            "energy": energy, "predicted_mse": float(errors.mean()), "mse": float(along.mean()),
            "predicted_sharpest": float(errors[:SHARPEST].mean()), "sharpest": float(along[:SHARPEST].mean()),
            "worst_predicted": float(errors.min()),
            "bayes": float((errors * TAU**2 / (errors + TAU**2)).mean()), "rmse": float(along.mean()) ** 0.5,
            "predicted_rmse": float(errors.mean()) ** 0.5,
            "converged": found.converged, "matched": found.matched, "failed": found.failed, "reason": found.reason,
        })  # fmt: skip
    return rows


def _sent(p: Problem) -> tuple[str, float, int]:
    """What a gradient depends on, of one image: kind, level and draw of its noise."""
    return p["kind"], p["level"], p["noise_seed"]


def noise(kind: str, level: float) -> Defense:
    """The noise of this kind, its norm over the gradient's being `level`."""
    return Defense("relative" if kind == "isotropic" else kind, (level,))


def knowing_covariance(
    J: GradientJacobian, gradient: Tensor, variances: Tensor, floor: float, start: Tensor, steps: int
) -> Tensor:
    """The image found by an attacker who knows the covariance Σ = V diag(s) Vᵀ + floor·I and continues from `start`.

    To first order nothing is gained. But outside the row space of J the gradient came without noise, and its curvature
    there reveals what the row space hides.
    """
    values, vectors = spectrum.decompose(J)
    rows = (J.dense().T @ (vectors / values.sqrt())).T  # Vᵀ, (d_x, d_θ)
    known = LowRank(rows, variances, floor)
    found = invert(J.map.model, gradient, J.map.y, J.x.shape, covariance=known, start=start, steps=steps)
    return found.x


def utility(
    setting: dict[str, Any], methods: dict[str, list[float]], digits: int, held_out: int, epochs: int, batch: int,
    lr: float, seeds: int, reference: int, jobs: int | None = None,
) -> pd.DataFrame:  # fmt: skip
    """What a defence costs to training: LeNet on the bundled digits, each step the mean of `batch` images' gradients,
    each of them defended by itself.

    methods: kind -> its values: "none"; "isotropic": σ; "row-space": σ along the row space of each image's J, and
    nothing beside it; "designed": √c, the error of every direction, by noise on the input, which is what it is; "dp":
    clipping to the median norm at the start, and noise of this multiple of it on every image's gradient (local
    differential privacy); "prune": the ratio. A row a method, value and seed: accuracy on `held_out` of the 1,000
    digits that were not trained on, and privacy: the judged RMSE of an audit of `reference` of the images at the start.
    """
    tasks = [{**setting, "method": method, "value": float(value), "seed": seed}
             for method, values in methods.items() for value in values for seed in range(seeds)]  # fmt: skip
    solve = partial(_trained, digits, held_out, epochs, batch, lr, reference)
    return sweep.run(solve, tasks, together=("method", "value"), at_most=seeds, whole=True, jobs=jobs,
                     description="trainings")  # fmt: skip


def _trained(
    digits: int, held_out: int, epochs: int, batch: int, lr: float, reference: int, chunk: list[Problem]
) -> list[Row]:  # fmt: skip
    """A chunk has one method and value."""
    known = privacy(chunk[0], reference)
    return [{"privacy": known, "accuracy": train(p, digits, held_out, epochs, batch, lr)} for p in chunk]


def train(p: Problem, digits: int, held_out: int, epochs: int, batch: int, lr: float) -> float:
    """Accuracy on held-out digits after one defended training."""
    x, y, model, clip = _start(p, digits + held_out)
    order, noise = (streams.generator(name, p["seed"]) for name in ("order", "training noise"))
    steps = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(epochs):
        for chosen in torch.randperm(digits, generator=order).split(batch):
            gradients = defended(model, x[chosen], y[chosen], p["method"], p["value"], clip, noise)
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            steps.step()
    with torch.no_grad():
        return float((model(x[digits:]).argmax(1) == y[digits:]).double().mean())


def _start(p: Problem, n: int) -> tuple[Tensor, Tensor, torch.nn.Module, float]:
    """n digits of the training set, the network before any training, and the norm to clip to."""
    device = devices.current()
    x, y = (t.to(device) for t in data.load(p["dataset"], n, split="train"))
    model = models.build("lenet", p["dataset"], init=p["init"], seed=p["weight_seed"], normalize=False).to(device)
    return x, y, model, median_norm(model, x[:50], y[:50])


def defended(
    model: torch.nn.Module, x: Tensor, y: Tensor, method: str, value: float, clip: float, generator: torch.Generator
) -> list[Tensor]:  # fmt: skip
    """The mean of the images' defended gradients."""

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    if method == "designed":
        x = x + value * draw(x)
    if method in ("none", "designed", "isotropic", "row-space"):
        found = list(torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters())))
        if method == "isotropic":
            found = [g + value / len(x) ** 0.5 * draw(g) for g in found]
        if method == "row-space":
            noise = value * _row_space(model, x, y, generator).to(x)
            found = [g + part for g, part in zip(found, _split(model, noise), strict=True)]
        return found
    each = _each(model, x, y)
    if method == "dp":
        norms = torch.stack([g.flatten(1).square().sum(1) for g in each]).sum(0).sqrt()
        scale = (clip / norms).clamp(max=1)
        noise = value * clip / len(x) ** 0.5
        return [torch.einsum("b,b...->...", scale, g) / len(x) + noise * draw(g[0]) for g in each]
    flat = torch.cat([g.flatten(1) for g in each], 1)
    return _split(model, torch.stack([g + perturb.prune(g, value) for g in flat]).mean(0))


def _split(model: torch.nn.Module, flat: Tensor) -> list[Tensor]:
    """(d_θ,) as the parameters are shaped."""
    parameters = list(model.parameters())
    parts = flat.split([p.numel() for p in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]


def _row_space(model: torch.nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """The mean over images of a standard normal in the row space of each one's J, (d_θ,): Jᵀ(J Jᵀ)⁻¹J n."""
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64, device=x.device)
    for one, label in zip(x.split(1), y.split(1), strict=True):
        J = GradientJacobian(model, one, label, method="dense")
        rows, gram = J.dense().double(), J.gram()
        n = torch.randn(J.shape[1], generator=generator).to(rows)
        floor = spectrum.zero_level(J) * gram.diagonal().sum() * torch.eye(J.shape[0]).to(gram)
        along = torch.cholesky_solve((rows @ n)[:, None], torch.linalg.cholesky(gram + floor))
        total += (along.T @ rows)[0]
    return total / len(x)


def _each(model: torch.nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Every image's own gradient, (B, …) a parameter."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(theta: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, theta, (one[None],)), label[None])

    return list(torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, y).values())


def median_norm(model: torch.nn.Module, x: Tensor, y: Tensor) -> float:
    return float(torch.stack([g.flatten(1).square().sum(1) for g in _each(model, x, y)]).sum(0).sqrt().median())


def privacy(p: Problem, reference: int) -> float:
    """The mean judged RMSE of the images' audits before any training; of designed noise, whose errors are all √c, in
    closed form."""
    x, y, model, clip = _start(p, 50)
    x, y = x[:reference], y[:reference]
    if p["method"] == "designed":
        deviation = torch.full((x[0].numel(),), p["value"], dtype=torch.float64, device=x.device)
        boxed = [float(clamped_square(one.double().reshape(-1), deviation).mean()) ** 0.5 for one in x]
        prior = p["value"] * TAU / math.hypot(p["value"], TAU)
        return float(np.mean([min(one, prior) for one in boxed]))
    variance = f"gaussian:{p['value'] ** 2}"
    # an attacker cannot use what lies beside the row space, to first order: noise in it alone leaves the same errors
    defense = {"none": "none", "isotropic": variance, "row-space": variance, "dp": f"dp:{clip}:{p['value']}",
               "prune": f"prune:{p['value']}"}[p["method"]]  # fmt: skip
    return float(np.mean([sample.judged for sample in audit(model.double(), x, y, defense, tau=TAU)]))


def gains(table: pd.DataFrame) -> pd.DataFrame:
    """A row an image and level: the measured error along the sharpest directions, designed over row-space, the mean
    over draws of each; and the same of the mean error over all directions."""
    rows = shared.scored(table[~table.told.astype(bool)])
    means = rows.groupby(["image", "level", "kind"])[["sharpest", "mse", "bayes"]].mean().unstack("kind")
    return pd.DataFrame({
        "sharpest": means["sharpest", "designed"] / means["sharpest", "row-space"],
        "isotropic": means["sharpest", "designed"] / means["sharpest", "isotropic"],
        "mean": means["mse", "designed"] / means["mse", "row-space"],
        "averaged": means["bayes", "averaged"] / means["bayes", "row-space"],
    }).reset_index()  # fmt: skip


def judge(
    table: pd.DataFrame, frontier: pd.DataFrame, dataset: str, gain: float, accuracy: float, margin: float
) -> list[claims.Claim]:
    """The experiment's claims. The thresholds are the notebook's parameters."""
    usual = table[~table.told.astype(bool)]
    found = []
    gained = gains(table)
    attacker = "gauss-newton: knows model, label and, to first order without use, the covariance; no prior"
    common: dict[str, Any] = {"source": "ours", "attacker": attacker, "note": claims.settled(usual)}
    for column, name, statement, statistic, threshold in (
        ("sharpest", "gain", "Designed noise protects the least protected directions better than noise in J's row "
         "space.", "designed over row-space", gain),
        ("isotropic", "gain-isotropic", "Designed noise protects them far better than isotropic noise of its energy.",
         "designed over isotropic", gain),
    ):  # fmt: skip
        found.append(claims.judge(
            gained, lambda t, column=column: float(np.exp(np.log(t[column]).mean())), "image", at_least=threshold,
            id=f"designed-{dataset}-{name}", statement=statement,
            statistic=f"measured squared error along the {SHARPEST} sharpest directions, {statistic}, geometric mean",
            **common,
        ))  # fmt: skip
    found.append(claims.judge(
        gained, lambda t: float(t.averaged.mean()), "image", at_least=1.0 + 1e-3, id=f"designed-{dataset}-averaged",
        statement="Water-filled noise leaves an attacker with a prior a larger mean error than row-space noise.",
        statistic="linear Bayes error, water-filled over row-space", source="ours", attacker="none: spectra",
        note="the optimum by construction: how much it gains is what was measured",
    ))  # fmt: skip
    exact = shared.lost(usual[usual.predicted_mse <= 0.05**2])
    if len(exact):
        found.append(claims.judge(
            exact, _off, "image", at_most=accuracy, id=f"designed-{dataset}-prediction",
            statement="The error of each kind of noise is what its spectrum foretells.",
            statistic="median relative difference of measured and expected MSE, worst kind, predicted RMSE ≤ 0.05",
            **common,
        ))  # fmt: skip
    told = table[table.told.astype(bool)]
    for kind, statement, bound in (
        ("linear", "Drawn as √c Jᵀz, designed noise does not protect from who is told its covariance.",
         {"at_most": 0.5}),
        ("designed", "As the gradient of a noisy input, designed noise shows no more to who is told its covariance.",
         {"at_least": 0.9}),
    ):  # fmt: skip
        pairs = told[told.kind == kind].merge(
            usual[usual.kind == kind], on=["image", "level", "noise_seed"], suffixes=("", "_untold")
        )
        if len(pairs):
            found.append(claims.judge(
                pairs, lambda t: float((t.rmse / t.rmse_untold).median()), "image", **bound, source="ours",
                id=f"designed-{dataset}-told-{kind}", statement=statement,
                statistic="RMSE of an attacker who is told, over that of one who is not, median",
                attacker="Levenberg–Marquardt, whitened by the covariance, from where Gauss–Newton ended",
            ))  # fmt: skip
    return found + (judge_trainings(frontier, dataset, margin) if len(frontier) else [])


def judge_trainings(frontier: pd.DataFrame, dataset: str, margin: float, name: str = "designed") -> list[claims.Claim]:
    """The claim about accuracy at equal privacy, of a table that `utility` made or `benchmarks/trainings.py`. It has no
    verdict where isotropic noise costs so little that there is no `margin` to gain, and there is none without both."""
    if not {"isotropic", "designed"} <= set(frontier.method):
        return []
    plain = float(frontier[frontier.method == "none"].accuracy.mean())  # NaN where it was not trained
    level = _middle(frontier[frontier.method == "isotropic"])
    cost = plain - float(level.accuracy)
    note = f"accuracy {plain:.3f} undefended, of which isotropic noise costs {cost:.3f} at this privacy"
    if plain < claims.LEARNT:
        note = "the undefended network has learnt too little to compare"
    elif cost < margin:
        note += ": there is less to gain than the threshold asks for"
    known = not (plain < claims.LEARNT or cost < margin)
    return [claims.judge(
        frontier, lambda t: advantage(t, "designed", "isotropic") if known else np.nan, "seed",
        at_least=margin, id=f"{name}-{dataset}-utility", note=note, least=3,
        statement="At equal privacy designed noise costs training less than isotropic noise.",
        statistic="accuracy gained at the privacy of the middle isotropic level", source="ours",
        attacker="none: an audit's judged RMSE at the first step",
    )]  # fmt: skip


def _off(table: pd.DataFrame) -> float:
    """How far the measured MSE, a mean over draws, is from the expected one: median over images, of the worst kind."""
    means = table.groupby(["image", "kind", "level"])[["mse", "predicted_mse"]].mean()
    off = (means.mse / means.predicted_mse - 1).abs()
    return float(off.groupby("kind").median().max())


def advantage(frontier: pd.DataFrame, ours: str, other: str) -> float:
    """The accuracy of `ours` minus that of `other`, at the privacy of other's middle value, by interpolation."""
    at, own = _middle(frontier[frontier.method == other]), _curve(frontier[frontier.method == ours])
    there = np.interp(at.privacy, own.privacy, own.accuracy, left=np.nan, right=np.nan)
    return float(there - at.accuracy)


def _curve(rows: pd.DataFrame) -> pd.DataFrame:
    """Privacy and accuracy, means over seeds, a row a value."""
    return rows.groupby("value")[["privacy", "accuracy"]].mean().sort_values("privacy")


def _middle(rows: pd.DataFrame) -> pd.Series:
    curve = _curve(rows)
    return curve.iloc[len(curve) // 2]
