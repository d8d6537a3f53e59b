"""The map that an attacker inverts, x ↦ g(x) = ∇_θ L(x, θ), and its exact derivative at a point."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from i2f import checks

Loss = Callable[[Tensor, Tensor], Tensor]


def elementary(model: nn.Module) -> AbstractContextManager:
    """A context in which the model's LayerNorms are written out in elementary operations.

    PyTorch's own is right up to the second derivative, which J needs, and wrong in the third (2.15), which Newton's
    term and the penalties need. Nothing where the model has none, since such a context costs time at every operation.
    """
    has = any(isinstance(module, nn.LayerNorm) for module in model.modules())
    return _LayerNormWrittenOut() if has else nullcontext()


class _LayerNormWrittenOut(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        written_out = func is F.layer_norm or func is torch.layer_norm
        return (_layer_norm if written_out else func)(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, cudnn_enable: bool = True,
) -> Tensor:  # fmt: skip
    """As torch.nn.functional.layer_norm, whose names these are."""
    axes = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(axes, keepdim=True)
    out = centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


class GradientMap:
    """g(x) = ∇_θ L(x, θ) for one model, one set of labels and one loss, as a function of the input alone.

    Args:
        model: any module in evaluation mode; parameters with `requires_grad=False` are left out of θ.
        y: labels, one an image; what `loss` takes as its second argument.
        loss: (model output, y) -> scalar. Default: mean cross-entropy.

    θ is every trainable parameter, flattened and joined in `model.named_parameters()` order. Model and labels are
    copied: what the caller does to them later does not change the map, and the map never changes them.

    Raises:
        ValueError: no trainable parameter; a BatchNorm or Dropout layer in training mode.
    """

    def __init__(self, model: nn.Module, y: Tensor | None, loss: Loss = F.cross_entropy):
        checks.deterministic(model)
        self.model, self.loss = copy.deepcopy(model), loss
        self.y = y.clone() if torch.is_tensor(y) else y
        named = dict(self.model.named_parameters())
        self.parameters = {name: p.detach() for name, p in named.items() if p.requires_grad}
        self.frozen = {name: p.detach() for name, p in named.items() if not p.requires_grad}
        names = {id(p): name for name, p in named.items()}
        self._slots = {  # a shared layer once, a shared parameter under each of its names
            f"{prefix}.{name}".removeprefix("."): names[id(p)]
            for prefix, module in self.model.named_modules()
            for name, p in module.named_parameters(recurse=False)
        }
        if not self.parameters:
            raise ValueError("model has no trainable parameter (requires_grad=True): there is no gradient to share")
        self.size = sum(p.numel() for p in self.parameters.values())
        first = next(iter(self.parameters.values()))
        self.dtype, self.device = first.dtype, first.device
        self.unit = 1.0

    def scaled(self, unit: float) -> "GradientMap":
        """The map of L/`unit`, a power of two, so that gradients and J are of order one and nothing under- or
        overflows: x ↦ g(x)/unit. The model is shared, not copied."""
        other = copy.copy(self)
        other.unit = unit
        return other

    def flat(self, name: str, value: Any, batch: bool = True) -> Tensor:
        """A gradient (or δ) as a flat, finite tensor, (d_θ,), or with `batch` also (k, d_θ). Takes a flat tensor or
        array, a list of tensors in the parameters' order, or a dictionary by parameter name, in any order."""
        return checks.flat(name, value, self.size, "the model's trainable parameter space", batch)

    def cast(self, dtype: torch.dtype) -> "GradientMap":
        """The same map with parameters, buffers, targets and the loss's own tensors in another precision."""
        return self if dtype == self.dtype else self._moved(dtype)

    def to(self, device: torch.device | str) -> "GradientMap":
        """The same map on another device; on "meta", its shapes alone."""
        return self._moved(device)

    def _moved(self, where: torch.dtype | torch.device | str) -> "GradientMap":
        y = self.y
        if torch.is_tensor(y) and (y.is_floating_point() or not isinstance(where, torch.dtype)):
            y = y.to(where)
        loss = copy.deepcopy(self.loss).to(where) if isinstance(self.loss, nn.Module) else self.loss
        return GradientMap(copy.deepcopy(self.model).to(where), y, loss)

    def relabel(self, y: Tensor | None) -> "GradientMap":
        """The same map for other labels; the model is shared, not copied."""
        other = copy.copy(self)
        other.y = y.clone() if torch.is_tensor(y) else y
        return other

    def check(self, x: Tensor, what: str) -> Tensor:
        """The model's output at `x`; a ValueError about `what` where it does not fit, or where a label is no class."""
        try:
            with torch.no_grad():
                output = self.output(self.parameters, x)
        except (RuntimeError, IndexError, AssertionError) as error:
            raise ValueError(f"{what} does not fit the model: {error}") from error
        if self.y is not None:
            checks.classes_in_range(self.y, output)
        return output

    def output(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        """The model's output at `x`, with θ given and buffers out of harm's way."""
        buffers = {name: b.detach().clone() for name, b in self.model.named_buffers()}  # a forward may write to them
        every = {**parameters, **self.frozen}
        slots = {slot: every[name] for slot, name in self._slots.items()}
        with sdpa_kernel(SDPBackend.MATH), elementary(self.model):  # fused attention has no second derivative
            return functional_call(self.model, (slots, buffers), (x,), tie_weights=False)

    def value(self, parameters: dict[str, Tensor], x: Tensor, y: Tensor | None = None) -> Tensor:
        """L(x, θ), a scalar; `y` instead of the map's own labels, where given."""
        value = self.loss(self.output(parameters, x), self.y if y is None else y)
        if value.ndim != 0:
            raise ValueError(f"loss returned shape {tuple(value.shape)}; it must return one number (reduce it)")
        return value if self.unit == 1 else value / self.unit

    def __call__(self, x: Tensor, y: Tensor | None = None, create_graph: bool = False) -> Tensor:
        """g(x), flat (d_θ,); differentiable in x (and in y) with `create_graph`. Cost: one gradient evaluation."""
        parameters = {name: p.detach().requires_grad_() for name, p in self.parameters.items()}
        with torch.enable_grad():
            value = self.value(parameters, x, y)
            gradient = torch.autograd.grad(
                value, list(parameters.values()), create_graph=create_graph, materialize_grads=True
            )
        return torch.cat([g.reshape(-1) for g in gradient])

    def split(self, vector: Tensor) -> list[Tensor]:
        """A flat (..., d_θ) vector as one tensor a parameter, in the parameters' own shapes."""
        parts = vector.split([p.numel() for p in self.parameters.values()], dim=-1)
        return [v.reshape(*vector.shape[:-1], *p.shape) for v, p in zip(parts, self.parameters.values(), strict=True)]


class Linearization:
    """g(x) = ∇_θ L(x, θ) at one x, and exact products with its Jacobian there.

        J δ  = ∇_x ⟨∇_θ L, δ⟩      parameter space -> input space
        Jᵀ v = ∇_θ ⟨∇_x L, v⟩      input space -> parameter space

    Both gradients' graphs are kept, so that a product costs one backward pass through them. No checks: see
    `GradientJacobian`.
    """

    def __init__(self, gmap: GradientMap, x: Tensor):
        self.gmap, self.x = gmap, x.detach()
        self._theta = {name: p.detach().requires_grad_() for name, p in gmap.parameters.items()}
        self._x = self.x.clone().requires_grad_()
        with torch.enable_grad():
            value = gmap.value(self._theta, self._x)
            if not value.requires_grad:
                raise ValueError("loss depends neither on x nor on θ: its gradient gives nothing away")
            *by_theta, self._by_x = torch.autograd.grad(
                value, [*self._theta.values(), self._x], create_graph=True, materialize_grads=True
            )
        self.gradient = torch.cat([g.detach().reshape(-1) for g in by_theta])
        self._by_theta = [g if g.requires_grad else None for g in by_theta]

    def checked(self) -> "Linearization":
        """Itself, or a ValueError where no path leads from x to ∇_θ L, so that J = 0 at every x; a RuntimeError where
        a path ends at an operation that forbids a second derivative, which would be left out without a word."""
        ends = [g.grad_fn for g in (*self._by_theta, self._by_x) if g is not None]
        if any(node.name() == "torch::autograd::Error" for node in graph_nodes(ends)):
            raise RuntimeError("an autograd.Function of the model is marked once_differentiable")
        constant = not self._by_x.requires_grad or all(g is None for g in self._by_theta)
        if constant or self._backward(torch.zeros_like(self.gradient), allow_unused=True) is None:
            raise ValueError("∂²L/∂x∂θ is zero: loss must depend on x and on θ, and on both together")
        return self

    def matvec(self, delta: Tensor) -> Tensor:
        """J δ, (d_θ,) -> (d_x,), or (k, d_θ) -> (k, d_x) in one pass."""
        many = delta.ndim == 2
        return self._backward(delta, is_grads_batched=many).reshape(*delta.shape[:-1], -1)

    def rmatvec(self, v: Tensor) -> Tensor:
        """Jᵀ v, (d_x,) -> (d_θ,), or (k, d_x) -> (k, d_θ) in one pass."""
        out = torch.autograd.grad(
            self._by_x,
            list(self._theta.values()),
            v.view(*v.shape[:-1], *self._x.shape),
            retain_graph=True,
            materialize_grads=True,
            is_grads_batched=v.ndim == 2,
        )
        return torch.cat([g.reshape(*v.shape[:-1], -1) for g in out], dim=-1)

    def _backward(self, delta: Tensor, **options: bool) -> Tensor:
        pairs = [(g, d) for g, d in zip(self._by_theta, self.gmap.split(delta), strict=True) if g is not None]
        gradients, weights = zip(*pairs, strict=True)
        return torch.autograd.grad(gradients, self._x, weights, retain_graph=True, **options)[0]


def graph_nodes(ends: list[Any]) -> set[Any]:
    """Every node of the autograd graphs that end there; `ends` is used up."""
    seen: set[Any] = set()
    while ends:
        node = ends.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ends.extend(following for following, _ in node.next_functions)
    return seen


class Recomputation:
    """The same products for n images behind one gradient, `group` of them at a time, with no graph kept.

    Where no image's output depends on another, J stacks the images' own Jacobians, each with its weight w in the loss
    (1/n for a mean, 1 for a sum):  J δ = [w₁ J₁ δ; …; w_n J_n δ],  Jᵀ v = Σ w_i J_iᵀ v_i. A product builds the graphs
    of each group anew: the memory of one group, for the time of about three gradients.

    Raises: ValueError where the images' gradients do not add up to the whole one (BatchNorm by the batch's statistics).
    """

    def __init__(self, gmap: GradientMap, x: Tensor, group: int = 1):
        self.gmap, self.x = gmap, x.detach()
        n = len(x)
        self.groups = [slice(first, min(first + group, n)) for first in range(0, n, group)]
        self.gradient = gmap(self.x)
        choices = [(some.stop - some.start) / n for some in self.groups], [1.0] * len(self.groups)
        totals = [torch.zeros_like(self.gradient) for _ in choices]
        for number, some in enumerate(self.groups):
            own = self._map(some)(self.x[some])
            for total, weights in zip(totals, choices, strict=True):
                total += weights[number] * own
        for total, weights in zip(totals, choices, strict=True):
            if float((total - self.gradient).norm()) <= SAME * float(self.gradient.norm()):
                self.weights = weights
                return
        raise ValueError("the images cannot be taken one after another: their gradients, neither their mean nor their "
                         "sum, make that of all. A layer may mix them (BatchNorm by the batch's own statistics), or "
                         "the loss weigh them")  # fmt: skip

    def checked(self) -> "Recomputation":
        """Itself; the first group is looked at."""
        self._at(self.groups[0]).checked()
        return self

    def matvec(self, delta: Tensor) -> Tensor:
        """J δ, (d_θ,) -> (d_x,)."""
        parts = zip(self.weights, self.groups, strict=True)
        return torch.cat([w * self._at(some).matvec(delta) for w, some in parts])

    def rmatvec(self, v: Tensor) -> Tensor:
        """Jᵀ v, (d_x,) -> (d_θ,)."""
        v, total = v.view_as(self.x), torch.zeros_like(self.gradient)
        for w, some in zip(self.weights, self.groups, strict=True):
            total += w * self._at(some).rmatvec(v[some].reshape(-1))
        return total

    def _map(self, some: slice) -> GradientMap:
        return self.gmap.relabel(self.gmap.y[some])

    def _at(self, some: slice) -> Linearization:
        return Linearization(self._map(some), self.x[some])


SAME = 1e-3  # relative, between two ways to sum a gradient in float32
