"""The scale of the loss changes no answer, and gradients beyond the range of a dtype are refused."""

import functools
import math

import pytest
import torch
from torch.nn import functional as F

import i2f
from conftest import build_tiny, normal
from i2f import metrics
from i2f.attacks import steps
from i2f.attacks.point import Point

D = torch.float64


def mse(found, x):
    return float(metrics.mse(found.x.double(), x.double()).mean())


ATTACKS = {
    "gauss-newton": {},
    "box": {"box": True},
    "krylov": {},
    "prior": {"ridge": 1e-2},
    "whitened": {"covariance": 1e-4},
    "dgl": {"method": "dgl", "steps": 60},
    "tag": {"method": "dgl", "steps": 60, "l1": 1e-2, "ridge": 1e-3},
    "idlg": {"method": "idlg", "steps": 60, "y": None},
    "dlg": {"method": "dlg", "steps": 5, "box": True},
    "gs": {"method": "gs", "steps": 60, "ridge": 1e-3},
}
POWERS = {"ridge": 2, "covariance": 2, "l1": 1}


def at_scale(backward, c, dtype, attack):
    """The attack on c times the loss, with the noise, and the weights beside a squared distance, scaled along."""
    model, x, y = build_tiny("mlp")
    sent = backward(model, x, y)
    sent = c * (sent + 1e-2 * normal(len(sent)))
    options = dict(ATTACKS[attack])
    for name, power in POWERS.items():
        if name in options and attack != "gs":
            options[name] *= c**power
    if attack == "whitened":
        options["covariance"] = options["covariance"] * torch.linspace(0.5, 2, len(sent), dtype=D)
    found = i2f.invert(
        model.to(dtype),
        sent.to(dtype),
        options.pop("y", y),
        x.shape,
        loss=lambda o, t: c * F.cross_entropy(o, t),
        **options,
    )
    return found, mse(found, x)


@pytest.fixture(scope="module")
def plain(backward):
    """The attack at c = 1, once."""
    return functools.cache(functools.partial(at_scale, backward, 1.0))


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(
    ("dtype", "c"),
    [
        (D, 1e-100),
        (D, 1e-15),
        (D, 1e30),
        (torch.float32, 1e-15),
        (torch.float32, 1e15),
    ],
)
def test_no_answer_depends_on_the_scale_of_the_loss(backward, plain, monkeypatch, attack, dtype, c):
    if attack == "krylov":
        monkeypatch.setattr(steps.StepSolver, "fits", lambda problem: False)
    (one, error), (found, other) = plain(dtype, attack), at_scale(backward, c, dtype, attack)
    assert other == pytest.approx(error, rel=1e-6 if dtype == D else 1e-3)
    assert found.loss == pytest.approx(one.loss * (1 if attack in ("whitened", "gs") else c**2), rel=1e-3)
    assert found.relative_residual == pytest.approx(one.relative_residual, rel=1e-3)
    assert (found.converged, found.matched) == (one.converged, one.matched)


def test_a_callback_sees_the_users_loss(backward):
    model, x, y = build_tiny("mlp")
    c, seen = 1e-20, []
    loss = lambda o, t: c * F.cross_entropy(o, t)  # noqa: E731
    sent = backward(model, x.flip(-1), y, loss)
    i2f.invert(model, sent, y, x.shape, loss=loss, steps=2, callback=seen.append)
    for at in seen:
        assert at.loss == pytest.approx(float((backward(model, at.x, y, loss) - sent).square().sum()), rel=1e-9)


def test_neighbours_of_other_scales(backward):
    """Gradients of very different sizes, of one loss, in one call of a first-order method: each as if it were alone."""
    model, x, y = build_tiny("mlp")
    model = model.float()
    g = backward(model, x.float(), y)
    sent = torch.stack([g * 3e37, g, g * 1e-12, 2 * g, g])
    for method in ("dgl", "gauss-newton"):
        together = i2f.invert_many(model, sent, y.expand(5, 1), x.shape, method=method, steps=10, seed=3)
        for one, found in zip(sent, together, strict=True):
            alone = i2f.invert(model, one, y, x.shape, method=method, steps=10, seed=3)
            torch.testing.assert_close(found.x, alone.x, rtol=1e-4, atol=1e-4)
            assert found.failed == alone.failed


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "gradient is zero in every known"),
        (1e-40, "gradient has no entry above 1e-40"),
        (1e39, "gradient has entries up to 1e.39"),
    ],
)
def test_gradients_outside_the_range_of_the_dtype_are_refused(value, words):
    model, x, y = build_tiny("mlp")
    with pytest.raises(ValueError, match=words):
        i2f.invert(model.float(), torch.full((293,), value, dtype=D), y, x.shape)


def test_the_gram_matrix_of_a_neighbour_is_taken_in_its_own_units(backward):
    """Problems that share start and label share their first Gram matrix: the way of each is what it is alone."""
    model, x, y = build_tiny("conv")
    g = backward(model, x, y)
    sent = torch.stack([g, 1e6 * g, 1e-6 * g])
    together = i2f.invert_many(model, sent, y.expand(3, 1), x.shape, steps=6)
    for one, found in zip(sent, together, strict=True):
        alone = i2f.invert(model, one, y, x.shape, steps=6)
        assert (found.steps, found.evaluations) == (alone.steps, alone.evaluations)


@pytest.mark.parametrize("curvature", [0.0, math.inf, math.nan])
def test_a_curvature_that_is_no_number_ends_the_attack(guard, backward, monkeypatch, curvature):
    """No damping can be derived from it, and no loop over dampings runs for ever."""
    model, x, y = build_tiny("relu")
    monkeypatch.setattr(Point, "curvature", lambda *_: curvature)
    found = i2f.invert(model, backward(model, x, y), y, x.shape)
    assert not found.converged
    assert found.reason.startswith("stalled")


def test_a_gradient_far_beyond_the_models_is_not_called_matched_or_converged(backward):
    model, x, y = build_tiny("mlp")
    found = i2f.invert(model.float(), 1e35 * normal(293), y, x.shape)
    assert not found.converged
    assert found.relative_residual == pytest.approx(1.0)


def test_a_mask_decides_what_is_zero():
    model, x, y = build_tiny("mlp")
    sent = torch.ones(293, dtype=D)
    mask = torch.arange(293) < 7
    sent[mask] = 0
    with pytest.raises(ValueError, match="gradient is zero in every known"):
        i2f.invert(model, sent, y, x.shape, mask=mask)


@pytest.mark.parametrize("krylov", [False, True])
def test_dead_start_with_a_prior_goes_to_its_mean(monkeypatch, krylov):
    """J = 0 at every x near the start, so that the objective is ridge·‖x − mean‖² and a constant."""
    if krylov:
        monkeypatch.setattr(steps.StepSolver, "fits", lambda problem: False)
    model, x, y = build_tiny("relu")
    with torch.no_grad():
        model[0].bias.fill_(-100)
    found = i2f.invert(model, normal(344), y, x.shape, ridge=1e-3, mean=0.25)
    assert found.converged
    torch.testing.assert_close(found.x, torch.full_like(x, 0.25), rtol=0, atol=1e-9)


@pytest.mark.parametrize("matrix", [torch.full((3, 3), math.nan), -torch.eye(3), torch.zeros(3, 3)])
def test_a_factor_that_does_not_exist_ends_the_search_for_it(guard, matrix):
    factor = steps.cholesky(steps.Gram(matrix, 1e-300), 0.0)
    assert factor is None or torch.isfinite(factor).all()
