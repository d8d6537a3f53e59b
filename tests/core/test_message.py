"""What several local steps of SGD send: against `torch.optim.SGD`, central differences, and the plain gradient."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import i2f
from i2f._fast.update import chain_update
from i2f.attacks import recover_labels
from i2f.core.gradient import GradientMap


class Skip(nn.Module):
    """No chain of layers."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(36, 36), nn.Linear(36, 4)

    def forward(self, x):
        x = x.flatten(1)
        return self.head(x + torch.tanh(self.inner(x)))


def chain() -> nn.Module:
    layers = [nn.Conv2d(1, 3, 3, 2, 1), nn.Sigmoid(), nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(36, 5), nn.Softplus(), nn.Linear(5, 4))


def problem(make, n: int = 1):
    torch.manual_seed(0)
    return make().double(), torch.rand(n, 1, 6, 6, dtype=torch.float64), torch.arange(n) % 4


def trained(model: nn.Module, x: torch.Tensor, y: torch.Tensor, message: i2f.LocalSteps) -> torch.Tensor:
    """θ₀ − θ_K of a client that trains with PyTorch's own optimizer."""
    client = copy.deepcopy(model)
    optimizer = torch.optim.SGD(client.parameters(), message.lr, message.momentum, weight_decay=message.weight_decay)
    for images in message.batches(len(x)):
        optimizer.zero_grad()
        F.cross_entropy(client(x[images]), y[images]).backward()
        optimizer.step()
    parts = zip(model.parameters(), client.parameters(), strict=True)
    return torch.cat([(before - after).detach().flatten() for before, after in parts])


SCHEDULES = [
    (1, {"steps": 5, "lr": 0.3}),
    (1, {"steps": 6, "lr": 0.2, "momentum": 0.9, "weight_decay": 0.05}),
    (3, {"epochs": 2, "batch_size": 2, "lr": 0.3, "momentum": 0.5}),
    (3, {"steps": 4, "batch_size": 1, "lr": 0.3, "shuffle": 7, "weight_decay": 0.1}),
]


@pytest.mark.parametrize("make", [chain, Skip])
@pytest.mark.parametrize(("n", "schedule"), SCHEDULES, ids=["plain", "momentum", "batches", "shuffled"])
def test_message_and_jacobian_are_those_of_sgd(make, n, schedule):
    (model, x, y), message = problem(make, n), i2f.LocalSteps(**schedule)
    J = i2f.GradientJacobian(model, x, y, message=message)
    assert torch.allclose(J.gradient, trained(model, x, y, message), rtol=0, atol=1e-14)
    v, delta = torch.randn(x.numel(), dtype=torch.float64), torch.randn(J.shape[1], dtype=torch.float64)
    step = 1e-6 * v.view_as(x)
    wanted = (trained(model, x + step, y, message) - trained(model, x - step, y, message)) / 2e-6
    assert float((J.rmatvec(v) - wanted).norm()) < 1e-7 * float(wanted.norm())
    products = J.matvec(delta), J.rmatvec(v)
    assert torch.allclose(products[0] @ v, products[1] @ delta, rtol=1e-10)
    D = J.dense()
    assert torch.allclose(D @ delta, products[0], atol=1e-12)
    assert torch.allclose(v @ D, products[1], atol=1e-12)
    gram = i2f.GradientJacobian(model, x, y, message=message).gram()
    assert torch.allclose(gram, D @ D.T, atol=1e-12)


def test_layers_rules_and_function_transforms_agree(monkeypatch):
    (model, x, y), message = problem(chain, 2), i2f.LocalSteps(lr=0.3, epochs=2, batch_size=1, momentum=0.5)
    gmap = GradientMap(model, y).sending(message)
    calls = []
    monkeypatch.setattr("i2f.core.message.chain_update", lambda *given: calls.append(chain_update(*given)))
    by_transforms = message.dense(gmap, x)
    assert torch.allclose(calls[0], by_transforms, atol=1e-13)
    layers = [nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 4)]
    layers[1].bias.requires_grad_(False)
    (model, x, y) = problem(lambda: nn.Sequential(*layers), 2)
    by_transforms = message.dense(GradientMap(model, y).sending(message), x)
    assert torch.allclose(calls[1], by_transforms, atol=1e-13)
    assert message.dense(GradientMap(*problem(Skip)[::2]).sending(i2f.LocalSteps(lr=1, steps=1)), x[:1]).any()
    assert calls[2] is None  # no chain


@pytest.mark.parametrize("method", ["gauss-newton", "dgl"])
def test_one_step_is_the_gradient(method):
    (model, x, y), one = problem(chain), i2f.LocalSteps(lr=1.0, steps=1)
    plain, J = i2f.GradientJacobian(model, x, y), i2f.GradientJacobian(model, x, y, message=one)
    delta = i2f.perturb.gaussian(plain.gradient, 1e-8, seed=0)
    assert torch.allclose(J.gradient, plain.gradient, rtol=0, atol=1e-14)
    assert torch.allclose(J.dense(), plain.dense(), rtol=0, atol=1e-13)
    assert i2f.influence(J, delta).norm == pytest.approx(i2f.influence(plain, delta).norm, rel=1e-8)
    assert i2f.lower_bound(J, delta).norm == pytest.approx(i2f.lower_bound(plain, delta).norm, rel=1e-8)
    sent = plain.gradient + delta
    found = [i2f.invert(model, sent, y, x.shape, method=method, steps=8, message=m) for m in (None, one)]
    assert torch.allclose(found[0].x, found[1].x, atol=1e-9)


