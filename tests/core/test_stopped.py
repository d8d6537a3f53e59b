"""Values that a forward or a loss takes out of autograd, in every way we know: J is the derivative of the module's own
gradient, or it is refused; and an audit of such a network never finds more protection than of its twin."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import i2f
from i2f.audit import audit

X, Y = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)[None], torch.tensor([1])

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PyTorch deprecates what people still use

    @torch.jit.script
    def scripted_detach(h: Tensor) -> Tensor:
        return torch.cat([h.detach()[:, :4], h[:, 4:]], 1)

    @torch.jit.script
    def scripted_no_grad(h: Tensor) -> Tensor:
        with torch.no_grad():
            k = h * 2
        return h * k


def under_no_grad(h):
    with torch.no_grad():
        k = h.norm().item()
    return h / k


def data_set(h):
    o = torch.zeros_like(h)
    o.data = h
    return h * o


def data_written(h):
    o = torch.zeros_like(h)
    o.data.copy_(h)
    return h * o


def aten(h):
    return torch.cat([torch.ops.aten.detach(h)[:, :4], h[:, 4:]], 1)


HIDDEN = {
    "item of a detached norm": lambda h: h / h.detach().norm().item(),
    "item of a norm": lambda h: h / h.norm().item(),
    "float of a detached norm": lambda h: h / float(h.detach().norm()),
    "item of data": lambda h: h / h.data.norm().item(),
    "item under no_grad": under_no_grad,
    "torch.tensor": lambda h: h * torch.tensor(h.detach()),
    "tolist": lambda h: h * torch.tensor(h.detach().tolist(), dtype=h.dtype),
    "new_tensor": lambda h: h * h.new_tensor(h.detach()),
    "numpy": lambda h: h * torch.from_numpy(h.detach().numpy().copy()),
    "Parameter": lambda h: h * nn.Parameter(h),
    "data set": data_set,
    "data written": data_written,
    "scripted detach": scripted_detach,
    "scripted no_grad": scripted_no_grad,
    "ATen's detach": aten,
    "full": lambda h: h * torch.full((1, 8), h.detach()[0, 0].item(), dtype=h.dtype),
}


class Net(nn.Module):
    def __init__(self, middle, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.a, self.b = nn.Linear(6, 8).double(), nn.Linear(8, 3).double()
        self.middle = middle

    def forward(self, x):
        return self.b(self.middle(torch.tanh(self.a(x))))


def differences(model, loss=F.cross_entropy) -> Tensor:
    """J by central differences of plain gradients."""

    def gradient(x):
        parts = torch.autograd.grad(
            loss(model(x), Y), list(model.parameters()), allow_unused=True, materialize_grads=True
        )
        return torch.cat([part.reshape(-1) for part in parts])

    rows = [(gradient(X + h) - gradient(X - h)) / 2e-5 for h in 1e-5 * torch.eye(6, dtype=X.dtype)[:, None]]
    return torch.stack(rows)


def right_or_refused(model, loss=F.cross_entropy) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*sourceTensor.*")
        try:
            J = i2f.GradientJacobian(model, X, Y, loss)
        except ValueError as error:
            if "in a way that autograd does not see" in str(error):
                return
            raise
        wanted = differences(model, loss)
    torch.testing.assert_close(J.rmatvec(torch.eye(6, dtype=X.dtype)), wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(J.dense(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", HIDDEN)
def test_what_leaves_the_graph(name):
    for seed in range(20):  # a single value of an item spoils one direction, which a single probe may miss
        right_or_refused(Net(HIDDEN[name], seed))


def focal(output, y):
    weight = (1 - float(output.detach().softmax(1)[0, 1])) ** 2
    return weight * F.cross_entropy(output, y)


def self_normalised(output, y):
    value = F.cross_entropy(output, y)
    return value / value.detach().item()


@pytest.mark.parametrize("loss", [focal, self_normalised])
def test_what_leaves_the_graph_in_a_loss(loss):
    for seed in range(5):
        right_or_refused(Net(torch.tanh, seed), loss)


CONSTANTS = {
    "a constant tensor": lambda h: h * torch.tensor(2.0, dtype=torch.float64),
    "a shape": lambda h: h * float(h.shape[1]),
    "zeros_like": lambda h: h + torch.zeros_like(h) + h.new_ones(1),
    "an argmax": lambda h: h * (1.0 + F.one_hot(h.argmax(1), 8)),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_what_does_not_depend_on_x_is_not_refused(name):
    J = i2f.GradientJacobian(Net(CONSTANTS[name]), X, Y)
    torch.testing.assert_close(J.dense(), differences(Net(CONSTANTS[name])), rtol=1e-5, atol=1e-7)


def test_recomputation_looks_at_the_users_functions_too():
    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return (4 * value).round() / 4

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    for method in ("auto", "recompute"):
        with pytest.raises(ValueError, match="in a way that autograd does not see; the cause may be Round"):
            i2f.GradientJacobian(Net(Round.apply), torch.cat([X, 1 - X]), torch.tensor([1, 0]), method=method)


@pytest.mark.parametrize("share", [0.5, 0.01, 0.001])
def test_a_rare_draw_is_a_draw(share):
    for _ in range(20):
        with pytest.raises(ValueError, match="model is random: its forward draws numbers"):
            i2f.GradientJacobian(Net(lambda h: F.dropout(h, share)), X, Y)


def test_dropout_that_is_told_not_to_train_draws_nothing():
    i2f.GradientJacobian(Net(lambda h: F.dropout(h, 0.5, training=False)), X, Y)


def test_pruning_is_judged_by_the_image_and_not_by_the_batch():
    """An image whose loss weighs 300 times the other's is read exactly where the batch hides a half of its directions:
    against the projector on the kept columns of J."""
    model = Net(torch.tanh).double()
    x, y = torch.cat([X, 1 - X]), torch.tensor([1, 2])

    def loss(output, y):
        return (torch.tensor([6.0, 0.02], dtype=output.dtype) * F.cross_entropy(output, y, reduction="none")).sum()

    J = i2f.GradientJacobian(model, x, y, loss)
    kept = J.dense()[:, (J.gradient + i2f.perturb.prune(J.gradient, 0.9)) != 0]
    rows = torch.linalg.svd(kept, full_matrices=False)
    shown = rows.U[:, rows.S / rows.S[0] > 1e-9]
    hidden = (1 - shown.square().sum(1)).clamp_min(0).view(2, 6).mean(1)
    assert hidden[0] < hidden[1] / 2
    found = audit(model, x, y, "prune:0.9", loss=loss, together=True)
    for sample, left in zip(found, hidden, strict=True):
        assert sample.masked == pytest.approx(0.25 * float(left) ** 0.5, abs=1e-6)
        assert sample.judged <= sample.masked + 1e-12
