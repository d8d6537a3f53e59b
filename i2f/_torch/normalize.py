"""The normalisation that a network expects, as its first layer."""

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x − mean) / std for each channel, as the first layer, so that inputs, box and I²F stay in pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std
