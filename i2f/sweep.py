"""One problem, one row: what I²F predicts for a perturbed gradient, and what an attack then finds."""

from torch import Tensor

from i2f import metrics
from i2f.attacks import Reconstruction, invert
from i2f.influence import influence
from i2f.jacobian import GradientJacobian


def measure(
    J: GradientJacobian, delta: Tensor, method: str = "gauss-newton", **options
) -> tuple[dict[str, float | int | str | bool], Reconstruction]:
    """Attack the gradient J.gradient + δ and set the result beside the prediction.

    Returns a row and the reconstruction. In the row: `method`; `predicted_mse` = I²/d_x and `predicted_rmse`, by
    Eq. 4; `mse` (unclamped), `mse_clamped`, `rmse`, `psnr`, `ssim` against the truth J.x; `objective_ratio` =
    ‖∇L(x̂) − g‖²/‖δ‖², which is 1 at the truth, so that an attack that stopped above 1 cannot have found the minimum;
    `steps`, `evaluations`, `converged`, `reason` of the attack. `options` go to `invert`.
    """
    prediction = influence(J, delta)
    found = invert(J.map.model, J.gradient + delta, J.map.y, J.x.shape, method=method, loss=J.map.loss, **options)
    energy = float(delta.square().sum())
    row = {
        "method": method,
        "predicted_mse": prediction.rmse**2,
        "predicted_rmse": prediction.rmse,
        **metrics.compare(found.x, J.x),
        "objective_ratio": found.loss / energy if energy else float("nan"),
        "steps": found.steps,
        "evaluations": found.evaluations,
        "converged": found.converged,
        "reason": found.reason,
    }
    return row, found
