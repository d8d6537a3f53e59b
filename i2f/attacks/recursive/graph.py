"""A network as a graph of elementary operations, which the recursion walks from its answer down to its input."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from i2f._torch.normalize import Normalize

IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout2d)
ADDITIONS = (operator.add, operator.iadd, torch.add)
SAME = 1e-3  # relative difference up to which the graph's answer is the network's own, which may be in float32
NOTHING = torch.empty(0)


@dataclass
class Node:
    """One operation, with what it needs in float64.

    kind: "input", "conv", "linear", "scale" (t = scale · u + shift per channel), "relu", "add", "mean" (the average
    over all positions), "max" (pooling) or "flatten". shape: of its value for one image, without the batch. users: the
    nodes that take its value. names: of weight and bias among the network's parameters.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    module: Any = None
    weight: Tensor = NOTHING
    bias: Tensor | None = None
    scale: Tensor = NOTHING
    shift: Tensor = NOTHING
    slope: float = 0.0
    names: tuple[str, ...] = ()
    users: list[str] = field(default_factory=list)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return isinstance(m, Normalize) or super().is_leaf_module(m, qualified_name)


def trace(model: nn.Module) -> fx.Graph:
    """The network's calls, by names that `Graph` shares."""
    return _Tracer().trace(model)


class Graph:
    """The operations of a network in the order of its forward pass.

    Args:
        model: in evaluation mode. shape: of its input, (1, C, H, W).

    Raises: ValueError with the module's name for an operation that the recursion does not know, a network that
    `torch.fx` cannot trace, or one whose forward is not what the graph computes.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, ...]):
        self.nodes: dict[str, Node] = {}
        try:
            graph = trace(model)
        except Exception as error:  # control flow on values: whatever the forward raises under symbolic values
            raise ValueError(f"model cannot be read as a graph of operations ({error}): give another method") from error
        traced = fx.GraphModule(model, graph)
        parameter = next(model.parameters())
        probe = torch.linspace(-1, 1, torch.Size(shape).numel())
        probe = probe.reshape(shape).to(parameter)
        with torch.no_grad():
            ShapeProp(traced).propagate(probe)
            self._read(graph, dict(traced.named_modules()), {id(p): name for name, p in model.named_parameters()})
            answer, own = model(probe), self.values(probe[0].double())[self.output]
        if not torch.allclose(answer[0].double(), own, rtol=SAME, atol=SAME * float(own.abs().max())):
            raise ValueError("model computes another answer than its graph of operations: give another method")

    def _read(self, graph: fx.Graph, modules: Mapping[str, nn.Module], names: Mapping[int, str]) -> None:
        same: dict[str, str] = {}  # a node that changes nothing -> the one it stands for
        seen: set[int] = set()
        for step in graph.nodes:
            inputs = tuple(same.get(a.name, a.name) for a in step.all_input_nodes)
            if step.op == "output":
                self.output = inputs[0]
                break
            if step.op == "placeholder":
                kind: str | None = "input"
                found: dict[str, Any] = {}
            elif step.op == "call_module":
                module = modules[step.target]
                if isinstance(module, IDENTITIES):
                    same[step.name] = inputs[0]
                    continue
                kind, found = _module(module, names)
                if found.get("weight") is not None:
                    if id(module) in seen:
                        raise ValueError(f"model uses module {step.target!r} twice: its gradient is a sum")
                    seen.add(id(module))
            else:
                kind, found = _function(step)
            size = tuple(step.meta["tensor_meta"].shape[1:])
            if kind is None:
                what = (
                    getattr(step.target, "__name__", step.target)
                    if step.op != "call_module"
                    else f"{step.target} ({type(modules[step.target]).__name__})"
                )
                raise ValueError(f"the recursion does not know {what}: give method='gauss-newton' or another")
            if kind == "mean" and self.nodes[inputs[0]].shape == size:
                same[step.name] = inputs[0]  # a pool over one position
                continue
            if kind == "mean" and size[1:] not in ((), (1, 1)):
                raise ValueError(f"the recursion knows averages over all positions only, and {step.target} has {size}")
            self.nodes[step.name] = Node(step.name, kind, inputs, size, **found)
            for name in inputs:
                self.nodes[name].users.append(step.name)
        if self.nodes[self.output].kind != "linear":
            raise ValueError("model does not end in a linear layer, where the recursion starts: give another method")
        for name in reversed(list(self.nodes)):  # what the answer does not use is no part of it
            if not self.nodes[name].users and name != self.output:
                for above in self.nodes.pop(name).inputs:
                    self.nodes[above].users.remove(name)

    def values(self, x: Tensor, upto: str | None = None) -> dict[str, Tensor]:
        """Every node's value at x, (C, H, W) or a stack of images, up to and with the node `upto`."""
        found: dict[str, Tensor] = {}
        for name, node in self.nodes.items():
            found[name] = x if node.kind == "input" else apply(node, [found[i] for i in node.inputs])
            if name == upto:
                break
        return found

    def relus_above(self, name: str) -> list[str]:
        """The nearest ReLUs above a node."""
        found: set[str] = set()
        open_ = list(self.nodes[name].users)
        while open_:
            node = self.nodes[open_.pop()]
            if node.kind == "relu":
                found.add(node.name)
            else:
                open_ += node.users
        return [n for n in self.nodes if n in found]

    def convolutions_below(self, node: Node) -> list[tuple[Node, Tensor]]:
        """The convolutions below a ReLU, not behind another one, that with the most equations first, each with the
        factor between the signals at the two."""
        found: list[tuple[Node, Tensor]] = []
        ones = torch.ones(node.shape[0], 1, 1, dtype=torch.float64)
        open_ = [(name, ones) for name in node.inputs]
        while open_:
            name, scale = open_.pop()
            at = self.nodes[name]
            if at.kind == "scale":
                open_.append((at.inputs[0], scale * at.scale[:, None, None]))
            elif at.kind == "add":
                open_ += [(i, scale) for i in at.inputs]
            elif at.kind == "conv" and at.module.groups == 1:
                found.append((at, scale))
        return sorted(found, key=lambda f: -f[0].weight[:, 0].numel())

    def needed(self, wanted: list[str]) -> list[Node]:
        """The nodes that those wanted depend on, in order."""
        found, open_ = set(), list(wanted)
        while open_:
            name = open_.pop()
            if name not in found:
                found.add(name)
                open_ += self.nodes[name].inputs
        return [node for name, node in self.nodes.items() if name in found]


