"""Restarts keep the best attack; an interrupt returns the best so far."""

import pytest
import torch

import i2f
from i2f.attacks import GENERAL

METHOD_NAMES = [m for m in GENERAL if m != "idlg"]


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_best_restart_by_its_own_objective(several, method):
    model, x, y, gradients = several
    last = {}
    found = i2f.invert(
        model,
        gradients[0],
        y[0],
        x[0].shape,
        method=method,
        steps=2,
        restarts=4,
        start="normal",
        callback=lambda at: last.setdefault(at.restart, []).append(at.loss),
    )
    assert sorted(last) == [0, 1, 2, 3]
    lowest = min(last, key=lambda k: min(last[k]))
    if method != "dlg":  # between its outer steps L-BFGS may see better points than a callback does
        assert found.loss == pytest.approx(min(map(min, last.values())))
        assert found.restart == lowest
    assert len({losses[0] for losses in last.values()}) == 4


def test_first_restart_is_the_attack_without_any(several):
    model, x, y, gradients = several
    starts = []
    i2f.invert(
        model,
        gradients[0],
        y[0],
        x[0].shape,
        steps=1,
        seed=5,
        restarts=3,
        callback=lambda at: starts.append(at.x) if at.step == 0 else None,
    )
    alone = []
    i2f.invert(model, gradients[0], y[0], x[0].shape, steps=1, seed=5, callback=lambda at: alone.append(at.x))
    assert torch.equal(starts[0], alone[0])
    assert len(starts) == 3


def test_no_restart_after_a_match(several):
    model, x, y, gradients = several
    restarts = set()
    i2f.invert(model, gradients[0], y[0], x[0].shape, restarts=5, callback=lambda at: restarts.add(at.restart))
    assert restarts == {0}


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_interrupt_returns_the_best_so_far(several, method):
    model, x, y, gradients = several
    seen = []

    def interrupt(at):
        seen.append(at)
        if at.step == 2:
            raise KeyboardInterrupt

    found = i2f.invert(model, gradients[0], y[0], x[0].shape, method=method, callback=interrupt, steps=50)
    assert found.reason.startswith("interrupted after 2 steps")
    assert not found.converged
    assert found.loss <= min(at.loss for at in seen)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_interrupt_leaves_a_row_for_every_problem(several, method):
    model, x, y, gradients = several

    def interrupt(at):
        if at.step == 1:
            raise KeyboardInterrupt

    found = i2f.invert_many(model, gradients, y, x[0].shape, method=method, callback=interrupt, steps=50)
    assert len(found) == 5
    assert all("interrupted" in f.reason and not f.converged for f in found)
