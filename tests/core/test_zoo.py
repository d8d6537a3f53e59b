"""g, J and its uses on every network of the zoo, against central differences of a plain backward()."""

import re
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

import i2f
from i2f import attacks, trace
from i2f._fast.chain import chain_jacobian
from i2f.attacks.point import Point
from i2f.attacks.problem import Problem
from i2f.audit import audit
from i2f.paper import penalty

D = torch.float64
pytestmark = [
    # PyTorch's own words on the user's network
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


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


def problem_of(case: zoo.Case, gradient: Tensor) -> Problem:
    """What `invert` would solve, begun at the truth."""

    def run(problems: list[Problem]) -> None:
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
    point.check()
    return {
        "slope": apart(point.slope() * unit**2, -T @ (w @ T)),
        "W Jᵀ v": apart(point.rmatvec(v) * unit, v @ T),
        "J Jᵀ v": apart(point.half_hessian(v) * unit**2, T @ (v @ T)),
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        tensors = torch.is_tensor(a) and torch.is_tensor(b)
        return torch.equal(a.to_dense(), b.to_dense()) if tensors else a is b or a == b

    return [key for key in before.keys() | after.keys() if not same(before.get(key), after.get(key))]


@pytest.mark.parametrize("name", zoo.RIGHT)
def test_right(name: str) -> None:
    g, T, difference = zoo.reference(name)
    assert difference < 1e-4, "a kink is too near for differences to say what is right"
    case = zoo.build(name)
    model, x, needed = zoo.state(case.model), case.x.detach().clone(), case.x.requires_grad
    assert not wrong(case, g, T)
    assert not changes(model, zoo.state(case.model))
    assert torch.equal(case.x, x)
    assert case.x.requires_grad == needed
    assert case.x.grad is None


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


@pytest.mark.parametrize("name", zoo.REFUSED)
@pytest.mark.parametrize("method", ["gauss-newton", "dgl"])
def test_attacks_refuse_the_same(name: str, method: str) -> None:
    case = zoo.build(name)
    size = sum(p.numel() for p in case.model.parameters() if p.requires_grad and not is_lazy(p))
    with pytest.raises((ValueError, TypeError), match=zoo.REFUSED[name][1]):
        i2f.invert(case.model, torch.ones(size), case.y, case.x.shape, loss=case.loss, method=method, steps=1)


MOVED = (
    "Linear",
    "LSTM",
    "TransformerEncoder",
    "weight_norm, hook",
    "weight_norm",
    "spectral_norm, hook",
    "spectral_norm",
    "pruned",
    "tied, in one module",
    "tied, second name",
    "tied, plain list",
    "tied, one module twice",
    "layers in a plain list",
    "patched activation",
    "forward hook",
    "DataParallel",
    "GradSampleModule",
    "compiled",
    "compiled in place",
    "GraphModule",
    "checkpointed",
)


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


def third_differences(
    case: zoo.Case, w: Tensor, v: Tensor, direction: list[Tensor], h: float = 5e-4
) -> tuple[float, float]:
    """By plain backward() alone: the derivative of ‖Jᵀw‖² along `direction` in θ, and that of ½‖g(x) − 2g(x₀)‖², twice
    along v in x. Both take third derivatives of L."""

    def rows(t: float) -> Tensor:
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=t)
        s = 2e-4
        far, near = ((zoo.backward(case, k * s * w) - zoo.backward(case, -k * s * w)) / (2 * k * s) for k in (2, 1))
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(d, alpha=t)
        return ((4 * near - far) / 3).square().sum()

    parameters = [p for p in case.model.parameters() if p.requires_grad]
    far, near = ((rows(k * h) - rows(-k * h)) / (2 * k * h) for k in (2, 1))
    target = 2 * zoo.backward(case)
    f = {k: 0.5 * (zoo.backward(case, k * h * v) - target).square().sum() for k in (-2, -1, 0, 1, 2)}
    second = (16 * (f[1] + f[-1]) - f[2] - f[-2] - 30 * f[0]) / (12 * h**2)
    return float((4 * near - far) / 3), float(second)


THIRD = (
    "Linear on tokens",
    "Conv2d",
    "LSTM",
    "GRU",
    "Bilinear",
    "MultiheadAttention, no weights",
    "scaled_dot_product_attention",
    "TransformerEncoderLayer, gelu",
    "TransformerEncoderLayer, norm first",
    "Transformer",
    "LayerNorm",
    "LayerNorm, no affine",
    "InstanceNorm2d",
    "InstanceNorm2d, affine",
    "InstanceNorm2d, stored",
    "F.instance_norm",
    "LayerNorm on images",
    "F.layer_norm",
    "torch.layer_norm",
    "torch.native_layer_norm",
    "RMSNorm",
    "F.rms_norm",
    "F.normalize",
    "GroupNorm",
    "F.group_norm",
    "BatchNorm1d",
    "BatchNorm2d",
    "F.batch_norm",
    "BatchNorm1d, its batch",
    "BatchNorm2d, its batch of two",
    "LocalResponseNorm",
    "GELU",
    "SiLU",
    "Mish",
    "Softplus",
    "Softmax",
    "LogSigmoid",
    "AvgPool2d",
    "MaxPool2d",
    "Upsample, bicubic",
    "weight_norm",
    "weight_norm, hook",
    "spectral_norm",
    "orthogonal, cayley",
    "tied, second name",
    "patched forward",
    "forward hook",
    "label smoothing",
    "class weights",
    "BCEWithLogitsLoss",
    "GaussianNLLLoss",
    "focal loss",
    "RNN",
    "GroupNorm, no affine",
    "InstanceNorm1d, stored, training mode",
    "BatchNorm3d, its batch",
    "TransformerDecoderLayer",
    "orthogonal, matrix_exp",
    "a hypernetwork",
    "vmap in the forward",
    "linalg",
    "fft",
    "a step of gradient descent",
    "weight standardisation",
    "DataParallel",
    "pruned",
)


@pytest.mark.parametrize("name", THIRD)
def test_third_derivative(name: str) -> None:
    case = zoo.build(name)
    parameters = [p for p in case.model.parameters() if p.requires_grad]
    w, v = normal(*case.x.shape, seed=1), normal(*case.x.shape, seed=2)
    direction = [normal(*p.shape, seed=k) for k, p in enumerate(parameters)]
    by_theta, by_x = third_differences(case, w, v, direction)
    value = penalty.sensitivity(case.model, case.x, case.y, w, loss=case.loss)
    slopes = torch.autograd.grad(value, parameters, materialize_grads=True)
    assert float(sum((s * d).sum() for s, d in zip(slopes, direction, strict=True))) == pytest.approx(
        by_theta, rel=1e-5
    )
    problem = problem_of(case, 2 * zoo.backward(case))
    point = Point(problem, problem.start)
    point.slope()
    along = float(v.reshape(-1) @ point.half_hessian(v.reshape(-1), newton=True)) * problem.gmap.unit**2
    assert along == pytest.approx(by_x, rel=1e-5)


@pytest.mark.parametrize("name", ["patched forward", "layer in a closure"])
def test_J_never_moves_in_silence(name: str) -> None:
    """A forward that holds the user's own layer meets its new weights: an error, or J where it was."""
    case, (_, T, _) = zoo.build(name), zoo.reference(name)
    try:
        J = i2f.GradientJacobian(case.model, case.x, case.y, loss=case.loss)
        for p in case.model.parameters():
            p.detach().mul_(1.5)
        found = J.rmatvec(normal(len(T))), J.dense()
    except (RuntimeError, ValueError) as error:
        found, reason = None, str(error)
    if found is None:
        assert re.search("modified|own gradient|apart from", reason), reason
    else:
        assert apart(found[0], normal(len(T)) @ T) < 1e-6
        assert apart(found[1], T) < 1e-6


# ---- the rows of faults, each against a twin without the feature


def audited(case: zoo.Case, **options: Any) -> dict[str, float]:
    """What an audit says of it, in numbers and words."""
    (sample,) = audit(case.model, case.x, case.y, "gaussian:1e-4", loss=case.loss, **options)
    numbers = {name: getattr(sample, name) for name in ("gradient_norm", "lambda_max", "prior", "judged", "needed")}
    return {**{k: v for k, v in numbers.items() if v is not None}, "verdict": sample.verdict}


def agree(found: dict[str, float], right: dict[str, float], rel: float = 1e-6) -> None:
    assert found.keys() == right.keys()
    assert found.pop("verdict") == right.pop("verdict")
    assert found == pytest.approx(right, rel=rel)


@pytest.mark.parametrize("name", ["tied, in one module", "tied, second name", "tied, plain list"])
def test_a_parameter_with_two_names(name: str) -> None:
    case = zoo.build(name)
    one = case.model
    if name == "tied, in one module":
        rule = lambda net, x: net.head(torch.tanh(torch.tanh(x @ net.weight) @ net.weight))  # noqa: E731
        twin = zoo.Net(rule, weight=one.weight, head=one.head)
    else:
        rule = lambda net, x: net.head(torch.tanh(F.linear(torch.tanh(net.a(x)), net.a.weight)))  # noqa: E731
        twin = zoo.Net(rule, a=one.first, head=one.head)
    agree(audited(case), audited(case._replace(model=twin.eval())))


@pytest.mark.parametrize("name", ["encoder under no_grad", "a loss that detaches", "z * z.detach()", "its own teacher"])
def test_never_two_answers(name: str) -> None:
    case, (_, T, _) = zoo.build(name), zoo.reference(name)
    delta, v = normal(T.shape[1]), normal(T.shape[0])
    try:
        J = i2f.GradientJacobian(case.model, case.x, case.y, loss=case.loss)
    except ValueError:
        return
    early = J.matvec(delta), J.rmatvec(v), i2f.lower_bound(J, delta).norm
    J.dense()
    late = J.matvec(delta), J.rmatvec(v), i2f.lower_bound(J, delta).norm
    right = T @ delta, v @ T, float((T @ delta).norm() / torch.linalg.eigvalsh(T @ T.T)[-1])
    for found in (early, late):
        assert apart(found[0], right[0]) < 1e-6
        assert apart(found[1], right[1]) < 1e-6
        assert found[2] == pytest.approx(right[2], rel=2e-3)
    assert late[2] <= i2f.influence(J, delta).norm


def test_a_layer_that_the_loss_never_meets() -> None:
    case = zoo.build("a layer without effect, in front")
    case = case._replace(x=case.x[:1], y=case.y[:1])
    bare = zoo.Net(case.model.rule, a=case.model.a, b=case.model.b).eval()
    J = i2f.GradientJacobian(case.model, case.x, case.y)
    unused = sum(p.numel() for p in case.model.c.parameters())
    rows = J.rmatvec(normal(3, J.shape[0]))
    assert rows.shape == (3, J.shape[1])
    assert not rows[:, :unused].any()
    assert trace.bayes_error(J, 1e-3, 1e-2).value == pytest.approx(
        trace.bayes_error(i2f.GradientJacobian(bare, case.x, case.y), 1e-3, 1e-2).value, rel=1e-6
    )
    for exact in (True, False):
        agree(audited(case, exact=exact), audited(case._replace(model=bare), exact=exact))


def test_without_a_third_derivative() -> None:
    """Gauss–Newton's own matrix takes over, and the result says so. The gradient is noisy, so that the term matters: a
    twin whose sine has all derivatives finds the same image."""
    case, right = zoo.build("no third derivative"), zoo.build("no third derivative")
    right.model.rule = lambda net, x: net.b(net.a(x).sin())
    g = zoo.backward(right)
    g = g + 0.02 * g.norm() / len(g) ** 0.5 * normal(len(g))
    found, twin = (i2f.invert(c.model, g, c.y, c.x.shape, start=c.x, steps=200) for c in (case, right))
    assert "second-order term" in found.reason
    assert "second-order term" not in twin.reason
    assert apart(found.x, twin.x) < 1e-4


@pytest.mark.parametrize("name", ["fixed batch size", "LSTM, fixed state"])
def test_a_fixed_batch_size(name: str) -> None:
    case = zoo.build(name)
    free = zoo.build(name).model
    if name == "fixed batch size":
        free.rule = lambda net, x: net.b(torch.tanh(net.a(x)))
    else:
        free.rule = lambda net, x: net.head(
            net.layer(x, (net.h.expand(1, len(x), 3).contiguous(), net.c.expand(1, len(x), 3).contiguous()))[0].flatten(
                1
            )
        )
    right = case._replace(model=free)
    agree(audited(case), audited(right))
    found = i2f.invert(case.model, zoo.backward(case), None, case.x.shape, start=case.x + 0.01, steps=10)
    assert torch.equal(found.y, case.y)


@pytest.mark.parametrize("name", ["output is a dict", "output is a tuple", "output is a namedtuple"])
def test_outputs_of_any_kind(name: str) -> None:
    case = zoo.build(name)
    bare = zoo.Net(lambda net, x: net.b(torch.tanh(net.a(x))), a=case.model.a, b=case.model.b).eval()
    features = 0.0 if name.endswith("namedtuple") else 0.1
    right = case._replace(
        model=zoo.Net(lambda net, x: torch.cat([bare(x), net.a(x)], 1), a=case.model.a, b=case.model.b).eval(),
        loss=lambda out, y: F.cross_entropy(out[:, :3], y) + features * out[:, 3:].square().mean(),
    )
    agree(audited(case), audited(right))
    found = i2f.invert(
        case.model, zoo.backward(case), case.y, case.x.shape, loss=case.loss, start=case.x + 0.01, steps=20
    )
    assert apart(found.x, case.x) < 1e-6


def test_in_place_on_the_input() -> None:
    case = zoo.build("in place on its input")
    free = zoo.Net(lambda net, x: net.b(torch.tanh(net.a(2 * x - 0.5))), a=case.model.a, b=case.model.b).eval()
    agree(audited(case), audited(case._replace(model=free)))
    found = i2f.invert(case.model, zoo.backward(case), case.y, case.x.shape, start=case.x + 0.01, steps=20)
    assert apart(found.x, case.x) < 1e-6


@pytest.mark.parametrize("method", ["gauss-newton", "dgl", "dlg", "gs"])
def test_a_random_network_is_not_attacked(method: str) -> None:
    case = zoo.build("F.dropout")
    with pytest.raises(ValueError, match="random"):
        i2f.invert(case.model, zoo.backward(case), case.y, case.x.shape, method=method, steps=2)


@pytest.mark.parametrize("name", ["pruned", "weight_norm, hook", "spectral_norm, hook", "spectral_norm", "weight_norm"])
def test_parametrized_networks_are_attacked(name: str) -> None:
    case = zoo.build(name)
    found = i2f.invert(case.model, zoo.backward(case), case.y, case.x.shape, start=case.x + 0.01, steps=20)
    assert apart(found.x, case.x) < 1e-6
    g, T, _ = zoo.reference(name)
    right = {"gradient_norm": float(g.norm()), "lambda_max": float(torch.linalg.eigvalsh(T @ T.T)[-1])}
    assert {key: value for key, value in audited(case).items() if key in right} == pytest.approx(right, rel=1e-6)


@pytest.mark.parametrize("wrap", [nn.DataParallel, zoo.grad_sample, lambda net: torch.compile(net, backend="eager")])
def test_a_wrapper_changes_nothing(wrap: Any) -> None:
    case = zoo.build("MSE")
    case = case._replace(x=case.x[:1], y=case.y[:1])
    wrapped = case._replace(model=wrap(zoo.build("MSE").model).eval())
    agree(audited(wrapped), audited(case))


def test_distributed() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        case = zoo.build("Linear on tokens")
        model = nn.parallel.DistributedDataParallel(zoo.build("Linear on tokens").model)
        agree(audited(case._replace(model=model)), audited(case))
    finally:
        torch.distributed.destroy_process_group()


def test_wrappers_that_are_named() -> None:
    for name, words in (("scripted", "script|jit"), ("complex weights", "complex")):
        case = zoo.build(name)
        for function in (audited, lambda case: i2f.invert(case.model, torch.ones(66), case.y, case.x.shape)):
            with pytest.raises((ValueError, TypeError), match=words):
                function(case)


@pytest.mark.parametrize(
    "name",
    [
        "patched forward",
        "patched activation",
        "an activation on five axes",
        "an activation first",
        "Flatten of (n, L, C)",
        "GELU subclass",
        "Linear subclass",
    ],
)
def test_a_layer_that_is_not_the_known_one(name: str) -> None:
    case = zoo.build(name)
    J, T = i2f.GradientJacobian(case.model, case.x, case.y), zoo.reference(name)[1]
    by_rules = chain_jacobian(J.map.model, J.map.loss_of, J.x) if J.map.plain else None
    assert by_rules is None or name.startswith(("an activation", "Flatten"))
    assert apart(J.gram(), T @ T.T) < 1e-6
    assert apart(J.dense(), T) < 1e-6
