"""The map that an attacker inverts, x ↦ g(x) = ∇_θ L(x, θ), and its exact derivative at a point."""

import copy
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

from i2f._torch import modules
from i2f._torch.operations import Needs, Switch, Unsupported, Watch, carried_out, ordinary
from i2f.core import checks, targets
from i2f.core.targets import Loss

__all__ = ["GradientMap", "Loss", "flatten_gradient", "joined"]


@dataclass
class _Way:
    """How a network must be run for its gradient to be its own; found by `GradientMap.examine`, shared by the copies.

    needs: what its operations need. stateful: a forward leaves Python attributes behind, which are put back. bound:
    parameters cannot be swapped (a second name in a list, a patched forward): "copy", the copied module's own are used;
    "given", the caller's. switch: of the values that are held where the network stops its gradient.
    """

    needs: Needs = field(default_factory=Needs)
    stateful: bool = False
    bound: str = ""
    switch: Switch = field(default_factory=Switch)


class GradientMap:
    """g(x) = ∇_θ L(x, θ) for one model, one set of labels and one loss, as a function of the input alone.

    Args:
        model: any module in evaluation mode; parameters with `requires_grad=False` are left out of θ. DataParallel,
            torch.compile's and Opacus's wrappers are taken off.
        y: labels, one an image; what `loss` takes as its second argument.
        loss: (model output, y) -> scalar. Default: mean cross-entropy.

    θ is every trainable parameter, flattened and joined in `model.named_parameters()` order. Model and labels are
    copied: what the caller does to them later does not change the map, and the map never changes them. (Where a copy
    does not compute what the module does, as with a patched `forward`, the module itself is used; and what a closure of
    it holds is not copied.) A model in bfloat16
    or float16 is computed in float32, with a warning; `given_dtype` is its own.

    Raises:
        TypeError: model is no module, or y no labels.
        ValueError: no trainable parameter; a BatchNorm or Dropout layer in training mode; complex or missing weights.
    """

    def __init__(self, model: nn.Module, y: Any, loss: Loss = F.cross_entropy):
        if not callable(loss):
            raise TypeError(f"loss is {type(loss).__name__}; it must be a function of (what the model returns, y)")
        self._given: nn.Module | None = modules.unwrapped(model)
        checks.deterministic(self._given)
        self._way, self.unit = _Way(), 1.0
        try:
            self.model = modules.duplicate(self._given)
        except Exception:  # a lock, an open file: it cannot be copied, and may raise anything
            self.model, self._way.bound = self._given, "given"
        self._index()
        self.given_dtype = self.dtype
        if any(p.dtype in HALF for p in self.model.parameters()):
            if self._way.bound:
                raise ValueError(f"model has parameters in {self.dtype} and cannot be copied: convert it with .float()")
            warnings.warn(f"model has parameters in {self.dtype}: its gradient is computed in float32", stacklevel=3)
            self.model = self._given = self.model.float()
            self._index()
        self.loss = targets.moved(loss, self.dtype)
        self.y = targets.as_labels(y, self.dtype)

    def _index(self) -> None:
        """θ and its places, read off the module."""
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
    def plain(self) -> bool:
        """Whether the network is what its modules say, and its parameters can be swapped: others need autograd's own
        graph (no layer rules, no function transforms)."""
        return not (self._way.bound or self._way.needs.stopped)

    @property
    def stops(self) -> bool:
        """Whether something that depends on x is kept from the gradient by θ (`operations.Held`)."""
        return self._way.needs.stopped

    @property
    def escaping(self) -> set[str]:
        """The operations of the network at which autograd cannot be taken at its word."""
        return self._way.needs.escaping

    def hold(self, stopped: bool) -> None:
        """Whether what the network stops is held, so that J sees it, at the cost of slower products."""
        self._way.needs = dataclasses.replace(self._way.needs, stopped=stopped)

    def scaled(self, unit: float) -> "GradientMap":
        """The map of L/`unit`, a power of two, so that gradients and J are of order one and nothing under- or
        overflows: x ↦ g(x)/unit. The model is shared, not copied."""
        other = copy.copy(self)
        other.unit = unit
        return other

    def cast(self, dtype: torch.dtype) -> "GradientMap":
        """The same map with parameters, buffers, targets and the loss's own tensors in another precision; itself where
        only the caller's own module computes it."""
        return self if dtype == self.dtype or self._way.bound == "given" else self._moved(dtype)

    def to(self, device: torch.device | str) -> "GradientMap":
        """The same map on another device; on "meta", its shapes alone."""
        if self._way.bound == "given":
            raise RuntimeError("the model runs where it is alone: a copy of it does not compute the same")
        return self._moved(device)

    def _moved(self, where: torch.dtype | torch.device | str) -> "GradientMap":
        other = copy.copy(self)
        shapes = where == "meta"
        other.model, other._given = modules.duplicate(self.model, shapes).to(where), None
        other._index()
        other.loss = targets.moved(self.loss, where)
        if torch.is_tensor(self.y) and (self.y.is_floating_point() or not isinstance(where, torch.dtype)):
            other.y = self.y.to(where)
        return other

    def relabel(self, y: Any) -> "GradientMap":
        """The same map for other labels; the model is shared, not copied."""
        other = copy.copy(self)
        other.y = targets.as_labels(y, self.dtype)
        return other

    @ordinary()
    def check(self, x: Tensor, what: str) -> Any:
        """The model's output at `x`, once everything that `examine` and `settle` look at is in order: before an attack
        or a J. Without labels, the output alone is looked at."""
        x = x.clone()  # under inference mode, too, an ordinary tensor
        if self.y is None:
            probe = copy.copy(self)
            probe.y, probe.loss = torch.zeros(()), _any_function
            given = self._given or self.model
            with self._as_given(given):
                output = probe._forward(given, x, what)
            if _numbers(output):
                probe.check(x, what)
                self.model = probe.model
            return output
        output, own = self.examine(x, what)
        try:
            self.settle(x, own, self(x))
        except RuntimeError as error:
            raise checks.not_differentiable(self.model, error, "first") from error
        return output

    def examine(self, x: Tensor, what: str) -> tuple[Any, Tensor]:
        """One forward and one plain backward of the caller's own module: its output, and its gradient, (d_θ,).

        Finds how the network must be run (`_Way`), and the form in which the loss takes the labels. The module is left
        as it was.

        Raises: ValueError about `what` where it does not fit the model, for a loss that does not take the output or y,
        or whatever is not finite.
        """
        given = self._given or self.model
        watch = Watch([*given.parameters(), *(self.loss.parameters() if isinstance(self.loss, nn.Module) else ())])
        versions = {name: p._version for name, p in given.named_parameters()}
        drawn = _random_state(x.device)
        with self._as_given(given) as changed:
            with watch, warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Converting a tensor with requires_grad=True to a scalar")
                output = self._forward(given, x.clone().requires_grad_(), what)
                self._unchanged(given, versions)
                value, self.y = targets.evaluate(self.loss, output, self.y)
            own = self._own(given, value)
        self._first = float(value.detach())
        if not torch.isfinite(own.sum()) and not torch.isfinite(own).all():  # the sum is quick, and may overflow
            raise ValueError(self._not_finite(output, value))
        if not torch.equal(drawn, _random_state(x.device)):
            if watch.drew:
                raise ValueError(checks.DRAWS)
            self._same_again(given, x, own)
        self._way.stateful |= bool(changed)
        watch.needs.escaping |= modules.exported_stops(given)
        self._way.needs = watch.needs
        return output, own

    def _forward(self, given: nn.Module, x: Tensor, what: str) -> Any:
        try:
            return given(x.clone())  # no leaf: a forward may change it in place
        except torch.OutOfMemoryError:
            raise
        except Unsupported as error:
            raise ValueError(str(error)) from error
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            raise ValueError(f"{what} does not fit the model: {type(error).__name__}: {error}") from error
        except Exception as error:  # it may raise anything
            raise ValueError(f"model fails at {what}: {type(error).__name__}: {error}") from error

    def _same_again(self, given: nn.Module, x: Tensor, own: Tensor) -> None:
        """Further passes have the same gradient; a ValueError for a random network, or one that keeps a state."""
        for _ in range(PASSES):  # few draws may be equal by chance
            checks.repeatable(own, self._gradient_of(given, x))

    def _unchanged(self, given: nn.Module, versions: dict[str, int]) -> None:
        """A ValueError where a forward wrote to a parameter, which then gets its value back."""
        written = {name: p for name, p in given.named_parameters() if p._version != versions[name]}
        kept = dict(self.model.named_parameters())
        changed = [name for name, p in written.items() if not torch.equal(p, kept[name])]
        if not changed:
            return
        with torch.no_grad():
            for name in changed:
                written[name].copy_(kept[name])
        raise ValueError(f"model: its forward changes a parameter in place ({', '.join(changed)}), so that there is no "
                         "θ to derive at: apply the change once, before")  # fmt: skip

    def settle(self, x: Tensor, own: Tensor, found: Tensor) -> bool:
        """Whether the gradient `found` at x is the module's own; where it is not, the way to run it is changed so that
        it becomes so, and False is returned.

        Raises: ValueError where a second pass of the module itself gives another gradient: it is random, or keeps a
        state.
        """
        apart = self._apart(own, found)
        if apart <= 1:
            if apart > 0 and self._way.needs == Needs():
                self._warn_of_kernels(x, own)
            if modules.has_own_code(self.model) or not targets.is_pytorchs(self.loss):
                self._keeps_no_state(x)
            return True
        given = self._given or self.model
        self._same_again(given, x, own)
        for bound, module in (("copy", self.model), ("given", given)):
            self._way.bound, self.model = bound, module
            if self._apart(own, self(x)) <= 1:
                return False
        raise ValueError("model: its gradient cannot be computed apart from the module: a forward that keeps a state, "
                         "changes its own parameters, or writes into a tensor under no_grad? Give one whose answer "
                         "depends on x and θ alone")  # fmt: skip

    def _keeps_no_state(self, x: Tensor) -> None:
        """A further pass has the loss of the first; a ValueError for a network that counts its passes, or the like."""
        with torch.enable_grad():  # which a forward may need
            again = self.value(self.leaves(), x).detach() * self.unit
        apart = abs(float(again) - self._first) / (abs(self._first) or 1.0)
        if apart > (1e-3 if x.dtype == torch.float32 else 1e-8):
            raise ValueError(f"model keeps a state: two passes over the same x differ by {apart:.1g} of the loss; give "
                             "one whose answer depends on x and θ alone")  # fmt: skip

    def _warn_of_kernels(self, x: Tensor, own: Tensor) -> None:
        again = self._gradient_of(self._given or self.model, x)
        if not torch.equal(own, again):
            checks.repeatable(own, again)

    def _gradient_of(self, module: nn.Module, x: Tensor) -> Tensor:
        with self._as_given(module):
            return self._own(module, self.loss(module(x.clone().requires_grad_().clone()), self.y))

    @contextmanager
    def _as_given(self, module: nn.Module) -> Iterator[list[bool]]:
        """The module runs as it does for its owner, and is left as it was."""
        way = carried_out(Needs(), self._way.switch)
        with modules.preserved(module) as changed, modules.uncompiled(), torch.enable_grad(), way:
            yield changed

    def _own(self, module: nn.Module, value: Tensor) -> Tensor:
        """∇_θ of a loss of the module, over `unit`, flat."""
        parameters = [p for p in module.parameters() if p.requires_grad]
        if not value.requires_grad:
            raise ValueError("loss depends neither on x nor on θ: its gradient gives nothing away")
        value = value if self.unit == 1 else value / self.unit
        try:
            parts = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise checks.not_differentiable(module, error, "first") from error
        if all(part is None for part in parts):
            raise ValueError(NO_J)
        return joined(
            [torch.zeros_like(p) if part is None else part for p, part in zip(parameters, parts, strict=True)]
        )

    def _apart(self, own: Tensor, found: Tensor) -> float:
        """The largest distance of a parameter's two gradients, in units of what rounding may do; NaN counts as far."""
        if torch.equal(own, found):
            return 0.0
        relative, floor = (1e-3, 1e-5) if own.dtype == torch.float32 else (1e-8, 1e-11)
        whole, worst = floor * float(own.double().norm()), 0.0
        for a, b in zip(self.split(own), self.split(found), strict=True):
            distance = float((a.double() - b.double()).norm())
            allowed = relative * float(a.double().norm()) + whole
            worst = max(worst, distance / allowed if allowed else (0.0 if distance == 0 else float("inf")))
        return worst

    def _not_finite(self, output: Any, value: Tensor) -> str:
        """Which one is NaN or infinite, the first on the way."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        named = [(f"model: {name}", t) for name, t in named]
        tensors = [t for t in tree_flatten(output)[0] if torch.is_tensor(t)]
        named += [("the model's output at this x", t) for t in tensors] + [("the loss at this x", value)]
        for name, tensor in named:
            if not torch.isfinite(tensor.detach()).all():
                bad = int((~torch.isfinite(tensor.detach())).sum())
                return f"{name} has {bad} NaN or infinite entries of {tensor.numel()}; it must be finite"
        return "the gradient has NaN or infinite entries at this x, where model and loss are finite"

    def leaves(self) -> dict[str, Tensor]:
        """θ as the leaves of a new graph: what `value` takes, and gradients are taken by."""
        if self._way.bound:
            return {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return {name: p.detach().requires_grad_() for name, p in self.parameters.items()}

    def output(self, parameters: dict[str, Tensor], x: Tensor) -> Any:
        """The model's output at `x`, with θ given (`leaves`) and buffers out of harm's way."""
        with self._carried_out():
            return self._run(parameters, x)

    def _run(self, parameters: dict[str, Tensor], x: Tensor) -> Any:
        x = x.clone()  # a forward may change it in place
        if self._way.bound:
            return self.model(x)
        buffers = {name: b.detach().clone() for name, b in self.model.named_buffers()}  # it may write to these too
        every = {**parameters, **self.frozen}
        slots = {slot: every[name] for slot, name in self._slots.items()}
        return functional_call(self.model, (slots, buffers), (x,), tie_weights=False)

    @contextmanager
    def _carried_out(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self._way.stateful or self._way.bound:
                stack.enter_context(modules.preserved(self.model))
            if self._way.bound:
                stack.enter_context(modules.uncompiled())
            stack.enter_context(carried_out(self._way.needs, self._way.switch))
            yield

    def value(self, parameters: dict[str, Tensor], x: Tensor, y: Tensor | None = None) -> Tensor:
        """L(x, θ), a scalar, over `unit`; `y` instead of the map's own labels, where given."""
        with self._carried_out():  # the loss too: it may stop gradients, or read what a forward left in the module
            return self.loss_of(self._run(parameters, x), y)

    def loss_of(self, output: Any, y: Tensor | None = None) -> Tensor:
        """The loss of a model's output, over `unit`."""
        value = self.loss(output, self.y if y is None else y)
        return value if self.unit == 1 else value / self.unit

    @ordinary()
    def __call__(self, x: Tensor, y: Tensor | None = None, create_graph: bool = False) -> Tensor:
        """g(x), flat (d_θ,); differentiable in x (and in y) with `create_graph`. Cost: one gradient evaluation."""
        x = x.clone() if x.is_inference() else x
        parameters = self.leaves()
        with torch.enable_grad():
            return joined(self.by_theta(self.value(parameters, x, y), list(parameters.values()), create_graph))

    def by_theta(self, value: Tensor, leaves: Sequence[Tensor], create_graph: bool) -> tuple[Tensor, ...]:
        """The gradient of a value by leaves of its graph, with what the network stops stopped."""
        with self._way.switch.stop():
            kept = create_graph or bool(self._way.bound)  # part of the graph may be the module's own
            return torch.autograd.grad(
                value, leaves, retain_graph=kept, create_graph=create_graph, materialize_grads=True
            )

    def split(self, vector: Tensor) -> list[Tensor]:
        """A flat (..., d_θ) vector as one tensor a parameter, in the parameters' own shapes."""
        parts = vector.split([p.numel() for p in self.parameters.values()], dim=-1)
        return [v.reshape(vector.shape[:-1] + p.shape) for v, p in zip(parts, self.parameters.values(), strict=True)]

    def flat(self, name: str, value: Any, batch: bool = True) -> Tensor:
        """A gradient (or δ) as a flat, finite tensor, (d_θ,), or with `batch` also (k, d_θ), in the order of `split`.

        Takes a flat tensor or array; a list of tensors in the order of `model.named_parameters()`, trainable ones
        alone, or a dictionary by those names, in any order. None stands for zeros, as `p.grad` of an unused parameter.

        Raises: TypeError for anything else, ValueError for missing or unknown names, other shapes, NaN.
        """
        space = "the model's trainable parameter space"
        if isinstance(value, np.ndarray) and value.dtype != object:
            value = torch.from_numpy(value)
        if torch.is_tensor(value):
            return checks.flat(name, value, self.size, space, batch)
        shapes = {key: tuple(p.shape) for key, p in self.parameters.items()}
        if isinstance(value, Mapping):
            value = {key: part for key, part in value.items() if key not in self.frozen}
            if value.keys() != shapes.keys():
                missing, unknown = sorted(shapes.keys() - value.keys()), sorted(map(str, value.keys() - shapes.keys()))
                raise ValueError(
                    f"{name} does not have the model's trainable parameters: "
                    f"missing {', '.join(missing) or 'none'}; unknown {', '.join(unknown) or 'none'}"
                )
            value = [value[key] for key in shapes]
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} is {type(value).__name__}; give a flat ({self.size},) tensor or array, or a list "
                            "or dictionary of the parameters' gradients")  # fmt: skip
        named = list(self.model.named_parameters())
        if len(value) == len(named):  # with the frozen ones
            value = [part for part, (_, p) in zip(value, named, strict=True) if p.requires_grad]
        if len(value) != len(shapes):
            raise ValueError(f"{name} has {len(value)} entries; the model has {len(shapes)} trainable parameters: "
                             f"{', '.join(shapes)}")  # fmt: skip
        parts = []
        for (key, shape), part in zip(shapes.items(), value, strict=True):
            part = self.parameters[key].new_zeros(shape) if part is None else torch.as_tensor(part)
            if tuple(part.shape) != shape:
                raise ValueError(f"{name}: {key} has shape {tuple(part.shape)}; it must be {shape}")
            parts.append(part.detach().to(self.parameters[key]))
        return checks.flat(name, joined(parts), self.size, space, batch)


