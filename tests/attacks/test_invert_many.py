"""Many problems at once: each as if it were alone, and one's misfortune no other's."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import i2f
from i2f import metrics
from i2f.attacks import GENERAL, steps
from i2f.attacks.batched import BatchedGradient
from i2f.core.dense import jacobian_gram
from i2f.core.gradient import GradientMap

METHOD_NAMES = [m for m in GENERAL if m != "idlg"]


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_alone_and_in_company_agree(several, method):
    model, x, y, gradients = several
    together = i2f.invert_many(model, gradients, y, x[0].shape, method=method, steps=8, seed=[0, 1, 2, 3, 4])
    for i, found in enumerate(together):
        alone = i2f.invert(model, gradients[i], y[i], x[0].shape, method=method, steps=8, seed=i)
        torch.testing.assert_close(found.x, alone.x, rtol=0, atol=1e-9)
        assert (found.steps, found.evaluations) == (alone.steps, alone.evaluations)
        assert torch.equal(found.y, alone.y)


def test_neighbours_with_one_start_share_its_gram_matrix(several, monkeypatch):
    """In time, not in the count: each counts as if alone. Another label, another start: another matrix."""
    model, x, y, gradients = several
    taken = []
    monkeypatch.setattr(steps, "jacobian_gram", lambda gmap, x: taken.append(x) or jacobian_gram(gmap, x))

    def spent(which, seeds):
        taken.clear()
        options = {"start": "uniform", "seed": seeds, "steps": 1}
        found = i2f.invert_many(model, gradients[which], y[which], x[0].shape, **options)
        return len(taken), [f.evaluations for f in found]

    (one, cost), (other, cost_of_other) = spent([1], [7]), spent([4], [7])
    assert one == other == 1
    assert spent([1, 4], [7, 7]) == (1, cost + cost_of_other)
    assert spent([1, 4], [7, 8])[0] == 2
    assert spent([1, 0, 4], [7, 7, 7])[0] == 3


def test_labels_are_read_for_each(several):
    model, x, y, gradients = several
    found = i2f.invert_many(model, gradients, None, x[0].shape, method="idlg", steps=2)
    assert torch.equal(torch.stack([f.y for f in found]), y)


def test_each_stops_by_itself(several):
    """One starts at its answer and stops there; the others go on to theirs."""
    model, x, y, gradients = several
    start = torch.full_like(x, 0.5)
    start[2] = x[2]
    found = i2f.invert_many(model, gradients, y, x[0].shape, method="dgl", steps=30, start=start)
    assert [f.steps for f in found] == [30, 30, 0, 30, 30]
    assert [f.evaluations for f in found] == [61, 61, 1, 61, 61]
    assert torch.equal(found[2].x, x[2])
    assert all(f.relative_residual < 0.5 for f in found)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_one_that_diverges_fails_and_the_others_go_on(several, method):
    """One gradient is that of an overflowing problem: its objective is infinite wherever one looks."""
    model, x, y, gradients = several
    gradients[1] = 1e200
    found = (
        i2f.invert_many(model, gradients, y, x[0].shape, method=method, steps=200, lr=0.05)
        if method == "dgl"
        else (i2f.invert_many(model, gradients, y, x[0].shape, method=method, steps=20))
    )
    if method != "gs":  # a direction has no length: it cannot overflow
        assert found[1].failed
        assert not found[1].converged
        assert found[1].reason.startswith("failed")
    others = [f for i, f in enumerate(found) if i != 1]
    assert not any(f.failed for f in others)
    if method == "gauss-newton":
        assert all(f.converged for f in others)


def test_explosion_is_a_failure_with_the_best_iterate(several):
    """A learning rate far too long carries the pixels away."""
    model, x, y, gradients = several
    seen = []
    found = i2f.invert(
        model, gradients[0], y[0], x[0].shape, method="dgl", lr=1e7, steps=50, callback=lambda at: seen.append(at)
    )
    assert found.failed
    assert "pixels beyond 1e+06" in found.reason
    best = min(seen, key=lambda at: at.loss)
    assert torch.equal(found.x, best.x)
    assert found.loss == best.loss


def test_any_torch_optimizer(several):
    model, x, y, gradients = several
    for optimizer, lr in [(torch.optim.SGD, 3.0), (torch.optim.RMSprop, 0.05), (torch.optim.LBFGS, 1.0)]:
        losses = []
        found = i2f.invert(
            model,
            gradients[0],
            y[0],
            x[0].shape,
            method="dgl",
            optimizer=optimizer,
            lr=lr,
            steps=20,
            callback=lambda at, losses=losses: losses.append(at.loss),
        )
        assert found.loss < 0.5 * losses[0]


def test_gs_projects_signs_and_lowers_its_rate(several):
    """Plain sign descent: every pixel moves by the learning rate, tenfold less after 3/8, 5/8 and 7/8 of the steps."""
    model, x, y, gradients = several
    path = []
    i2f.invert(
        model,
        gradients[0],
        y[0],
        x[0].shape,
        method="gs",
        optimizer=torch.optim.SGD,
        lr=1e-3,
        steps=16,
        box=False,
        callback=lambda at: path.append(at.x),
    )
    moves = [float((b - a).abs().max()) for a, b in pairwise(path)]
    assert moves == pytest.approx([1e-3] * 6 + [1e-4] * 4 + [1e-5] * 4 + [1e-6] * 2, rel=1e-6)


def test_gs_does_not_see_the_gradients_length(several):
    model, x, y, gradients = several
    one = i2f.invert(model, gradients[0], y[0], x[0].shape, method="gs", steps=30)
    scaled = i2f.invert(model, 5 * gradients[0], y[0], x[0].shape, method="gs", steps=30)
    torch.testing.assert_close(one.x, scaled.x)
    assert one.loss == pytest.approx(scaled.loss)


def test_tolerance_ends_an_attack(several):
    model, x, y, gradients = several
    for method in ("gauss-newton", "dgl", "gs"):
        found = i2f.invert(model, gradients[0], y[0], x[0].shape, method=method, tolerance=0.05, steps=500)
        assert found.converged
        assert found.steps < 500
        assert 1e-8 < found.relative_residual <= 0.07


def test_batched_gradients_are_the_gradients(tiny, backward):
    model, x, y = tiny
    xs = torch.stack([x, x.flip(-1), 1 - x])
    ys = torch.stack([y, y, (y + 1) % 4])
    batched = BatchedGradient(GradientMap(model, None))
    plain = torch.stack([backward(model, a, b) for a, b in zip(xs, ys, strict=True)])
    torch.testing.assert_close(batched(xs, ys), plain)
    assert batched.together


def test_operation_without_a_batching_rule_goes_one_by_one(cubic, backward):
    model, x, y = cubic
    batched = BatchedGradient(GradientMap(model, None))
    xs, ys = torch.stack([x, 1 - x]), torch.stack([y, y])
    torch.testing.assert_close(batched(xs, ys), torch.stack([backward(model, a, y) for a in xs]))
    assert not batched.together


def test_mask_for_each(several):
    model, x, y, gradients = several
    masks = torch.rand(gradients.shape, generator=torch.Generator().manual_seed(0)) > 0.3
    sent = torch.where(masks, gradients, 9.0)
    for found, truth in zip(i2f.invert_many(model, sent, y, x[0].shape, mask=masks, seed=3), x, strict=True):
        assert float(metrics.mse(found.x, truth)) <= 1e-12
    first = i2f.invert_many(model, sent, y, x[0].shape, mask=masks, method="dgl", steps=20)[1]
    alone = i2f.invert(model, sent[1], y[1], x[0].shape, mask=masks[1], method="dgl", steps=20)
    torch.testing.assert_close(first.x, alone.x)


def test_non_smooth_network_never_ends_worse_than_it_began(backward):
    """ReLU and max-pooling on a residual network: Gauss–Newton may stall, says so, and keeps what it gained."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        from torchvision.models.resnet import BasicBlock

        stem = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        model = nn.Sequential(*stem, BasicBlock(4, 4), nn.Flatten(), nn.Linear(64, 5)).double().eval()
    x, y, losses = torch.rand(1, 1, 8, 8, dtype=torch.float64), torch.tensor([1]), []
    found = i2f.invert(model, backward(model, x, y), y, x.shape, steps=15, callback=lambda at: losses.append(at.loss))
    assert found.loss == min(losses) < losses[0]
    assert found.relative_residual <= 1e-10 or found.reason.startswith(("stalled", "stationary", "used its 15 steps"))
