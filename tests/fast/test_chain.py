"""J by the layers' own rules: the same matrix as differentiation gives, for every layer that has a rule, and no answer
where a rule is missing."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import i2f
from i2f._fast.chain import chain_jacobian
from i2f._fast.layers import ELEMENTWISE
from i2f.core.dense import dense_jacobian, forward_over_reverse, jacobian_gram
from i2f.core.gradient import GradientMap
from i2f.paper.models import SPECS, Normalize


def chain(*layers, shape, classes=4, n=1):
    """A map and an input for layers with weights large enough to be nonlinear, and a linear layer at the end."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features = nn.Sequential(*layers)(torch.zeros(1, *shape)).numel()
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, classes)).double().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(0, 0.5)
        return GradientMap(model, torch.arange(n) % classes), torch.rand(n, *shape, dtype=torch.float64)


def by_rules(gmap, x, *args, **options):
    return chain_jacobian(gmap.model, gmap.loss_of, x, *args, **options)


def same(a, b, rtol=1e-11):
    return a is not None and a.shape == b.shape and float((a - b).norm()) <= rtol * float(b.norm())


CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 5, "padding": 2},
    "strided": {"kernel_size": 5, "padding": 2, "stride": 2},
    "rectangular": {"kernel_size": (2, 3), "padding": (1, 0), "stride": (1, 2)},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "dilated and strided": {"kernel_size": 3, "padding": 3, "dilation": (3, 2), "stride": (2, 3)},
    "blind to some pixels": {"kernel_size": 2, "stride": 3},
    "blind to the last rows": {"kernel_size": 3, "stride": 6},
    "without bias": {"kernel_size": 3, "bias": False},
    "far padding": {"kernel_size": 2, "padding": 2},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions(options):
    """By one direction, by some and by all at a time."""
    first = nn.Conv2d(2, 3, **options)
    second = nn.Conv2d(3, 2, kernel_size=2, padding=1, stride=1)
    gmap, x = chain(first, nn.Tanh(), second, nn.Sigmoid(), shape=(2, 8, 7))
    J = forward_over_reverse(gmap, x)
    for directions in (1, 7, 1000):
        assert same(by_rules(gmap, x, directions), J)


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions_behind_another(options):
    gmap, x = chain(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 3, **options), nn.Softplus(), shape=(1, 12, 11))
    assert same(by_rules(gmap, x, 16), forward_over_reverse(gmap, x))


@pytest.mark.parametrize("kind", [k for k in ELEMENTWISE if k is not Normalize])
def test_activations(kind):
    gmap, x = chain(nn.Conv2d(1, 3, 3), kind(), nn.Conv2d(3, 2, 3), kind(), shape=(1, 7, 7))
    assert same(by_rules(gmap, x), forward_over_reverse(gmap, x))


def test_an_activation_in_place():
    gmap, x = chain(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 3), nn.ReLU(True), shape=(1, 7, 7))
    plain, _ = chain(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.ReLU(), shape=(1, 7, 7))
    assert same(by_rules(gmap, x), forward_over_reverse(plain, x))


@pytest.mark.parametrize(
    ("dataset", "name", "normalize"),
    [
        *(("mnist", name, normalize) for name in ("lenet", "linear") for normalize in (False, True)),
        ("cifar10", "lenet", True),
        ("cifar10", "linear", False),
    ],
)
def test_networks_of_the_paper(dataset, name, normalize, backward):
    x, y = i2f.data.load(dataset, n=1)
    model = i2f.models.build(name, dataset, "uniform", 1, normalize).double()
    gmap, x = GradientMap(model, y), x.double()
    J = by_rules(gmap, x)
    v = torch.randn(x.numel(), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = 1e-4
    ahead, behind = (backward(model, x + s * h * v.view_as(x), y) for s in (1, -1))
    assert same(v @ J, (ahead - behind) / (2 * h), 1e-5)
    if dataset == "mnist":
        assert same(J, forward_over_reverse(gmap, x))
        assert same(by_rules(gmap.cast(torch.float32), x.float()).double(), J, 1e-5)


def test_several_images():
    gmap, x = chain(nn.Conv2d(1, 3, 3), nn.Tanh(), shape=(1, 6, 5), n=3)
    assert same(by_rules(gmap, x, 16), forward_over_reverse(gmap, x))


@pytest.mark.parametrize("frozen", [["0.weight"], ["0.weight", "0.bias"], ["2.bias"], ["4.weight", "4.bias"]])
def test_frozen_parameters(frozen):
    gmap, x = chain(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 3), shape=(1, 6, 6))
    for name in frozen:
        gmap.model.get_parameter(name).requires_grad_(False)
    gmap = GradientMap(gmap.model, gmap.y)
    assert same(by_rules(gmap, x), forward_over_reverse(gmap, x))


def test_nested_chains_and_other_losses():
    inner = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Sequential(nn.Tanh(), nn.Identity()))
    gmap, x = chain(inner, nn.Flatten(), nn.Linear(48, 6), nn.SiLU(), shape=(1, 6, 6))
    gmap.loss = lambda output, y: (output - y).pow(4).sum()
    assert same(by_rules(gmap, x), forward_over_reverse(gmap, x))


