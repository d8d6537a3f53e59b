"""From a network's answer down to its input, one layer at a time, in linear systems."""

from dataclasses import dataclass

import torch
from torch import Tensor

from i2f.attacks.recursive import masks, pool
from i2f.attacks.recursive.completion import complete
from i2f.attacks.recursive.graph import Node
from i2f.attacks.recursive.layers import Layers
from i2f.attacks.recursive.systems import NOISY, Layer, System, features_above, top_signal
from i2f.attacks.recursive.tangent import back_through, conv_transpose
from i2f.core.progress import bar

ENOUGH = 0.9  # share of the unknowns from which the features are quicker than a completion of more positions than
SMALL = 256
MOST = 1024  # positions whose activations are completed
CONSISTENT = 1e-6  # relative residual up to which a layer's equations agree with a completion above
COMPLETED = 1e-11  # relative accuracy of completed activations


@dataclass
class Recursion(Layers):
    """The walk from the top to where a layer's system is short of rank.

    Attributes:
        at, stopped: where and why it stopped; "" if it reached the input.
    """

    at: str = ""
    stopped: str = ""
    progress: bool | str = False

    def run(self) -> "Recursion":
        self.pooled, self.completed = "", ("", 0)
        nodes = list(reversed(self.graph.nodes.values()))
        for node in bar(nodes, total=len(nodes), description="recursion", shown=self.progress):
            self.stopped = self.descend(node)
            if self.stopped:
                self.at = node.name
                break
            if self.completed[0] and self.layers[-1].residual > CONSISTENT:
                self.at, place = self.completed
                del self.value[self.at], self.layers[place + 1 :], self.noises[place + 1 :]
                self.layers[place].completed = False
                self.stopped = f"{self.at}: its completion is contradicted by the layers below"
                break
        return self

    def descend(self, node: Node) -> str:
        """The node's part; a reason to stop, or ""."""
        if node.kind == "linear":
            return self.linear(node)
        short = node.name not in self.value and node.name in self.equations and not self.solve(node.name)
        if short and not self.complete(node):
            return (
                f"{node.name}: {self.layers[-1].rank} of {self.layers[-1].unknowns} unknowns per channel are determined"
            )
        known = self.value.get(node.name)
        if node.kind == "input":
            return "" if known is not None else "input: no equations"
        if node.kind == "relu":
            return self.relu(node, known)
        below = self.graph.nodes[node.inputs[0]]
        if node.kind == "conv":
            return self.conv(node)
        if node.kind == "scale" and known is not None:
            self.value[below.name] = (known - node.shift[:, None, None]) / node.scale[:, None, None]
            self.spread[below.name] = self.spread[node.name] / node.scale.abs()[:, None, None]
        if node.kind == "flatten" and known is not None:
            self.value[below.name] = known.reshape(below.shape)
            self.spread[below.name] = self.spread[node.name].expand(known.shape).reshape(below.shape)
        if node.kind == "max":
            return self.maximum(node)
        if node.kind == "add" and known is not None:
            return f"{node.name}: only the sum is known"
        if node.kind == "mean":
            self.pooled = below.name
        weight = node.scale[:, None, None] if node.kind == "scale" else node.scale
        for name in node.inputs:
            self.add(name, back_through(node, self.signal[node.name], below.shape, weight))
        return ""

    @property
    def partial(self) -> list[System]:
        """The systems of the node at which it stopped, where they are short of rank."""
        return [] if self.at in self.value else self.systems.get(self.at, [])

    def add(self, name: str, signal: Tensor) -> None:
        self.signal[name] = self.signal[name] + signal if name in self.signal else signal

    def linear(self, node: Node) -> str:
        G = self.gradient[node.names[0]]
        if node.name == self.graph.output:
            self.signal[node.name] = top_signal(G, self.gradient.get(node.names[1]) if len(node.names) > 1 else None)
        d = self.signal[node.name]
        h, sigma, size = features_above(G, d)
        self.noises.append(sigma / size)
        below = node.inputs[0]
        self.value[below], self.spread[below] = h, (sigma / d.norm()).expand(h.shape)
        self.layers.append(Layer(node.name, 1, 1, sigma / size))
        self.add(below, d @ node.weight)
        return ""

    def conv(self, node: Node) -> str:
        below, d = self.graph.nodes[node.inputs[0]], self.signal[node.name]
        self.equations.setdefault(below.name, []).append((node.name, d))
        self.value.pop(below.name, None)
        if below.kind != "input":
            self.add(below.name, conv_transpose(node, d, node.weight, below.shape))
        return ""

    def complete(self, node: Node) -> bool:
        """The node's activations from their signs and the layers above, where a gradient without noise allows it."""
        systems = self.systems[node.name]
        deep = any(other.kind == "relu" for other in self.graph.needed(list(node.inputs)))
        rank = min(s.rank / s.T.shape[1] for s in systems)
        positions = node.shape[1] * node.shape[2]
        if (node.kind == "relu" and not (deep or node.slope)) or self.noise > NOISY:
            return False
        if positions > (SMALL if rank > ENOUGH else MOST):
            return False
        found = complete(self.graph, node.name, systems, self.graph.relus_above(node.name), self.value, self.spread)
        if found is None:
            return False
        self.value[node.name] = found
        self.spread[node.name] = torch.full_like(found, COMPLETED * float(found.max()))
        self.layers[-1].completed, self.completed = True, (node.name, len(self.layers) - 1)
        return True

    def maximum(self, node: Node) -> str:
        """The signal below a maximum pool, at the units that it took."""
        known = {name: self.value[name] for name in (node.name, *node.users) if name in self.value}
        if not known:
            return f"{node.name}: which unit of a window is its maximum is not known"
        found = pool.below_maximum(self.graph, self.gradient, node, self.signal[node.name], known, self.noise)
        if isinstance(found, str):
            return found
        signal, gate = found
        self.add(node.inputs[0], signal)
        if gate is not None:
            self.gates[node.inputs[0]] = gate
        return ""

    def relu(self, node: Node, known: Tensor | None) -> str:
        signal = self.signal[node.name]
        if node.name in self.gates:  # below a pool
            self.signal[node.inputs[0]] = signal * self.gates[node.name]
            return ""
        if known is not None:
            score = masks.of_values(known, self.spread[node.name], node.slope)
        elif node.name == self.pooled:
            found = pool.scores(self.graph, self.gradient, node, self.signal[node.name], self.noise)
            if isinstance(found, str):
                return found
            score = found
        else:
            return f"{node.name}: nothing determines its units"
        own = score if known is not None else torch.zeros_like(score)
        self.gates[node.name] = gate = masks.opened(score, node.slope)
        if self.noise > NOISY or known is None:
            self.gates[node.name] = gate = self.refined(node, gate, own)
        self.signal[node.inputs[0]] = signal * gate
        return ""