PASSES = 5
SMALL = 2**18  # numbers in θ and x up to which a problem is simply tried out
NO_J = "∂²L/∂x∂θ is zero: loss must depend on x and on θ, and on both together"
HALF = (torch.bfloat16, torch.float16)


def _random_state(device: torch.device) -> Tensor:
    """Of PyTorch's global generator, which a random forward moves on."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _numbers(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output; none of an object that only the user's loss can read."""
    return [t for t in tree_flatten(output)[0] if torch.is_tensor(t) and t.is_floating_point()]


def _any_function(output: Any, y: Any) -> Tensor:
    """A scalar that depends on every entry of an output, for a network without labels."""
    parts = _numbers(output)
    weights = [torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype, device=t.device).view(t.shape) for t in parts]
    return torch.stack([(t * w).sum() for t, w in zip(parts, weights, strict=True)]).sum()


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors in a row, flat."""
    return torch.cat([part.to_dense().reshape(-1) if part.is_sparse else part.reshape(-1) for part in parts])


def flatten_gradient(model: nn.Module, gradient: Any) -> Tensor:
    """A gradient as one flat vector, (d_θ,), in the order that every function here takes: that of
    `model.named_parameters()`, trainable ones alone, each in its own memory order.

    Args: gradient: a list of tensors or arrays in that order ([p.grad for p in model.parameters()], None for zeros), a
        dictionary by parameter name, or a vector that is flat already.

    Raises: TypeError, ValueError naming what does not fit.
    """
    return GradientMap(model, None).flat("gradient", gradient, batch=False)
