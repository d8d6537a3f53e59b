"""One layer: its activations from its equations, and the mask above it from both."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from i2f.attacks.recursive import masks
from i2f.attacks.recursive.graph import Graph, Node
from i2f.attacks.recursive.systems import NOISY, ROUNDING, Layer, System, assemble

PASSES = 6  # of solving a layer and deciding the mask above it anew


@dataclass
class Layers:
    """What is known of a network's values at the image that is sought.

    Attributes:
        value: the activations found, by node. spread: their standard deviations. signal: ∂L/∂value. gates: of each
            ReLU's units. layers: what each gave. equations: of each node, the convolutions that take it and the signals
            at their outputs; systems: made of them.
    """

    graph: Graph
    gradient: Mapping[str, Tensor]
    value: dict[str, Tensor] = field(default_factory=dict)
    spread: dict[str, Tensor] = field(default_factory=dict)
    signal: dict[str, Tensor] = field(default_factory=dict)
    gates: dict[str, Tensor] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    noises: list[float] = field(default_factory=list)
    equations: dict[str, list[tuple[str, Tensor]]] = field(default_factory=dict)
    systems: dict[str, list[System]] = field(default_factory=dict)

    @property
    def noise(self) -> float:
        """The relative noise of a tensor's entries: the median over the layers so far."""
        return sorted(self.noises)[len(self.noises) // 2] if self.noises else ROUNDING

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

    def again(self, name: str, values: Mapping[str, Tensor]) -> int:
        """Decides the masks above the node `name` anew, where `values` are a network's at an image that is nearly
        right, and solves the node with them. Returns the number of changed bits."""
        changed = 0
        relus = [node for node in self.graph.nodes.values() if node.kind == "relu"]
        above = {c.name: (node, scale) for node in relus for c, scale in self.graph.convolutions_below(node)}
        for place, (convolution, _) in enumerate(self.equations.get(name, [])):
            conv = self.graph.nodes[convolution]
            if convolution not in above or above[convolution][0].name not in self.value or conv.module.groups > 1:
                continue
            relu, scale = above[convolution]
            full = self.signal[relu.name] * scale
            sigma = self.systems[name][0].sigma
            score = masks.shown(conv, self.gradient[conv.names[0]], full, values[name], sigma, relu.slope)
            if score is None:
                continue
            own = masks.of_values(self.value[relu.name], self.spread[relu.name], relu.slope)
            gate = masks.opened(score + own, relu.slope)
            changed += int((gate != self.gates[relu.name]).sum())
            self.gates[relu.name] = gate
            self.equations[name][place] = convolution, full * gate
        if changed:
            self.solve(name)
        return changed
