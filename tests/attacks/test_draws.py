"""Random draws, the box, and what a reconstruction reports at its end."""

import hashlib
from functools import partial

import pytest
import torch
from torch import nn

import i2f
from conftest import Trace, build_tiny, normal

D = torch.float64


def drawn(name, seed, *shape):
    state = int.from_bytes(hashlib.sha256(f"{name}:{seed}".encode()).digest()[:8], "little") >> 1
    return torch.randn(*shape, generator=torch.Generator().manual_seed(state), dtype=D)


def test_starts_share_nothing_with_noise_of_the_same_seed(mlp, backward):
    model, x, y = mlp
    seen = []
    i2f.invert(model, backward(model, x, y), y, x.shape, start="normal", seed=5, steps=1, callback=seen.append)
    torch.testing.assert_close(seen[0].x, drawn("start", 5, 1, 12))


def test_label_logits_come_from_the_seed_and_not_from_the_number_of_restarts(mlp, backward):
    """A restart's draw does not depend on how many follow it."""
    model, x, y = mlp
    sent = backward(model, x, y)

    def losses(**options):
        seen = []
        i2f.invert(model, sent, None, x.shape, method="dlg", start="normal", steps=1, callback=seen.append, **options)
        return [at.loss for at in seen if at.step == 0]

    soft = drawn("labels", 5, 1, 5).softmax(-1)
    at_start = float((backward(model, drawn("start", 5, 1, 12), soft) - sent).square().sum())
    assert losses(seed=5)[0] == pytest.approx(at_start)
    assert losses(seed=5, restarts=3)[0] == losses(seed=5)[0]
    assert len(set(losses(seed=5, restarts=3))) == 3


class Watching(nn.Module):
    """Keeps the range of every input that it sees."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x):
        RANGES.append(tuple(x.detach().aminmax()))
        return self.inner(x)


RANGES: list[tuple[torch.Tensor, torch.Tensor]] = []
OPTIMIZERS = {
    "dlg": {"method": "dlg"},
    "dlg, line search": {"method": "dlg", "optimizer": partial(torch.optim.LBFGS, line_search_fn="strong_wolfe")},
    "dgl, L-BFGS": {"method": "dgl", "optimizer": torch.optim.LBFGS, "lr": 1.0},
    "gs, L-BFGS": {"method": "gs", "optimizer": torch.optim.LBFGS, "lr": 0.5, "signed": False},
    "dgl": {"method": "dgl", "lr": 0.5},
    "gs": {"method": "gs"},
    "gauss-newton": {"method": "gauss-newton"},
    "dlg without labels": {"method": "dlg", "y": None},
}


@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_nothing_is_evaluated_outside_the_box(backward, options):
    model, x, y = build_tiny("mlp")
    x = x.round()
    sent = backward(model, x, y)
    sent = sent + 0.1 * normal(len(sent))
    RANGES.clear()
    found = i2f.invert(Watching(model), sent, shape=x.shape, box=True, steps=10, start="normal", **{"y": y} | options)
    assert len(RANGES) > 10
    assert min(float(low.detach()) for low, _ in RANGES) >= 0
    assert max(float(high.detach()) for _, high in RANGES) <= 1
    assert float(found.x.min()) >= 0
    assert float(found.x.max()) <= 1


def test_boxed_lbfgs_ends_where_the_second_order_attack_does(backward):
    model, x, y = build_tiny("mlp")
    x = x.round()
    sent = backward(model, x, y)
    sent = sent + 3e-2 * normal(len(sent))
    found, other = (
        i2f.invert(model, sent, y, x.shape, box=True, method=m, start="gray") for m in ("dlg", "gauss-newton")
    )
    assert other.converged
    assert found.loss == pytest.approx(other.loss, rel=1e-6)
    torch.testing.assert_close(found.x, other.x, rtol=0, atol=1e-4)


def test_matched_and_converged_are_two_things(mlp, backward):
    model, x, y = mlp
    sent = backward(model, x, y)
    noisy = i2f.invert(model, sent + 0.1 * normal(len(sent)), y, x.shape)
    clean = i2f.invert(model, sent, y, x.shape)
    short = i2f.invert(model, sent, y, x.shape, method="dgl", steps=1)
    loose = i2f.invert(model, sent, y, x.shape, tolerance=0.5)
    assert (noisy.converged, noisy.matched) == (True, False)
    assert (clean.converged, clean.matched) == (True, True)
    assert (short.converged, short.matched) == (False, False)
    assert loose.matched
    assert loose.relative_residual > 1e-3
    assert all("not matched" not in f.reason for f in (noisy, clean, short, loose))


STREAM = int.from_bytes(hashlib.sha256(b"start:4").digest()[:8], "little") >> 1  # of the starts with seed 4
NOISE = torch.randn(1, 12, generator=torch.Generator().manual_seed(STREAM), dtype=torch.float64)


@pytest.mark.parametrize(
    ("start", "expected"),
    [("gray", 0.5 + 0.1 * NOISE), ("normal", NOISE), ("uniform", torch.distributions.Normal(0, 1).cdf(NOISE))],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_starts(mlp, start, expected, dtype):
    """One draw for every precision."""
    model, x, y = mlp
    trace, model = Trace(), model.to(dtype)
    gradient = i2f.GradientJacobian(model, x, y).gradient
    i2f.invert(model, gradient, y, x.shape, start=start, seed=4, steps=1, callback=trace)
    assert trace.images[0].dtype == dtype
    torch.testing.assert_close(trace.images[0], expected.to(dtype), rtol=0, atol=4 * torch.finfo(dtype).eps)
