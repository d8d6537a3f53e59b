"""Memory for large dense work on a CPU, where the first touch of a fresh page can cost more than the sums in it."""

import math

import numpy as np
import torch
from torch import Tensor

SLAB_BYTES = 16 * 2**20


def empty(*shape: int, like: Tensor) -> Tensor:
    """Uninitialised memory; on a CPU from NumPy, which asks for huge pages where an array is large."""
    if like.device.type != "cpu" or like.dtype not in (torch.float32, torch.float64):
        return like.new_empty(shape)
    memory: Tensor = torch.from_numpy(np.empty(shape, str(like.dtype).removeprefix("torch.")))
    return memory


class Workspace:
    """Tensors that are used again and again, cut from a few large ones. Not for two threads at once."""

    def __init__(self, like: Tensor):
        self.like, self.left = like, like.new_empty(0)
        self.kept: dict[object, Tensor] = {}

    def __call__(self, purpose: object, *shape: int) -> Tensor:
        """A tensor of any content, to be written; the last one for the same purpose is lost."""
        size = math.prod(shape)
        if purpose not in self.kept or self.kept[purpose].numel() < size:
            self.kept[purpose] = self._cut(size)
        return self.kept[purpose][:size].view(shape)

    def _cut(self, size: int) -> Tensor:
        if self.left.numel() < size:
            self.left = empty(max(size, SLAB_BYTES // self.like.element_size()), like=self.like)
        piece, self.left = self.left[:size], self.left[size:]
        return piece
