"""J Jᵀ of a network with ReLUs, nearly: a preconditioner for what is solved with exact products."""

from collections.abc import Mapping

import torch
from torch import Tensor

from i2f.attacks.recursive.graph import Graph, Node
from i2f.attacks.recursive.systems import equations
from i2f.attacks.recursive.tangent import Tangent

SKETCH = 64  # columns for each channel of a layer's input
CHUNK = 64  # directions of input space pushed through the network together
LARGEST = 4096  # most unknowns for which the matrix is formed and factored
RIDGE = 1e-6  # of the largest diagonal entry, against rounding in float32


def preconditioner(graph: Graph, values: Mapping[str, Tensor], signal: Tensor) -> Tensor | None:
    """The Cholesky factor, (d_x, d_x), float32, or None where rounding leaves none, of

        J Jᵀ ≈ Σ_layers A_lᵀ (I ⊗ T_lᵀ T_l) A_l,   A_l = ∂a_l/∂x,

    since the weight gradient of a layer is T_l a_l (`systems.equations`), where the signals hardly depend on x. Of each
    T_l a random sketch with the same mean is taken, another one for each channel (Drineas et al. 2011).

    Args:
        values: of all nodes at the image. signal: ∂L/∂logits there.
    """
    users: dict[str, list[Node]] = {}
    for node in graph.nodes.values():
        if node.kind in ("conv", "linear"):
            users.setdefault(node.inputs[0], []).append(node)
    signals = Tangent(graph, [graph.output], values).signals({graph.output: signal})
    generator = torch.Generator().manual_seed(0)
    rows = {name: _rows(graph.nodes[name], convs, signals, generator) for name, convs in users.items()}
    tangent = Tangent(graph, list(rows), values, dtype=torch.float32)
    source = next(iter(graph.nodes.values()))
    one = torch.eye(torch.Size(source.shape).numel(), dtype=torch.float32)
    found: dict[str, list[Tensor]] = {name: [] for name in rows}
    for some in one.split(CHUNK):
        moved = tangent(some.reshape(-1, *source.shape))
        for name, R in rows.items():
            each = moved[name].reshape(len(some), len(R), -1)
            found[name].append(torch.bmm(each.transpose(0, 1), R).transpose(0, 1).flatten(1))
    matrix = torch.zeros_like(one)
    for parts in found.values():
        B = torch.cat(parts)
        matrix.addmm_(B, B.T)
    matrix.diagonal().add_(RIDGE * float(matrix.diagonal().max()))
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return None if int(failed) else torch.as_tensor(factor)


def _rows(node: Node, users: list[Node], signals: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """(C, H·W, k): for each channel a root of ΣTᵀT, sketched where that has fewer columns."""
    if users[0].kind == "linear":
        norm: Tensor = torch.stack([signals[user.name].norm() for user in users]).norm()
        return norm.float().expand(node.shape[0], 1, 1)
    parts = [equations(signals[user.name], user.module, node.shape) for user in users]
    squares, V = torch.linalg.eigh(torch.stack([T.T @ T for T in parts]).sum(0))
    root: Tensor = (V * squares.clamp(min=0).sqrt()).float()
    if root.shape[1] <= 2 * SKETCH:
        return root.expand(node.shape[0], *root.shape)
    size = (node.shape[0], root.shape[1], SKETCH)
    sketched: Tensor = root @ (torch.randn(size, generator=generator) / SKETCH**0.5)
    return sketched
