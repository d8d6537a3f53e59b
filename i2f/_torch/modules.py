"""A user's network: its wrappers taken off, copied whatever it holds, and left as it was."""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

WRAPPERS = {  # class name -> (its package, the attribute that holds the network)
    "DataParallel": ("torch", "module"),
    "DistributedDataParallel": ("torch", "module"),
    "OptimizedModule": ("torch", "_orig_mod"),  # torch.compile
    "AbstractGradSampleModule": ("opacus", "_module"),
    "DPDDP": ("opacus", "module"),
}
REFUSED = {  # class name -> (its package, why)
    "ScriptModule": ("torch", "is compiled by torch.jit, which fixes its derivatives: give the Python module"),
    "FullyShardedDataParallel": ("torch", "holds a shard of the parameters: gather the module first"),
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside DataParallel, torch.compile's and Opacus's wrappers; the parameters keep their order.

    Raises: TypeError for what is no module; ValueError for one whose parameters or derivatives are out of reach.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; it must be a torch.nn.Module")
    copied = any(p.is_inference() for p in model.parameters())
    copied |= any(_class(module, WRAPPERS) == "AbstractGradSampleModule" for module in model.modules())
    while (inner := _inner(model)) is not None:
        model = inner
    for path, module in model.named_modules():
        name = _class(module, REFUSED)
        if name:
            raise ValueError(f"model: {path or 'the model'} ({name}) {REFUSED[name][1]}")
    for path, p in model.named_parameters():
        if isinstance(p, nn.UninitializedParameter):
            raise ValueError(f"model: parameter {path} is not initialised: run the model once on an input")
        if p.is_complex():
            cure = "split it into real and imaginary part"
            raise ValueError(f"model: parameter {path} is {p.dtype}; J is defined for real parameters: {cure}")
        if getattr(p, "_post_accumulate_grad_hooks", None):
            raise ValueError(f"model: parameter {path} has a hook on its .grad, which no derivative sees: remove it")
        if p.is_meta:
            raise ValueError(f"model: parameter {path} is on the meta device and has no values: load them first")
    return duplicate(model) if copied else model


def _inner(module: nn.Module) -> nn.Module | None:
    name = _class(module, WRAPPERS)
    return getattr(module, WRAPPERS[name][1]) if name else None


def _class(module: nn.Module, table: dict[str, tuple[str, str]]) -> str:
    """The table's name for a class of the module, or ""; by name, so that no package is imported for it."""
    for kind in type(module).__mro__:
        if kind.__name__ in table and kind.__module__.startswith(table[kind.__name__][0]):
            return kind.__name__
    return ""


def duplicate(model: nn.Module, shapes: bool = False) -> nn.Module:
    """A deep copy without the wrappers inside it and without Opacus's hooks; with `shapes`, parameters and buffers are
    on the meta device, which stores shapes alone.

    What `copy.deepcopy` refuses, tensors that belong to a graph (a pruned or normalised weight, which a hook computes
    at every pass), is copied by value. Tensors made under `torch.inference_mode` become ordinary ones.
    """
    values: dict[int, Any] = {}
    own = [tensor for module in model.modules() for tensor in _tensors(vars(module))]
    for tensor in [*own, *model.parameters(), *model.buffers()]:
        if not tensor.is_leaf or tensor.is_inference():
            values[id(tensor)] = _by_value(tensor)
    if shapes:
        for p in model.parameters():
            values[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        values |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    with torch.inference_mode(False):
        copied = copy.deepcopy(model, values)
        for module in list(copied.modules()):
            _ordinary(module)
            for place, child in module.named_children():
                while (inner := _inner(child)) is not None:
                    setattr(module, place, inner)
                    child = inner
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
                for key, hook in list(hooks.items()):
                    if _package(hook) == "opacus":
                        del hooks[key]
    return copied


def _tensors(attributes: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors among the attributes that are not PyTorch's own, in lists, tuples and dictionaries too."""
    left = [value for name, value in attributes.items() if name not in PYTORCHS]
    while left:
        value = left.pop()
        if torch.is_tensor(value):
            yield value
        elif isinstance(value, dict):
            left.extend(value.values())
        elif isinstance(value, (list, tuple)):
            left.extend(value)


PYTORCHS = frozenset(vars(nn.Module()))


def _by_value(tensor: Tensor) -> Any:
    with torch.inference_mode(False):
        try:
            value = tensor.detach().clone()
        except RuntimeError:  # left behind by a transform that has ended: a hook computes it again
            return None
        return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _ordinary(module: nn.Module) -> None:
    for places in (module._parameters, module._buffers):
        for name, tensor in places.items():
            if tensor is not None and tensor.is_inference():
                places[name] = _by_value(tensor)


def _package(hook: Any) -> str:
    return (getattr(getattr(hook, "func", hook), "__module__", None) or "").split(".")[0]


def has_own_code(model: nn.Module) -> bool:
    """Whether anything runs in a forward that is not a layer of PyTorch's, which keep no state in evaluation mode."""
    return any(
        not type(m).__module__.startswith(("torch.nn.", "i2f._torch.normalize"))
        or ("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks)
        for m in model.modules()
    )


def exported_stops(model: nn.Module) -> set[str]:
    """The operations by which an exported graph (torch.fx, torch.export) stops gradients: calls of ATen's own, which no
    function mode sees."""
    graphs: list[Any] = [module.graph for module in model.modules() if _class(module, {"GraphModule": ("torch", "")})]
    names = {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}
    return {name for name in names if "aten.detach" in name or "set_grad_enabled" in name}


@contextmanager
def preserved(model: nn.Module) -> Iterator[list[bool]]:
    """The module's buffers and Python attributes are afterwards what they were; the list is empty unless an attribute
    had to be put back."""
    kept = [(m, dict(vars(m)), dict(m._buffers), dict(m._parameters)) for m in model.modules()]
    buffers = [b for b in model.buffers() if b.layout == torch.strided and not (b.is_meta or b.is_inference())]
    values = [(b, b.detach().clone()) for b in buffers]
    changed: list[bool] = []
    try:
        yield changed
    finally:
        for module, attributes, buffers_before, parameters in kept:
            _put_back(module._buffers, buffers_before)
            _put_back(module._parameters, parameters)
            if _put_back(vars(module), attributes):
                changed.append(True)
        with torch.no_grad():
            for buffer, value in values:  # an instance norm writes without a new version
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _put_back(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether anything in `now` was another object than `before`; it holds the same ones afterwards."""
    if now.keys() == before.keys() and all(now[name] is value for name, value in before.items()):
        return False
    now.clear()
    now.update(before)
    return True


@contextmanager
def uncompiled() -> Iterator[None]:
    """Parts that torch.compile compiled run as the Python code that they came from."""
    if "torch._dynamo.eval_frame" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