@pytest.mark.parametrize(("n", "schedule"), [SCHEDULES[1], SCHEDULES[2]], ids=["one image", "three in batches"])
def test_images_are_recovered_from_an_update(n, schedule):
    (model, x, y), message = problem(chain, n), i2f.LocalSteps(**schedule)
    found = i2f.invert(model, trained(model, x, y, message), y, x.shape, message=message, steps=100)
    assert float((i2f.metrics.assign(found.x, x) - x).square().mean()) < 1e-20
    assert found.matched
    other = i2f.LocalSteps(**schedule | {"lr": 2 * schedule["lr"]})  # what the attacker does not know it gets wrong
    found = i2f.invert(model, trained(model, x, y, message), y, x.shape, message=other, steps=6)
    assert not found.matched


def test_noise_on_an_update_moves_the_attack_as_predicted():
    (model, x, y), message = problem(chain), i2f.LocalSteps(lr=0.3, steps=5)
    J = i2f.GradientJacobian(model, x, y, message=message)
    delta = i2f.perturb.gaussian(J.gradient, 1e-14, seed=0)
    found = i2f.invert(model, J.gradient + delta, y, x.shape, start=x, message=message)
    assert float((found.x - x).norm()) == pytest.approx(i2f.influence(J, delta).norm, rel=1e-3)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "schedule", [{"epochs": 3, "batch_size": 2}, {"steps": 4, "momentum": 0.9}, {"epochs": 2, "batch_size": 1}]
)
def test_labels_are_read_off_an_update(reduction, schedule):
    (model, x, _), message = problem(chain, 4), i2f.LocalSteps(lr=0.002, **schedule)
    loss = partial(F.cross_entropy, reduction=reduction)
    for y in ([0, 2, 2, 3], [1, 1, 1, 1]):
        gmap = GradientMap(model, torch.tensor(y), loss).sending(message)
        assert recover_labels(gmap, gmap(x), tuple(x.shape)).tolist() == y


def test_labels_that_an_update_does_not_show_are_asked_for():
    model, x, y = problem(chain, 4)
    found = i2f.invert(model, trained(model, x, y, M := i2f.LocalSteps(lr=0.01, steps=2)), None, x.shape, message=M)
    assert found.y.tolist() == y.tolist()
    M = i2f.LocalSteps(lr=0.01, epochs=1, batch_size=2)
    with pytest.raises(ValueError, match=r"labels read off, \[0, 1, 2, 3\], do not say which of them belong to which"):
        i2f.invert(model, trained(model, x, y, M), None, x.shape, message=M)
    alike = torch.ones(4, dtype=torch.long)
    assert i2f.invert(model, trained(model, x, alike, M), None, x.shape, message=M, steps=1).y.tolist() == [1] * 4
    M = i2f.LocalSteps(lr=0.01, epochs=1, batch_size=3)
    with pytest.raises(ValueError, match="weigh the images differently"):
        i2f.invert(model, trained(model, x, y, M), None, x.shape, message=M)


def test_what_stops_nothing_that_matters_is_followed():
    """Its largest logit, which cross-entropy does not see, is taken off without a gradient."""

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(36, 4)

        def forward(self, x):
            z = self.layer(x.flatten(1))
            return z - z.max(1, keepdim=True).values.detach()

    (model, x, y), message = problem(Shifted), i2f.LocalSteps(lr=0.3, steps=3)
    J = i2f.GradientJacobian(model, x, y, message=message)
    assert torch.allclose(J.gradient, trained(model, x, y, message), rtol=0, atol=1e-14)


def test_steps_that_cannot_be_taken_are_named():
    model, x, y = problem(chain, 3)
    with pytest.raises(ValueError, match=r"local steps at lr=1e\+200 diverge"):
        i2f.GradientJacobian(model, x, y, loss=lambda z, t: z.square().sum(), message=i2f.LocalSteps(lr=1e200, steps=9))
    weights = torch.ones(3, 4)
    message = i2f.LocalSteps(lr=0.1, epochs=1, batch_size=2)
    with pytest.raises(ValueError, match="loss does not take a batch of 2 of 3 images"):
        i2f.GradientJacobian(model, x, y, loss=lambda z, t: (z * weights).square().sum(), message=message)


