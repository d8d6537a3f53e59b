"""How small changes of the input run through a layer: forward as A, and back as D.

A layer maps a ↦ z, and the loss sends δ = ∂L/∂z back through it. For m directions of input space at once, its rule
carries their effect on both,

    A = da/dx · directions  forward,      D = dδ/dx · directions  back,

and writes the layer's rows of Jᵀ: for a linear layer, whose gradient is δ aᵀ, the product rule's D aᵀ + δ Aᵀ.
Directions are the last axis and an image is (H, W, C), so that every sum below is one matrix product over
contiguous memory. A keeps only the image rows that the directions reach.
"""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2f._fast.workspace import Workspace
from i2f._torch.normalize import Normalize

ELEMENTWISE = (
    *(nn.Identity, nn.Sigmoid, nn.Tanh, nn.Softplus, Normalize),
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU),
)


class Reach(NamedTuple):
    """A: values of (rows, W, C, m), the image's other rows being zero, or of (features, m); and the first row."""

    values: Tensor
    top: int = 0

    @property
    def rows(self) -> range:
        return range(self.top, self.top + len(self.values))

    def full(self, height: int) -> Tensor:
        """The values with all of the image's rows."""
        if len(self.values) == height:
            return self.values
        full = self.values.new_zeros(height, *self.values.shape[1:])
        full[self.top : self.rows.stop] = self.values
        return full


class Rule:
    """What a layer does to A and D at one image, where its input is `a` and the loss's derivative by its output δ."""

    def __init__(self, layer: nn.Module, a: Tensor, delta: Tensor, work: Workspace):
        raise NotImplementedError

    def forward(self, A: Reach) -> Reach:
        """A of the layer's input -> A of its output."""
        raise NotImplementedError

    def backward(self, D: Tensor, A: Reach) -> Tensor:
        """D of the layer's output, and A of its input -> D of its input."""
        raise NotImplementedError

    def write_weight(self, out: Tensor, A: Reach, D: Tensor) -> None:
        """The weight's rows of Jᵀ, out: (*weight.shape, m)."""

    def write_turned(self, out: Tensor, A: Reach, D: Tensor) -> None:
        """The weight's rows of Jᵀ in another orthonormal basis, where the rule has one of fewer dimensions."""
        raise NotImplementedError

    def write_bias(self, out: Tensor, D: Tensor) -> None:
        """The bias's rows of Jᵀ, out: (*bias.shape, m)."""


class Elementwise(Rule):
    """z = σ(a):  A ↦ σ'A,  and from δ_a = σ'δ back,  D ↦ σ'D + σ''δA."""

    def __init__(self, layer: nn.Module, a: Tensor, delta: Tensor, work: Workspace):
        self.work = work
        a = a.detach().requires_grad_()
        with torch.enable_grad():
            (first,) = torch.autograd.grad(layer(a.clone()).sum(), a, create_graph=True)  # a clone: it may act in place
            second = torch.zeros_like(a)
            if first.requires_grad:
                (second,) = torch.autograd.grad(first.sum(), a)
        self.first, self.curvature = _directions_last(first.detach()), _directions_last(second * delta)

    def forward(self, A: Reach) -> Reach:
        out = self.work((self, "A"), *A.values.shape)
        return A._replace(values=torch.mul(self.first[A.top : A.rows.stop], A.values, out=out))

    def backward(self, D: Tensor, A: Reach) -> Tensor:
        D.mul_(self.first)
        D[A.top : A.rows.stop].addcmul_(self.curvature[A.top : A.rows.stop], A.values)
        return D


class Flatten(Rule):
    """(H, W, C) -> features in PyTorch's order, (C, H, W)."""

    def __init__(self, layer: nn.Flatten, a: Tensor, delta: Tensor, work: Workspace):
        self.shape = a.shape

    def forward(self, A: Reach) -> Reach:
        return A if A.values.ndim == 2 else Reach(A.full(self.shape[1]).permute(2, 0, 1, 3).flatten(0, 2))

    def backward(self, D: Tensor, A: Reach) -> Tensor:
        return D if len(self.shape) == 1 else D.view(*self.shape, -1).permute(1, 2, 0, 3).contiguous()


