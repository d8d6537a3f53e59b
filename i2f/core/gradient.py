"""The map that an attacker inverts: x ↦ g(x) = ∇_θ L(x, θ) for one model, one set of labels and one loss, or what
several steps along such gradients change."""

import copy
import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from i2f._torch import modules
from i2f._torch.operations import carried_out, ordinary
from i2f.core import checks, targets
from i2f.core.flat import by_parameter, joined
from i2f.core.message import LocalSteps
from i2f.core.targets import Loss
from i2f.core.way import Way

__all__ = ["GradientMap", "Loss", "flatten_gradient"]

HALF = (torch.bfloat16, torch.float16)


class GradientMap:
    """g(x) = ∇_θ L(x, θ) as a function of the input alone.

    Args:
        model: any module in evaluation mode; parameters with `requires_grad=False` are left out of θ. The wrappers of
            DataParallel, torch.compile and Opacus are taken off.
        y: one label per image; what `loss` takes as its second argument.
        loss: (model output, y) -> scalar. Default: mean cross-entropy.

    θ is every trainable parameter, flattened and joined in `model.named_parameters()` order. Model and labels are
    copied: what the caller does to them later does not change the map, and the map never changes them. (Where a copy
    does not compute what the module does, as with a patched `forward`, the module itself is used; what a closure holds
    is not copied.) A model in bfloat16 or float16 is computed in float32, with a warning.

    Raises:
        TypeError: model is no module, or y no labels.
        ValueError: no trainable parameter; a BatchNorm or Dropout layer in training mode; complex or missing weights.
    """

    def __init__(self, model: nn.Module, y: Any, loss: Loss = F.cross_entropy):
        if not callable(loss):
            raise TypeError(f"loss is {type(loss).__name__}; it must be a function of (what the model returns, y)")
        self._given: nn.Module | None = modules.unwrapped(model)
        checks.deterministic(self._given)
        self.way, self.unit = Way(), 1.0
        self.message: LocalSteps | None = None
        try:
            self.model = modules.duplicate(self._given)
        except Exception:  # a lock, an open file: it cannot be copied, and may raise anything
            self.model, self.way.bound = self._given, "given"
        self._index()
        if any(p.dtype in HALF for p in self.model.parameters()):
            if self.way.bound:
                raise ValueError(f"model has parameters in {self.dtype} and cannot be copied: convert it with .float()")
            warnings.warn(f"model has parameters in {self.dtype}: its gradient is computed in float32", stacklevel=3)
            self.model = self._given = self.model.float()
            self._index()
        self.loss = targets.moved(loss, self.dtype)
        self.y = targets.as_labels(y, self.dtype)

    def _index(self) -> None:
        """Read θ and its places off the module."""
        named = dict(self.model.named_parameters())
        self.parameters = {name: p.detach() for name, p in named.items() if p.requires_grad}
        self.frozen = {name: p.detach() for name, p in named.items() if not p.requires_grad}
        names = {id(p): name for name, p in named.items()}
        self._slots = {  # a shared layer once, a shared parameter under each of its names
            f"{prefix}.{name}".removeprefix("."): names[id(p)]
            for prefix, module in self.model.named_modules()
            for name, p in module.named_parameters(recurse=False, remove_duplicate=False)
        }
        if not self.parameters:
            raise ValueError("model has no trainable parameter (requires_grad=True): there is no gradient to share")
        self.size = sum(p.numel() for p in self.parameters.values())
        first = next(iter(self.parameters.values()))
        self.dtype, self.device = first.dtype, first.device

    @property
    def given(self) -> nn.Module:
        """The caller's own module."""
        return self.model if self._given is None else self._given

    @property
    def plain(self) -> bool:
        """Whether the network is what its modules say and its parameters can be swapped; otherwise only autograd's own
        graph is right (no layer rules, no function transforms)."""
        return not (self.way.bound or self.way.needs.stopped)

    @property
    def stops(self) -> bool:
        """Whether something that depends on x is kept from the gradient by θ (`operations.Held`)."""
        return self.way.needs.stopped

    def hold(self, stopped: bool) -> None:
        """Whether what the network stops is held, so that J includes it, at the cost of slower products."""
        self.way.needs = dataclasses.replace(self.way.needs, stopped=stopped)

    def scaled(self, unit: float) -> "GradientMap":
        """The map of L/`unit`, x ↦ g(x)/unit, for a power of two; the model is shared, not copied.

        Gradients and J are then of order one, and nothing under- or overflows.
        """
        other = copy.copy(self)
        other.unit = unit
        return other

    def cast(self, dtype: torch.dtype) -> "GradientMap":
        """The same map with parameters, buffers, targets and the loss's own tensors in another precision; itself where
        only the caller's own module computes it."""
        return self if dtype == self.dtype or self.way.bound == "given" else self._moved(dtype)

    def sending(self, message: LocalSteps | None) -> "GradientMap":
        """The map to what local steps change, x ↦ θ₀ − θ_K (over the unit), in the place of the gradient.

        Raises: ValueError where the network's parameters cannot be swapped, or it stops part of its gradient.
        """
        other = copy.copy(self)
        other.message = message
        if message is not None and not self.plain:
            why = "its parameters cannot be swapped" if self.way.bound else "it stops part of its gradient"
            raise ValueError(f"model: {why}, so that no local steps can be followed; give message=None")
        return other

    def without_data(self) -> "GradientMap":
        """The same map on PyTorch's meta device, where tensors have shapes and no values."""
        if self.way.bound == "given":
            raise RuntimeError("the model stays on its device: a copy of it does not compute the same")
        return self._moved("meta")

    def _moved(self, where: torch.dtype | str) -> "GradientMap":
        other = copy.copy(self)
        other.model, other._given = modules.duplicate(self.model, shapes=where == "meta").to(where), None
        other._index()
        other.loss = targets.moved(self.loss, where)
        other.y = targets.to(self.y, where)
        return other

    def relabel(self, y: Any) -> "GradientMap":
        """The same map for other labels; the model is shared, not copied."""
        other = copy.copy(self)
        other.y = targets.as_labels(y, self.dtype)
        return other

    def leaves(self) -> dict[str, Tensor]:
        """θ as the leaves of a new graph: what `value` takes, and gradients are taken by."""
        if self.way.bound:
            return {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return {name: p.detach().requires_grad_() for name, p in self.parameters.items()}

    def output(self, parameters: dict[str, Tensor], x: Tensor) -> Any:
        """The model's output at `x` for these parameters (`leaves`); its buffers do not change."""
        with self._carried_out():
            return self._run(parameters, x)

    def _run(self, parameters: dict[str, Tensor], x: Tensor) -> Any:
        x = x.clone()  # a forward may change it in place
        if self.way.bound:
            return self.model(x)
        buffers = {name: b.detach().clone() for name, b in self.model.named_buffers()}  # it may write to these too
        every = {**parameters, **self.frozen}
        slots = {slot: every[name] for slot, name in self._slots.items()}
        return functional_call(self.model, (slots, buffers), (x,), tie_weights=False)

    @contextmanager
    def _carried_out(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.way.stateful or self.way.bound:
                stack.enter_context(modules.preserved(self.model))
            if self.way.bound:
                stack.enter_context(modules.uncompiled())
            stack.enter_context(carried_out(self.way.needs, self.way.switch))
            yield

    def value(self, parameters: dict[str, Tensor], x: Tensor, y: Tensor | None = None) -> Tensor:
        """L(x, θ), a scalar, over `unit`; for the labels `y` where given, else the map's own."""
        with self._carried_out():  # the loss too: it may stop gradients, or read what a forward left in the module
            return self.loss_of(self._run(parameters, x), y)

    def loss_of(self, output: Any, y: Tensor | None = None) -> Tensor:
        """The loss of a model's output, over `unit`."""
        value = self.loss(output, self.y if y is None else y)
        return value if self.unit == 1 else value / self.unit

    @ordinary()
    def __call__(self, x: Tensor, y: Tensor | None = None, create_graph: bool = False) -> Tensor:
        """g(x), flat (d_θ,); differentiable in x (and in y) with `create_graph`. Cost: one gradient evaluation, or one
        for each local step."""
        x = x.clone() if x.is_inference() else x
        parameters = self.leaves()
        with torch.enable_grad():
            if self.message is not None:
                return joined(self.message.sent(self, parameters, x, y, create_graph))
            return joined(self.by_theta(self.value(parameters, x, y), list(parameters.values()), create_graph))

    def by_theta(self, value: Tensor, leaves: Sequence[Tensor], create_graph: bool) -> tuple[Tensor, ...]:
        """The gradient of a value by leaves of its graph, without what the network stops."""
        if not value.requires_grad:
            raise ValueError(checks.CONSTANT)
        with self.way.switch.stop():
            kept = create_graph or bool(self.way.bound)  # part of the graph may be the module's own
            return torch.autograd.grad(
                value, leaves, retain_graph=kept, create_graph=create_graph, materialize_grads=True
            )

    def split(self, vector: Tensor) -> list[Tensor]:
        """A flat (..., d_θ) vector as one tensor per parameter, in the parameters' own shapes."""
        parts = vector.split([p.numel() for p in self.parameters.values()], dim=-1)
        return [v.reshape(vector.shape[:-1] + p.shape) for v, p in zip(parts, self.parameters.values(), strict=True)]

    def flat(self, name: str, value: Any, batch: bool = True) -> Tensor:
        """A gradient (or δ) as a flat, finite tensor, (d_θ,), or with `batch` also (k, d_θ), in the order of `split`.

        Takes a flat tensor or array, or a list or dictionary by parameter (`flat.by_parameter`).

        Raises: TypeError for anything else, ValueError for missing or unknown names, other shapes, NaN.
        """
        if isinstance(value, np.ndarray) and value.dtype != object:
            value = torch.from_numpy(value)
        if not torch.is_tensor(value):
            names = [key for key, _ in self.model.named_parameters()]
            value = joined(by_parameter(name, value, names, self.parameters))
        return checks.flat(name, value, self.size, "the model's trainable parameter space", batch)


def flatten_gradient(model: nn.Module, gradient: Any) -> Tensor:
    """A gradient as one flat vector, (d_θ,), in the order that every function here takes: that of
    `model.named_parameters()`, trainable ones alone, each in its own memory order.

    Args: gradient: a list of tensors or arrays in that order ([p.grad for p in model.parameters()], None for zeros), a
        dictionary by parameter name, or a vector that is flat already.

    Raises: TypeError, ValueError naming what does not fit.
    """
    return GradientMap(model, None).flat("gradient", gradient, batch=False)
