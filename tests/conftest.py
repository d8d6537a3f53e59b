"""Networks, images and independent gradients that the tests share."""

import copy
import signal
import sys
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import i2f
from i2f.paper import networks


@pytest.fixture(autouse=True)
def _figures_are_closed() -> Iterator[None]:
    """A process that ran many tests would have too many of them open."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture
def few_draws(monkeypatch):
    """Bootstraps of few draws: verdicts on fabricated tables are as clear with them."""
    from i2f import claims, statistics

    monkeypatch.setattr(claims, "bootstrap", partial(statistics.bootstrap, draws=40))


class Tied(nn.Module):
    """One square layer used twice, as word embeddings and recurrent cells do."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(10, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Attention(nn.Module):
    """Softmax attention over (n, tokens, width), then a classifier of the mean token."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.tanh(x + self.attention(x, x, x)[0]).mean(1))


def _mlp():
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)), (1, 12)


def _conv():
    layers = (
        nn.Conv2d(2, 4, 3, padding=2, dilation=2, groups=2),
        nn.Softplus(),
        nn.Conv2d(4, 6, 3, padding=1, stride=2),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(54, 4),
    )
    return nn.Sequential(*layers), (1, 2, 5, 5)


def _norms():
    layers = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.LayerNorm(48)
    model = nn.Sequential(*layers, nn.Linear(48, 4))
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2.0)
    return model, (1, 1, 4, 4)


def _tied():
    return Tied(), (1, 10)


def _attention():
    return Attention(), (1, 5, 8)


def _relu():
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4)), (1, 12)


def _pair():
    """Two images behind one gradient."""
    return nn.Sequential(nn.Linear(8, 24), nn.Softplus(), nn.Linear(24, 4)), (2, 8)


TINY = {function.__name__[1:]: function for function in (_mlp, _conv, _norms, _tied, _attention, _relu, _pair)}


def build_tiny(name):
    """(model, x, y) in float64, d_x ≤ 60, the same at every call; weights large enough to bend the network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, shape = TINY[name]()
        model = model.double().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(0, 0.5)
        return model, torch.rand(shape, dtype=torch.float64), torch.arange(1, shape[0] + 1)


@pytest.fixture(params=TINY)
def tiny(request):
    """(model, x, y) of every small network in turn, or of those named by indirect parametrization."""
    return build_tiny(request.param)


@pytest.fixture
def mlp():
    return build_tiny("mlp")


@pytest.fixture
def blind():
    """(model, x, y) of a network that sees nine inputs through three frozen features: J Jᵀ has rank 3 of 9."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(9, 3), nn.Tanh(), nn.Linear(3, 4)).double().eval()
        model[0].requires_grad_(False)
        return model, torch.rand(1, 9, dtype=torch.float64), torch.tensor([2])


class Cube(torch.autograd.Function):
    """x³ with a backward rule and no forward-mode or batching rule."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, by_output):
        return 3 * ctx.saved_tensors[0] ** 2 * by_output


class Cubic(nn.Module):
    def forward(self, x):
        return Cube.apply(x)


@pytest.fixture
def cubic():
    """(model, x, y) of a network with an operation that only knows reverse mode."""
    model, x, y = build_tiny("mlp")
    model[1] = Cubic()
    return model, x, y


@pytest.fixture
def transformer():
    """(model, x, y) of PyTorch's own encoder layer on three tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)
        model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(24, 4)).double().eval()
        return model, torch.rand(1, 3, 8, dtype=torch.float64), torch.tensor([1])


@pytest.fixture(scope="session")
def digits():
    """(x, y) of the first five MNIST test images, float64."""
    x, y = i2f.data.load("mnist", n=5)
    return x.double(), y


@pytest.fixture
def lenet():
    """The released LeNet with its released weights, float64, fed with pixels."""
    return i2f.models.build("lenet", "mnist", "uniform", seed=1, normalize=False).double()


def build_crop():
    """(model, x, y) of LeNet on 8×8 pixels, the middle of the first digit: 64 rows of J in place of 784. Float64."""
    x, y = i2f.data.load("mnist", n=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(*networks.lenet((1, 8, 8), 10)).double().eval()
        for p in model.parameters():
            nn.init.uniform_(p, -0.5, 0.5)
    return model, x[..., 10:18, 10:18].double(), y


@pytest.fixture
def crop():
    return build_crop()


@pytest.fixture(scope="session")
def backward():
    """g(x) by the textbook: loss.backward() on a copy of the model, then the .grad fields."""

    def gradient(model, x, y, loss=F.cross_entropy):
        model = copy.deepcopy(model)
        model.zero_grad()
        loss(model(x), y).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    return gradient


@pytest.fixture(scope="session")
def twin(backward):
    """J by central differences of `backward`, (d_x, d_θ): shares no code with the package."""

    def dense(model, x, y, loss=F.cross_entropy, h=2e-4):
        rows = []
        for e in torch.eye(x.numel(), dtype=x.dtype):
            ahead = [backward(model, x + k * h * e.view_as(x), y, loss) for k in (-2, -1, 1, 2)]
            rows.append((ahead[0] - 8 * ahead[1] + 8 * ahead[2] - ahead[3]) / (12 * h))  # error O(h⁴)
        return torch.stack(rows)

    return dense


def normal(*shape, seed=0, dtype=torch.float64):
    """N(0, 1) from a generator of its own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def guard():
    """A loop without an end becomes a failure."""

    def stop(*_):
        raise TimeoutError("the attack did not end")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


class Trace:
    """A callback that keeps every iterate."""

    def __init__(self):
        self.steps, self.images, self.losses, self.evaluations = [], [], [], []

    def __call__(self, iterate):
        self.steps.append(iterate.step)
        self.images.append(iterate.x)
        self.losses.append(iterate.loss)
        self.evaluations.append(iterate.evaluations)


@pytest.fixture
def several(mlp, backward):
    """Five problems that share a model: (model, images (5, 1, 12), labels (5, 1), gradients (5, d_θ))."""
    model, _, _ = mlp
    x = torch.rand(5, 1, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y = torch.tensor([[0], [3], [1], [4], [3]])
    return model, x, y, torch.stack([backward(model, a, b) for a, b in zip(x, y, strict=True)])
