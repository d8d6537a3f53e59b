"""Many attacks side by side, a row each: what I²F predicts for a perturbed gradient, and what the attack found."""

from typing import Any, NamedTuple

import joblib
import torch
from torch import Tensor

from i2f import metrics
from i2f.attacks import Reconstruction, invert
from i2f.influence import influence
from i2f.jacobian import GradientJacobian
from i2f.progress import bar


class Attack(NamedTuple):
    """One problem: the gradient at J's input, perturbed by δ, and how to attack it (`options` go to `invert`)."""

    J: GradientJacobian
    delta: Tensor
    method: str = "gauss-newton"
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed


Row = dict[str, float | int | str | bool]


def attack_all(attacks: list[Attack], jobs: int | None = None) -> list[tuple[Row, Reconstruction]]:
    """Attack every problem, `jobs` at a time (None: one a core), and set each result beside its prediction.

    Each attack has a process to itself and one thread in it, so that cores are not oversubscribed and a result does
    not depend on how many run beside it. The order is that of `attacks`.

    A row holds `method`; `predicted_mse` = I²/d_x and `predicted_rmse`, by Eq. 4; `mse` (unclamped), `mse_clamped`,
    `rmse`, `psnr`, `ssim` against the truth J.x; `objective_ratio` = ‖∇L(x̂) − g‖²/‖δ‖², which is 1 at the truth, so
    that an attack that stopped above 1 cannot have found the minimum; `steps`, `evaluations`, `converged`, `failed`,
    `reason`.
    """
    calls = [
        joblib.delayed(_invert)(
            a.J.map.model, a.J.gradient + a.delta, a.J.map.y, a.J.x.shape,
            method=a.method, loss=a.J.map.loss, **a.options,
        )
        for a in attacks
    ]  # fmt: skip
    jobs = min(jobs or joblib.cpu_count(only_physical_cores=True), len(calls))
    with joblib.parallel_config("loky", n_jobs=jobs, inner_max_num_threads=1):
        found = joblib.Parallel(return_as="generator", batch_size=1)(calls)
        return [
            (_row(attack, result), result)
            for attack, result in zip(attacks, bar(found, total=len(calls), description="attacks"), strict=True)
        ]


def _invert(*arguments: Any, **options: Any) -> Reconstruction:
    torch.set_num_threads(1)
    return invert(*arguments, **options)


def _row(attack: Attack, found: Reconstruction) -> Row:
    prediction = influence(attack.J, attack.delta)
    energy = float(attack.delta.square().sum())
    return {
        "method": attack.method,
        "predicted_mse": prediction.rmse**2,
        "predicted_rmse": prediction.rmse,
        **metrics.compare(found.x, attack.J.x),
        "objective_ratio": found.loss / energy if energy else float("nan"),
        "steps": found.steps,
        "evaluations": found.evaluations,
        "converged": found.converged,
        "failed": found.failed,
        "reason": found.reason,
    }
