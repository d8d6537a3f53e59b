"""Predicted memory against what a process takes, and what happens where it is too little."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import i2f
from conftest import build_tiny
from i2f import memory, models
from i2f.core import checks
from i2f.core.gradient import GradientMap
from i2f.core.linearization import Linearization, Recomputation

MEASURED = r"""
import os, re, sys
import torch, i2f
from i2f.core.linearization import Linearization, Recomputation
from i2f.core.memory import footprint
from i2f.core.gradient import GradientMap
torch.set_num_threads(1)
n = int(sys.argv[1])
x, y = (t[torch.arange(n) % 20] for t in i2f.data.load("cifar10"))
gmap = GradientMap(i2f.models.build("resnet20", "cifar10", activation="gelu"), y)

def peak():  # of this process alone: ru_maxrss starts at what its parent held
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read()).group(1))

def measure(kind):
    predicted = footprint(gmap, x)
    small = Linearization(GradientMap(gmap.model, y[:1]), x[:1])
    small.matvec(torch.randn(gmap.size)), small.rmatvec(torch.randn(x[:1].numel()))
    del small
    before = peak()
    at_x = Linearization(gmap, x) if kind == "kept" else Recomputation(gmap, x, n // 4)
    at_x.matvec(torch.randn(gmap.size)), at_x.rmatvec(torch.randn(x.numel()))
    print(kind, peak() - before, predicted.kept() if kind == "kept" else predicted.recomputed(1 / 4), flush=True)

for kind in ("kept", "recomputed"):  # each in a process of its own, which need not load PyTorch again
    if os.fork() == 0:
        measure(kind)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's own peak from /proc")
def test_the_estimate_is_what_a_process_takes():
    """Within a factor of 1.6 either way, for 32 images, of which 8 take turns where graphs are not kept."""
    out = subprocess.run([sys.executable, "-c", MEASURED, "32"], capture_output=True, text=True, check=True)
    found = {
        kind: (float(taken), float(predicted)) for kind, taken, predicted in map(str.split, out.stdout.splitlines())
    }
    assert list(found) == ["kept", "recomputed"]
    for taken, predicted in found.values():
        assert predicted / 1.6 <= taken <= 1.6 * predicted


def test_the_count_is_that_of_the_graphs():
    """A linear layer keeps its input and its weight; the count leaves θ out and takes each tensor once."""
    x, y = torch.rand(3, 5), torch.tensor([0, 1, 2])
    found = memory.footprint(GradientMap(nn.Linear(5, 4), y), x)
    assert found.parameters == 4 * (5 * 4 + 4)
    logits, labels = 4 * 3 * 4, 8 * 3
    assert found.activations == 4 * 3 * 5 + logits + labels + 4  # x, log-softmax, y, the weight of the mean
    assert found.graphs > found.activations


@pytest.mark.parametrize("network", ["lenet", "cnn4x16"])
def test_the_count_is_the_same_without_bytes(network, monkeypatch):
    x, y = i2f.data.load("mnist", n=2)
    gmap = GradientMap(models.build(network, "mnist"), y)
    built = memory.footprint(gmap, x)
    monkeypatch.setattr(GradientMap, "_moved", lambda *_: pytest.fail("a small problem needs no other device"))
    assert memory.footprint(gmap, x) == built
    monkeypatch.undo()
    monkeypatch.setattr(memory, "SMALL_PROBLEM", 0)
    assert memory.footprint(gmap, x) == built


def products_agree(model, x, y, group, reduction):
    gmap = GradientMap(model, y, nn.CrossEntropyLoss(reduction=reduction))
    kept, anew = Linearization(gmap, x), Recomputation(gmap, x, group)
    delta = torch.randn(gmap.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v = torch.randn(x.numel(), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for a, b in ((kept.matvec(delta), anew.matvec(delta)), (kept.rmatvec(v), anew.rmatvec(v))):
        assert float((a - b).norm() / a.norm()) <= 1e-12
    assert torch.equal(anew.gradient, gmap(x))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("group", [1, 2, 3])
def test_recomputed_products_are_the_same(group, reduction):
    model, x, _ = build_tiny("attention")
    x = torch.rand(5, *x.shape[1:], generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    products_agree(model, x, torch.tensor([0, 3, 1, 2, 3]), group, reduction)


def test_recomputed_products_of_a_vision_transformer():
    x, y = i2f.data.load("cifar10", n=3)
    products_agree(models.build("vit", "cifar10").double(), x.double(), y, 2, "mean")


class Centred(nn.Module):
    """Takes the batch's mean out of every image, as BatchNorm does in training."""

    def forward(self, x):
        return x - x.mean(0)


def test_images_that_mix_are_not_taken_apart():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).eval()
    x, y = torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    i2f.GradientJacobian(net, x, y, method="recompute")
    with pytest.raises(ValueError, match="A layer may mix them"):
        i2f.GradientJacobian(nn.Sequential(Centred(), net), x, y, method="recompute")


def test_many_vectors_at_once_are_the_same_as_one_after_another(tiny):
    model, x, y = tiny
    J = i2f.GradientJacobian(model, x, y, method="matrix-free")
    delta, v = torch.randn(5, J.shape[1]).double(), torch.randn(5, J.shape[0]).double()
    assert J.chunk > 1
    at_once = J.matvec(delta), J.rmatvec(v)
    for chunk in (1, 2):
        J.chunk = chunk
        torch.testing.assert_close(J.matvec(delta), at_once[0], rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(J.rmatvec(v), at_once[1], rtol=1e-10, atol=1e-13)


def test_without_a_batching_rule_one_after_another(cubic):
    model, x, y = cubic
    J = i2f.GradientJacobian(model, x, y, method="matrix-free")
    v = torch.randn(3, J.shape[0]).double()
    torch.testing.assert_close(J.rmatvec(v), torch.stack([J.rmatvec(u) for u in v]))


@pytest.fixture(scope="module")
def deep():
    x, y = i2f.data.load("cifar10", n=2)
    return models.build("resnet20", "cifar10", activation="gelu"), x, y


def test_the_budget_decides(deep):
    need = memory.footprint(GradientMap(deep[0], deep[2]), deep[1])
    plenty = i2f.GradientJacobian(*deep, memory=need.kept(8))
    assert type(plenty._at_x) is Linearization
    assert plenty.chunk == 8
    tight = i2f.GradientJacobian(*deep, memory=need.kept() - 1)
    assert type(tight._at_x) is Recomputation
    assert tight._at_x.groups == [slice(0, 1), slice(1, 2)]
    with pytest.raises(MemoryError, match=r"products with J take .*, or .* with the 2 images one after another"):
        i2f.GradientJacobian(*deep, memory=need.recomputed(1 / 2) - 1)


def test_forming_what_does_not_fit_is_refused(deep):
    J = i2f.GradientJacobian(*deep, method="dense", memory=2**28)
    with pytest.raises(MemoryError, match=r"J takes 6\.24 GiB, and 0\.25 GiB may be used.*matrix-free"):
        J.dense()
    J.memory = 2**20
    with pytest.raises(MemoryError, match=r"J Jᵀ takes 0\.281 GiB"):
        J.gram()


class InPlace(nn.Module):
    def forward(self, x):
        out = torch.exp(x)
        out += 1
        return out


class Random(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        return x + self.size * torch.rand_like(x)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, by_output):
        return 2 * ctx.saved_tensors[0] * by_output


class Dropping(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5)


class Square(nn.Module):
    def forward(self, x):
        return Once.apply(x)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (InPlace(), "model: an in-place operation overwrites"),
        (nn.Sequential(InPlace(), nn.ELU(inplace=True)), "in-place operation overwrites.*inplace=True: 1.1"),
        (Dropping(), "model is random: .* training=self.training"),
        (Square(), "operation without a second derivative.*once_differentiable"),
        (nn.Dropout(0.1).train(), "in training mode: its gradient is random"),
        (nn.BatchNorm1d(4).train(), "BatchNorm1d.* in training mode"),
    ],
)
def test_what_has_no_jacobian_is_named(layer, message):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), layer, nn.Linear(4, 3))
    with pytest.raises(ValueError, match=message):
        i2f.GradientJacobian(model, torch.rand(2, 5), torch.tensor([0, 1]))


def test_a_difference_of_rounding_is_a_warning():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), Random(1e-7), nn.Linear(4, 3))
    with pytest.warns(UserWarning, match="kernels that are not deterministic.*use_deterministic_algorithms"):
        i2f.GradientJacobian(model, torch.rand(1, 5), torch.tensor([0]))


def test_out_of_memory_has_its_own_name():
    error = checks.not_differentiable(nn.Linear(1, 1), RuntimeError("can't allocate memory: you tried 9 TB"))
    assert isinstance(error, MemoryError)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu(deep):
    model, x, y = deep
    there = i2f.GradientJacobian(model.double().cuda(), x.double().cuda(), y.cuda())
    here = i2f.GradientJacobian(model.double().cpu(), x.double(), y)
    v = torch.randn(here.shape[0], dtype=torch.float64)
    torch.testing.assert_close(there.rmatvec(v.cuda()).cpu(), here.rmatvec(v), rtol=1e-9, atol=1e-12)
    assert i2f.spectrum.lambda_max(there).value == pytest.approx(i2f.spectrum.lambda_max(here).value, rel=1e-6)
