"""The gradients of many independent problems, taken together."""

import torch
from torch import Tensor
from torch.func import grad, vmap

from i2f.core.gradient import GradientMap


class BatchedGradient:
    """(x_1 … x_P) ↦ (∇_θ L(x_1, y_1) … ∇_θ L(x_P, y_P)), each problem for itself, differentiable in x and y.

    One vectorised pass; one problem after another where an operation of the network has no batching rule, which the
    first call finds out. `gmap` holds the model, the parameters and the loss that the problems share.
    """

    def __init__(self, gmap: GradientMap):
        self.gmap = gmap
        self.together: bool | None = None

    def __call__(self, xs: Tensor, ys: Tensor) -> Tensor:
        """xs: (P, n, ...), ys: (P, n) or (P, n, classes) -> (P, d_θ), with its graph. Cost: P gradient evaluations."""
        if not self.gmap.plain or self.gmap.message is not None:
            self.together = False
        if len(xs) > 1 and self.together is None:
            self.together = self._has_rules(xs.detach(), ys.detach())
        if len(xs) > 1 and self.together:
            return self._vectorised(xs, ys)
        return torch.stack([self.gmap(x, y, create_graph=True) for x, y in zip(xs, ys, strict=True)])

    def _vectorised(self, xs: Tensor, ys: Tensor) -> Tensor:
        gradient = vmap(grad(self.gmap.value), in_dims=(None, 0, 0))(self.gmap.parameters, xs, ys)
        return torch.cat([g.flatten(1) for g in gradient.values()], dim=1)

    def _has_rules(self, xs: Tensor, ys: Tensor) -> bool:
        xs.requires_grad_()
        try:
            torch.autograd.grad(self._vectorised(xs, ys).sum(), xs, allow_unused=True)
        except (NotImplementedError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return False
        return True
