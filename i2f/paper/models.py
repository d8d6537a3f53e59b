"""Networks for a data set's images, with the released weights for a seed, or pretrained ones."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from i2f._torch.normalize import Normalize
from i2f.core import checks
from i2f.paper import networks

Activation = Callable[[], nn.Module]
Draw = Callable[[Tensor], object]  # draws a parameter in place


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


class Network(NamedTuple):
    """An architecture: its layers for a shape and a number of classes, and its pretrained weights.

    pretrained: a name of `torchvision.models`, "imagenet" for what a package ships, or "" where there are none.
    """

    layers: Callable[[networks.Shape, int], list[nn.Module]]
    pretrained: str = ""


NETWORKS = {
    "lenet": Network(networks.lenet),
    "linear": Network(networks.linear),
    "resnet20": Network(networks.resnet20),
    "vit": Network(networks.vit),
    "efficientnet_lite0": Network(networks.efficientnet_lite0, "imagenet"),
    **{name: Network(networks.resnet(name), name) for name in ("resnet18", "resnet50", "resnet152")},
    **{f"cnn{d}x{w}": Network(networks.cnn(d, w)) for d in (2, 4, 8, 16) for w in (8, 16, 32)},
}
ACTIVATIONS: dict[str, Activation] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
}
REPLACED = (nn.ReLU, nn.ReLU6, nn.GELU, nn.Sigmoid)  # what another activation takes the place of
LITE0_MEAN, LITE0_STD = 127 / 255, 128 / 255  # EfficientNet-Lite was trained on (byte − 127)/128


def _uniform(p: Tensor) -> None:
    nn.init.uniform_(p, -0.5, 0.5)


def _normal(p: Tensor) -> None:
    nn.init.normal_(p, 0, 0.5)


def _normal_twice(p: Tensor) -> None:
    """As in the released code, which draws the weight again where it means the bias."""
    _normal(p)
    _normal(p)


# name -> (of weights, of biases); None keeps PyTorch's own draw
INITS: dict[str, tuple[Draw | None, Draw | None]] = {
    "default": (None, None),
    "uniform": (_uniform, _uniform),
    "normal": (_normal, _normal),
    "normal-released": (_normal_twice, None),
    "kaiming": (lambda p: nn.init.kaiming_uniform_(p, nonlinearity="sigmoid"), _uniform),
    "xavier": (nn.init.xavier_uniform_, _uniform),
}


def build(
    name: str,
    dataset: str,
    init: str = "default",
    seed: int = 0,
    normalize: bool = True,
    activation: str | Activation | None = None,
    weights: str | Path | None = None,
) -> nn.Sequential:
    """A network for a data set's images, in evaluation mode.

    Args:
        name: a key of `NETWORKS`: the paper's "lenet", "linear"; "resnet20", "resnet18", "resnet50", "resnet152" (with
            the stem for small images where they are small); "vit"; "efficientnet_lite0"; "cnn8x16", eight convolutions
            of 16 channels, and its family. dataset: whose shape, classes and moments (a key of `SPECS`).
        init: a key of `INITS`. seed: of the weights; the same seed gives the released weights.
        normalize: put (x − mean)/std in front, so that the model takes pixels in [0, 1].
        activation: a key of `ACTIVATIONS`, or a function that makes a module, instead of the network's own; with a
            piecewise one (ReLU) J exists almost everywhere, and holds up to the next kink.
        weights: pretrained, instead of drawn ones: "imagenet" for efficientnet_lite0 (shipped by a package, with its
            own moments), a name of torchvision's for the ResNets, which it downloads ("IMAGENET1K_V2", "DEFAULT"), or
            the path of a state dict that this network saved.

    Weights follow the released order: PyTorch's own initialisation first, then every layer's weight and bias from
    the same random stream ("normal-released" as the released code really does: the weight twice, the bias never).
    The caller's random state is left as it was.

    Raises: ValueError for an unknown name, or arguments that exclude each other; FileNotFoundError,
    ModuleNotFoundError for weights that are missing.
    """
    network = NETWORKS[checks.one_of("name", name, NETWORKS)]
    checks.one_of("dataset", dataset, SPECS)
    checks.one_of("init", init, INITS)
    if isinstance(activation, str):
        activation = ACTIVATIONS[checks.one_of("activation", activation, ACTIVATIONS)]
    spec = SPECS[dataset]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Sequential(*network.layers(spec.shape, spec.classes))
        _draw(layers, *INITS[init])
    first = [Normalize(spec.mean, spec.std)] if normalize else []
    if weights is not None:
        if init != "default":
            raise ValueError(f"init={init!r} would overwrite weights={str(weights)!r}: give one of them")
        _load(layers, nn.Sequential(*first, *layers), name, dataset, weights)
        if weights == "imagenet" and normalize:
            first = [Normalize((LITE0_MEAN,) * 3, (LITE0_STD,) * 3)]
    _activate(layers, activation)
    return nn.Sequential(*first, *layers).eval()


def _draw(net: nn.Module, draw_weight: Draw | None, draw_bias: Draw | None) -> None:
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            if draw_weight:
                draw_weight(layer.weight)
            if draw_bias and layer.bias is not None:
                draw_bias(layer.bias)


def _activate(net: nn.Module, activation: Activation | None) -> None:
    """Replace every activation; without a replacement, make none work in place: a second derivative needs its input."""
    for module in list(net.modules()):
        for place, child in module.named_children():
            if isinstance(child, REPLACED):
                if activation is not None:
                    setattr(module, place, activation())
                elif getattr(child, "inplace", False):
                    child.inplace = False


def _load(net: nn.Sequential, whole: nn.Sequential, name: str, dataset: str, weights: str | Path) -> None:
    """Weights into the network `net`, or into the `whole` of it and its first layer, as a file has them; what they were
    trained for must be what it is built for."""
    source = NETWORKS[name].pretrained
    if weights == "imagenet" and source == "imagenet":
        stored = networks.stored_lite0()
        stored = dict(zip(net.state_dict(), stored.values(), strict=True))  # the same order, other names
    elif Path(weights).is_file():
        stored = torch.load(weights, weights_only=True, map_location="cpu")
    elif source and source != "imagenet" and dataset == "imagenet":
        import torchvision

        names = [w.name for w in torchvision.models.get_model_weights(source)]
        checks.one_of("weights", str(weights), ["DEFAULT", *names])
        stored = torchvision.models.get_model(source, weights=str(weights)).state_dict()
        stored = {f"0.{key}": value for key, value in stored.items()}
    else:
        ships = f"; {name} has its own for imagenet" if source and dataset != "imagenet" else ""
        raise FileNotFoundError(f"weights={str(weights)!r} is no file, and no pretrained weights of {name}{ships}")
    try:
        (whole if stored.keys() == whole.state_dict().keys() else net).load_state_dict(stored)
    except RuntimeError as error:
        raise ValueError(f"weights={str(weights)!r} do not fit {name} for {dataset}: {error}") from error