def apply(node: Node, inputs: list[Tensor]) -> Tensor:
    """The node's value for one image or a stack of them (a leading dimension)."""
    u, m = inputs[0], node.module
    stacked = u.ndim > len(node.shape) if node.kind not in ("flatten", "mean") else u.ndim == 4
    if node.kind == "conv":
        weight, bias = node.weight.to(u.dtype), None if node.bias is None else node.bias.to(u.dtype)
        return F.conv2d(u, weight, bias, m.stride, m.padding, m.dilation, m.groups)
    if node.kind == "linear":
        return F.linear(u, node.weight.to(u.dtype), None if node.bias is None else node.bias.to(u.dtype))
    if node.kind == "scale":
        return u * node.scale.to(u.dtype)[:, None, None] + node.shift.to(u.dtype)[:, None, None]
    if node.kind == "relu":
        return F.leaky_relu(u, node.slope) if node.slope else F.relu(u)
    if node.kind == "add":
        return inputs[0] + inputs[1]
    if node.kind == "mean":
        return u.mean((-2, -1)).reshape(*u.shape[: u.ndim - 3], *node.shape)
    if node.kind == "max":
        return F.max_pool2d(u, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode)
    return u.reshape(*u.shape[:1], -1) if stacked else u.reshape(-1)


def _module(module: nn.Module, names: Mapping[int, str]) -> tuple[str | None, dict[str, Any]]:
    if isinstance(module, nn.Conv2d | nn.Linear):
        kind = "conv" if isinstance(module, nn.Conv2d) else "linear"
        if (
            type(module).forward not in (nn.Conv2d.forward, nn.Linear.forward)
            or getattr(module, "padding_mode", "zeros") != "zeros"
        ):
            return None, {}
        if isinstance(getattr(module, "padding", 0), str):
            return None, {}
        bias = None if module.bias is None else module.bias.detach().double()
        own = tuple(names[id(p)] for p in (module.weight, module.bias) if p is not None)
        return kind, {"module": module, "weight": module.weight.detach().double(), "bias": bias, "names": own}
    if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
        scale = (module.running_var.double() + module.eps).rsqrt()
        scale = scale if module.weight is None else scale * module.weight.detach().double()
        shift = 0.0 if module.bias is None else module.bias.detach().double()
        return "scale", {"scale": scale, "shift": shift - scale * cast(Tensor, module.running_mean).double()}
    if isinstance(module, Normalize):
        std, mean = module.std.double().flatten(), module.mean.double().flatten()
        return "scale", {"scale": 1 / std, "shift": -mean / std}
    if isinstance(module, nn.ReLU):
        return "relu", {}
    if isinstance(module, nn.LeakyReLU):
        return "relu", {"slope": float(module.negative_slope)}
    if isinstance(module, nn.AdaptiveAvgPool2d | nn.AvgPool2d):
        return "mean", {}
    if isinstance(module, nn.MaxPool2d) and not module.return_indices:
        return "max", {"module": module}
    if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
        return "flatten", {}
    return None, {}


def _function(step: fx.Node) -> tuple[str | None, dict[str, Any]]:
    if step.op == "call_function" and step.target in ADDITIONS and len(step.all_input_nodes) == 2:
        return "add", {}
    if step.target in (torch.flatten, "flatten") and step.args[1:] in ((1,), (1, -1)):
        return "flatten", {}
    if step.target in (torch.relu, F.relu, F.relu_, "relu", "relu_"):
        return "relu", {}
    if step.target is F.leaky_relu:
        slope: Any = step.kwargs.get("negative_slope", (*step.args, 0.01, 0.01)[1])
        return "relu", {"slope": float(slope)}
    return None, {}
