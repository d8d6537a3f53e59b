"""From a network's answer down to its input, one layer at a time, in linear systems."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from i2f.attacks.recursive import masks, pool
from i2f.attacks.recursive.completion import complete
from i2f.attacks.recursive.graph import Graph, Node
from i2f.attacks.recursive.systems import NOISY, ROUNDING, Layer, System, assemble, top_signal
from i2f.attacks.recursive.tangent import back_through, conv_transpose
from i2f.core.progress import bar

PASSES = 6  # of solving a layer and deciding the mask above it anew
ENOUGH = 0.9  # share of the unknowns from which the features are quicker than a completion of more positions than
SMALL = 256
CONSISTENT = 1e-6  # relative residual up to which a layer's equations agree with a completion above
COMPLETED = 1e-11  # relative accuracy of completed activations


@dataclass
class Recursion:
    """Signals, masks and activations from the top to where a layer's system is short of rank.

    Attributes:
        value: the activations found, by node. spread: their standard deviations. signal: ∂L/∂value. gates: of each
            ReLU's units. at, stopped: where and why it stopped; "" if it reached the input.
    """

    graph: Graph
    gradient: Mapping[str, Tensor]
    value: dict[str, Tensor] = field(default_factory=dict)
    spread: dict[str, Tensor] = field(default_factory=dict)
    signal: dict[str, Tensor] = field(default_factory=dict)
    gates: dict[str, Tensor] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    noises: list[float] = field(default_factory=list)
    at: str = ""
    stopped: str = ""
    progress: bool | str = False

    def run(self) -> "Recursion":
        self.equations: dict[str, list[tuple[str, Tensor]]] = {}
        self.systems: dict[str, list[System]] = {}
        self.pooled, self.completed = "", ("", 0)
        relus = [node for node in self.graph.nodes.values() if node.kind == "relu"]
        self.above = {c.name: node for node in relus for c, _ in self.graph.convolutions_below(node)}
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
            return f"{node.name}: which unit of a window is its maximum is not known"
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
        h = d @ G / (d @ d)
        size = G.norm() / math.sqrt(G.numel())
        sigma = ((G - d[:, None] * h).norm() / math.sqrt(max(G.numel() - len(h), 1))).clamp(min=ROUNDING * size)
        self.noises.append(float(sigma / size))
        below = node.inputs[0]
        self.value[below], self.spread[below] = h, (sigma / d.norm()).expand(h.shape)
        self.layers.append(Layer(node.name, 1, 1, float(sigma * math.sqrt(G.numel()) / G.norm())))
        self.add(below, d @ node.weight)
        return ""

    @property
    def noise(self) -> float:
        """The relative noise of a tensor's entries: the median over the layers so far."""
        return sorted(self.noises)[len(self.noises) // 2] if self.noises else ROUNDING

    def conv(self, node: Node) -> str:
        below, d = self.graph.nodes[node.inputs[0]], self.signal[node.name]
        self.equations.setdefault(below.name, []).append((node.name, d))
        self.value.pop(below.name, None)
        if below.kind != "input":
            self.add(below.name, conv_transpose(node, d, node.weight, below.shape))
        return ""

    def solve(self, name: str) -> bool:
        """The node's activations from all its equations; False where they are short of rank."""
        node = self.graph.nodes[name]
        users = [(self.graph.nodes[conv], signal) for conv, signal in self.equations[name]]
        systems = assemble(node, users, self.gradient)
        values, spreads, residuals, noises = [], [], [], []
        for system in systems:
            a = system.solve()
            if len(system.T) > system.rank and self.noise > NOISY:
                a = system.robust()
            free = len(system.T) - system.rank
            size = system.G.norm() / math.sqrt(system.G.numel()) if system.G.any() else system.S[0]  # dead units above
            sigma = torch.as_tensor(self.noise) * size
            if free > 0.3 * len(system.T):
                sigma = (system.residual.norm() / math.sqrt(free * system.G.shape[1])).clamp(min=ROUNDING * size)
            values.append(a)
            spreads.append((sigma * system.spread).expand(a.shape))
            residuals.append(float(system.residual.norm() / (size * math.sqrt(system.G.numel()))))
            noises.append(float(sigma / size))
            system.sigma = float(sigma)
        worst = min(systems, key=lambda s: s.rank / s.T.shape[1])
        self.layers.append(Layer(name, worst.rank, worst.T.shape[1], max(residuals)))
        self.systems[name] = systems
        if not all(s.full for s in systems):
            return False
        self.value[name] = torch.cat(values).reshape(node.shape)
        self.spread[name] = torch.cat(spreads).reshape(node.shape)
        self.noises.append(max(noises))
        return True

    def complete(self, node: Node) -> bool:
        """The node's activations from their signs and the layers above, where a gradient without noise allows it."""
        systems = self.systems[node.name]
        deep = any(other.kind == "relu" for other in self.graph.needed(list(node.inputs)))
        rank = min(s.rank / s.T.shape[1] for s in systems)
        small = node.shape[1] * node.shape[2] <= SMALL
        if (node.kind == "relu" and not (deep or node.slope)) or self.noise > NOISY or (rank > ENOUGH and not small):
            return False
        found = complete(self.graph, node.name, systems, self.graph.relus_above(node.name), self.value, self.spread)
        if found is None:
            return False
        self.value[node.name] = found
        self.spread[node.name] = torch.full_like(found, COMPLETED * float(found.max()))
        self.layers[-1].completed, self.completed = True, (node.name, len(self.layers) - 1)
        return True

    def relu(self, node: Node, known: Tensor | None) -> str:
        signal = self.signal[node.name]
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

    def refined(self, node: Node, gate: Tensor, own: Tensor) -> Tensor:
        """The mask, decided anew from the gradient of the convolution below, until it stays."""
        below = self.graph.convolutions_below(node)
        if not below:
            return gate
        conv, scale = below[0]
        name = conv.inputs[0]
        full = self.signal[node.name] * scale
        for _ in range(PASSES):
            before = self.equations.get(name, [])
            self.equations[name] = [*before, (conv.name, full * gate)]
            solved = self.solve(name)
            self.equations[name] = before
            self.layers.pop()
            if not solved:
                break
            self.noises.pop()
            G, sigma = self.gradient[conv.names[0]], self.systems[name][0].sigma
            score = masks.shown(conv, G, full, self.value.pop(name), sigma, node.slope)
            new = gate if score is None else masks.opened(score + own, node.slope)
            if torch.equal(new, gate):
                break
            gate = new
        return gate

    def again(self, values: Mapping[str, Tensor]) -> int:
        """Decides the masks above the node at which the recursion stopped anew, where `values` are a network's at an
        image that is nearly right, and assembles that node's system with them. Returns the number of changed bits."""
        changed = 0
        for place, (name, _) in enumerate(self.equations.get(self.at, [])):
            conv, above = self.graph.nodes[name], self.above.get(name)
            if above is None or above.name not in self.value or conv.module.groups > 1:
                continue
            scale = {c.name: s for c, s in self.graph.convolutions_below(above)}[name]
            full = self.signal[above.name] * scale
            sigma = self.systems[self.at][0].sigma
            score = masks.shown(conv, self.gradient[conv.names[0]], full, values[self.at], sigma, above.slope)
            if score is None:
                continue
            own = masks.of_values(self.value[above.name], self.spread[above.name], above.slope)
            gate = masks.opened(score + own, above.slope)
            changed += int((gate != self.gates[above.name]).sum())
            self.gates[above.name] = gate
            self.equations[self.at][place] = name, full * gate
        if changed:
            self.solve(self.at)
        return changed
