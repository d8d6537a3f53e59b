"""The map that an attacker inverts: x ↦ g(x) = ∇_θ L(x, θ)."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from i2f import checks

Loss = Callable[[Tensor, Tensor], Tensor]


class GradientMap:
    """g(x) = ∇_θ L(x, θ) for one model, one set of labels and one loss, as a function of the input alone.

    Args:
        model: any module in evaluation mode; parameters with `requires_grad=False` are left out of θ.
        y: labels, one an image; what `loss` takes as its second argument.
        loss: (model output, y) -> scalar. Default: mean cross-entropy.

    θ is every trainable parameter, flattened and joined in `model.named_parameters()` order. Buffers are
    never changed: the model only ever sees copies of them.

    Raises:
        ValueError: no trainable parameter; a BatchNorm or Dropout layer in training mode.
    """

    def __init__(self, model: nn.Module, y: Tensor, loss: Loss = F.cross_entropy):
        checks.deterministic(model)
        self.model, self.y, self.loss = model, y, loss
        named = dict(model.named_parameters())
        self.parameters = {name: p.detach() for name, p in named.items() if p.requires_grad}
        self.frozen = {name: p.detach() for name, p in named.items() if not p.requires_grad}
        if not self.parameters:
            raise ValueError("model has no trainable parameter (requires_grad=True): there is no gradient to share")
        self.size = sum(p.numel() for p in self.parameters.values())
        first = next(iter(self.parameters.values()))
        self.dtype, self.device = first.dtype, first.device

    def cast(self, dtype: torch.dtype) -> "GradientMap":
        """The same map with the model's parameters and buffers in another precision."""
        if dtype == self.dtype:
            return self
        y = self.y.to(dtype) if torch.is_tensor(self.y) and self.y.is_floating_point() else self.y
        return GradientMap(copy.deepcopy(self.model).to(dtype), y, self.loss)

    def output(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        """The model's output at `x`, with θ given and buffers out of harm's way."""
        buffers = {name: b.detach().clone() for name, b in self.model.named_buffers()}
        return functional_call(self.model, ({**parameters, **self.frozen}, buffers), (x,))

    def value(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        """L(x, θ), a scalar."""
        value = self.loss(self.output(parameters, x), self.y)
        if value.ndim != 0:
            raise ValueError(f"loss returned shape {tuple(value.shape)}; it must return one number (reduce it)")
        return value

    def __call__(self, x: Tensor, create_graph: bool = False) -> Tensor:
        """g(x), flat (d_θ,); differentiable in x with `create_graph`. Cost: one gradient evaluation."""
        parameters = {name: p.detach().requires_grad_() for name, p in self.parameters.items()}
        with torch.enable_grad():
            value = self.value(parameters, x)
            gradient = torch.autograd.grad(
                value, list(parameters.values()), create_graph=create_graph, materialize_grads=True
            )
        return torch.cat([g.reshape(-1) for g in gradient])

    def split(self, vector: Tensor) -> list[Tensor]:
        """A flat (..., d_θ) vector as one tensor a parameter, in the parameters' own shapes."""
        parts = vector.split([p.numel() for p in self.parameters.values()], dim=-1)
        return [v.reshape(*vector.shape[:-1], *p.shape) for v, p in zip(parts, self.parameters.values(), strict=True)]
