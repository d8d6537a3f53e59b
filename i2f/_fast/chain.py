"""J of a chain of layers, by their own rules: every sum a large matrix product, nothing of it formed twice."""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from i2f._fast.layers import Linear, Reach, Rule, rule_for
from i2f._fast.workspace import Workspace, empty

DIRECTIONS = 256  # pushed through the network at a time: enough for matrix products, few enough for the cache


def chain_jacobian(
    model: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor, directions: int = DIRECTIONS, turned: bool = False
) -> Tensor | None:
    """J = ∂²L/∂x∂θ at `x`, (d_x, d_θ), stored by columns, for θ the trainable parameters in the model's order.

    None where the model is no chain (an `nn.Sequential`, nested or not) of layers that `rule_for` knows, or where its
    loss couples the images. Forward over reverse without a graph: `directions` of input space at a time run forward
    through the layers and back, and each layer writes its parameters' rows of Jᵀ.

    Args:
        loss: the model's output -> L.
        turned: of one image, return J times an orthogonal matrix, without the columns that become zero. J Jᵀ stays,
            and a linear layer has n_in + n_out columns in place of n_in·n_out (`Linear.write_turned`).
    """
    chain = layers_of(model)
    if chain is None:
        return None
    inputs, errors, curvature = backpropagate(loss, [layer for layer, _ in chain], x)
    rules = [rule for (layer, _), a in zip(chain, inputs, strict=True) if (rule := rule_for(layer, a[0]))]
    if curvature is None or len(rules) < len(chain):
        return None
    turned = turned and len(x) == 1
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    if turned:
        linear = {f"{prefix}weight" for layer, prefix in chain if type(layer) is nn.Linear}
        shapes |= {name: (sum(shape),) for name, shape in shapes.items() if name in linear}
    by_parameter = empty(sum(map(math.prod, shapes.values())), x.numel(), like=x)
    parts = split_rows(by_parameter, shapes)
    features = x[0].numel()
    workers = torch.get_num_threads() if x.device.type == "cpu" else 1
    batches = math.ceil(features / directions)  # whatever the threads, so that they do not change a digit
    edges = [features * k // batches for k in range(batches + 1)]

    def run(image: int, worker: int) -> None:
        work, steps = Workspace(x), []
        for rule, (layer, prefix), a, delta in zip(rules, chain, inputs, errors, strict=True):
            weight, bias = parts.get(f"{prefix}weight"), parts.get(f"{prefix}bias")
            steps.append(_Step(rule(layer, a[image], delta[image], work), weight, bias, turned and rule is Linear))
        for start, stop in list(pairwise(edges))[worker::workers]:
            columns = slice(image * features + start, image * features + stop)
            _push(steps, curvature[image], unit_directions(x[image], start, stop), columns)

    if workers == 1:
        for image in range(len(x)):
            run(image, 0)
    else:  # one thread per batch: the products are too small to share one among threads
        try:
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                list(pool.map(run, *zip(*product(range(len(x)), range(workers)), strict=True)))
        finally:
            torch.set_num_threads(workers)  # else threads that start later have one each
    return by_parameter.T


class _Step(NamedTuple):
    """A layer's rule, and its parameters' rows of Jᵀ, (*shape, d_x); None for one that is frozen or absent."""

    rule: Rule
    weight: Tensor | None
    bias: Tensor | None
    turned: bool

    def write(self, A: Reach, D: Tensor, columns: slice) -> None:
        if self.weight is not None:
            (self.rule.write_turned if self.turned else self.rule.write_weight)(self.weight[..., columns], A, D)
        if self.bias is not None:
            self.rule.write_bias(self.bias[..., columns], D)


def _push(steps: list[_Step], curvature: Tensor, A: Reach, columns: slice) -> None:
    """Carry directions of input space through the network and back, and write their columns of Jᵀ."""
    inputs = []
    for step in steps:
        inputs.append(A)
        A = step.rule.forward(A)
    D = curvature @ A.values
    first = next(k for k, step in enumerate(steps) if step.weight is not None or step.bias is not None)
    for step, A in zip(steps[:first:-1], inputs[:first:-1], strict=True):
        step.write(A, D, columns)
        D = step.rule.backward(D, A)
    steps[first].write(inputs[first], D, columns)


def layers_of(model: nn.Module) -> list[tuple[nn.Module, str]] | None:
    """The chain's layers and the prefix of their parameters' names; None where the model is something else, or more."""
    modules = list(model.named_modules(remove_duplicate=False))
    chain = [(m, f"{name}." if name else "") for name, m in modules if type(m) is not nn.Sequential]
    nested = any(True for layer, _ in chain for _ in layer.children())
    hooked = any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for _, m in modules
    )
    patched = any("forward" in vars(m) or type(m).__call__ is not nn.Module.__call__ for _, m in modules)
    twice = len({id(layer) for layer, _ in chain}) < len(chain)
    owned = [f"{prefix}{name}" for layer, prefix in chain for name, p in layer.named_parameters() if p.requires_grad]
    shared = owned != [name for name, p in model.named_parameters() if p.requires_grad]
    return None if nested or hooked or patched or twice or shared else chain


def backpropagate(
    loss: Callable[[Tensor], Tensor], layers: list[nn.Module], x: Tensor
) -> tuple[list[Tensor], Sequence[Tensor], Tensor | None]:
    """Every layer's input, ∂L/∂(its output), and each image's second derivative of the loss by the network's output,
    (n, classes, classes)."""
    inputs, outputs, a = [], [], x.detach().requires_grad_()
    with torch.enable_grad():
        for layer in layers:
            inputs.append(a.detach())
            a = layer(a.clone())  # a clone: it may act in place
            outputs.append(a)
        errors = torch.autograd.grad(loss(a), outputs)
    if a.ndim != 2 or any(z.shape[0] != len(x) for z in [*inputs, *outputs]):
        return inputs, errors, None
    hessian = torch.autograd.functional.hessian(loss, a.detach())
    assert isinstance(hessian, Tensor)  # of one tensor
    each = torch.arange(len(x))
    curvature = hessian[each, :, each]
    coupled = hessian.count_nonzero() > curvature.count_nonzero()
    return inputs, errors, None if coupled else curvature


def split_rows(by_parameter: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The rows of Jᵀ, one view for each parameter: (*its shape, d_x)."""
    parts = by_parameter.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.view(*shape, -1) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def unit_directions(image: Tensor, start: int, stop: int) -> Reach:
    """The directions start … stop of input space, as what they do to the first layer's input."""
    which = torch.arange(stop - start, device=image.device)
    pixel = start + which
    if image.ndim != 3:
        unit = image.new_zeros(image.numel(), len(which))
        unit[pixel, which] = 1
        return Reach(unit)
    channels, height, width = image.shape
    rows = pixel // width % height
    top, bottom = int(rows.min()), int(rows.max()) + 1
    unit = image.new_zeros(bottom - top, width, channels, len(which))
    unit[rows - top, pixel % width, pixel // (height * width), which] = 1
    return Reach(unit, top)
