"""What BatchNorm gives away: three threat models, each a network whose gradient is what its victim sends.

stored   The victim normalises by stored statistics: `model.eval()`, what every network here starts with.
batch    The victim normalises by its own batch, as in training. The attacker's candidate images have statistics of
         their own, so the attack needs to be told nothing: `of_batch`.
shared   As before, and the batch's statistics are sent along with the gradient (the running statistics of a client that
         trains do so): `sharing`. They join the gradient as further coordinates, so that J, I²F and every attack
         take them in: 2 numbers a channel.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Norm = nn.modules.batchnorm._BatchNorm


class BatchStatistics(nn.Module):
    """BatchNorm by the batch at hand, (n, C, ...) -> (n, C, ...), out of operations that have every derivative
    (PyTorch's own has two)."""

    def __init__(self, layer: Norm):
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps
        self.channels = layer.num_features
        self.found: list[Tensor] | None = None  # where to put the batch's mean and variance, (C,) each

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[1]:
            raise ValueError("BatchNorm by the batch's own statistics needs more than one value a channel; x has "
                             f"{tuple(x.shape)} there: give more images")  # fmt: skip
        over = [dim for dim in range(x.ndim) if dim != 1]
        mean, variance = x.mean(over), x.var(over, correction=0)
        if self.found is not None:
            self.found += [mean, variance]
        channel = [-1] + [1] * (x.ndim - 2)
        out = (x - mean.view(channel)) * (variance.view(channel) + self.eps).rsqrt()
        return out if self.weight is None else out * self.weight.view(channel) + self.bias.view(channel)


def of_batch(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose BatchNorm layers normalise by the batch at hand."""
    model = copy.deepcopy(model).eval()
    if isinstance(model, Norm):
        return BatchStatistics(model).eval()
    for module in list(model.modules()):
        for place, child in module.named_children():
            if isinstance(child, Norm):
                setattr(module, place, BatchStatistics(child).eval())
    return model


def sharing(model: nn.Module) -> "Sharing":
    """`of_batch`, and the statistics are part of what is sent. Its loss is `sharing_loss`."""
    return Sharing(of_batch(model)).eval()


class Sharing(nn.Module):
    """The model's output, and a last column Σ ⟨p, statistics⟩ with p = 0: its derivative by p is the statistics.

    So ∇_θ L, taken by (p, θ), holds the mean and variance of every channel of every layer, and then the gradient.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        channels = sum(layer.channels for layer in self._layers())
        if not channels:
            raise ValueError("model has no BatchNorm layer: it has no batch statistics to share")
        self.probes = nn.Parameter(torch.zeros(2 * channels).to(next(model.parameters())))

    def forward(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        for layer in self._layers():
            layer.found = found
        try:
            output = self.model(x)
        finally:
            for layer in self._layers():
                layer.found = None  # what a pass leaves in a module would outlive its graph
        return torch.cat([output, (self.probes @ torch.cat(found)).expand(len(output), 1)], dim=1)

    def _layers(self) -> list[BatchStatistics]:
        return [module for module in self.model.modules() if isinstance(module, BatchStatistics)]


def sharing_loss(output: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy, plus the column that carries the statistics."""
    return F.cross_entropy(output[:, :-1], y) + output[0, -1]
