"""Short trainings of LeNet on the bundled digits, plain or with every image's gradient defended by itself."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2f.core import perturb, spectrum, streams
from i2f.core.jacobian import GradientJacobian
from i2f.paper import data, devices, models
from i2f.paper.sweep import Problem

Gradients = Callable[[int, Tensor], Sequence[Tensor]]  # number of the batch in its epoch, its images -> by parameter


@dataclass(frozen=True)
class Training:
    """`epochs` of Adam at the rate `lr`, `batch_size` images per step, on the first `digits` of the train split; the
    next `held_out` are for the accuracy."""

    digits: int
    held_out: int
    epochs: int
    batch_size: int
    lr: float

    @classmethod
    def of(cls, named: Mapping[str, Any]) -> Self:
        """From a config or a problem, which hold its values by name."""
        return cls(**{name: named[name] for name in FIELDS})


FIELDS = tuple(field.name for field in fields(Training))


class Method(NamedTuple):
    """How every image's gradient is defended.

    name: "none"; "isotropic": noise of deviation `value`; "row-space": the same along the row space of the image's J,
    and none outside; "designed": noise of deviation `value` on the input; "dp": clipping to the norm `clip` and noise
    of `value` times it (local differential privacy); "prune": the share `value` is set to zero.
    """

    name: str
    value: float = 0.0
    clip: float = 0.0


def start(problem: Problem, n: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The problem's network before any training, and the first n digits of the train split, on the current device."""
    device = devices.current()
    x, y = (t.to(device) for t in data.load(problem["dataset"], n, split="train"))
    init, seed = problem["init"], problem["weight_seed"]
    return models.build("lenet", problem["dataset"], init=init, seed=seed, normalize=False).to(device), x, y


def epochs(
    model: nn.Module, optimizer: torch.optim.Optimizer, digits: int, batch_size: int, seed: int, gradients: Gradients
) -> Iterator[None]:
    """Train the model in place, an epoch each time that one is asked for, without end.

    The order of the digits is a stream of its own: the same whatever else a training draws.
    """
    order = streams.generator("order", seed)
    while True:
        for number, chosen in enumerate(torch.randperm(digits, generator=order).split(batch_size)):
            for parameter, gradient in zip(model.parameters(), gradients(number, chosen), strict=True):
                parameter.grad = gradient
            optimizer.step()
        yield


def train(model: nn.Module, x: Tensor, y: Tensor, training: Training, seed: int, gradients: Gradients) -> float:
    """Train the model in place on the `gradients`; its accuracy on the held-out digits. x, y: all digits."""
    optimizer = torch.optim.Adam(model.parameters(), lr=training.lr)
    course = epochs(model, optimizer, training.digits, training.batch_size, seed, gradients)
    for _ in itertools.islice(course, training.epochs):
        pass
    with torch.no_grad():
        right = model(x[training.digits :]).argmax(1) == y[training.digits :]
    return float(right.double().mean())


def defended(model: nn.Module, x: Tensor, y: Tensor, method: Method, generator: torch.Generator | None) -> list[Tensor]:
    """The mean of the images' defended gradients, by parameter."""

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    name, value, clip = method
    if name == "designed":
        x = x + value * draw(x)
    if name in ("none", "designed", "isotropic", "row-space"):
        found = list(torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters())))
        if name == "isotropic":
            found = [g + value / len(x) ** 0.5 * draw(g) for g in found]
        if name == "row-space":
            noise = value * row_space(model, x, y, generator).to(x)
            found = [g + part for g, part in zip(found, _split(model, noise), strict=True)]
        return found
    each = _each(model, x, y)
    if name == "dp":
        norms = torch.stack([g.flatten(1).square().sum(1) for g in each]).sum(0).sqrt()
        scale = (clip / norms).clamp(max=1)
        deviation = value * clip / len(x) ** 0.5
        return [torch.einsum("b,b...->...", scale, g) / len(x) + deviation * draw(g[0]) for g in each]
    flat = torch.cat([g.flatten(1) for g in each], 1)
    return _split(model, torch.stack([g + perturb.prune(g, value) for g in flat]).mean(0))


def median_norm(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The median over images of their gradients' norms."""
    return float(torch.stack([g.flatten(1).square().sum(1) for g in _each(model, x, y)]).sum(0).sqrt().median())


def row_space(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Tensor:
    """The mean over images of a standard normal in the row space of each one's J, (d_θ,): Jᵀ(J Jᵀ)⁻¹J n."""
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64, device=x.device)
    for one, label in zip(x.split(1), y.split(1), strict=True):
        J = GradientJacobian(model, one, label, method="dense")
        rows, gram = J.dense().double(), J.gram()
        n = torch.randn(J.shape[1], generator=generator).to(rows)
        floor = spectrum.zero_level(J) * gram.diagonal().sum() * torch.eye(J.shape[0]).to(gram)
        along = torch.cholesky_solve((rows @ n)[:, None], torch.linalg.cholesky(gram + floor))
        total += (along.T @ rows)[0]
    return total / len(x)


def _split(model: nn.Module, flat: Tensor) -> list[Tensor]:
    """(d_θ,), by parameter."""
    parameters = list(model.parameters())
    parts = flat.split([p.numel() for p in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]


def _each(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Every image's own gradient, (B, …) by parameter."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(theta: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, theta, (one[None],)), label[None])

    return list(torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, y).values())
