"""Is an audit right? Its predicted PSNR against an attack's, the noise that it suggests against what that leaves."""

import math
from functools import partial
from typing import Any

import pandas as pd

from i2f.audit import audit
from i2f.paper import claims, data, devices, sweep
from i2f.paper.experiments import problems as shared
from i2f.paper.sweep import Problem, Row

PREDICTED, SUGGESTED = "predicted", "suggested"


def problems(setting: dict[str, Any], images: int, variances: list[float], targets: list[float]) -> list[Problem]:
    """Every image under noise of each variance, and under the noise that its audit suggests for each target PSNR."""
    parts = [(PREDICTED, v) for v in variances] + [(SUGGESTED, t) for t in targets]
    return [
        {**setting, "image": image, "part": part, "asked": asked} for image in range(images) for part, asked in parts
    ]


def run(tasks: list[Problem], steps: int, jobs: int | None = None) -> pd.DataFrame:
    """A row each. asked: a variance, or a target PSNR in dB; variance: σ² of the noise; predicted_rmse, psnr: of the
    audit, for the perturbation drawn; expected_psnr: over draws, for the best of the attackers that an audit considers,
    for whom the noise is sized; attacked_rmse, attacked_psnr: what Gauss–Newton left, without a prior (PSNR of the
    clamped image)."""
    return sweep.run(partial(_solve, steps), tasks, together=("image",), at_most=8, jobs=jobs, description="audits")


def _solve(steps: int, chunk: list[Problem]) -> list[Row]:
    rows = []
    for p in chunk:
        x, y = (t.to(devices.current()) for t in data.load(p["dataset"], n=1, offset=p["image"]))
        model = shared.network(*(shared.value(p, name) for name in shared.NETWORK))
        variance = p["asked"]
        if p["part"] == SUGGESTED:
            (first,) = audit(model, x, y, target_psnr=p["asked"])
            variance = first.needed
        (found,) = audit(model, x, y, f"gaussian:{variance:.17g}", attack=True, attack_steps=steps, seed=p["image"])
        rows.append({
            "variance": variance, "predicted_rmse": found.drawn_rmse, "psnr": found.drawn_psnr,
            "expected_psnr": -20 * math.log10(min(found.boxed, found.prior)),
            "attacked_rmse": found.attacked_rmse, "attacked_psnr": found.attacked_psnr,
            "label": found.label, "judged": found.judged, "verdict": found.verdict,
            "converged": found.attacked_reason.startswith(("stationary", "matched")), "reason": found.attacked_reason,
        })  # fmt: skip
    return rows


def judge(table: pd.DataFrame, dataset: str, cut: float, accuracy: float, within: float) -> list[claims.Claim]:
    """The experiment's claims. The thresholds are the notebook's parameters."""
    common: dict[str, Any] = {"source": "ours", "attacker": shared.PERFECT}
    fine = table[(table.part == PREDICTED) & (table.predicted_rmse <= cut)]
    found = []
    if len(fine):
        found.append(claims.judge(
            fine, lambda t: float((t.attacked_psnr - t.psnr).abs().median()), "image", at_most=accuracy, **common,
            id=f"audit-{dataset}-psnr", statement="An audit foretells the PSNR that an attack reaches.",
            statistic="median difference of predicted and measured PSNR in dB",
            note=f"predicted RMSE at most {cut:g}; {claims.settled(fine)}",
        ))  # fmt: skip
    asked = table[table.part == SUGGESTED]
    if len(asked):
        targets = ", ".join(f"{t:g}" for t in sorted(asked.asked.unique()))
        found.append(claims.judge(
            asked, lambda t: float((t.attacked_psnr - t.asked).abs().to_numpy().max()), "image", at_most=within,
            **common,
            id=f"audit-{dataset}-suggested",
            statement=f"The noise that an audit suggests for {asked.asked.min():g} dB and more leaves that.",
            statistic="largest difference from the target in dB",
            note=f"targets of {targets} dB; {claims.settled(asked)}",
        ))  # fmt: skip
    found.append(claims.judge(
        table, lambda t: float(t.label.astype(float).mean()), "image", at_least=0.99, **common,
        id=f"audit-{dataset}-labels", statement="One image's label is read off its gradient under this noise.",
        statistic="share of labels read",
    ))  # fmt: skip
    return found
