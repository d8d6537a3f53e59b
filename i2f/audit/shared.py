"""What an audit asks, and one shared gradient: what is found once for all samples behind it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from i2f.attacks import invert
from i2f.audit.defense import Defense
from i2f.audit.labels import as_classes, read_off
from i2f.audit.sample import rms
from i2f.core import checks, metrics
from i2f.core.jacobian import GradientJacobian
from i2f.core.linearization import graph_nodes

KINKS = re.compile(  # in the names of the autograd nodes of operations whose derivative jumps
    "relu|hard(tanh|swish|sigmoid)|max(pool|backward|imum)|min(backward|imum)|a(max|min)|cum(max|min)|where|abs|clamp"
    "|threshold|shrink|round|floor|ceil|trunc|signbackward|topk|sort|median|kthvalue|smoothl1|huber|margin"
)


@dataclass(frozen=True)
class Question:
    """What an audit asks of every sample.

    target_psnr: in dB. tau: τ, in units of the range. attack_steps: None where no attack is run. weights: the precision
    of the model as it was given.
    """

    defense: Defense
    target_psnr: float
    tau: float
    seed: int
    attack_steps: int | None
    weights: torch.dtype

    def __post_init__(self) -> None:
        checks.at_least("tau", self.tau, 1e-6)
        checks.at_least("target_psnr", self.target_psnr, 1e-6)

    @property
    def target_mse(self) -> float:
        """The target, in squared units of the range."""
        return 10 ** (-self.target_psnr / 10)


@dataclass(frozen=True)
class Attack:
    """Reconstructions in the order of the samples, (n, …), and why the attack stopped."""

    images: Tensor
    reason: str

    def errors(self, k: int, truth: Tensor) -> dict[str, Any]:
        """The fields of a `Sample` about the attack on sample k. truth: flat, (d_x,)."""
        x = self.images[k].double().reshape(-1)
        return {
            "attacked": rms((x.clamp(0, 1) - truth).square()),
            "attacked_rmse": rms((x - truth).square()),
            "attacked_reason": self.reason,
            "recovered": self.images[k].float().cpu(),
        }


@dataclass(frozen=True)
class Shared:
    """One shared gradient.

    indices: the numbers of the samples behind it. sent: δ as drawn. seen: δ once the attacker has scaled a clipped
    gradient back to its own length. labels: as they are shown. read: whether each is read off the gradient.
    """

    J: GradientJacobian
    question: Question
    indices: Sequence[int]
    sent: Tensor
    seen: Tensor
    labels: list[Any]
    read: list[bool | None]
    attack: Attack | None

    @property
    def d_x(self) -> int:
        """Entries of one sample."""
        return self.J.shape[0] // len(self.J.x)

    @property
    def gradient_norm(self) -> float:
        return float(self.J.gradient.double().norm())

    def part(self, k: int) -> slice:
        """The entries of sample k among those of all."""
        return slice(k * self.d_x, (k + 1) * self.d_x)

    def truth(self, k: int) -> Tensor:
        """Sample k, flat, float64."""
        return self.J.x[k].double().reshape(-1)

    def attacked(self, k: int) -> dict[str, Any]:
        """The fields of a `Sample` about the attack; empty where none was run."""
        return {} if self.attack is None else self.attack.errors(k, self.truth(k))

    def kept(self) -> Tensor | None:
        """The coordinates that pruning kept, (d_θ,) booleans; None for other defences."""
        return (self.J.gradient + self.sent) != 0 if self.question.defense.name == "prune" else None

    @cached_property
    def kinked(self) -> bool:
        """Whether the way from x to the loss passes an operation with a kink, module or function."""
        gmap = self.J.map
        with torch.enable_grad():
            value = gmap.value(gmap.parameters, self.J.x.clone().requires_grad_())
        names = [node.name().lower().replace("softmax", "") for node in graph_nodes([value.grad_fn])]
        return any(KINKS.search(name) for name in names)


def share(J: GradientJacobian, question: Question, indices: Sequence[int]) -> Shared:
    """The defence is drawn, labels are read, and the attack is run where it is asked for."""
    sent = question.defense.delta(J, question.seed + indices[0])
    seen, y = question.defense.undone(J, sent), J.map.y
    classes = as_classes(y)
    labels = [y[k].tolist() if one is None else one for k, one in enumerate(classes)]
    shared = Shared(J, question, indices, sent, seen, labels, read_off(J, sent, classes), None)
    return shared if question.attack_steps is None else replace(shared, attack=_attack(shared))


def _attack(shared: Shared) -> Attack:
    """Gauss–Newton's reconstruction; where the network has kinks, at which it stalls, that of the recursion if that is
    nearer to the truth: between two that do not match the gradient, an attacker's choice is a guess, and the audit
    takes the worse for who shares."""
    J, question = shared.J, shared.question
    keywords: dict[str, Any] = {"loss": J.map.loss, "seed": question.seed, "steps": question.attack_steps}
    keywords["message"] = J.map.message
    arguments = (J.map.model, J.gradient + shared.seen, J.map.y, J.x.shape)
    found = invert(*arguments, mask=shared.kept(), **keywords)
    reason = found.reason
    if shared.kinked:
        try:
            exact = invert(*arguments, method="recursive", **keywords)
        except ValueError as error:
            reason += f"; the recursive attack takes no such problem: {error}"
        else:
            if not metrics.mse(found.x.to(J.x), J.x) <= metrics.mse(exact.x.to(J.x), J.x):
                found, reason = exact, f"recursive attack: {exact.reason}"
    x = found.x.to(J.x)
    return Attack(metrics.assign(x, J.x) if len(x) > 1 else x, reason)
