"""The derivative of a graph's values by its input, where its kinks stand as they do: a linear map and its transpose."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from i2f.attacks.recursive.graph import Graph, Node, apply


class Tangent:
    """t ↦ ∂values/∂x · t and its transpose, in `dtype`, with every ReLU and maximum as at one point.

    A network of these operations is linear wherever no unit changes its side, so that both products cost one pass each
    and no derivative is taken. gates: for each ReLU's name the factor of each unit, (C, H, W), 0 or 1 where the ReLU is
    itself; anything between smooths it.

    Args:
        graph: wanted: the nodes whose derivatives are asked for. values: of all nodes at the point.
    """

    def __init__(
        self,
        graph: Graph,
        wanted: list[str],
        values: Mapping[str, Tensor],
        gates: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype = torch.float64,
    ):
        self.nodes, self.wanted = graph.needed(wanted), wanted
        self.gates = {
            n.name: (gates or {}).get(n.name, gate(n, values[n.inputs[0]])).to(dtype)
            for n in self.nodes
            if n.kind == "relu"
        }
        self.places = {n.name: maxima(n, values[n.inputs[0]]) for n in self.nodes if n.kind == "max"}
        self.weights = {
            n.name: (n.weight if len(n.weight) else n.scale[:, None, None]).to(dtype)
            for n in self.nodes
            if n.kind in ("conv", "linear", "scale")
        }
        self.shapes = {n.name: n.shape for n in graph.nodes.values()}

    def __call__(self, t: Tensor) -> dict[str, Tensor]:
        """∂values/∂x · t for t of the input's shape, or a stack of them."""
        found: dict[str, Tensor] = {}
        for node in self.nodes:
            u = [found[i] for i in node.inputs]
            if node.kind == "input":
                found[node.name] = t
            elif node.kind == "conv":
                m = node.module
                found[node.name] = F.conv2d(
                    u[0], self.weights[node.name], None, m.stride, m.padding, m.dilation, m.groups
                )
            elif node.kind == "linear":
                found[node.name] = F.linear(u[0], self.weights[node.name])
            elif node.kind == "scale":
                found[node.name] = u[0] * self.weights[node.name]
            elif node.kind == "relu":
                found[node.name] = u[0] * self.gates[node.name]
            elif node.kind == "max":
                places = self.places[node.name]
                found[node.name] = u[0].flatten(-2)[..., *_each(places)].reshape(*u[0].shape[:-3], *node.shape)
            else:
                found[node.name] = apply(node, u)
        return {name: found[name] for name in self.wanted}

    def transpose(self, covectors: Mapping[str, Tensor]) -> Tensor:
        """Σ (∂value/∂x)ᵀ · covector over the wanted nodes."""
        return self.signals(covectors)[self.nodes[0].name]

    def signals(self, covectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same up to every node: what reaches it from the covectors above."""
        found: dict[str, Tensor] = dict(covectors)
        for node in reversed(self.nodes):
            d = found.get(node.name)
            if d is None or node.kind == "input":
                continue
            shape, places = self.shapes[node.inputs[0]], self.places.get(node.name)
            back = back_through(node, d, shape, self.weights.get(node.name, d), self.gates.get(node.name), places)
            for name in node.inputs:
                found[name] = found[name] + back if name in found else back
        return found


def gate(node: Node, u: Tensor) -> Tensor:
    """A ReLU's derivative at u."""
    return (u > 0).to(u.dtype) * (1 - node.slope) + node.slope


def maxima(node: Node, u: Tensor) -> Tensor:
    """The places of a pool's maxima among the H·W positions of its input."""
    m = node.module
    return F.max_pool2d(u, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, return_indices=True)[1]


def back_through(
    node: Node,
    d: Tensor,
    shape: tuple[int, ...],
    weight: Tensor,
    gates: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """The signal at each of a node's inputs, of the given shape, from the signal `d` at its value. weight: the node's
    own, or a scale's factors, in d's precision."""
    if node.kind == "conv":
        return conv_transpose(node, d, weight, shape)
    if node.kind == "linear":
        return d @ weight
    if node.kind == "scale":
        return d * weight
    if gates is not None:
        return d * gates
    if node.kind == "add":
        return d
    if node.kind == "mean":
        _, h, w = shape
        return (d.reshape(-1, 1, 1) / (h * w)).expand(shape)
    if places is not None:
        flat = torch.zeros(shape[0], shape[1] * shape[2], dtype=d.dtype)
        return flat.scatter_add_(1, places.reshape(shape[0], -1), d.reshape(shape[0], -1)).reshape(shape)
    return d.reshape(shape)


def conv_transpose(node: Node, d: Tensor, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A convolution's transpose, onto an input of the given shape."""
    m = node.module
    rest = [
        size - ((out - 1) * s - 2 * p + a * (k - 1) + 1)
        for size, out, s, p, a, k in zip(
            shape[-2:], d.shape[-2:], m.stride, m.padding, m.dilation, m.kernel_size, strict=True
        )
    ]
    return F.conv_transpose2d(d, weight, None, m.stride, m.padding, tuple(rest), m.groups, m.dilation)


def _each(places: Tensor) -> tuple[Tensor, Tensor]:
    channels = torch.arange(places.shape[0])[:, None]
    return channels, places.reshape(places.shape[0], -1)
