"""J = ∂²L/∂x∂θ as a linear operator: exact products, never formed unless asked."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2f import checks
from i2f.dense import dense_jacobian, jacobian_gram, outer_gram
from i2f.gradient import GradientMap, Linearization, Loss, Recomputation
from i2f.memory import available, footprint

DENSE_BYTES = 2 * 2**30  # J is formed by itself, where it is needed whole, up to this size
MOST_AT_ONCE = 32  # vectors in one pass: more gain nothing


class GradientJacobian:
    """The Jacobian of the shared gradient by the private input, J = ∂²L/∂x∂θ, of shape (d_x, d_θ).

        J δ  = ∇_x ⟨∇_θ L, δ⟩      parameter space -> input space    `matvec`
        Jᵀ v = ∇_θ ⟨∇_x L, v⟩      input space -> parameter space    `rmatvec`

    A product costs one backward pass through the kept graphs of both gradients, 1.6 to 1.8 gradient evaluations on a
    ResNet18 (`Linearization`; benchmarks/deep.py); where the graphs of all images do not fit, about three more, some
    images at a time (`Recomputation`).
    Once `dense()` has run, products are matrix products with it.

    Args:
        model: any module in evaluation mode. x: (n, ...) in [0, 1], cast to the model's dtype.
        y: (n,) labels, or what `loss` takes. loss: (output, y) -> scalar.
        method: "dense" and "matrix-free" say how exact solvers should work; "auto" is dense where J takes at
            most `DENSE_BYTES` (2 GiB). "recompute" is matrix-free without kept graphs, as many images at
            a time as fit.
        memory: bytes that products, and a formed J, may take; None: what is free on the device, 90% of it. How they
            are counted: `i2f.memory`.

    Attributes:
        shape: (d_x, d_θ). gradient: ∇_θ L(x, θ), flat (d_θ,). x: (n, ...), in pixels.
        products: how often J or Jᵀ was applied, a formed J counting d_x.
        chunk: how many vectors of a stack go through the graphs at once.
        footprint: what a product takes, in bytes; None where the model does not run without data.

    Raises:
        ValueError: NaN or infinite x, as many labels as images, labels out of range, nothing trainable, BatchNorm or
            Dropout in training mode, a model that is random, x on another device than the model or
            of a shape that does not fit it, a loss for which J = 0 identically, a layer without a second derivative.
        MemoryError: before any work, where `memory` is too small.

    Source: section 3 of the paper, where J appears in Eq. 3.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, y: Tensor, loss: Loss = F.cross_entropy, method: str = "auto",
        memory: int | None = None,
    ):  # fmt: skip
        checks.one_of("method", method, ("auto", "dense", "matrix-free", "recompute"))
        checks.images_and_labels(x, y)
        self.map = GradientMap(model, y, loss)
        if x.device != self.map.device:
            raise ValueError(f"x is on {x.device} and the model on {self.map.device}; move one of them")
        self.x = x.detach().to(self.map.dtype, copy=True)  # what the caller does to x later must not move J
        self.shape = (self.x.numel(), self.map.size)
        self.memory = memory
        self.footprint = footprint(self.map, self.x)
        group, self.chunk = self._plan(method)
        what = f"x of shape {tuple(x.shape)}"
        checks.repeatable(self.map.check(self.x, what), self.map.check(self.x, what))
        size = self.shape[0] * self.shape[1] * self.x.element_size()
        self.is_dense = method == "dense" or (method == "auto" and size <= DENSE_BYTES)
        self.products = 0
        self._dense: Tensor | None = None
        self._gram: Tensor | None = None
        self.spectrum = None  # kept here by spectrum.decompose
        try:
            kept = Recomputation(self.map, self.x, group) if group else Linearization(self.map, self.x)
            self._at_x = kept.checked()
        except RuntimeError as error:
            raise checks.not_differentiable(model, error) from error
        self.gradient = checks.finite("gradient", self._at_x.gradient)
        size = float(self.gradient.double().norm())
        self.unit = 2.0 ** round(math.log2(size)) if size else 1.0

    def _plan(self, method: str) -> tuple[int, int]:
        """How many images take turns (0: none, the graphs of all are kept), and how many vectors go at once."""
        n = len(self.x)
        if self.footprint is None:
            return int(method == "recompute"), 1
        need, budget = self.footprint, self._budget()
        if method != "recompute" and need.kept() <= budget:
            return 0, min(MOST_AT_ONCE, need.vectors(budget))
        for group in range(n - 1 if n > 1 else 1, 0, -1):
            if need.recomputed(group / n) <= budget:
                return group, 1
        raise MemoryError(
            f"products with J take {_gib(need.kept())}"
            + (f", or {_gib(need.recomputed(1 / n))} with the {n} images one after another" if n > 1 else "")
            + f", and {_gib(budget)} may be used: raise memory=, or take a narrower dtype, fewer or smaller images, "
            "or a device with more memory"
        )

    def _budget(self) -> int:
        return available(self.device) if self.memory is None else self.memory

    def _may_form(self, what: str, numbers: int, dtype: torch.dtype) -> None:
        size, budget = numbers * dtype.itemsize, self._budget()
        if size > budget:
            raise MemoryError(f"{what} takes {_gib(size)}, and {_gib(budget)} may be used: raise memory=, or stay "
                              "with products (method='matrix-free')")  # fmt: skip

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
        return self._in_chunks(self._at_x.matvec, delta)

    def rmatvec(self, v: Tensor) -> Tensor:
        """Jᵀ v: (d_x,) -> (d_θ,), or (k, d_x) -> (k, d_θ). One product a vector."""
        v = checks.flat("v", v, self.shape[0], "input space").to(self.x)
        self.products += v.numel() // self.shape[0]
        if self._dense is not None:
            return v @ self._dense
        return self._in_chunks(self._at_x.rmatvec, v)

    def _in_chunks(self, product: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
        if vectors.ndim == 1:
            return product(vectors)
        if self.chunk > 1:
            try:
                return torch.cat([product(some) for some in vectors.split(self.chunk)])
            except RuntimeError as error:  # an operation without a batching rule
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self.chunk = 1
        return torch.stack([product(one) for one in vectors])

    def dense(self) -> Tensor:
        """J itself, (d_x, d_θ), in the model's dtype; formed once and kept. d_x products."""
        if self._dense is None:
            self._may_form("J", self.shape[0] * self.shape[1], self.dtype)
            self._dense = dense_jacobian(self.map, self.x)
            self.products += self.shape[0]
        return self._dense

    def gram(self) -> Tensor:
        """J Jᵀ, (d_x, d_x), accumulated in float64 whatever the model's dtype; formed once and kept. d_x products,
        unless J is there already."""
        if self._gram is None:
            self._may_form("J Jᵀ", self.shape[0] ** 2, torch.float64)
            if self._dense is None:
                self._may_form("J, which J Jᵀ is made of,", self.shape[0] * self.shape[1], self.dtype)
        if self._gram is None and self._dense is not None:
            self._gram = outer_gram(self._dense.double())
        elif self._gram is None:
            self._gram = jacobian_gram(self.map, self.x, torch.float64)
            self.products += self.shape[0]
        return self._gram


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"
