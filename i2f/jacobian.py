"""J = ∂²L/∂x∂θ as a linear operator: exact products, never formed unless asked."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2f import checks
from i2f.dense import dense_jacobian, jacobian_gram, outer_gram
from i2f.gradient import GradientMap, Linearization, Loss

DENSE_BYTES = 2 * 2**30  # J is formed by itself, where it is needed whole, up to this size


class GradientJacobian:
    """The Jacobian of the shared gradient by the private input, J = ∂²L/∂x∂θ, of shape (d_x, d_θ).

        J δ  = ∇_x ⟨∇_θ L, δ⟩      parameter space -> input space    `matvec`
        Jᵀ v = ∇_θ ⟨∇_x L, v⟩      input space -> parameter space    `rmatvec`

    A product costs one backward pass through the kept graphs of both gradients, about one gradient evaluation
    (`Linearization`). Once `dense()` has run, products are matrix products with it.

    Args:
        model: any module in evaluation mode. x: (n, ...) in [0, 1], cast to the model's dtype.
        y: (n,) labels, or what `loss` takes. loss: (output, y) -> scalar.
        method: "dense" and "matrix-free" say how exact solvers should work; "auto" is dense where J takes at
            most `DENSE_BYTES` (2 GiB).

    Attributes:
        shape: (d_x, d_θ). gradient: ∇_θ L(x, θ), flat (d_θ,). x: (n, ...), in pixels.
        products: how often J or Jᵀ was applied, a formed J counting d_x.

    Raises:
        ValueError: NaN or infinite x, as many labels as images, labels out of range, nothing trainable, BatchNorm or
            Dropout in training mode, x on another device than the model or of a shape that does not
            fit it, a loss for which J = 0 identically.

    Source: section 3 of the paper, where J appears in Eq. 3.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, loss: Loss = F.cross_entropy, method: str = "auto"):
        checks.one_of("method", method, ("auto", "dense", "matrix-free"))
        checks.images_and_labels(x, y)
        self.map = GradientMap(model, y, loss)
        if x.device != self.map.device:
            raise ValueError(f"x is on {x.device} and the model on {self.map.device}; move one of them")
        self.x = x.detach().to(self.map.dtype, copy=True)  # what the caller does to x later must not move J
        self.map.check(self.x, f"x of shape {tuple(x.shape)}")
        self.shape = (self.x.numel(), self.map.size)
        size = self.shape[0] * self.shape[1] * self.x.element_size()
        self.is_dense = method == "dense" or (method == "auto" and size <= DENSE_BYTES)
        self.products = 0
        self._dense: Tensor | None = None
        self._gram: Tensor | None = None
        self.spectrum = None  # kept here by spectrum.decompose
        self._at_x = Linearization(self.map, self.x).checked()
        self.gradient = checks.finite("gradient", self._at_x.gradient)

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device

    def matvec(self, delta: Tensor) -> Tensor:
        """J δ: (d_θ,) -> (d_x,), or (k, d_θ) -> (k, d_x). One product a vector."""
        delta = checks.flat("delta", delta, self.shape[1], "parameter space").to(self.x)
        self.products += delta.numel() // self.shape[1]
        if self._dense is not None:
            return delta @ self._dense.T
        if delta.ndim == 2:
            return torch.stack([self._at_x.matvec(d) for d in delta])
        return self._at_x.matvec(delta)

    def rmatvec(self, v: Tensor) -> Tensor:
        """Jᵀ v: (d_x,) -> (d_θ,), or (k, d_x) -> (k, d_θ). One product a vector."""
        v = checks.flat("v", v, self.shape[0], "input space").to(self.x)
        self.products += v.numel() // self.shape[0]
        if self._dense is not None:
            return v @ self._dense
        if v.ndim == 2:
            return torch.stack([self._at_x.rmatvec(u) for u in v])
        return self._at_x.rmatvec(v)

    def dense(self) -> Tensor:
        """J itself, (d_x, d_θ), in the model's dtype; formed once and kept. d_x products."""
        if self._dense is None:
            self._dense = dense_jacobian(self.map, self.x)
            self.products += self.shape[0]
        return self._dense

    def gram(self) -> Tensor:
        """J Jᵀ, (d_x, d_x), accumulated in float64 whatever the model's dtype; formed once and kept. d_x products,
        unless J is there already."""
        if self._gram is None and self._dense is not None:
            self._gram = outer_gram(self._dense.double())
        elif self._gram is None:
            self._gram = jacobian_gram(self.map, self.x, torch.float64)
            self.products += self.shape[0]
        return self._gram
