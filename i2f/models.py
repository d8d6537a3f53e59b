"""The networks of the paper, with the released weights for a seed."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from i2f import checks


class Spec(NamedTuple):
    """What a data set's images look like: shape (C, H, W), classes, and the training set's channel moments."""

    shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


SPECS = {
    "mnist": Spec((1, 28, 28), 10, (0.13066373765468597,), (0.30810782313346863,)),
    "fashion-mnist": Spec((1, 28, 28), 10, (0.28604060411453247,), (0.35302424430847168,)),
    "cifar10": Spec((3, 32, 32), 10, (0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784)),
    "cifar100": Spec((3, 32, 32), 100, (0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047)),
    "imagenet": Spec((3, 224, 224), 1000, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class Normalize(nn.Module):
    """(x − mean) / std a channel, as the first layer, so that inputs, box and I²F stay in pixels."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def _lenet(spec: Spec) -> list[nn.Module]:
    """The released LeNet: four 5×5 convolutions of 12 channels, a sigmoid behind each, one linear layer."""
    channels, height, width = spec.shape
    layers: list[nn.Module] = []
    for n_in, stride in zip((channels, 12, 12, 12), (2, 2, 1, 1), strict=True):
        layers += [nn.Conv2d(n_in, 12, kernel_size=5, padding=2, stride=stride), nn.Sigmoid()]
    features = 12 * -(-height // 4) * -(-width // 4)
    return [*layers, nn.Flatten(), nn.Linear(features, spec.classes)]


def _linear(spec: Spec) -> list[nn.Module]:
    """One linear layer: its gradient gives the input away in closed form, x = ∇_W L / ∇_b L."""
    channels, height, width = spec.shape
    return [nn.Flatten(), nn.Linear(channels * height * width, spec.classes)]


MODELS: dict[str, Callable[[Spec], list[nn.Module]]] = {"lenet": _lenet, "linear": _linear}


def _uniform(p: Tensor) -> None:
    nn.init.uniform_(p, -0.5, 0.5)


def _normal(p: Tensor) -> None:
    nn.init.normal_(p, 0, 0.5)


def _normal_twice(p: Tensor) -> None:
    """The released code's slip: where it means the bias it draws the weight again."""
    _normal(p)
    _normal(p)


# name -> (how a weight is drawn, how a bias is drawn); None keeps PyTorch's default draw.
INITS: dict[str, tuple[Callable | None, Callable | None]] = {
    "default": (None, None),
    "uniform": (_uniform, _uniform),
    "normal": (_normal, _normal),
    "normal-released": (_normal_twice, None),
    "kaiming": (lambda p: nn.init.kaiming_uniform_(p, nonlinearity="sigmoid"), _uniform),
    "xavier": (nn.init.xavier_uniform_, _uniform),
}


def build(name: str, dataset: str, init: str = "default", seed: int = 0, normalize: bool = True) -> nn.Sequential:
    """A network of the paper for a data set's images, in evaluation mode.

    Args:
        name: "lenet" or "linear". dataset: whose shape, classes and moments (a key of `SPECS`).
        init: a key of `INITS`. seed: of the weights; the same seed gives the released weights.
        normalize: put (x − mean)/std in front, so that the model takes pixels in [0, 1].

    Weights follow the released order: PyTorch's own initialisation first, then every layer's weight and bias from
    the same random stream ("normal-released" as the released code really does: the weight twice, the bias never).
    The caller's random state is left as it was.
    """
    checks.one_of("name", name, MODELS)
    checks.one_of("dataset", dataset, SPECS)
    checks.one_of("init", init, INITS)
    spec = SPECS[dataset]
    draw_weight, draw_bias = INITS[init]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = MODELS[name](spec)
        for layer in layers:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                if draw_weight:
                    draw_weight(layer.weight)
                if draw_bias:
                    draw_bias(layer.bias)
    first = [Normalize(spec.mean, spec.std)] if normalize else []
    return nn.Sequential(*first, *layers).eval()
