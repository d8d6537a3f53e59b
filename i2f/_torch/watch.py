"""What a forward pass needs for J to be exact (`operations.Needs`), found out by watching one."""

from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from i2f._torch.operations import AUTOCAST, DATA, STOPS, VALUES, Needs, Unsupported, is_first_order
from i2f._torch.rewritten import REWRITTEN

ESCAPES = (
    *VALUES,
    *(Tensor.backward, Tensor.register_hook, Tensor.new_tensor, DATA.__set__, torch.autograd.backward, torch.tensor),
    *(torch.fake_quantize_per_tensor_affine, torch.fake_quantize_per_channel_affine),
)
RANDOM = ("dropout", "bernoulli", "gumbel", "rrelu")  # in the names of functions with random results
BELOW = "detach or no_grad, unseen by Python"


class _Below(TorchDispatchMode):
    """Sees what no function mode does, in scripted functions and direct calls of ATen: an operation without a graph, or
    a `detach` whose result is used (autograd detaches what it saves, and uses none of that in a forward)."""

    def __init__(self) -> None:
        super().__init__()
        self.detached: dict[int, Tensor] = {}  # kept alive, so that no other takes its place
        self.stops = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: PyTorch would import its compiler, seconds of every process, to say that it must not compile this."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = _tensors(args, kwargs or {})
        self.stops |= any(value._cdata in self.detached for value in tensors)
        attached = any(value.requires_grad for value in tensors)
        self.stops |= attached and not torch.is_grad_enabled()
        out = func(*args, **(kwargs or {}))
        if attached and func is torch.ops.aten.detach.default:
            self.detached[out._cdata] = out
        return out


class Watch(TorchFunctionMode):
    """Finds out what a forward pass needs; nothing is changed. drew: a function with a random result was called.

    Args: known: the parameters that a module and its loss have; a parameter made in the forward stops
    gradients, and autograd does not show it.
    """

    def __init__(self, known: Iterable[Tensor] | None = None) -> None:
        super().__init__()
        self.known = None if known is None else {id(p) for p in known}
        self.needs, self.drew, self._below = Needs(), False, _Below()
        self._stopped = WeakTensorKeyDictionary()  # tensors that depend on x or θ without autograd's knowledge

    def __enter__(self) -> Self:
        self._below.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._below.__exit__(*error)
        if self._below.stops and not self.needs.stopped:
            self.needs.escaping.add(BELOW)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():
            why = "enters torch.inference_mode(), which no derivative passes: use torch.no_grad() there"
            raise Unsupported(f"model's forward {why}")
        if any(torch.is_autocast_enabled(kind) for kind in AUTOCAST):
            raise Unsupported("model's forward enables autocast, whose few digits leave nothing of J: disable it there")
        self.needs.rewritten |= func in REWRITTEN
        name = getattr(func, "__name__", "")
        self.drew |= any(word in name for word in RANDOM) and _draws(args, kwargs)
        tensors = _tensors(args, kwargs)
        if self.known is not None and any(isinstance(t, nn.Parameter) and id(t) not in self.known for t in tensors):
            self.needs.escaping.add("Parameter")
        attached = any(value.requires_grad for value in tensors)
        depends = attached or any(value in self._stopped for value in tensors)
        stops = func in STOPS or is_first_order(func, args, kwargs) or not torch.is_grad_enabled()
        scaled = func is F.embedding and kwargs.get("scale_grad_by_freq")  # its second derivative leaves this out
        escapes = func in ESCAPES or scaled
        if depends and escapes:
            self.needs.escaping.add("scale_grad_by_freq" if scaled else name)
        elif attached and stops:
            self.needs.stopped = True
        elif func == DATA.__get__:
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


def _draws(args: Any, kwargs: Any) -> bool:
    """Whether a dropout is asked to train, which is its default, and to drop anything."""
    share = kwargs.get("p", args[1] if len(args) > 1 else None)
    return share != 0 and bool(kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True)))


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors among arguments, in lists, tuples and dictionaries too."""
    found: list[Tensor] = []
    left = [*args, *kwargs.values()]
    for value in left:  # which grows on the way
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            left.extend(value)
        elif isinstance(value, dict):
            left.extend(value.values())
    return found
