"""J for an audit: in unit pixels, and in float64 where that fits."""

import warnings

import torch
from torch import Tensor, nn

from i2f._torch.normalize import Normalize
from i2f.audit.products import SMALL
from i2f.core.gradient import GradientMap, Loss
from i2f.core.jacobian import DENSE_BYTES, GradientJacobian
from i2f.core.message import LocalSteps
from i2f.core.metrics import Units


def in_units(model: nn.Module, units: Units) -> nn.Module:
    """The model as a function of unit pixels u = (x − low)/span: behind a first layer, low + span·u, that has no
    parameters."""
    if units.plain:
        return model
    like = next(model.parameters(), units.low)
    dtype = torch.promote_types(like.dtype, torch.float32)
    first = Normalize((0.0,), (1.0,))
    first.mean, first.std = -units.low / units.span, 1 / units.span
    return nn.Sequential(first.to(like.device, dtype), model)


def precision(model: nn.Module) -> torch.dtype:
    """The dtype of the model's trainable parameters."""
    return next((p.dtype for p in model.parameters() if p.requires_grad), torch.float64)


class Operators:
    """J of one group of samples after another, in float64 where that fits and the model computes in it."""

    def __init__(self, model: nn.Module, loss: Loss, method: str, message: LocalSteps | None = None):
        self.model, self.loss, self.method, self.message = model, loss, method, message
        self._wide: GradientMap | None = None  # the model and its loss in float64, once they are known to work
        self._narrow = False  # whether they are known not to

    def at(self, u: Tensor, y: Tensor) -> GradientJacobian:
        if self._wide is not None:
            return self._made(self._wide.model, u, y, self._wide.loss)
        with warnings.catch_warnings():  # a reservation states the precision
            warnings.filterwarnings("ignore", message="model has parameters in")
            J = self._made(self.model, u, y, self.loss)
        if self._narrow or J.dtype == torch.float64 or not self._fits(J):
            return J
        try:
            wide = J.map.cast(torch.float64)
            if wide.dtype == torch.float64:
                J = self._made(wide.model, u, wide.y, wide.loss)
                self._wide = wide
        except (ValueError, TypeError, RuntimeError, MemoryError):  # tensors of its own precision in model or loss
            self._narrow = True
        return J

    def _made(self, model: nn.Module, u: Tensor, y: Tensor, loss: Loss) -> GradientJacobian:
        return GradientJacobian(model, u, y, loss, self.method, message=self.message)

    def _fits(self, J: GradientJacobian) -> bool:
        """Whether J fits in float64; or products alone will do, and the network is small."""
        need = 8 * J.shape[0] * J.shape[1]
        products = self.method != "dense" and need > 2 * DENSE_BYTES and J.shape[1] <= SMALL
        return J.device.type != "mps" and (need <= DENSE_BYTES or products)
