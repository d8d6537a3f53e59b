"""Deep networks: the architectures, their activations and weights, what BatchNorm gives away, the attack on them."""

import functools

import pytest
import torch
import torchvision
from torch import nn

import i2f
from i2f import metrics, models
from i2f.attacks import gauss_newton, krylov, steps


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "dataset", "size"),
    [
        ("resnet20", "cifar10", 272_474),  # He et al. 2016 count 0.27 million
        ("resnet18", "cifar10", 11_173_962),
        ("resnet18", "imagenet", 11_689_512),  # torchvision's own counts, from here on
        ("resnet50", "imagenet", 25_557_032),
        ("resnet152", "imagenet", 60_192_808),
        ("efficientnet_lite0", "imagenet", 4_652_008),
        ("vit", "cifar10", 2_693_578),
        ("cnn8x16", "mnist", 160 + 7 * (16 * 16 * 9 + 16) + 16 * 49 * 10 + 10),
    ],
)
def test_size(name, dataset, size):
    with torch.device("meta"):  # no numbers are drawn
        assert count(models.build(name, dataset)) == size


def test_resnet_of_large_images_is_torchvisions():
    torch.manual_seed(3)
    theirs = torchvision.models.resnet18().eval()
    ours = models.build("resnet18", "imagenet", seed=3, normalize=False)
    x = torch.rand(1, 3, 224, 224)
    assert torch.equal(ours(x), theirs(x))


own_of = functools.cache(lambda name: models.build(name, "cifar10", seed=1))


@pytest.mark.parametrize("name", ["lenet", "resnet20", "vit", "efficientnet_lite0", "cnn4x8"])
@pytest.mark.parametrize("activation", models.ACTIVATIONS)
def test_activation_is_replaced_and_nothing_else(name, activation):
    own, other = own_of(name), models.build(name, "cifar10", seed=1, activation=activation)
    assert all(torch.equal(a, b) for a, b in zip(own.state_dict().values(), other.state_dict().values(), strict=True))
    kinds = {type(module) for module in other.modules() if isinstance(module, (*models.REPLACED, nn.Softplus))}
    assert kinds == {type(models.ACTIVATIONS[activation]())}
    assert not any(getattr(module, "inplace", False) for module in [*own.modules(), *other.modules()])


def test_activation_may_be_any_module():
    model = models.build("cnn2x8", "mnist", activation=lambda: nn.Softplus(beta=10))
    assert [m.beta for m in model.modules() if isinstance(m, nn.Softplus)] == [10, 10]


def test_shipped_weights_know_the_photographs():
    """Three of the first four are named right, the fourth among the five best: a wrong padding, order or
    normalisation would show."""
    x, y = i2f.data.load("imagenet", n=4)
    with torch.no_grad():
        output = models.build("efficientnet_lite0", "imagenet", weights="imagenet")(x)
    assert int((output.argmax(1) == y).sum()) >= 3
    assert (output.topk(5).indices == y[:, None]).any(1).all()


def test_weights_from_a_file(tmp_path):
    model = models.build("resnet20", "cifar10", seed=5)
    x = torch.rand(1, 3, 32, 32)
    for saved in (model, nn.Sequential(*list(model)[1:])):  # with the normalisation in front, or without
        torch.save(saved.state_dict(), tmp_path / "net.pth")
        again = models.build("resnet20", "cifar10", seed=6, weights=tmp_path / "net.pth")
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name": "resnet"}, ValueError, r"name='resnet' is unknown: did you mean 'resnet"),
        ({"activation": "gelo"}, ValueError, r"activation='gelo' is unknown: did you mean 'gelu'"),
        ({"weights": "imagenet"}, FileNotFoundError, r"weights='imagenet' is no file, and no pretrained weights"),
        ({"dataset": "imagenet", "weights": "IMAGENET"}, ValueError, r"weights='IMAGENET' .*IMAGENET1K_V1"),
        ({"weights": "imagenet", "init": "uniform"}, ValueError, r"init='uniform' would overwrite weights='imagenet'"),
        ({"name": "vit", "dataset": "imagenet"}, ValueError, r"vit cuts square images of up to 64 pixels"),
    ],
)
def test_bad_input_is_named(options, error, message):
    with pytest.raises(error, match=message):
        models.build(**({"name": "resnet18", "dataset": "cifar10"} | options))


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(models.build("cnn2x8", "mnist").state_dict(), tmp_path / "net.pth")
    with pytest.raises(ValueError, match="do not fit cnn2x16 for mnist"):
        models.build("cnn2x16", "mnist", weights=tmp_path / "net.pth")


