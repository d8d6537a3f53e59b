"""What a client sends after local training: the change of its parameters over several steps of SGD."""

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

from i2f._fast.update import Rates, Step, chain_update
from i2f.core import checks, streams

CHUNK_BYTES = 64 * 2**20  # directions of input space pushed through the steps at a time, as rows of J


class Losses(Protocol):
    """What a message needs of a `GradientMap`."""

    unit: float
    y: Any
    model: nn.Module
    parameters: dict[str, Tensor]

    def value(self, parameters: dict[str, Tensor], x: Tensor, y: Any = None) -> Tensor: ...

    def loss_of(self, output: Any, y: Any = None) -> Tensor: ...

    def by_theta(self, value: Tensor, leaves: Sequence[Tensor], create_graph: bool) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class LocalSteps:
    """θ₀ − θ_K, what K local steps of SGD on the client's n images change, as `torch.optim.SGD` takes them:

        b_{k+1} = m b_k + ∇_θ L(x_{B_k}, θ_k) + w θ_k,    θ_{k+1} = θ_k − lr b_{k+1},    b_0 = 0.

    Its Jacobian by x is exact, through all steps. Where the server receives the weights θ_K, subtract them from its
    own θ₀. With one step, lr 1, no momentum and no decay, it is the gradient.

    Args:
        lr: of every step. momentum, weight_decay: m and w.
        steps: K, each on the next batch, from the first one again after the last. Or epochs: passes over all images.
        batch_size: images of a step, in their order; the last batch of an epoch may be smaller. None: all.
        shuffle: the seed of each epoch's order; None: as they stand. Who knows the seed knows the order: an attacker
            who does not gives None, or another one.

    Raises: ValueError for numbers out of range, or not exactly one of steps and epochs.
    """

    lr: float
    steps: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    shuffle: int | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("LocalSteps: give one of steps=K, epochs=E")
        for name in ("steps", "epochs", "batch_size"):
            if getattr(self, name) is not None:
                checks.whole(f"LocalSteps: {name}", getattr(self, name), 1)
        if not 0 < self.lr < math.inf:
            raise ValueError(f"LocalSteps: lr={self.lr} is out of range: it must be positive and finite")
        checks.at_least("LocalSteps: weight_decay", self.weight_decay, 0.0)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"LocalSteps: momentum={self.momentum} is out of range: give 0 or more, and less than 1")

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, **schedule: Any) -> "LocalSteps":
        """The steps of an optimizer: its lr, momentum and decay; schedule: the other arguments.

        Raises: ValueError for any but `torch.optim.SGD` with one group, without Nesterov momentum or dampening.
        """
        (group, *others), kind = optimizer.param_groups, type(optimizer)
        if kind is not torch.optim.SGD:
            raise ValueError(f"optimizer is {kind.__name__}: local steps are known of torch.optim.SGD alone")
        unknown = [name for name in ("nesterov", "dampening", "maximize") if group[name]]
        if others or unknown:
            what = f"{', '.join(unknown)} set" if unknown else f"{len(others) + 1} groups of parameters"
            raise ValueError(f"optimizer has {what}: give SGD with one lr, momentum and weight_decay")
        if group["momentum"] and any("momentum_buffer" in state for state in optimizer.state.values()):
            raise ValueError("optimizer has momentum from earlier steps: give it as it is before the first")
        rates: dict[str, Any] = {name: float(group[name]) for name in ("lr", "momentum", "weight_decay")}
        return cls(**rates, **schedule)

    def __str__(self) -> str:
        count = f"{self.steps} steps" if self.steps is not None else f"{self.epochs} epochs"
        rates = {"momentum": self.momentum, "weight decay": self.weight_decay}
        rest = [f"{name} {value:g}" for name, value in rates.items() if value]
        rest += [f"batches of {self.batch_size}"] if self.batch_size else []
        return f"the change of the parameters over {count} of SGD, {', '.join([f'lr {self.lr:g}', *rest])}"

    def batches(self, n: int) -> list[list[int]]:
        """The images of each step, of n.

        Raises: ValueError for a batch of more images than there are.
        """
        size = self.batch_size or n
        if size > n:
            raise ValueError(f"LocalSteps: batch_size={size} and x has {n} images: give at most {n}")
        order, an_epoch = self._orders(n), -(-n // size)
        count = self.steps if self.steps is not None else int(self.epochs or 0) * an_epoch
        found: list[list[int]] = []
        while len(found) < count:
            images = next(order)
            found += [images[first : first + size] for first in range(0, n, size)]
        return found[:count]

    def _orders(self, n: int) -> Iterator[list[int]]:
        generator = None if self.shuffle is None else streams.generator("shuffle", self.shuffle)
        while True:
            yield list(range(n)) if generator is None else torch.randperm(n, generator=generator).tolist()

    def rates(self, n: int) -> list[float]:
        """By what each step's gradient is multiplied in the message: lr (1 − m^{K−k})/(1 − m), k = 0 … K − 1."""
        count = len(self.batches(n))
        return [self.lr * (1 - self.momentum ** (count - k)) / (1 - self.momentum) for k in range(count)]

    def check(self, losses: Losses, x: Tensor) -> None:
        """The loss takes every batch, and the steps do not diverge.

        Raises: ValueError where it does not, or they do.
        """
        for images in {len(images): images for images in self.batches(len(x))}.values():
            try:
                losses.value(losses.parameters, *_some(x, losses.y, images))
            except Exception as error:  # a loss may raise anything
                raise ValueError(f"loss does not take a batch of {len(images)} of {len(x)} images: {error}") from error
        found = self.sent(losses, losses.parameters, x, None, create_graph=False)
        if not all(torch.isfinite(part).all() for part in found):
            raise ValueError(f"message: local steps at lr={self.lr:g} diverge, θ_K is not finite: lower lr")

    def sent(
        self, losses: Losses, theta: dict[str, Tensor], x: Tensor, y: Any, create_graph: bool
    ) -> tuple[Tensor, ...]:
        """(θ₀ − θ_K)/unit by parameter, differentiable in x with `create_graph`. Cost: K gradients."""
        y = losses.y if y is None else y
        moved = [torch.zeros_like(p) for p in theta.values()]
        buffers: list[Tensor | None] = [None] * len(moved)
        for images in self.batches(len(x)):
            now = {name: p.detach() - losses.unit * m for (name, p), m in zip(theta.items(), moved, strict=True)}
            leaves = [p if p.requires_grad else p.requires_grad_() for p in now.values()]
            value = losses.value(dict(zip(now, leaves, strict=True)), *_some(x, y, images))
            gradients = losses.by_theta(value, leaves, create_graph)
            for i, (g, p) in enumerate(zip(gradients, leaves, strict=True)):
                p, g = (p, g) if create_graph else (p.detach(), g.detach())
                g = g + (self.weight_decay / losses.unit) * p if self.weight_decay else g
                before = buffers[i]
                buffers[i] = b = g if before is None or not self.momentum else self.momentum * before + g
                moved[i] = moved[i] + self.lr * b
        return tuple(moved)

    def dense(self, losses: Losses, x: Tensor) -> Tensor:
        """J, (d_x, d_θ), of the message over the unit: the derivatives of θ_k along every direction of input space are
        carried from step to step, many directions at a time."""
        path = list(self.path(losses, x))
        J = self._by_layers(losses, x, path)
        if J is not None:
            return J
        J = x.new_empty(x.numel(), sum(p.numel() for p in losses.parameters.values()))
        chunk = max(1, min(len(J), CHUNK_BYTES // (J.shape[1] * x.element_size())))
        with warnings.catch_warnings():
            # the first forward-mode derivative in a process loads PyTorch's own scripted rules
            warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
            for first in range(0, len(J), chunk):
                directions = torch.eye(len(J), dtype=x.dtype, device=x.device)[first : first + chunk]
                J[first : first + chunk] = self.along(losses, x, path, directions.view(-1, *x.shape))
        return J

    def _by_layers(
        self, losses: Losses, x: Tensor, path: Sequence[tuple[dict[str, Tensor], list[int]]]
    ) -> Tensor | None:
        """J by the layers' own rules, of a chain of known layers."""
        steps = []
        for now, images in path:
            labels = _some(x, losses.y, images)[1]
            model = copy.deepcopy(losses.model)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if name in now:
                        p.copy_(now[name])
            steps.append(Step(model, partial(losses.loss_of, y=labels), images))
        return chain_update(steps, x, Rates(self.lr, self.momentum, self.weight_decay, losses.unit))

    def path(self, losses: Losses, x: Tensor) -> Iterator[tuple[dict[str, Tensor], list[int]]]:
        """θ_k and the images of step k."""
        now = {name: p.detach() for name, p in losses.parameters.items()}
        buffers: dict[str, Tensor] = {}
        for images in self.batches(len(x)):
            yield now, images
            gradients = grad(losses.value)(now, *_some(x, losses.y, images))
            following = {}
            for name, p in now.items():
                g = gradients[name].detach() + (self.weight_decay / losses.unit) * p
                buffers[name] = self.momentum * buffers[name] + g if name in buffers else g
                following[name] = p - losses.unit * self.lr * buffers[name]
            now = following

    def along(
        self, losses: Losses, x: Tensor, path: Sequence[tuple[dict[str, Tensor], list[int]]], directions: Tensor
    ) -> Tensor:
        """The message's derivatives along directions of input space, (k, n, ...) -> (k, d_θ)."""
        moved = {name: p.new_zeros(len(directions), *p.shape) for name, p in losses.parameters.items()}
        buffers: dict[str, Tensor] = {}
        for now, images in path:
            part, labels = _some(x, losses.y, images)
            gradient = partial(grad(losses.value), y=labels)

            def along(tangent: dict[str, Tensor], e: Tensor, at: Any = (gradient, now, part)) -> dict[str, Tensor]:
                found: dict[str, Tensor] = jvp(at[0], at[1:], (tangent, e))[1]
                return found

            tangents = {name: -losses.unit * m for name, m in moved.items()}
            found = vmap(along)(tangents, directions[:, images])
            for name, g in found.items():
                g = g + (self.weight_decay / losses.unit) * tangents[name]
                buffers[name] = self.momentum * buffers[name] + g if name in buffers else g
                moved[name] = moved[name] + self.lr * buffers[name]
        return torch.cat([m.flatten(1) for m in moved.values()], dim=1)


def _some(x: Tensor, y: Any, images: list[int]) -> tuple[Tensor, Any]:
    """Those images and their labels; all of them as they are."""
    if len(images) == len(x) and images == sorted(images):
        return x, y
    return x[images], y[images]
