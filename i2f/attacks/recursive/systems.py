"""A convolution's weight gradient as linear equations for the convolution's input."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2f.attacks.recursive.graph import NOTHING, Node

ROUNDING = 1e-14  # relative error of a gradient without noise
NOISY = 10 * ROUNDING  # relative noise above which masks may be wrong
OUTLIER = 3.0  # an output channel whose residual is so many medians has a wrong mask: its equations count less
ROBUST = 10  # passes that find them
RANK = 1e-5  # singular values below this share of the largest carry no equation (their squares are at 10⁻¹⁰, of 10⁻¹⁶)


def equations(delta: Tensor, conv: nn.Conv2d, shape: tuple[int, ...]) -> Tensor:
    """T, (O·K, H·W), with  ∂L/∂W[o, c, k] = Σ_q T[(o, k), q] a[c, q]  for the signal δ, (O, h, w), at the output.

    T[(o, k), q] = Σ_p δ[o, p] [q = s·p + d·k − padding]: the same for every input channel c of the group.
    """
    (outputs, h, w), (_, height, width) = delta.shape, shape
    kernel = torch.cartesian_prod(*(torch.arange(k) for k in conv.kernel_size))
    found = torch.zeros(outputs, len(kernel), height * width, dtype=delta.dtype)
    above, left = padding(conv)
    rows = torch.arange(h) * conv.stride[0] - above
    columns = torch.arange(w) * conv.stride[1] - left
    for number, (ky, kx) in enumerate(kernel.tolist()):
        y, x = rows + ky * conv.dilation[0], columns + kx * conv.dilation[1]
        inside = ((y >= 0) & (y < height))[:, None] & ((x >= 0) & (x < width))
        found[:, number, (y[:, None] * width + x)[inside]] = delta[:, inside]
    return found.flatten(0, 1)


def patches(value: Tensor, conv: nn.Conv2d) -> Tensor:
    """The input's patches, (C·K, h·w): one column per position of the output."""
    found: Tensor = F.unfold(value[None], conv.kernel_size, conv.dilation, padding(conv), conv.stride)[0]
    return found


def padding(conv: nn.Conv2d) -> tuple[int, int]:
    """Rows and columns of zeros on each side."""
    assert not isinstance(conv.padding, str)  # `Graph` refuses those
    return conv.padding[0], conv.padding[1]


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
class System:
    """T a = G for some channels of a node's value a: T (m, n), G (m, C), least squares by the modes of TᵀT.

    modes: V (k, n), the right singular vectors with a singular value of more than `RANK` of the largest, S (k,) with
    them, falling. weight: of each equation. channels: which of the node's.
    """

    channels: slice
    T: Tensor
    G: Tensor
    rows: list[int]
    rank: int = 0
    sigma: float = 0.0
    V: Tensor = NOTHING
    S: Tensor = NOTHING
    solution: Tensor = NOTHING
    residual: Tensor = NOTHING

    def solve(self, weight: Tensor | None = None) -> Tensor:
        """a, (C, n): of the known modes, the others at zero; refined until rounding."""
        T, G = (self.T, self.G) if weight is None else (self.T * weight[:, None], self.G * weight[:, None])
        squares, vectors = torch.linalg.eigh(T.T @ T)
        squares, vectors = squares.flip(0), vectors.flip(1)
        self.rank = int((squares > RANK**2 * squares[0]).sum())
        self.S, self.V = squares[: self.rank].sqrt(), vectors[:, : self.rank].T
        a = torch.zeros(T.shape[1], G.shape[1], dtype=T.dtype)
        for _ in range(3):
            a = a + self.V.T @ (self.V @ (T.T @ (G - T @ a)) / self.S[:, None] ** 2)
        self.solution = a
        self.residual = self.G - self.T @ a
        self.used, self.target = T, G
        return a.mT

    @property
    def full(self) -> bool:
        return self.rank == self.T.shape[1]

    @property
    def spread(self) -> Tensor:
        """√diag((TᵀT)⁻¹), (n,): a unit's standard deviation in units of the gradient's."""
        return (self.V / self.S[:, None]).square().sum(0).sqrt()

    def misfit(self, a: Tensor) -> Tensor:
        """S⁻² V Tᵀ (T a − G), (k, C): the known modes' distance from a (C, n), without the rounding of V."""
        return self.V @ (self.used.T @ (self.used @ a.T - self.target)) / self.S[:, None] ** 2

    def robust(self) -> Tensor:
        """The solution with less weight on the output channels whose residuals stand out."""
        rank = self.rank
        a = self.solution.T
        for _ in range(ROBUST):
            each = self.residual.square().mean(1).split(self.rows)
            size = torch.stack([part.mean().sqrt() for part in each])
            weight = 1 / (size / (OUTLIER * size.median())).clamp(min=1).square()
            if bool((weight == 1).all()):
                break
            a = self.solve(weight.repeat_interleave(torch.tensor(self.rows)))
            if self.rank < rank:
                return self.solve()
        return a


def assemble(node: Node, users: Sequence[tuple[Node, Tensor]], gradient: Mapping[str, Tensor]) -> list[System]:
    """The equations of a node's channels, stacked over the convolutions that take it (with the signals at their
    outputs): one system for each block of channels that all convolutions take together."""
    finest = max(conv.module.groups for conv, _ in users)
    size = node.shape[0] // finest
    found = []
    for block in range(finest):
        channels = slice(block * size, (block + 1) * size)
        T, G, rows = [], [], []
        for conv, d in users:
            m, G_all = conv.module, gradient[conv.names[0]]
            group = channels.start * m.groups // node.shape[0]
            outputs = m.out_channels // m.groups
            mine = slice(group * outputs, (group + 1) * outputs)
            inside = slice(channels.start - group * G_all.shape[1], channels.stop - group * G_all.shape[1])
            T.append(equations(d[mine], m, node.shape))
            G.append(G_all[mine, inside].permute(0, 2, 3, 1).reshape(T[-1].shape[0], -1))
            rows += [len(T[-1]) // outputs] * outputs
        found.append(System(channels, torch.cat(T), torch.cat(G), rows))
    return found


def top_signal(G: Tensor, bias: Tensor | None) -> Tensor:
    """∂L/∂logits, (classes,), from the last layer's gradients: that of the bias, in the direction of G = r hᵀ."""
    if bias is None:
        raise ValueError(
            "the last linear layer has no bias, whose gradient the recursion starts from: give another method"
        )
    U, _, _ = torch.linalg.svd(G, full_matrices=False)
    found: Tensor = U[:, 0] * (U[:, 0] @ bias)
    return found


def features_above(G: Tensor, d: Tensor) -> tuple[Tensor, float, float]:
    """The input h of a linear layer, least squares of G = d hᵀ, how far G's entries are from it, and their size."""
    h = d @ G / (d @ d)
    size = float(G.norm()) / math.sqrt(G.numel())
    left = float((G - d[:, None] * h).norm()) / math.sqrt(max(G.numel() - len(h), 1))
    return h, max(left, ROUNDING * size), size
