"""Is an audit right? Its predicted PSNR against an attack's, and the PSNR that its recommended noise achieves."""

import math
from typing import Any

import pandas as pd

from i2f.audit import audit
from i2f.paper import estimates, sweep
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.rows import declare
from i2f.paper.statistics import convergence
from i2f.paper.sweep import Problem, Row, Settings

PREDICTED, SUGGESTED = "predicted", "suggested"
ATTACKED = {"attacked_rmse": "converged", "attacked_psnr": "decibel", "judged": "converged"}


def problems(config: Config) -> list[Problem]:
    """Every image under noise of each variance, and under the noise that its audit recommends for each target PSNR.

    config: dataset, model, init; images of MNIST's train split, from first_digit on, each under one of weight_seeds, in
    rotation; variances, targets (dB), gauss_newton_steps.
    """
    parts = [(PREDICTED, v) for v in config["variances"]] + [(SUGGESTED, t) for t in config["targets"]]
    setting = {**shared.setting(config), "split": "train", "normalize": False, "steps": config["gauss_newton_steps"]}
    return [
        {**setting, "image": image, "weight_seed": weight_seed, "part": part, "asked": asked}
        for image, weight_seed in shared.rotated(config["first_digit"], config["images"], config["weight_seeds"])
        for part, asked in parts
    ]


def run(problems: list[Problem], settings: Settings = sweep.DEFAULT) -> Results:
    """One row per problem. asked: a variance, or a target PSNR in dB; variance: σ² of the noise; predicted_rmse, psnr:
    of the audit, for the perturbation drawn; expected_psnr: over draws, for the best of the attackers that an audit
    considers, for whom the noise is chosen; attacked_rmse, attacked_psnr: of Gauss–Newton without a prior (PSNR of the
    clamped image)."""
    table = sweep.run(solve, problems, settings, ("image",), at_most=8, description="audits")
    return Results({"problems": table.drop(columns="steps")})


@declare("problems", defaults=shared.SETTING, kinds=ATTACKED)
def solve(chunk: list[Problem]) -> list[Row]:
    rows = []
    for p in chunk:
        J = shared.jacobian(p)
        model, x, y = J.map.model, J.x, J.map.y
        variance = p["asked"]
        if p["part"] == SUGGESTED:
            (first,) = audit(model, x, y, target_psnr=p["asked"])
            variance = first.needed
        defense = f"gaussian:{variance:.17g}"
        (found,) = audit(model, x, y, defense, attack=True, attack_steps=p["steps"], seed=p["image"])
        rows.append(
            {
                "variance": variance,
                "predicted_rmse": found.drawn_rmse,
                "psnr": found.drawn_psnr,
                "expected_psnr": -20 * math.log10(min(found.boxed, found.prior)),
                "attacked_rmse": found.attacked_rmse,
                "attacked_psnr": found.attacked_psnr,
                "label": found.label,
                "judged": found.judged,
                "verdict": found.verdict,
                "converged": found.attacked_reason.startswith(("stationary", "matched")),
                "reason": found.attacked_reason,
            }
        )
    return rows


def judge(tables: Tables, thresholds: Thresholds) -> list[Claim]:
    """The experiment's claims. Of the thresholds, `cut` on the predicted RMSE bounds the linear regime, and `within`,
    in dB, is how far above the target a PSNR may lie."""
    table = tables["problems"]
    judged, found = Judge.of("audited", "audit", thresholds), []
    linear = table[(table.part == PREDICTED) & (table.predicted_rmse <= thresholds["cut"])]
    done = linear[linear.converged.eq(True)]
    if len(done):
        off = (done.psnr - done.attacked_psnr).groupby(done.image).mean()
        found.append(judged("psnr", estimates.mean(off), **_ended(linear)))
    asked = table[table.part == SUGGESTED]
    if len(asked):
        above, ended = asked.attacked_psnr - asked.asked, asked.converged.eq(True)
        # an attack that ended early proves no protection
        protected = (ended & (above <= thresholds["within"])).groupby(asked.image).all()
        words: dict[str, Any] = {"requested": ", ".join(f"{target:g}" for target in sorted(asked.asked.unique()))}
        words |= {"above": f"{above[ended].mean():+.2f}"}
        found.append(judged("recommended", estimates.share(protected), **words, **_ended(asked)))
    return found


def _ended(rows: pd.DataFrame) -> dict[str, Any]:
    return {"finished": float(rows.converged.eq(True).mean()), "converged": convergence(rows)}
