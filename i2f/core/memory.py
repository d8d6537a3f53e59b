"""The memory that products with J take, known before the work: the graphs of large problems are built on PyTorch's meta
device, where tensors have shapes and no bytes.

With both gradients' graphs kept (`linearization.Linearization`), k vectors at a time, in bytes:

    peak ≈ G + k·(A + P) + 4·P        G: all that both graphs hold        P: θ, d_θ numbers
                                      A: what the graph of L holds, as much as one backward pass needs at once

G and A grow with the images behind one gradient. Where they do not fit, groups of m of the n images take turns
(`linearization.Recomputation`): peak ≈ max((G + A)·m/n, A) + 6·P, for three times the time; A, since the gradient of
all is computed once.
"""

import math
from typing import NamedTuple

import psutil
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from i2f._torch.modules import preserved
from i2f.core.gradient import GradientMap
from i2f.core.linearization import SMALL_PROBLEM, Linearization

SHARE = 0.9  # of the memory that is free
MOST_AT_ONCE = 32  # vectors in one pass: more gain nothing


class Footprint(NamedTuple):
    """Bytes: of what both gradients' graphs hold, of what the loss's graph holds, and of θ."""

    graphs: int
    activations: int
    parameters: int

    def kept(self, vectors: int = 1) -> int:
        """The peak of a product with `vectors` vectors at a time, graphs kept."""
        return self.graphs + vectors * (self.activations + self.parameters) + 4 * self.parameters

    def recomputed(self, share: float) -> int:
        """The peak of a product that takes this share of the images at a time."""
        return max(math.ceil(share * (self.graphs + self.activations)), self.activations) + 6 * self.parameters

    def vectors(self, budget: int) -> int:
        """How many vectors go through the kept graphs at once; 0 where not even the graphs fit."""
        return max(0, (budget - self.kept(0)) // (self.activations + self.parameters))

    def plan(self, n: int, budget: int, keep: bool) -> tuple[int, int]:
        """How many of the n images are in memory at once (0: all, with their graphs kept, which `keep` allows), and how
        many vectors go through the graphs at once.

        Raises: MemoryError where not even one image fits.
        """
        if keep and self.kept() <= budget:
            return 0, min(MOST_AT_ONCE, self.vectors(budget))
        for group in range(n - 1 if n > 1 else 1, 0, -1):
            if self.recomputed(group / n) <= budget:
                return group, 1
        apart = f", or {gib(self.recomputed(1 / n))} with the {n} images one after another" if n > 1 else ""
        cure = "raise memory=, or use a narrower dtype, fewer or smaller images, or a device with more memory"
        raise MemoryError(f"products with J take {gib(self.kept())}{apart}, and {gib(budget)} may be used: {cure}")


def footprint(gmap: GradientMap, x: Tensor) -> Footprint | None:
    """The bytes that products with J at `x` take; None where the model does not run, or cannot without data."""
    parameters = gmap.size * x.element_size()
    try:
        if gmap.size + x.numel() > SMALL_PROBLEM:
            gmap, x = gmap.without_data(), x.to("meta")
        own = {p.untyped_storage()._cdata for p in [*gmap.parameters.values(), *gmap.frozen.values()]}
        held = _Count(own)
        with preserved(gmap.model), held:
            at_x = Linearization(gmap, x.detach(), forward=held.mark)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        return None
    del at_x
    return Footprint(held.bytes, held.marked, parameters)


def available(device: torch.device) -> int:
    """The bytes that a computation on the device may take now."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's, to be used again
        return int(SHARE * (torch.cuda.mem_get_info(device)[0] + cached))
    if device.type == "mps":
        return int(SHARE * (torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()))
    return int(SHARE * psutil.virtual_memory().available)


def gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


class _Count(saved_tensors_hooks):
    """Bytes of the distinct storages that a graph holds on to, apart from those of θ."""

    def __init__(self, own: set[int]):
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.own, self.marked = own, 0
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.storages[storage._cdata] = storage  # kept alive, so that no other takes its address
        return tensor

    def mark(self) -> None:
        """Keeps the bytes so far."""
        self.marked = self.bytes

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())
