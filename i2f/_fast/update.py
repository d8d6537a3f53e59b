"""The Jacobian of several steps of SGD through a chain of layers: as `chain`, where the parameters move with the input.

With M_k = ∂(θ₀ − θ_k)/∂x, a step's gradient changes along a direction e of input space by ∇_θ²L (−M_k e) + Jᵀe. Changes
B of a layer's weight W join those of its input: forward z = W a gains B a, and back δ_a = Wᵀδ gains Bᵀδ.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor, nn

from i2f._fast.chain import backpropagate, layers_of, split_rows, unit_directions
from i2f._fast.layers import Conv2d, Linear, Reach, Rule, rule_for
from i2f._fast.workspace import Workspace

DIRECTIONS = 128  # at a time: the parameters' changes along them stay in the cache


class Step(NamedTuple):
    """A local step: the network with its parameters before it, the loss of its output, and the images it is on."""

    model: nn.Module
    loss: Callable[[Tensor], Tensor]
    images: Sequence[int]


class Rates(NamedTuple):
    """Of SGD; decay is weight decay, and unit what the loss is divided by."""

    lr: float
    momentum: float
    decay: float
    unit: float


class _At(NamedTuple):
    """One image in one step: the layers' rules, the prefixes of their parameters' names, and the second derivative of
    the loss by the network's output."""

    image: int
    rules: list[Rule]
    prefixes: list[str]
    curvature: Tensor


def chain_update(steps: Sequence[Step], x: Tensor, rates: Rates) -> Tensor | None:
    """∂(θ₀ − θ_K)/∂x over the unit, (d_x, d_θ), for θ the trainable parameters in the model's order.

    None where the model is no chain of known layers, or a step's loss couples its images (`chain_jacobian`).
    """
    prepared = []
    for step in steps:
        chain = layers_of(step.model)
        if chain is None:
            return None
        inputs, errors, curvature = backpropagate(step.loss, [layer for layer, _ in chain], x[list(step.images)])
        rules = [rule for (layer, _), a in zip(chain, inputs, strict=True) if (rule := rule_for(layer, a[0]))]
        if curvature is None or len(rules) < len(chain):
            return None
        prepared.append((step, chain, rules, inputs, errors, curvature))
    shapes = {name: tuple(p.shape) for name, p in steps[0].model.named_parameters() if p.requires_grad}
    J = x.new_empty(x.numel(), sum(map(math.prod, shapes.values())))
    features = x[0].numel()
    chunks = [(i, k, min(k + DIRECTIONS, features)) for i in range(len(x)) for k in range(0, features, DIRECTIONS)]
    workers = torch.get_num_threads() if x.device.type == "cpu" else 1

    def run(worker: int) -> None:
        work = Workspace(x)
        path = []
        for step, chain, rules, inputs, errors, curvature in prepared:
            made = [
                [
                    rule(layer, a[j], delta[j], work)
                    for rule, (layer, _), a, delta in zip(rules, chain, inputs, errors, strict=True)
                ]
                for j in range(len(step.images))
            ]
            prefixes = [prefix for _, prefix in chain]
            path.append([_At(i, made[j], prefixes, curvature[j]) for j, i in enumerate(step.images)])
        for image, start, stop in chunks[worker::workers]:
            rows = slice(image * features + start, image * features + stop)
            J[rows] = _along(path, x, image, (start, stop), shapes, rates).T

    if workers == 1:
        run(0)
        return J
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(run, range(workers)))
    finally:
        torch.set_num_threads(workers)  # else threads that start later have one each
    return J


def _along(
    path: Sequence[Sequence[_At]],
    x: Tensor,
    image: int,
    which: tuple[int, int],
    shapes: dict[str, tuple[int, ...]],
    rates: Rates,
) -> Tensor:
    """The parameters' changes along some directions of one image, (d_θ, m)."""
    size, m = sum(map(math.prod, shapes.values())), which[1] - which[0]
    moved, change, one = (x.new_zeros(size, m) for _ in range(3))
    buffer = x.new_zeros(size, m) if rates.momentum else change
    tangents, parts = split_rows(moved, shapes), split_rows(one, shapes)
    for step in path:
        change.zero_()
        for at in step:
            A = unit_directions(x[image], *which) if at.image == image else Reach(_nothing(x[image], m))
            _push(at, A, tangents, parts, -rates.unit)
            change += one
        if rates.decay:
            change.sub_(moved, alpha=rates.decay)
        if rates.momentum:
            buffer.mul_(rates.momentum).add_(change)
        moved.add_(buffer, alpha=rates.lr)
    return moved


def _nothing(image: Tensor, m: int) -> Tensor:
    shape = (*image.shape[1:], image.shape[0]) if image.ndim == 3 else image.shape
    return image.new_zeros(*shape, m)


def _push(at: _At, A: Reach, tangents: dict[str, Tensor], parts: dict[str, Tensor], scale: float) -> None:
    """The change of one image's gradient where its input changes by A and the parameters by scale · tangents; written
    to `parts`."""
    inputs, layers = [], list(zip(at.rules, at.prefixes, strict=True))
    for rule, prefix in layers:
        inputs.append(A)
        A = _forward(rule, A, tangents.get(f"{prefix}weight"), tangents.get(f"{prefix}bias"), scale)
    D = at.curvature @ A.values
    first = next(k for k, (_, prefix) in enumerate(layers) if f"{prefix}weight" in parts or f"{prefix}bias" in parts)
    for k in range(len(layers) - 1, first - 1, -1):
        (rule, prefix), A = layers[k], inputs[k]
        weight, bias = parts.get(f"{prefix}weight"), parts.get(f"{prefix}bias")
        if weight is not None:
            rule.write_weight(weight, A, D)
        if bias is not None:
            rule.write_bias(bias, D)
        if k > first:
            D = _backward(rule, D, A, tangents.get(f"{prefix}weight"), scale)


def _forward(rule: Rule, A: Reach, weight: Tensor | None, bias: Tensor | None, scale: float) -> Reach:
    z = rule.forward(A)
    if isinstance(rule, Linear) and weight is not None:
        z = Reach(z.values.add(torch.einsum("oim,i->om", weight, rule.a), alpha=scale))
    if isinstance(rule, Conv2d):
        height, width = rule.sizes
        out = z.full(height)
        if weight is not None:
            spread = weight.flatten(1, 3).transpose(0, 1).flatten(1)  # (n_in · taps · columns, n_out · m)
            out = out.view(height * width, -1).addmm(rule.patches.T, spread, alpha=scale)
        z = Reach(out.view(height, width, rule.shape[0], -1))
    if bias is not None:
        z.values.add_(bias, alpha=scale)
    return z


def _backward(rule: Rule, D: Tensor, A: Reach, weight: Tensor | None, scale: float) -> Tensor:
    back = rule.backward(D, A)
    if weight is None:
        return back
    if isinstance(rule, Linear):
        return back.add(torch.einsum("oim,o->im", weight, rule.delta), alpha=scale)
    assert isinstance(rule, Conv2d)  # no other rule has a weight
    spread = weight.permute(0, 2, 3, 1, 4).flatten(0, 2).flatten(1)  # (n_out · taps · columns, n_in · m)
    flat = back.reshape(-1, spread.shape[1])
    return flat.addmm(rule.signals, spread, alpha=scale).view(back.shape)