def test_a_layer_alone():
    model = nn.Linear(6, 4).double()
    gmap, x = GradientMap(model, torch.tensor([2])), torch.rand(1, 6, dtype=torch.float64)
    assert same(by_rules(gmap, x), forward_over_reverse(gmap, x))


def test_turned_columns_have_the_same_gram():
    layers = nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 7), nn.SiLU(), nn.Linear(7, 5)
    gmap, x = chain(*layers, shape=(1, 6, 6))
    J, turned = by_rules(gmap, x), by_rules(gmap, x, turned=True)
    weights = [m.weight for m in gmap.model.modules() if type(m) is nn.Linear]
    assert len(weights) >= 2
    assert turned.shape[1] == J.shape[1] - sum(w.numel() - sum(w.shape) for w in weights)
    assert same(turned @ turned.T, J @ J.T)
    assert same(jacobian_gram(gmap, x), J @ J.T)


def test_turned_columns_where_a_layer_sees_nothing():
    """A gradient δ aᵀ with a = 0, or with δ = 0."""
    for layers in ((nn.Flatten(), nn.ReLU(), nn.Linear(9, 4)), (nn.Flatten(), nn.Linear(9, 4), nn.ReLU())):
        gmap, x = chain(*layers, shape=(1, 3, 3))
        x = -x if type(layers[1]) is nn.ReLU else x
        gmap.loss = lambda output, y: (output * 0).sum() + output.square().sum()
        J, turned = by_rules(gmap, x), by_rules(gmap, x, turned=True)
        assert turned.isfinite().all()
        assert torch.allclose(turned @ turned.T, J @ J.T, atol=1e-14)


def test_several_images_are_not_turned():
    gmap, x = chain(nn.Flatten(), nn.Linear(6, 4), shape=(1, 2, 3), n=2)
    assert torch.equal(by_rules(gmap, x, turned=True), by_rules(gmap, x))


class Sum(nn.Sequential):
    """Looks like a chain and is none."""

    def forward(self, x):
        return super().forward(x) + x.sum()


def _tied():
    layer = nn.Linear(9, 9)
    return nn.Flatten(), layer, nn.Tanh(), layer


def _tied_weights():
    first, second = nn.Linear(9, 9), nn.Linear(9, 9)
    second.weight = first.weight
    return nn.Flatten(), first, nn.Tanh(), second


def _hooked():
    layer = nn.Conv2d(1, 2, 2)
    layer.register_forward_hook(lambda module, inputs, output: output**2)
    return (layer,)


NO_CHAIN = {
    "pooling": lambda: (nn.AvgPool2d(2),),
    "groups": lambda: (nn.Conv2d(1, 2, 1), nn.Tanh(), nn.Conv2d(2, 2, 2, groups=2)),
    "circular": lambda: (nn.Conv2d(1, 2, 2, padding=1, padding_mode="circular"),),
    "padding by name": lambda: (nn.Conv2d(1, 2, 3, padding="same"),),
    "normalisation": lambda: (nn.Conv2d(1, 2, 2), nn.GroupNorm(1, 2)),
    "linear on an image": lambda: (nn.Linear(3, 2), nn.Tanh()),
    "part flat": lambda: (nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(2)),
    "a layer twice": _tied,
    "shared weights": _tied_weights,
    "a hook": _hooked,
    "a chain's subclass": lambda: (Sum(nn.Conv2d(1, 2, 2)),),
}


@pytest.mark.parametrize("layers", NO_CHAIN.values(), ids=NO_CHAIN)
def test_what_is_no_chain(layers, twin):
    gmap, x = chain(*layers(), shape=(1, 3, 3))
    assert by_rules(gmap, x) is None
    assert same(dense_jacobian(gmap, x), twin(gmap.model, x, gmap.y), 1e-9)


def test_a_loss_that_couples_images(twin):
    gmap, x = chain(nn.Conv2d(1, 3, 3), nn.Tanh(), shape=(1, 5, 5), n=2)
    gmap.loss = lambda output, y: F.cross_entropy(output, y) ** 2
    assert by_rules(gmap, x) is None
    assert same(dense_jacobian(gmap, x), forward_over_reverse(gmap, x))


def test_threads_do_not_change_a_digit():
    gmap, x = chain(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 3), nn.Tanh(), shape=(1, 14, 13), n=2)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(by_rules(gmap, x, 16))
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_the_map_is_left_as_it_was():
    gmap, x = chain(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), shape=(1, 5, 5))
    before = x.clone(), {name: p.clone() for name, p in gmap.parameters.items()}
    by_rules(gmap, x)
    assert torch.equal(x, before[0])
    assert not x.requires_grad
    assert all(torch.equal(p, before[1][name]) and p.grad is None for name, p in gmap.parameters.items())


def test_every_known_data_set_has_a_chain():
    for dataset in ("fashion-mnist", "cifar100"):
        spec = SPECS[dataset]
        model = i2f.models.build("lenet", dataset, "uniform", 1)
        gmap, x = GradientMap(model, torch.tensor([1])), torch.rand(1, *spec.shape)
        assert by_rules(gmap, x).shape == (x.numel(), gmap.size)


def test_threads_are_afterwards_what_they_were(mlp):
    """Of the caller and of threads that start later: a count set in a worker is PyTorch's for every new thread."""
    model, x, y = mlp
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        by_rules(GradientMap(model, y), x)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
