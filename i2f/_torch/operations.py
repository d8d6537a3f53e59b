"""What a network's operations lack for higher derivatives, and what takes their place while J is computed.

Three kinds, each keyed to the operation, whoever calls it:

rewritten   layers of PyTorch's with a wrong or missing derivative are written out in elementary operations
            (`rewritten`), and fused attention, which has no second derivative, gives way to plain attention.
stopped     `detach`, `.data`, `torch.no_grad()` and a gradient taken in the forward stop the gradient by θ, and hide
            from autograd that what is stopped still depends on x. `Held` keeps the first and undoes the second.
escaping    `item`, `numpy`, `tolist` take a value out of PyTorch, `data` and `new_tensor` out of autograd, and a few
            operations have derivatives that are not their own: only a numerical check can see what J lacks.

`watch.Watch` finds out which of them a forward pass needs.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from i2f._torch.rewritten import REWRITTEN, Rewritten

AUTOCAST = ("cpu", "cuda")
DATA: Any = Tensor.data  # a descriptor, which PyTorch's stubs call a tensor
STOPS = (Tensor.detach, Tensor.detach_, DATA.__get__, torch.detach)
VALUES = (
    *(Tensor.item, Tensor.numpy, Tensor.tolist),
    *(Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.__array__),
)
_set_grad_enabled = torch._C._set_grad_enabled


@dataclass
class Needs:
    """What a forward pass needs, of the kinds above; nothing by default, since a context costs time at every operation.

    escaping: the names of the operations.
    """

    rewritten: bool = False
    stopped: bool = False
    escaping: set[str] = field(default_factory=set)


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
    """A context in which what a forward stops is held instead (`_Hold`).

    The gradient by θ is then the network's own, and its derivative by x is exact. Under `no_grad` every operation is
    held.
    """

    def __init__(self, switch: Switch):
        super().__init__()
        self.switch, self.off = switch, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _set_grad_enabled:
            self.off = not args[0]
            return None
        if func is Tensor.detach_:
            raise Unsupported("model's forward calls detach_() on a value that depends on x: use detach()")
        if func in STOPS:
            return self._hold(args[0])
        if func in VALUES:  # of a value that the network stops, and that is held here
            return func(args[0].detach(), *args[1:], **kwargs)
        if is_first_order(func, args, kwargs):
            return tree_map(self._hold, func(*args[:4], *args[5:], **{**kwargs, "create_graph": True}))
        out = REWRITTEN.get(func, func)(*args, **kwargs)
        return tree_map(self._hold, out) if self.off else out

    def _hold(self, value: Any) -> Any:
        held = torch.is_tensor(value) and (value.is_floating_point() or value.is_complex())
        return _Hold.apply(value, self.switch) if held and value.requires_grad else value


def is_first_order(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether this is a gradient taken inside a forward, without a graph of its own."""
    return func is torch.autograd.grad and not (kwargs.get("create_graph") or args[4:5] == (True,))


@contextmanager
def carried_out(needs: Needs, switch: Switch) -> Iterator[None]:
    """The context that a forward with these needs runs in."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if needs.stopped:
            stack.enter_context(Held(switch))
        elif needs.rewritten:
            stack.enter_context(Rewritten())
        yield


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
