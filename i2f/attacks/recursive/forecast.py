"""Where the recursion must stop, from a network's shapes alone."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from i2f.attacks.recursive.graph import Graph, Node
from i2f.attacks.recursive.systems import RANK, equations

FACTORED = 1024  # most unknowns whose rank is computed; above, equations are counted
OPEN = 0.5  # share of open units that a rank is computed for


class Determined(NamedTuple):
    """The equations for one channel of a layer's input.

    layer: the node whose value is sought. rank: of the equations that its weight gradients are, at most; exact for
    generic signals where there are up to 1,024 unknowns. unknowns: positions. what: "linear", "convolution", "pool" for
    the mask behind a global average pool, or "maximum" for max pooling, which does not show which unit it took. Behind
    both, the gradient of the convolution below must tell its positions apart: `rank` is its number of output channels
    (or of entries of a patch), at most.
    """

    layer: str
    what: str
    rank: int
    unknowns: int

    @property
    def short(self) -> bool:
        """Whether the recursion cannot read this layer by its own equations."""
        return self.rank < self.unknowns


def forecast(model: nn.Module, shape: Sequence[int]) -> list[Determined]:
    """What each layer of a network determines, from the last to the first; the recursion stops at the first short one.

    Below that, it goes on where the activations follow from the layers above and their signs (`completion`), or with a
    search for the image whose activations agree (`features`), which the forecast says nothing about.

    Args:
        model: in evaluation mode; its weights do not matter. shape: of one image, (1, C, H, W).

    Raises: ValueError for a network that the recursion cannot read.
    """
    graph = Graph(model, tuple(shape))
    found: list[Determined] = []
    for node in reversed(list(graph.nodes.values())):
        users = [graph.nodes[name] for name in node.users]
        convolutions = [user for user in users if user.kind == "conv"]
        if node.kind == "max":
            found.append(_behind(graph, node, graph.nodes[node.inputs[0]], "maximum"))
        elif any(user.kind == "linear" for user in users):
            found.append(Determined(node.name, "linear", 1, 1))
        elif any(user.kind == "mean" for user in users):
            found.append(_behind(graph, node, node, "pool"))
        elif convolutions:
            found.append(Determined(node.name, "convolution", _rank(node, convolutions), node.shape[1] * node.shape[2]))
    return found


def _behind(graph: Graph, node: Node, under: Node, what: str) -> Determined:
    """How many positions behind a pool the convolution below tells apart, by its shape."""
    below = graph.convolutions_below(under) or graph.convolutions_below(node)
    shapes = [conv.weight.flatten(1).shape for conv, _ in below[:1]]
    return Determined(node.name, what, min(*shapes[0]) if shapes else 0, under.shape[1] * under.shape[2])


def _rank(node: Node, convolutions: Sequence[Node]) -> int:
    """Of the equations for one channel, by all convolutions that take it."""
    unknowns = node.shape[1] * node.shape[2]
    rows = [conv.weight[:, 0].numel() // conv.module.groups for conv in convolutions]
    if unknowns > FACTORED or sum(rows) < unknowns // 4:
        return int(min(sum(rows), unknowns))
    generator = torch.Generator().manual_seed(0)
    parts = []
    for conv in convolutions:
        size = (conv.shape[0] // conv.module.groups, *conv.shape[1:])
        signal = torch.randn(size, generator=generator, dtype=torch.float64)
        signal *= torch.rand(size, generator=generator) < OPEN
        parts.append(equations(signal, conv.module, node.shape))
    T = torch.cat(parts)
    squares = torch.linalg.eigvalsh(T.T @ T)
    return int((squares > RANK**2 * squares[-1]).sum())