# The attack where no Gram matrix fits ---------------------------------------------------------------------------------


@pytest.fixture
def large(monkeypatch):
    """Every J counts as too large to form."""
    monkeypatch.setattr(steps, "DENSE_BYTES", 0)


@pytest.mark.parametrize("tiny", ["mlp", "conv", "norms", "tied", "pair"], indirect=True)
def test_krylov_attack_on_small_networks(large, tiny, backward):
    model, x, y = tiny
    found = i2f.invert(model, backward(model, x, y), y, x.shape, steps=60, restarts=5)
    assert found.relative_residual <= 1e-10
    assert found.converged


def test_krylov_attack_on_lenet(large, lenet, digits, backward):
    x, y = digits[0][:1], digits[1][:1]
    found = i2f.invert(lenet, backward(lenet, x, y), y, x.shape, steps=60, tolerance=1e-5)
    assert float(metrics.mse(found.x, x)) <= 1e-4
    assert found.relative_residual <= 1e-4


def test_krylov_attack_lands_where_the_dense_one_does(monkeypatch, mlp, backward):
    """A noisy gradient, a prior: the same minimum, by another route."""
    model, x, y = mlp
    sent = backward(model, x, y)
    sent = sent + i2f.perturb.gaussian(sent, 1e-6, seed=0)
    for options in ({}, {"ridge": 1e-4}):
        dense = i2f.invert(model, sent, y, x.shape, start=x, **options)
        with monkeypatch.context() as patch:
            patch.setattr(steps, "DENSE_BYTES", 0)
            sparse = i2f.invert(model, sent, y, x.shape, start=x, **options)
        assert dense.converged
        assert sparse.converged
        torch.testing.assert_close(sparse.x, dense.x, rtol=0, atol=1e-6)


def test_a_refused_step_costs_no_product(mlp, backward):
    """One Lanczos process answers for every damping."""
    applied = []

    class Bowl:
        def half_hessian(self, v, newton):
            applied.append(1)
            return v * torch.arange(1.0, 13.0, dtype=v.dtype)

    solver, point, b = krylov.KrylovSolver(), Bowl(), torch.ones(12, dtype=torch.float64)
    first, _ = solver.solve(point, b, 0.1, False)
    spent = len(applied)
    for mu in (1.0, 10.0, 100.0):
        s, _ = solver.solve(point, b, mu, False)
        assert float((s * (torch.arange(1.0, 13.0) + mu) - b).norm()) <= krylov.FORCING * float(b.norm())
    assert len(applied) == spent == solver.products / 2
    assert float(first.norm()) > float(s.norm())


def test_corrections_pay(large, monkeypatch, digits, backward):
    """Where the objective is strongly curved, the same steps get further with them."""
    x, y = digits[0][:1], digits[1][:1]
    model = models.build("cnn4x16", "mnist", "kaiming", seed=1, activation="gelu").double()
    sent = backward(model, x, y)
    with_them = i2f.invert(model, sent, y, x.shape, steps=10)
    monkeypatch.setattr(gauss_newton, "MOST_CORRECTIONS", 0)
    without = i2f.invert(model, sent, y, x.shape, steps=10)
    assert with_them.loss < 0.7 * without.loss