class Linear(Rule):
    """z = Wa + b."""

    def __init__(self, layer: nn.Linear, a: Tensor, delta: Tensor, work: Workspace):
        self.weight, self.a, self.delta = layer.weight.detach(), a, delta

    def forward(self, A: Reach) -> Reach:
        return Reach(self.weight @ A.values)

    def backward(self, D: Tensor, A: Reach) -> Tensor:
        return self.weight.T @ D

    def write_weight(self, out: Tensor, A: Reach, D: Tensor) -> None:
        for row, d, error in zip(out, D, self.delta.tolist(), strict=True):
            torch.addr(A.values, self.a, d, beta=error, out=row)

    def write_turned(self, out: Tensor, A: Reach, D: Tensor) -> None:
        """The weight's rows in another orthonormal basis, out: (outputs + inputs, m), the others being zero in it.

        With â = a/‖a‖ and A = â (âᵀA) + A⊥,  D aᵀ + δ Aᵀ = (‖a‖D + δ âᵀA) âᵀ + δ A⊥ᵀ: two parts, orthogonal.
        """
        size = self.a.norm()
        unit = self.a / size if size else self.a
        along = unit @ A.values
        outputs = len(D)
        torch.addr(size * D, self.delta, along, out=out[:outputs])
        torch.addr(A.values, unit, along, alpha=-1, out=out[outputs:]).mul_(self.delta.norm())

    def write_bias(self, out: Tensor, D: Tensor) -> None:
        out.copy_(D)


class Conv2d(Rule):
    """z = W * a + b: from one row of the image to another, a matrix for each row of the kernel."""

    def __init__(self, layer: nn.Conv2d, a: Tensor, delta: Tensor, work: Workspace):
        self.work = work
        n_out, n_in, taps, columns = self.shape = layer.weight.shape
        (_, self.height, width), (_, out_height, out_width) = a.shape, delta.shape
        assert not isinstance(layer.padding, str)  # `rule_for` lets none pass
        (self.stride, stride), (down, right), (above, left) = layer.stride, layer.dilation, layer.padding
        # sources[i][k]: the input row that the output row i sees through the kernel's row k; may lie outside
        self.sources = [[self.stride * i + down * k - above for k in range(taps)] for i in range(out_height)]
        links = [(i, j, k) for i, row in enumerate(self.sources) for k, j in enumerate(row) if 0 <= j < self.height]
        # at[v, w, k]: whether the output column v sees the input column w through the kernel's column k
        seen = stride * torch.arange(out_width)[:, None] + right * torch.arange(columns) - left
        at = (seen[:, None, :] == torch.arange(width)[:, None]).to(a)
        blocks = torch.einsum("vwk,oirk->rvowi", at, layer.weight.detach())
        blocks = blocks.reshape(taps, out_width * n_out, width * n_in)
        self._forward = _RowByRow(blocks, out_height, links, work)
        self._backward = _RowByRow(blocks.mT, self.height, [(j, i, k) for i, j, k in links], work)
        self.patches = F.unfold(a[None], layer.kernel_size, layer.dilation, layer.padding, layer.stride)[0]
        self.errors = torch.einsum("oiv,vwk->okiw", delta, at)
        self.sizes, self.links = (out_height, out_width), links

    @cached_property
    def signals(self) -> Tensor:
        """δ as each pixel of the input sees it, (H·W, n_out · taps · columns): [(j, w), (o, k, l)] = δ[o, i, v]."""
        n_out, _, taps, columns = self.shape
        found = self.errors.new_zeros(self.height, self.errors.shape[-1], n_out, taps, columns)
        for i, j, k in self.links:
            found[j, :, :, k] += self.errors[:, :, i].permute(2, 0, 1)
        return found.view(-1, n_out * taps * columns)

    def forward(self, A: Reach) -> Reach:
        z = self._forward(A._replace(values=A.values.flatten(1, 2)))
        return z._replace(values=z.values.unflatten(1, (-1, self.shape[0])))

    def backward(self, D: Tensor, A: Reach) -> Tensor:
        rows = self._backward(Reach(D.flatten(1, 2))).full(self.height)
        return rows.unflatten(1, (-1, self.shape[1]))  # type: ignore[no-any-return]  # PyTorch's has no type

    def write_weight(self, out: Tensor, A: Reach, D: Tensor) -> None:
        n_out, n_in, taps, columns = self.shape
        m, reached = D.shape[-1], A.rows
        through_errors = self.work("through errors", n_in, taps, columns, n_out, m)
        torch.mm(self.patches, D.reshape(-1, n_out * m), out=through_errors.view(-1, n_out * m))
        through_input = self.work("through input", taps, n_out, columns, n_in, m)
        for tap, product in enumerate(through_input.view(taps, n_out * columns, n_in * m)):
            rows = [i for i, row in enumerate(self.sources) if row[tap] in reached]
            if rows:
                first, last = (self.sources[i][tap] - A.top for i in (rows[0], rows[-1]))
                seen = A.values[first : last + 1 : self.stride].reshape(-1, n_in * m)
                torch.mm(self.errors[:, :, rows[0] : rows[-1] + 1].reshape(n_out * columns, -1), seen, out=product)
            else:
                product.zero_()
        torch.add(through_errors.permute(3, 0, 1, 2, 4), through_input.permute(1, 3, 0, 2, 4), out=out)

    def write_bias(self, out: Tensor, D: Tensor) -> None:
        torch.sum(D, (0, 1), out=out)


