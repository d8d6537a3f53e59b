"""The paper's networks: sizes, the released weights drawn again by hand, and the pixels in front."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import i2f
from i2f import models

SMALL = [name for name in models.SPECS if name != "imagenet"]  # its linear layer alone takes a gigabyte


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    ("dataset", "size"), [("mnist", 17_038), ("fashion-mnist", 17_038), ("cifar10", 19_438), ("cifar100", 88_648)]
)
def test_lenet_size(dataset, size):
    assert len(parameters(models.build("lenet", dataset))) == size


@pytest.mark.parametrize(("dataset", "channels", "features"), [("mnist", 1, 588), ("cifar10", 3, 768)])
def test_lenet_layers(dataset, channels, features):
    layers = list(models.build("lenet", dataset, normalize=False))
    assert [type(layer) for layer in layers] == [nn.Conv2d, nn.Sigmoid] * 4 + [nn.Flatten, nn.Linear]
    convolutions = layers[0:8:2]
    assert [c.weight.shape for c in convolutions] == [(12, channels, 5, 5)] + [(12, 12, 5, 5)] * 3
    assert [c.stride for c in convolutions] == [(2, 2), (2, 2), (1, 1), (1, 1)]
    assert all(c.padding == (2, 2) and c.bias is not None for c in convolutions)
    assert layers[-1].weight.shape == (10, features)


@pytest.mark.parametrize("dataset", SMALL)
@pytest.mark.parametrize("name", [name for name in models.NETWORKS if name not in ("resnet50", "resnet152")])
def test_takes_images_gives_logits(name, dataset):
    spec = models.SPECS[dataset]
    model = models.build(name, dataset)
    assert not any(module.training for module in model.modules())
    assert model(torch.rand(2, *spec.shape)).shape == (2, spec.classes)


def released(seed, channels, features):
    """The published recipe: PyTorch's default draw first, from the seed; then the caller draws on."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(channels, 12, 5, padding=2, stride=2)]
    layers += [nn.Conv2d(12, 12, 5, padding=2, stride=stride) for stride in (2, 1, 1)]
    return [*layers, nn.Linear(features, 10)]


@pytest.fixture
def stream():
    """The global random stream, given back as it was."""
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.parametrize("seed", [1, 7])
@pytest.mark.parametrize(("dataset", "channels", "features"), [("mnist", 1, 588), ("cifar10", 3, 768)])
def test_uniform_is_the_released_draw(stream, dataset, channels, features, seed):
    layers = released(seed, channels, features)
    with torch.no_grad():
        for layer in layers:
            layer.weight.uniform_(-0.5, 0.5)
            layer.bias.uniform_(-0.5, 0.5)
    assert torch.equal(parameters(models.build("lenet", dataset, "uniform", seed)), parameters(nn.ModuleList(layers)))


def test_normal_released_sets_the_weight_twice(stream):
    """The slip of the released code: where it means the bias it draws the weight again."""
    layers = released(1, 1, 588)
    with torch.no_grad():
        for layer in layers:
            layer.weight.normal_(0, 0.5)
            layer.weight.normal_(0, 0.5)
    built = models.build("lenet", "mnist", "normal-released", seed=1)
    assert torch.equal(parameters(built), parameters(nn.ModuleList(layers)))


def test_normal_released_keeps_the_default_biases():
    default, built = (models.build("lenet", "mnist", init, seed=1) for init in ("default", "normal-released"))
    for a, b in zip(default.parameters(), built.parameters(), strict=True):
        assert torch.equal(a, b) == (a.ndim == 1)


@pytest.mark.parametrize(
    ("init", "weight_std", "bias_std"),
    [
        ("uniform", 12**-0.5, 12**-0.5),
        ("normal", 0.5, 0.5),
        ("normal-released", 0.5, (3 * 588) ** -0.5),  # PyTorch's default: U(±1/√fan_in)
        ("kaiming", 588**-0.5, 12**-0.5),  # sigmoid's gain is 1: std 1/√fan_in
        ("xavier", (2 / 688) ** 0.5, 12**-0.5),  # std √(2/(fan_in + fan_out))
    ],
)
def test_spread_of_an_initialisation(monkeypatch, init, weight_std, bias_std):
    """On a linear layer with 588 inputs and 100 outputs, to five standard errors of a normal sample."""
    monkeypatch.setitem(models.SPECS, "wide", models.Spec((12, 7, 7), 100, (0.0,), (1.0,)))
    layer = models.build("linear", "wide", init, seed=1)[-1].requires_grad_(False)
    assert float(layer.weight.std()) == pytest.approx(weight_std, rel=5 / (2 * 58_800) ** 0.5)
    assert float(layer.bias.std()) == pytest.approx(bias_std, rel=5 / (2 * 100) ** 0.5)


@pytest.mark.parametrize("init", models.INITS)
@pytest.mark.parametrize("name", ["lenet", "linear", "resnet20", "vit", "cnn4x8"])
def test_seed_decides(name, init):
    first, again, other = (parameters(models.build(name, "mnist", init, seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("init", models.INITS)
def test_global_random_state_is_left_alone(init):
    before = torch.get_rng_state()
    models.build("lenet", "mnist", init, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dataset", SMALL)
def test_normalisation_is_a_first_layer(dataset):
    spec = models.SPECS[dataset]
    x = torch.rand(2, *spec.shape, dtype=torch.float64)
    mean, std = (torch.tensor(m)[:, None, None].double() for m in (spec.mean, spec.std))
    pixels, plain = (models.build("linear", dataset, seed=1, normalize=n).double() for n in (True, False))
    torch.testing.assert_close(pixels(x), plain((x - mean) / std))


@pytest.mark.parametrize("i", range(5))
def test_linear_gives_its_input_away(digits, backward, i):
    """x = ∇_W L / ∇_b L, for any row whose bias gradient is not zero."""
    x, y = digits[0][i : i + 1], digits[1][i : i + 1]
    model = models.build("linear", "mnist", "uniform", seed=1, normalize=False).double()
    gradient = backward(model, x, y)
    torch.testing.assert_close(gradient, i2f.GradientJacobian(model, x, y).gradient)
    weight, bias = gradient[:-10].view(10, 784), gradient[-10:]
    row = int(bias.abs().argmax())
    torch.testing.assert_close(weight[row] / bias[row], x.flatten(), rtol=0, atol=1e-10)


def test_linear_is_linear():
    model = models.build("linear", "cifar10", seed=1, normalize=False)
    x = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(model(x), F.linear(x.flatten(1), model[-1].weight, model[-1].bias))