def test_a_loss_of_any_scale():
    """The unit that a large loss is divided by does not change the steps."""
    model, x, y = problem(chain)

    def large(output, labels):
        return 1e9 * F.cross_entropy(output, labels)

    rates = {"steps": 3, "momentum": 0.5, "weight_decay": 1e7}
    J = i2f.GradientJacobian(model, x, y, loss=large, message=i2f.LocalSteps(lr=3e-10, **rates))
    wanted = trained(model, x, y, i2f.LocalSteps(lr=0.3, steps=3, momentum=0.5))
    decay_free = i2f.GradientJacobian(model, x, y, loss=large, message=i2f.LocalSteps(lr=3e-10, steps=3, momentum=0.5))
    assert torch.allclose(decay_free.gradient, wanted, rtol=1e-9)
    assert J.unit != 1
    v = torch.randn(36, dtype=torch.float64)
    assert torch.allclose(J.rmatvec(v), v @ J.dense(), rtol=1e-8, atol=1e-12)
    assert not torch.allclose(J.gradient, decay_free.gradient, rtol=1e-12)


def test_schedules():
    assert i2f.LocalSteps(lr=1, epochs=2, batch_size=2).batches(3) == [[0, 1], [2], [0, 1], [2]]
    assert i2f.LocalSteps(lr=1, steps=3, batch_size=2).batches(3) == [[0, 1], [2], [0, 1]]
    assert i2f.LocalSteps(lr=1, steps=2).batches(2) == [[0, 1], [0, 1]]
    shuffled = i2f.LocalSteps(lr=1, epochs=2, batch_size=4, shuffle=1).batches(8)
    assert [sorted(shuffled[k] + shuffled[k + 1]) for k in (0, 2)] == [list(range(8))] * 2
    assert shuffled[:2] != shuffled[2:]
    assert i2f.LocalSteps(lr=0.1, steps=3, momentum=0.5).rates(1) == pytest.approx([0.175, 0.15, 0.1])


def test_an_optimizer_is_read():
    model = chain()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    assert i2f.LocalSteps.of(sgd, steps=3) == i2f.LocalSteps(lr=0.1, steps=3, momentum=0.9, weight_decay=1e-4)
    with pytest.raises(ValueError, match="optimizer is Adam: local steps are known of torch"):
        i2f.LocalSteps.of(torch.optim.Adam(model.parameters()), steps=3)
    model(torch.rand(1, 1, 6, 6)).sum().backward()
    sgd.step()
    with pytest.raises(ValueError, match="momentum from earlier steps"):
        i2f.LocalSteps.of(sgd, steps=3)
    with pytest.raises(ValueError, match="nesterov set"):
        i2f.LocalSteps.of(torch.optim.SGD(model.parameters(), 0.1, 0.9, nesterov=True), steps=3)
    groups = [{"params": [p]} for p in model.parameters()]
    with pytest.raises(ValueError, match="8 groups of parameters"):
        i2f.LocalSteps.of(torch.optim.SGD(groups, 0.1), steps=3)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"lr": 0.1}, "give one of steps=K, epochs=E"),
        ({"lr": 0.1, "steps": 2, "epochs": 1}, "give one of steps=K, epochs=E"),
        ({"lr": 0.1, "steps": 0}, "steps=0 is out of range"),
        ({"lr": 0.1, "steps": 1, "batch_size": 0}, "batch_size=0 is out of range"),
        ({"lr": 0.0, "steps": 1}, "lr=0.0 is out of range"),
        ({"lr": 0.1, "steps": 1, "momentum": 1.0}, "momentum=1.0 is out of range"),
        ({"lr": 0.1, "steps": 1, "weight_decay": -1.0}, "weight_decay=-1.0 is out of range"),
    ],
)
def test_numbers_out_of_range(given, says):
    with pytest.raises(ValueError, match=says):
        i2f.LocalSteps(**given)


def test_a_schedule_that_does_not_fit():
    (model, x, y), message = problem(chain, 2), i2f.LocalSteps(lr=0.1, epochs=1, batch_size=3)
    with pytest.raises(ValueError, match="batch_size=3 and x has 2 images: give at most 2"):
        i2f.GradientJacobian(model, x, y, message=message)
    with pytest.raises(ValueError, match="batch_size=3"):
        i2f.invert(model, torch.zeros(10), y, x.shape, message=message)
    one = i2f.LocalSteps(lr=0.1, steps=1)
    size = sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match="'recursive' reads one gradient"):
        i2f.invert(model, torch.ones(size), y, x.shape, method="recursive", message=one)
    with pytest.raises(ValueError, match="the model's trainable parameter space"):  # of another model
        i2f.invert(model, torch.ones(size + 1), y, x.shape, message=one)


def test_steps_at_random_are_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Dropout(0.5), nn.Linear(8, 4)).double()
    x, y = torch.rand(1, 1, 6, 6, dtype=torch.float64), torch.tensor([1])
    with pytest.raises(ValueError, match="Dropout"):
        i2f.GradientJacobian(model, x, y, message=i2f.LocalSteps(lr=0.1, steps=2))


def test_products_that_do_not_fit_say_what_they_take():
    (model, x, y), message = problem(chain), i2f.LocalSteps(lr=0.1, steps=30)
    with pytest.raises(MemoryError, match=r"through the local steps take .*GiB, and .*GiB may be used"):
        i2f.GradientJacobian(model, x, y, message=message, memory=10**5)
    with pytest.raises(ValueError, match="method='recompute' takes images one after another"):
        i2f.GradientJacobian(model, x, y, message=message, method="recompute")
