"""J = ∂²L/∂x∂θ as a linear operator: exact products, never formed unless asked."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2f._torch.operations import ordinary
from i2f.core import checks
from i2f.core.dense import Spectrum, dense_jacobian, jacobian_gram, outer_gram, unit_vectors
from i2f.core.examination import Examination
from i2f.core.gradient import GradientMap, Loss
from i2f.core.linearization import SMALL_PROBLEM, Linearization, Recomputation
from i2f.core.memory import MOST_AT_ONCE, Footprint, available, footprint, gib
from i2f.core.message import LocalSteps
from i2f.core.trust import Products, followed, trusted
from i2f.core.units import loss_unit, times

DENSE_BYTES = 2 * 2**30  # J is formed by itself, where it is needed whole, up to this size


class GradientJacobian:
    """The Jacobian of the shared gradient by the private input, J = ∂²L/∂x∂θ, of shape (d_x, d_θ).

        J δ  = ∇_x ⟨∇_θ L, δ⟩      parameter space -> input space    `matvec`
        Jᵀ v = ∇_θ ⟨∇_x L, v⟩      input space -> parameter space    `rmatvec`

    A product costs one backward pass through the kept graphs of both gradients, 1.6 to 1.8 gradient evaluations on a
    ResNet18 (`Linearization`; benchmarks/deep.py); where the graphs of all images do not fit, about three more, some
    images at a time (`Recomputation`). Once `dense()` has run, products are matrix products with it.

    Args:
        model: any module in evaluation mode. x: (n, ...) in [0, 1], cast to the model's dtype.
        y: (n,) labels, or what `loss` takes. loss: (output, y) -> scalar.
        method: "dense" and "matrix-free" say how exact solvers should work; "auto" is dense where J takes at
            most `DENSE_BYTES` (2 GiB). "recompute" is matrix-free without kept graphs, as many images at
            a time as fit.
        memory: bytes that products, and a formed J, may take; None: what is free on the device, 90% of it. How they
            are counted: `i2f.memory`.
        message: what is sent in the gradient's place, θ₀ − θ_K after local steps (`LocalSteps`); J is its Jacobian, and
            `gradient` is the message.

    Attributes:
        shape: (d_x, d_θ). gradient: ∇_θ L(x, θ), flat (d_θ,). x: (n, ...), in pixels.
        products: how often J or Jᵀ was applied, a formed J counting d_x.

    Raises:
        ValueError: NaN or infinite x, another number of labels than of images, labels out of range, nothing trainable,
            BatchNorm or Dropout in training mode, a model that is random, x on another device than the model or
            of a shape that does not fit it, a loss for which J = 0 identically, a layer without a second derivative.
        MemoryError: before any work, where `memory` is too small.

    Source: section 3 of the paper, where J appears in Eq. 3.
    """

    @ordinary()
    def __init__(
        self,
        model: nn.Module,
        x: Tensor | np.ndarray,
        y: Any,
        loss: Loss = F.cross_entropy,
        method: str = "auto",
        memory: int | None = None,
        message: LocalSteps | None = None,
    ):
        checks.one_of("method", method, ("auto", "dense", "matrix-free", "recompute"))
        x = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
        checks.images("x", x)
        single = self.map = GradientMap(model, y, loss)
        checks.one_label_each(x, self.map.y)
        if message is not None:
            message.batches(len(x))  # raises where the schedule does not fit
            if method == "recompute":
                raise ValueError("method='recompute' takes images one after another, which local steps do not allow")
            self.map = single.sending(message)
        if x.device != self.map.device:
            raise ValueError(f"x is on {x.device} and the model on {self.map.device}; move one of them")
        self.x = x.detach().to(self.map.dtype, copy=True)  # what the caller does to x later must not move J
        self.dtype, self.device = self.x.dtype, self.x.device
        self.shape = (self.x.numel(), self.map.size)
        self.memory, self.products = memory, 0
        size = self.shape[0] * self.shape[1] * self.x.element_size()
        self.is_dense = method == "dense" or (method == "auto" and size <= DENSE_BYTES)
        self._method = method
        self._dense: Tensor | None = None
        self._gram: Tensor | None = None
        self._spectrum: Spectrum | None = None
        self._footprint: Footprint | None = None
        small = sum(self.shape) <= SMALL_PROBLEM
        if not small:
            self._plan()  # a MemoryError comes before any work
        examined = Examination(single, self.x, f"x of shape {tuple(x.shape)}")
        self.unit = loss_unit(examined.gradient)
        fits = small and memory is None and method != "recompute"  # whatever the network
        try:
            if message is not None:
                if not examined.confirms(single(self.x)):
                    examined.confirms(single(self.x))
                self.map = followed(single, message, self.x)
            self._at_x = self._built(examined, 0 if fits else self._plan()[0])
        except RuntimeError as error:
            raise checks.not_differentiable(model, error) from error
        self.gradient = times(self.unit, self._at_x.gradient)

    def _built(self, examined: Examination, group: int) -> Products:
        """The products over `unit`, once their gradient is the module's own and their J that of this gradient."""

        def build() -> Products:
            self._scaled = self.map.scaled(self.unit)
            return Recomputation(self._scaled, self.x, group) if group else Linearization(self._scaled, self.x)

        at_x = build()
        if self.map.message is None and not examined.confirms(times(self.unit, at_x.gradient)):
            at_x = build()
        at_x = trusted(self.map, self.x, at_x, build)
        if not examined.gradient.any():  # a stationary θ says nothing about the size of J
            self.unit = loss_unit(at_x.rmatvec(_probe(self.x)))
            at_x = build()
        return at_x

    def __reduce__(self) -> Any:
        graphs = "a GradientJacobian holds graphs, which no copy keeps (its J would be zero)"
        raise TypeError(f"{graphs}: build it from model, x and y where it is used")

    def __repr__(self) -> str:
        d_x, d_theta = self.shape
        return f"GradientJacobian({d_x:,} × {d_theta:,}, {str(self.dtype).removeprefix('torch.')})"

    @property
    def footprint(self) -> Footprint | None:
        """What a product takes, in bytes; None where the model does not run without data."""
        if self._footprint is None:  # asked again after a None: an examination brings the labels into another form
            self._footprint = footprint(self.map, self.x)
        return self._footprint

    @cached_property
    def chunk(self) -> int:
        """How many vectors of a stack go through the graphs at once."""
        return self._plan()[1]

    def _plan(self) -> tuple[int, int]:
        """As `Footprint.plan`; without a footprint, one vector at a time."""
        recompute = self._method == "recompute"
        need = self.footprint
        if need is None:
            return int(recompute), 1
        if self.map.message is not None and need.kept() > self._budget():
            cure = "raise memory=, or use fewer steps, fewer or smaller images, or a narrower dtype"
            through = f"products through the local steps take {gib(need.kept())}"
            raise MemoryError(f"{through}, and {gib(self._budget())} may be used: {cure}")
        return need.plan(len(self.x), self._budget(), keep=not recompute)

    def _budget(self) -> int:
        return available(self.device) if self.memory is None else self.memory

    def _may_form(self, what: str, numbers: int, dtype: torch.dtype) -> None:
        size, budget = numbers * dtype.itemsize, self._budget()
        if size > budget:
            cure = "raise memory=, or stay with products (method='matrix-free')"
            raise MemoryError(f"{what} takes {gib(size)}, and {gib(budget)} may be used: {cure}")

    @ordinary()
    def matvec(self, delta: Tensor) -> Tensor:
        """J δ: (d_θ,) -> (d_x,), or (k, d_θ) -> (k, d_x). One product per vector."""
        delta = self._of_own_dtype("delta", self.map.flat("delta", delta))
        self.products += delta.numel() // self.shape[1]
        if self._dense is not None:
            return delta @ self._dense.T
        return times(self.unit, self._in_chunks(self._at_x.matvec, delta))

    @ordinary()
    def rmatvec(self, v: Tensor) -> Tensor:
        """Jᵀ v: (d_x,) -> (d_θ,), or (k, d_x) -> (k, d_θ). One product per vector."""
        v = self._of_own_dtype("v", checks.flat("v", v, self.shape[0], "input space"))
        self.products += v.numel() // self.shape[0]
        if self._dense is not None:
            return v @ self._dense
        return times(self.unit, self._in_chunks(self._at_x.rmatvec, v))

    def _of_own_dtype(self, name: str, value: Tensor) -> Tensor:
        """In J's dtype, in which it must still be finite."""
        own = value.to(self.x)
        return own if value.dtype == self.dtype else checks.finite(f"{name} in {self.dtype}", own)

    def _in_chunks(self, product: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
        if vectors.ndim == 1:
            return product(vectors)
        if self.chunk > 1:
            try:
                return torch.cat([product(some) for some in vectors.split(self.chunk)])
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # an operation without a batching rule
                self.chunk = 1
        return torch.stack([product(one) for one in vectors])

    @ordinary()
    def dense(self) -> Tensor:
        """J itself, (d_x, d_θ), in the model's dtype; formed once and kept. d_x products."""
        if self._dense is None:
            self._may_form("J", self.shape[0] * self.shape[1], self.dtype)
            J, v = dense_jacobian(self._scaled, self.x), _probe(self.x)
            if not _alike(v @ J, self._at_x.rmatvec(v)):  # a layer that does not compute what its class does
                J = torch.cat([self._in_chunks(self._at_x.rmatvec, e) for e in unit_vectors(self.x, MOST_AT_ONCE)])
            self._dense = times(self.unit, J)
            self.products += self.shape[0]
        return self._dense

    @ordinary()
    def gram(self) -> Tensor:
        """J Jᵀ, (d_x, d_x), accumulated in float64 whatever the model's dtype; formed once and kept. d_x products,
        unless J is there already."""
        if self._gram is None:
            self._may_form("J Jᵀ", self.shape[0] ** 2, torch.float64)
            if self._dense is None:
                self._may_form("J, which J Jᵀ is made of,", self.shape[0] * self.shape[1], self.dtype)
                gram, v = jacobian_gram(self._scaled, self.x, torch.float64), _probe(self.x)
                if _alike(gram @ v.double(), self._at_x.matvec(self._at_x.rmatvec(v))):
                    self.products += self.shape[0]
                    self._gram = gram * self.unit**2
                    return self._gram
            self._gram = outer_gram(self.dense().double())
        return self._gram

    @ordinary()
    def eigh(self) -> Spectrum:
        """Every eigenpair of J Jᵀ, from `gram`, in O(d_x³); computed once and kept."""
        if self._spectrum is None:
            values, vectors = torch.linalg.eigh(checks.finite("J Jᵀ", self.gram()))
            self._spectrum = Spectrum(values.flip(0).clamp_min(0), vectors.flip(1))
        return self._spectrum


def _probe(x: Tensor) -> Tensor:
    """A fixed draw from N(0, I) of input space, (d_x,)."""
    return torch.from_numpy(np.random.default_rng(1).standard_normal(x.numel())).to(x)


def _alike(found: Tensor, wanted: Tensor) -> bool:
    """Whether two ways to the same product agree, up to rounding in their dtype."""
    rounding = 1e-3 if wanted.dtype == torch.float32 else 1e-7
    return float((found.double() - wanted.double()).norm()) <= rounding * float(wanted.double().norm())
