"""What a network's operations lack for higher derivatives, and what takes their place while J is taken.

Three kinds, each keyed to the operation, whoever calls it:

rewritten   PyTorch's layer norm and weight norm are wrong in the third derivative, instance norm (and batch norm by the
            batch's own statistics) have none, and fused attention has no second: written out in elementary operations.
stopped     `detach`, `.data`, `torch.no_grad()` and a gradient taken in the forward stop the gradient by θ, and hide
            from autograd that what is stopped still depends on x. `Held` stops the one and shows the other.
escaping    `item`, `numpy`, `tolist` take a value out of PyTorch, `data` and `new_tensor` out of autograd, and a few
            operations have derivatives that are not their own: only a numerical check can see what J lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary


@contextmanager
def elementary() -> Iterator[None]:
    """A context in which a network's operations have the derivatives that J, Newton's term and the penalties need."""
    with carried_out(Needs(rewritten=True), Switch()):
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
VALUES = (
    Tensor.item, Tensor.numpy, Tensor.tolist, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.__array__,
)  # fmt: skip
ESCAPES = (
    *VALUES,
    Tensor.backward, Tensor.register_hook, Tensor.new_tensor, Tensor.data.__set__, torch.autograd.backward,
    torch.tensor, torch.fake_quantize_per_tensor_affine, torch.fake_quantize_per_channel_affine,
)  # fmt: skip
RANDOM = ("dropout", "bernoulli", "gumbel", "rrelu")  # in the names of functions whose answer is drawn
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


BELOW = "detach or no_grad, unseen by Python"


class _Below(TorchDispatchMode):
    """Sees what no function mode does, in scripted functions and direct calls of ATen: a `detach` whose result is used
    (autograd detaches what it saves, and uses none of that in a forward), or an operation without a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.detached: dict[int, Tensor] = {}  # kept alive, so that no other takes its place
        self.stops = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        tensors = _tensors(args, kwargs or {})
        self.stops |= any(value._cdata in self.detached for value in tensors)
        attached = any(value.requires_grad for value in tensors)
        self.stops |= attached and not torch.is_grad_enabled()
        out = func(*args, **(kwargs or {}))
        if attached and func is torch.ops.aten.detach.default:
            self.detached[out._cdata] = out
        return out


class Watch(TorchFunctionMode):
    """Finds out what a forward pass needs; nothing is changed. drew: a function was called whose answer is random.

    Args: known: the parameters that a module and its loss have; one made on the way stops gradients unseen.
    """

    def __init__(self, known: Iterable[Tensor] | None = None) -> None:
        super().__init__()
        self.known = None if known is None else {id(p) for p in known}
        self.needs, self.drew, self._below = Needs(), False, _Below()
        self._stopped = WeakTensorKeyDictionary()  # tensors that depend on x or θ, as autograd does not know

    def __enter__(self) -> Watch:
        self._below.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._below.__exit__(*error)
        if self._below.stops and not self.needs.stopped:
            self.needs.escaping.add(BELOW)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():
            raise Unsupported("model's forward enters torch.inference_mode(), which no derivative passes: use "
                              "torch.no_grad() there")  # fmt: skip
        if any(torch.is_autocast_enabled(kind) for kind in AUTOCAST):
            raise Unsupported("model's forward enables autocast, whose few digits leave nothing of J: disable it there")
        self.needs.rewritten |= func in REWRITTEN
        name = getattr(func, "__name__", "")
        self.drew |= any(word in name for word in RANDOM) and _draws(args, kwargs)
        tensors = _tensors(args, kwargs)
        if self.known is not None:
            made = any(isinstance(value, nn.Parameter) and id(value) not in self.known for value in tensors)
            self.needs.escaping |= {"Parameter"} if made else set()
        attached = any(value.requires_grad for value in tensors)
        depends = attached or any(value in self._stopped for value in tensors)
        stops = func in STOPS or _first_order(func, args, kwargs) or not torch.is_grad_enabled()
        scaled = func is F.embedding and kwargs.get("scale_grad_by_freq")  # of which no second derivative knows
        escapes = func in ESCAPES or scaled
        if depends and escapes:
            self.needs.escaping.add("scale_grad_by_freq" if scaled else name)
        elif attached and stops:
            self.needs.stopped = True
        elif func == Tensor.data.__get__:
            self.needs.escaping.add("data")  # what is written into it reaches a tensor that no one sees
        out = func(*args, **kwargs)
        if depends:
            for value in _tensors((out,), {}):
                if value.is_floating_point() and not value.requires_grad:
                    self._stopped[value] = True
                    free = func in REWRITTEN or "new_" in name or name.endswith("_like")
                    if attached and not (stops or escapes or free):
                        self.needs.escaping.add(name)
        return out


class Unsupported(RuntimeError):
    """What a forward does that no derivative passes, in words for its owner."""


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
            raise Unsupported("model's forward calls detach_() on a value that depends on x: use detach()")
        if func in STOPS:
            return self._hold(args[0])
        if func in VALUES:  # called on a value that is stopped, and that is held here
            return func(args[0].detach(), *args[1:], **kwargs)
        if _first_order(func, args, kwargs):
            return tree_map(self._hold, func(*args[:4], *args[5:], **{**kwargs, "create_graph": True}))
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


def _first_order(func: Any, args: tuple, kwargs: dict) -> bool:
    """A gradient taken inside a forward, without a graph of its own."""
    return func is torch.autograd.grad and not (kwargs.get("create_graph") or args[4:5] == (True,))


def _draws(args: tuple, kwargs: dict) -> bool:
    """Whether a dropout is told to train, as it is unless told otherwise, and to drop anything."""
    share = kwargs.get("p", args[1] if len(args) > 1 else None)
    return share != 0 and bool(kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True)))


def _tensors(args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors among arguments, in lists, tuples and dictionaries too."""
    found, left = [], [*args, *kwargs.values()]
    for value in left:  # which grows on the way
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            left.extend(value)
        elif isinstance(value, dict):
            left.extend(value.values())
    return found
