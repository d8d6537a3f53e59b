"""From a network's answer down to its input, one layer at a time, in linear systems."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from i2f.attacks.recursive import masks, pool
from i2f.attacks.recursive.completion import complete
from i2f.attacks.recursive.graph import Graph, Node
from i2f.attacks.recursive.systems import System, equations, patches
from i2f.attacks.recursive.tangent import back_through, conv_transpose

ROUNDING = 1e-14  # relative error of a gradient without noise
NOISY = 10 * ROUNDING  # relative noise above which masks may be wrong
PASSES = 6  # of solving a layer and deciding the mask above it anew
ENOUGH = 0.9  # share of the unknowns from which the features are quicker than a completion
COMPLETED = 1e-11  # relative accuracy of completed activations
OUTLIER = 3.0  # an output channel whose residual is so many medians has a wrong mask: its equations count less


@dataclass
class Layer:
    """What one layer gave: `rank` of `unknowns` per channel, the relative residual of its equations, and whether what
    they leave open was completed."""

    name: str
    rank: int
    unknowns: int
    residual: float
    completed: bool = False


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

    def run(self) -> "Recursion":
        self.equations: dict[str, list[tuple[str, Tensor]]] = {}
        self.systems: dict[str, list[System]] = {}
        self.pooled = ""
        for node in reversed(list(self.graph.nodes.values())):
            self.stopped = self.descend(node)
            if self.stopped:
                self.at = node.name
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

    def assembled(self, name: str) -> list[System]:
        """The equations of a node's channels, stacked over the convolutions that take it."""
        node, users = self.graph.nodes[name], [(self.graph.nodes[c], d) for c, d in self.equations[name]]
        finest = max(conv.module.groups for conv, _ in users)
        size = node.shape[0] // finest
        found = []
        for block in range(finest):
            channels = slice(block * size, (block + 1) * size)
            T, G, rows = [], [], []
            for conv, d in users:
                m, G_all = conv.module, self.gradient[conv.names[0]]
                group = channels.start * m.groups // node.shape[0]
                outputs = m.out_channels // m.groups
                mine = slice(group * outputs, (group + 1) * outputs)
                inside = slice(channels.start - group * G_all.shape[1], channels.stop - group * G_all.shape[1])
                T.append(equations(d[mine], m, node.shape))
                G.append(G_all[mine, inside].permute(0, 2, 3, 1).reshape(T[-1].shape[0], -1))
                rows += [len(T[-1]) // outputs] * outputs
            found.append(System(channels, torch.cat(T), torch.cat(G), rows))
        return found

    def solve(self, name: str) -> bool:
        """The node's activations from all its equations; False where they are short of rank."""
        node, systems = self.graph.nodes[name], self.assembled(name)
        values, spreads, residuals, noises = [], [], [], []
        for system in systems:
            a = system.solve()
            if len(system.T) > system.rank and self.noise > NOISY:
                a = self.robust(system, a)
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
        if node.kind != "relu" or not deep or self.noise > NOISY or rank > ENOUGH:
            return False
        found = complete(self.graph, node.name, systems, self.graph.relus_above(node.name), self.value, self.spread)
        if found is None:
            return False
        self.value[node.name] = found
        self.spread[node.name] = torch.full_like(found, COMPLETED * float(found.max()))
        self.layers[-1].completed = True
        return True

    def robust(self, system: System, a: Tensor) -> Tensor:
        """The solution with less weight on the output channels whose residuals stand out."""
        rank = system.rank
        for _ in range(3):
            each = system.residual.square().mean(1).split(system.rows)
            size = torch.stack([part.mean().sqrt() for part in each])
            weight = 1 / (size / (OUTLIER * size.median())).clamp(min=1).square()
            if bool((weight == 1).all()):
                break
            a = system.solve(weight.repeat_interleave(torch.tensor(system.rows)))
            if system.rank < rank:
                return system.solve()
        return a

    def relu(self, node: Node, known: Tensor | None) -> str:
        signal = self.signal[node.name]
        if known is not None:
            score = masks.of_values(known, self.spread[node.name], node.slope)
        elif node.name == self.pooled:
            found = self.behind_pool(node)
            if isinstance(found, str):
                return found
            score = found
        else:
            return f"{node.name}: nothing determines its units"
        own = score if known is not None else torch.zeros_like(score)
        self.gates[node.name] = gate = opened(score, node.slope)
        if self.noise > NOISY or known is None:
            self.gates[node.name] = gate = self.refined(node, gate, own)
        self.signal[node.inputs[0]] = signal * gate
        return ""

    def refined(self, node: Node, gate: Tensor, own: Tensor) -> Tensor:
        """The mask, decided anew from the gradient of the convolution below, until it stays."""
        below = self.below(node)
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
            score = self.shown(conv, full, self.value.pop(name), self.systems[name][0].sigma, node.slope)
            new = gate if score is None else opened(score + own, node.slope)
            if torch.equal(new, gate):
                break
            gate = new
        return gate

    def shown(self, conv: Node, full: Tensor, value: Tensor, sigma: float, slope: float) -> Tensor | None:
        """Scores of the units above a convolution whose input is `value`, from its weight gradient: G_o = Σ_p δ_o(p)
        patch(p) has fewer unknowns δ_o than equations. None where it has not."""
        A, G = patches(value, conv.module), self.gradient[conv.names[0]].flatten(1)
        if A.shape[1] > A.shape[0]:
            return None
        inverse = torch.linalg.inv(A.T @ A)
        measured = (G @ A) @ inverse
        measured = measured + ((G - measured @ A.T) @ A) @ inverse
        wide = full.reshape(measured.shape)
        score = masks.of_signals(measured / wide, sigma * inverse.diagonal().sqrt() / wide.abs(), slope)
        return score.reshape(full.shape)

    def again(self, values: Mapping[str, Tensor]) -> int:
        """Decides the masks above the node at which the recursion stopped anew, where `values` are a network's at an
        image that is nearly right, and assembles that node's system with them. Returns the number of changed bits."""
        changed = 0
        for place, (name, _) in enumerate(self.equations.get(self.at, [])):
            conv = self.graph.nodes[name]
            above = next(
                (
                    n
                    for n in self.graph.nodes.values()
                    if n.name in self.gates and conv in [c for c, _ in self.below(n)]
                ),
                None,
            )
            if above is None or above.name not in self.value:
                continue
            scale = {c.name: s for c, s in self.below(above)}[name]
            full = self.signal[above.name] * scale
            score = self.shown(conv, full, values[self.at], self.systems[self.at][0].sigma, above.slope)
            if score is None:
                continue
            own = masks.of_values(self.value[above.name], self.spread[above.name], above.slope)
            gate = opened(score + own, above.slope)
            changed += int((gate != self.gates[above.name]).sum())
            self.gates[above.name] = gate
            self.equations[self.at][place] = name, full * gate
        if changed:
            self.solve(self.at)
        return changed

    def below(self, node: Node) -> list[tuple[Node, Tensor]]:
        """The convolutions below a ReLU, not behind another one, that with the most equations first, each with the
        factor between the signals at the two."""
        found: list[tuple[Node, Tensor]] = []
        ones = torch.ones(node.shape[0], 1, 1, dtype=torch.float64)
        open_ = [(name, ones) for name in node.inputs]
        while open_:
            name, scale = open_.pop()
            at = self.graph.nodes[name]
            if at.kind == "scale":
                open_.append((at.inputs[0], scale * at.scale[:, None, None]))
            elif at.kind == "add":
                open_ += [(i, scale) for i in at.inputs]
            elif at.kind == "conv" and at.module.groups == 1:
                found.append((at, scale))
        return sorted(found, key=lambda f: -f[0].weight[:, 0].numel())

    def behind_pool(self, node: Node) -> Tensor | str:
        """Scores of the units behind a global average pool."""
        positions, below = node.shape[1] * node.shape[2], self.below(node)
        if not below:
            return f"{node.name}: no convolution below the pool"
        conv, scale = below[0]
        full = (self.signal[node.name] * scale).flatten(1)[:, :1]
        G = self.gradient[conv.names[0]].flatten(1)
        strong = full.abs()[:, 0] > 0.1 * full.abs().median()
        U, S = pool.span(G[strong], positions)
        sigma = self.noise * G.norm() / math.sqrt(G.numel())
        level = 2 * sigma * (math.sqrt(len(G)) + math.sqrt(G.shape[1]))  # twice the largest singular value of the noise
        rank = int((level < S).sum())
        if rank < positions:
            return f"{node.name}: only {rank} of {positions} positions behind the pool can be told apart"
        found = pool.columns(U / full[strong])
        if found is None:
            return f"{node.name}: the {positions} masks behind the pool are not found"
        A = torch.linalg.lstsq(found * full[strong], G[strong]).solution
        M = (G / full) @ A.T @ torch.linalg.inv(A @ A.T)
        place = self.places(conv, (M > 0.5) * full, A, node.shape[1:])
        if place is None:
            return f"{node.name}: behind 1×1 convolutions alone, the order of the positions is not known"
        score = torch.empty_like(M)
        score[:, place] = M - 0.5
        return score.reshape(node.shape)

    def places(self, conv: Node, signal: Tensor, A: Tensor, size: tuple[int, ...]) -> Tensor | None:
        """Where the patches A, (P, C·k·k), of a convolution's input stand in a map of that size, for the signal (O, P)
        at its output. The patches of a 1×1 convolution do not overlap: those of the convolution before it are found
        with the mask that they show."""
        while conv.module.kernel_size == (1, 1):
            above = self.graph.nodes[conv.inputs[0]]
            below = self.below(above) if above.kind == "relu" else []
            if not below or below[0][0].module.stride != (1, 1):
                return None
            gate = (
                opened(A.T - 1e-3 * A.abs().max(), above.slope)
                if self.noise > NOISY
                else opened(A.T - 1e-9 * A.abs().max(), above.slope)
            )
            signal = conv.weight[:, :, 0, 0].T @ signal * gate
            conv, scale = below[0]
            signal = signal * scale[:, :, 0]
            A = torch.linalg.lstsq(signal, self.gradient[conv.names[0]].flatten(1)).solution
        return pool.arrange(A.reshape(len(A), -1, *conv.module.kernel_size), *size)


def opened(score: Tensor, slope: float) -> Tensor:
    """A ReLU's derivative where positive scores are those of open units."""
    return (score > 0).to(score.dtype) * (1 - slope) + slope


def top_signal(G: Tensor, bias: Tensor | None) -> Tensor:
    """∂L/∂logits, (classes,), from the last layer's gradients: that of the bias, in the direction of G = r hᵀ."""
    if bias is None:
        raise ValueError(
            "the last linear layer has no bias, whose gradient the recursion starts from: give another method"
        )
    U, _, _ = torch.linalg.svd(G, full_matrices=False)
    found: Tensor = U[:, 0] * (U[:, 0] @ bias)
    return found
