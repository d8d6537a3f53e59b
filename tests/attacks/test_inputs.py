"""Arguments in every usual form, and what is refused by name."""

import inspect
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

import i2f
from conftest import build_tiny
from i2f.attacks import METHODS
from i2f.attacks.knowledge import KNOWN, SEARCHED, Keywords

D = torch.float64


def parts_of(model, x, y):
    value = F.cross_entropy(model(x), y)
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(value, list(model.parameters())), strict=True))


def test_gradients_in_each_usual_form(mlp, backward):
    model, x, y = mlp
    parts, flat = parts_of(model, x, y), backward(model, x, y)
    base = i2f.invert(model, flat, y, x.shape)
    backwards = dict(reversed(parts.items()))
    for form in (list(parts.values()), tuple(parts.values()), parts, backwards, flat.numpy(), flat.float()):
        found = i2f.invert(model, form, y, x.shape)
        torch.testing.assert_close(found.x, base.x, rtol=0, atol=1e-5)
    for many in ([parts, flat], [flat.numpy(), list(parts.values())], np.stack([flat, flat])):
        for found in i2f.invert_many(model, many, y.expand(2, 1), x.shape):
            torch.testing.assert_close(found.x, base.x, rtol=0, atol=1e-9)


def test_everything_as_arrays(mlp, backward):
    model, x, y = mlp
    sent = backward(model, x, y)
    mask, covariance = torch.arange(293) % 3 > 0, torch.linspace(1, 2, 293, dtype=D)
    given = {"mask": mask, "covariance": covariance, "mean": 0.3 + 0 * x, "start": x + 0.1, "ridge": 1e-6}
    arrays = {name: value.numpy() if torch.is_tensor(value) else np.float64(value) for name, value in given.items()}
    base = i2f.invert(model, sent, y, x.shape, **given)
    found = i2f.invert(model, sent.numpy(), y.numpy(), np.array(x.shape), **arrays)
    assert torch.equal(found.x, base.x)
    listed = i2f.invert(
        model, sent, y, list(x.shape), **given | {"mask": mask.tolist(), "start": given["start"].tolist()}
    )
    assert torch.equal(listed.x, base.x)


GRADIENT = torch.linspace(-1, 1, 293, dtype=D)
WRONG = {
    "gradient": ({"gradient": 3.0}, "gradient is float"),
    "model as gradient": ({"gradient": nn.Linear(2, 2)}, "gradient is Linear"),
    "y": ({"y": 7}, "y is int"),
    "y of names": ({"y": "cat"}, "y is str"),
    "shape": ({"shape": 28}, "shape=28 is no sequence"),
    "shape of names": ({"shape": "28"}, "shape='28' is no sequence"),
    "shape of fractions": ({"shape": (1, 12.0)}, "shape=.* is no sequence of whole numbers"),
    "mask": ({"mask": nn.Linear(2, 2)}, "mask is Linear"),
    "covariance": ({"covariance": nn.Linear(2, 2)}, "covariance is Linear"),
    "mean": ({"mean": nn.Linear(2, 2), "ridge": 1.0}, "mean is Linear"),
    "start": ({"start": nn.Linear(2, 2)}, "start is Linear"),
    "seed": ({"seed": 1.5}, "seed is float"),
    "seed of a name": ({"seed": "7"}, "seed is str"),
    "steps": ({"steps": 2.5}, "steps is float"),
    "restarts": ({"restarts": "2"}, "restarts is str"),
    "callback": ({"callback": 7}, "callback is int"),
}


@pytest.mark.parametrize(("given", "words"), WRONG.values(), ids=WRONG)
def test_wrong_types_are_named(mlp, given, words):
    model, x, y = mlp
    with pytest.raises(TypeError, match=words):
        i2f.invert(model, **{"gradient": GRADIENT, "y": y, "shape": x.shape} | given)


def test_a_dictionary_of_many_is_refused(mlp):
    model, x, y = mlp
    with pytest.raises(TypeError, match="gradients is dict"):
        i2f.invert_many(model, {"0": GRADIENT}, y[None], x.shape)