class _RowByRow:
    """out[i] = Σ blocks[k] a[j] over the links (i, j, k) of each i: one matrix product for each row of the output."""

    def __init__(self, blocks: Tensor, height: int, links: list[tuple[int, int, int]], work: Workspace):
        self.blocks, self.work = blocks, work
        self.links = [sorted((j, k) for row, j, k in links if row == i) for i in range(height)]
        self.joined: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, a: Reach) -> Reach:
        """Rows of (features, m) -> those that they reach."""
        rows = a.rows
        links = [[(j - a.top, k) for j, k in pairs if j in rows] for pairs in self.links]
        reached = [i for i, pairs in enumerate(links) if pairs] or [0]
        top, bottom = reached[0], reached[-1] + 1
        out = self.work(self, bottom - top, self.blocks.shape[1], a.values.shape[-1])
        for row, pairs in zip(out, links[top:bottom], strict=True):
            if pairs:
                step = pairs[1][0] - pairs[0][0] if len(pairs) > 1 else 1
                seen = a.values[pairs[0][0] : pairs[-1][0] + 1 : step].flatten(0, 1)
                torch.mm(self._join(tuple(k for _, k in pairs)), seen, out=row)
            else:
                row.zero_()
        return Reach(out, top)

    def _join(self, taps: tuple[int, ...]) -> Tensor:
        if taps not in self.joined:
            self.joined[taps] = torch.cat([self.blocks[k] for k in taps], dim=1)
        return self.joined[taps]


def rule_for(layer: nn.Module, a: Tensor) -> type[Rule] | None:
    """The rule of a layer whose input is `a` (one image, without its batch axis); None where there is none."""
    if type(layer) in ELEMENTWISE:
        return Elementwise if a.ndim in (1, 3) else None
    if type(layer) is nn.Flatten:
        return Flatten if (layer.start_dim, layer.end_dim) in ((1, -1), (1, a.ndim)) and a.ndim in (1, 3) else None
    if type(layer) is nn.Linear:
        return Linear if a.ndim == 1 else None
    if type(layer) is nn.Conv2d:
        plain = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return Conv2d if plain and a.ndim == 3 else None
    return None


def _directions_last(a: Tensor) -> Tensor:
    """(C, H, W) -> (H, W, C, 1), or (features,) -> (features, 1)."""
    return (a.permute(1, 2, 0) if a.ndim == 3 else a).unsqueeze(-1)
