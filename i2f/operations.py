"""What a network's operations lack for higher derivatives, and what takes their place while J is taken.

Three kinds, each keyed to the operation, whoever calls it:

rewritten   PyTorch's layer norm and weight norm are wrong in the third derivative, instance norm (and batch norm by the
            batch's own statistics) have none, and fused attention has no second: written out in elementary operations.
stopped     `detach`, `.data`, `torch.no_grad()` and a gradient taken in the forward stop the gradient by θ, and hide
            from autograd that what is stopped still depends on x. `Held` stops the one and shows the other.
escaping    `item`, `numpy`, `tolist` take a value out of PyTorch, and a few operations have derivatives that are not
            their own: only a numerical check can see what J lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map


@contextmanager
def elementary() -> Iterator[None]:
    """A context in which a network's operations have the derivatives that J, Newton's term and the penalties need."""
    with sdpa_kernel(SDPBackend.MATH), _Rewritten():
        yield


@contextmanager
def ordinary() -> Iterator[None]:
    """A context, and decorator: autograd as it is outside of the caller's inference mode, no_grad and autocast."""
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for kind in AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


AUTOCAST = ("cpu", "cuda")


def _layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, cudnn_enable: bool = True,
) -> Tensor:  # fmt: skip
    """As torch.nn.functional.layer_norm, whose names these are."""
    axes = tuple(range(-len(normalized_shape), 0))
    out = _standardized(input, axes, eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _native_layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As torch.native_layer_norm: the output, the mean, and one over the deviation."""
    axes = tuple(range(-len(normalized_shape), 0))
    mean = input.mean(axes, keepdim=True)
    inverse = ((input - mean).square().mean(axes, keepdim=True) + eps).rsqrt()
    return _layer_norm(input, normalized_shape, weight, bias, eps), mean, inverse


def _native_batch_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    training: bool, momentum: float, eps: float, cudnn_enabled: bool = True,
) -> Tensor:  # fmt: skip
    """As torch.batch_norm."""
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _native_instance_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    use_input_stats: bool, momentum: float, eps: float, cudnn_enabled: bool = True,
) -> Tensor:  # fmt: skip
    """As torch.instance_norm."""
    return _instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """As torch.nn.functional.batch_norm; by stored statistics PyTorch's own has every derivative."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    out = _standardized(input, (0, *range(2, input.ndim)), eps)
    return _affine(out, weight, bias)


def _instance_norm(
    input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """As torch.nn.functional.instance_norm."""
    if not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return _affine(_standardized(input, tuple(range(2, input.ndim)), eps), weight, bias)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """As torch._weight_norm: g v/‖v‖, the norm over every axis but `dim`."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _standardized(a: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    centred = a - a.mean(axes, keepdim=True)
    return centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()


def _affine(a: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    channel = [-1] + [1] * (a.ndim - 2)
    a = a if weight is None else a * weight.view(channel)
    return a if bias is None else a + bias.view(channel)


REWRITTEN: dict[Callable, Callable] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    torch.native_layer_norm: _native_layer_norm,
    torch.batch_norm: _native_batch_norm,
    torch.instance_norm: _native_instance_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    torch._weight_norm: _weight_norm,
}
STOPS = (Tensor.detach, Tensor.detach_, Tensor.data.__get__, torch.detach)
ESCAPES = (
    Tensor.item, Tensor.numpy, Tensor.tolist, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.__array__,
    Tensor.backward, Tensor.register_hook, torch.autograd.backward, torch.tensor, torch.fake_quantize_per_tensor_affine,
    torch.fake_quantize_per_channel_affine,
)  # fmt: skip
_set_grad_enabled = torch._C._set_grad_enabled


class _Rewritten(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return REWRITTEN.get(func, func)(*args, **(kwargs or {}))


@dataclass
class Needs:
    """What a forward pass was seen to need: of the kinds above, and nothing by default, since a context costs time at
    every operation. escaping: the names of the operations."""

    rewritten: bool = False
    stopped: bool = False
    escaping: set[str] = field(default_factory=set)


class _UsedDetach(TorchDispatchMode):
    """Sees ATen's own `detach`, which no function mode does, where its result is used: autograd detaches what it saves,
    and uses none of that in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.results: dict[int, Tensor] = {}  # kept alive, so that no other takes its address
        self.used = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.used |= any(id(value) in self.results for value in args)
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.detach.default and args[0].requires_grad:
            self.results[id(out)] = out
        return out


class Watch(TorchFunctionMode):
    """Finds out what a forward pass needs; nothing is changed."""

    def __init__(self) -> None:
        super().__init__()
        self.needs, self._detached = Needs(), _UsedDetach()

    def __enter__(self) -> Watch:
        self._detached.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._detached.__exit__(*error)
        if self._detached.used and not self.needs.stopped:
            self.needs.escaping.add("aten.detach")

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self.needs.rewritten |= func in REWRITTEN
        if torch.is_inference_mode_enabled():
            raise RuntimeError("model's forward enters torch.inference_mode(), which no derivative passes: use "
                               "torch.no_grad() there")  # fmt: skip
        if any(torch.is_autocast_enabled(kind) for kind in AUTOCAST):
            raise RuntimeError(
                "model's forward enables autocast, whose few digits leave nothing of J: disable it there"
            )
        stops = func in STOPS or _first_order(func, kwargs)
        scaled = func is F.embedding and kwargs.get("scale_grad_by_freq")  # of which no second derivative knows
        escapes = func in ESCAPES or scaled
        if (stops or escapes or not torch.is_grad_enabled()) and _attached(args, kwargs):
            self.needs.stopped |= not escapes
            if escapes:
                self.needs.escaping.add("scale_grad_by_freq" if scaled else func.__name__)
        return func(*args, **kwargs)


class Switch:
    """Whether held values stop a gradient (the one by θ) or let it pass (every further one)."""

    def __init__(self) -> None:
        self.stopping = False

    @contextmanager
    def stop(self) -> Iterator[None]:
        before, self.stopping = self.stopping, True
        try:
            yield
        finally:
            self.stopping = before


class _Hold(torch.autograd.Function):
    """The identity, whose derivative is zero while the switch stops, and one otherwise."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, switch: Switch) -> Tensor:
        ctx.switch = switch
        return value.clone()  # what is held may be changed in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        return (None if ctx.switch.stopping else gradient), None


class Held(TorchFunctionMode):
    """A context in which what a forward stops is held instead (`_Hold`): the gradient by θ is the network's own, and
    its derivative by x is exact. Under `no_grad` every operation is held."""

    def __init__(self, switch: Switch):
        super().__init__()
        self.switch, self.off = switch, False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is _set_grad_enabled:
            self.off = not args[0]
            return None
        if func is Tensor.detach_:
            raise RuntimeError("model's forward calls detach_() on a value that depends on x: use detach()")
        if func in STOPS:
            return self._hold(args[0])
        if _first_order(func, kwargs):
            return tree_map(self._hold, func(*args, **{**kwargs, "create_graph": True}))
        out = REWRITTEN.get(func, func)(*args, **kwargs)
        return tree_map(self._hold, out) if self.off else out

    def _hold(self, value: Any) -> Any:
        held = torch.is_tensor(value) and (value.is_floating_point() or value.is_complex())
        return _Hold.apply(value, self.switch) if held and value.requires_grad else value


@contextmanager
def carried_out(needs: Needs, switch: Switch) -> Iterator[None]:
    """The context that a forward with these needs runs in."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if needs.stopped:
            stack.enter_context(Held(switch))
        elif needs.rewritten:
            stack.enter_context(_Rewritten())
        yield


def _first_order(func: Any, kwargs: dict) -> bool:
    """A gradient taken inside a forward, without a graph of its own."""
    return func is torch.autograd.grad and not kwargs.get("create_graph")


def _attached(args: tuple, kwargs: dict) -> bool:
    return any(torch.is_tensor(a) and a.requires_grad for a in tree_flatten((args, kwargs))[0])