NOT_FINITE = {
    "gradient": lambda bad: {"gradient": GRADIENT * bad},
    "start": lambda bad: {"start": torch.full((1, 12), bad)},
    "mean": lambda bad: {"mean": torch.full((1, 12), bad), "ridge": 1.0},
    "y": lambda bad: {"y": torch.full((1, 5), bad)},
    "covariance": lambda bad: {"covariance": torch.full((293,), bad)},
}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", NOT_FINITE)
def test_nan_is_refused_by_name(mlp, name, bad):
    model, x, y = mlp
    with pytest.raises(ValueError, match=rf"{name} has \d+ NaN or infinite"):
        i2f.invert(model, **{"gradient": GRADIENT, "y": y, "shape": x.shape} | NOT_FINITE[name](bad))


def test_nan_is_no_mask(mlp):
    model, x, y = mlp
    with pytest.raises(ValueError, match=r"mask is .*float.*booleans"):
        i2f.invert(model, GRADIENT, y, x.shape, mask=torch.full((293,), math.nan))


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = build_tiny("mlp")[0]

    def forward(self, x):
        return self.inner(F.dropout(x, 0.5))


@pytest.mark.parametrize("method", ["gauss-newton", "dgl", "dlg", "gs"])
@pytest.mark.parametrize("labels", [True, False])
def test_random_models_are_refused(mlp, method, labels):
    _, x, y = mlp
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="model is random"):
        i2f.invert(Dropping(), GRADIENT, y if labels else None, x.shape, method=method, steps=1)


class OnceCube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, by_output):
        return 3 * ctx.saved_tensors[0] ** 2 * by_output


class OnceCubic(nn.Module):
    def forward(self, x):
        return OnceCube.apply(x)


@pytest.mark.parametrize("method", ["gauss-newton", "dgl", "dlg", "gs"])
def test_networks_without_a_second_derivative_are_refused(mlp, method):
    model, x, y = mlp
    model[1] = OnceCubic()
    with pytest.raises(ValueError, match="without a second derivative"):
        i2f.invert(model, GRADIENT, y, x.shape, method=method, steps=1)


def test_a_loss_that_does_not_take_the_labels_says_why(mlp):
    model, x, _ = mlp
    with pytest.raises(ValueError, match=r"loss .*y"):
        i2f.invert(model, GRADIENT, torch.rand(1, 4, dtype=D), x.shape, loss=F.l1_loss)


@pytest.mark.parametrize("method", ["gauss-newton", "dgl", "dlg", "gs"])
@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, torch.no_grad, partial(torch.autocast, "cpu", torch.bfloat16)],
    ids=["inference_mode", "no_grad", "autocast"],
)
def test_a_callers_context_changes_no_answer(backward, method, context):
    model, x, y = build_tiny("mlp")
    model, x = model.float(), x.float()
    sent = backward(model, x, y)
    run = partial(i2f.invert, method=method, steps=6, start=torch.full_like(x, 0.4))
    outside = run(model, sent, y, x.shape)
    with context():
        inside = run(model, sent.clone(), y.clone(), x.shape, start=torch.full_like(x, 0.4))
    assert torch.equal(inside.x, outside.x)
    assert not inside.x.is_inference()


@pytest.mark.parametrize("seed", [np.int64(3), np.uint8(3), torch.tensor(3), [np.int32(3)], np.array([3]), (3,)])
def test_seeds_of_any_integer_type(mlp, backward, seed):
    model, x, y = mlp
    sent = backward(model, x, y)[None]
    base = i2f.invert_many(model, sent, y[None], x.shape, seed=3, steps=2)[0]
    assert torch.equal(i2f.invert_many(model, sent, y[None], x.shape, seed=seed, steps=2)[0].x, base.x)


def test_half_precision_models_are_attacked_in_float32(backward):
    model, x, y = build_tiny("mlp")
    model = model.to(torch.bfloat16)
    wide = model.float()
    sent = backward(wide, x.float(), y)
    with pytest.warns(UserWarning, match="computed in float32"):
        found = i2f.invert(model.to(torch.bfloat16), sent.to(torch.bfloat16), y, x.shape)
    base = i2f.invert(model.float(), sent.to(torch.bfloat16).float(), y, x.shape)
    assert found.x.dtype == torch.float32
    assert torch.equal(found.x, base.x)


def test_the_signature_lists_every_keyword_with_its_default():
    """What `help` shows, the type checker's keywords, and the fields that hold them are the same names."""
    fields = KNOWN | SEARCHED
    for function in (i2f.invert, i2f.invert_many):
        parameters = inspect.signature(function).parameters
        listed = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
        assert listed == {name: f.default for name, f in fields.items()}
    options = {name for method in METHODS.values() for name in method.options}
    assert set(Keywords.__annotations__) == {*fields, *options}
