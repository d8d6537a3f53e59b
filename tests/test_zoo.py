"""g, J and its uses on every network of the zoo, against central differences of a plain backward()."""

import re
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

import i2f
from i2f import attacks
from i2f.attacks.gauss_newton import Point

D = torch.float64
pytestmark = [
    # PyTorch's own words on the user's network
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def apart(found: Tensor, right: Tensor) -> float:
    """Relative distance; infinite where shapes differ or a value is NaN."""
    if found.shape != right.shape or not torch.isfinite(found).all():
        return float("inf")
    return float((found - right).norm() / right.norm().clamp_min(1e-300))


def wrong(case: zoo.Case, g: Tensor, T: Tensor, rtol: float = 1e-6) -> dict[str, float]:
    """What of g, J, its products, J Jᵀ and a Gauss–Newton step is not what (g, T) say, and how far it is from that."""
    d_x, d_theta = T.shape
    delta, v, deltas, vs = normal(d_theta, seed=1), normal(d_x, seed=2), normal(3, d_theta), normal(3, d_x, seed=3)
    J = i2f.GradientJacobian(case.model, case.x, case.y, loss=case.loss)

    def products(how: str) -> dict[str, float]:
        return {
            f"J δ, {how}": apart(J.matvec(delta), T @ delta),
            f"Jᵀ v, {how}": apart(J.rmatvec(v), v @ T),
            f"stacked J δ, {how}": apart(J.matvec(deltas), deltas @ T.T),
            f"stacked Jᵀ v, {how}": apart(J.rmatvec(vs), vs @ T),
        }

    distances = products("by graphs")
    distances["gradient"] = apart(J.gradient, g)
    distances["gram"] = apart(J.gram(), T @ T.T)
    distances["dense"] = apart(J.dense(), T)
    distances |= products("formed")
    distances |= gauss_newton_step(case, g, T)
    return {name: far for name, far in distances.items() if not far <= rtol}


class Captured(Exception):
    """An attack's problem, just before its first step."""


def problem_of(case: zoo.Case, gradient: Tensor) -> attacks.Problem:
    """What `invert` would solve, begun at the truth."""

    def run(problems: list[attacks.Problem]) -> None:
        raise Captured(problems[0])

    method = attacks.METHODS["gauss-newton"]
    attacks.METHODS["gauss-newton"] = method._replace(run=run)
    try:
        i2f.invert(case.model, gradient, case.y, case.x.shape, loss=case.loss, start=case.x.to(D))
    except Captured as captured:
        return captured.args[0]
    finally:
        attacks.METHODS["gauss-newton"] = method
    raise AssertionError("invert ran no method")


def gauss_newton_step(case: zoo.Case, g: Tensor, T: Tensor) -> dict[str, float]:
    """At the truth, where the gradient is g + Tᵀw, an attack has the slope −T Tᵀw, and T Tᵀ as its matrix."""
    w, v = 1e-3 * normal(len(T), seed=4), normal(len(T), seed=5)
    problem = problem_of(case, g + w @ T)
    unit = problem.gmap.unit
    point = Point(problem, problem.start)
    point.checked()
    return {
        "slope": apart(point.slope() * unit**2, -T @ (w @ T)),
        "W Jᵀ v": apart(point.rmatvec(v) * unit, v @ T),
        "J Jᵀ v": apart(point.curve(v) * unit**2, T @ (v @ T)),
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if torch.is_tensor(a) and torch.is_tensor(b) else a is b or a == b

    return [key for key in before.keys() | after.keys() if not same(before.get(key), after.get(key))]


@pytest.mark.parametrize("name", zoo.RIGHT)
def test_right(name: str) -> None:
    g, T, difference = zoo.reference(name)
    assert difference < 1e-4, "a kink is too near for differences to say what is right"
    case = zoo.build(name)
    model, x = zoo.state(case.model), case.x.clone()
    assert not wrong(case, g, T)
    assert not changes(model, zoo.state(case.model))
    assert torch.equal(case.x, x)
    assert not case.x.requires_grad


@pytest.mark.parametrize("name", zoo.EITHER)
def test_right_or_refused(name: str) -> None:
    case, (g, T, _) = zoo.build(name), zoo.reference(name)
    model = zoo.state(case.model)
    try:
        found, reason = wrong(case, g, T), None
    except (ValueError, TypeError) as error:
        found, reason = {}, str(error)
    assert reason is None or re.search(zoo.EITHER[name][1], reason), reason
    assert not found
    assert not changes(model, zoo.state(case.model))


@pytest.mark.parametrize("name", zoo.REFUSED)
def test_refused(name: str) -> None:
    case = zoo.build(name)
    model = zoo.state(case.model)
    with pytest.raises((ValueError, TypeError), match=zoo.REFUSED[name][1]):
        i2f.GradientJacobian(case.model, case.x, case.y, loss=case.loss)
    assert not changes(model, zoo.state(case.model))


MOVED = (
    "Linear", "LSTM", "TransformerEncoder", "weight_norm, hook", "weight_norm", "spectral_norm, hook", "spectral_norm",
    "pruned", "tied, second name", "tied, plain list", "tied, one module twice", "layers in a plain list",
    "patched forward", "patched activation", "forward hook", "DataParallel", "GradSampleModule", "compiled",
    "compiled in place", "GraphModule", "checkpointed",
)  # fmt: skip


@pytest.mark.parametrize("name", MOVED)
def test_J_stays_where_it_was_taken(name: str) -> None:
    """A training step of the user's own module, after J was built, does not pass into J."""
    case, (_, T, _) = zoo.build(name), zoo.reference(name)
    J = i2f.GradientJacobian(case.model, case.x, case.y, loss=case.loss)
    with torch.no_grad():
        for p in case.model.parameters():
            p.mul_(1.5)
    v = normal(len(T))
    assert apart(J.rmatvec(v), v @ T) < 1e-6
    assert apart(J.dense(), T) < 1e-6
