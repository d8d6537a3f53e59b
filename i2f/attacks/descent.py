"""First-order gradient inversion: one loop for every published attack, many problems in it at once."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from i2f.attacks.batched import BatchedGradient
from i2f.attacks.prior import BOX
from i2f.attacks.problem import EXPLODED, Problem, Reconstruction
from i2f.core.progress import bar

MakeOptimizer = Callable[..., torch.optim.Optimizer]
TOGETHER_BYTES = 2**30  # of per-problem gradients and what their graphs hold
GRAPH = 16  # a problem's graph, in units of its gradient and its input


class Recipe(NamedTuple):
    """What tells one first-order attack from another.

    optimizer: called as optimizer(parameters, lr=lr). cosine: match the gradient's direction instead of its value.
    signed: step along the sign of the objective's gradient. drops: at these shares of the budget lr falls tenfold.
    l1: weight of the sum of absolute differences beside the distance.
    """

    optimizer: MakeOptimizer
    lr: float
    cosine: bool = False
    signed: bool = False
    drops: tuple[float, ...] = ()
    l1: float = 0.0


def descend(problems: Sequence[Problem], recipe: Recipe) -> list[Reconstruction]:
    """Minimise every problem's own objective, D(W ∇L(x), W g) + penalty(x), with D one of

        squared  ‖a − b‖² [+ l1 ‖a − b‖₁]        cosine  1 − ⟨a, b⟩ / ‖a‖‖b‖,

    by any torch optimiser, which sees the objective in units of ‖W g‖², so that its settings mean the same at every
    scale of the loss. Problems share the model, not their fate: each has its own leaf tensor, stops by itself,
    and keeps its own best iterate. The problems of one call have the same shape and steps.

    `converged` only where the gradient was matched: a first-order method cannot tell a slow descent from a stationary
    point, and the reason says how much the last tenth of its steps still gained.
    """
    group = _group_size(problems, recipe)
    found: list[Reconstruction] = []
    for first in range(0, len(problems), group):
        found += _Descent(problems[first : first + group], recipe).run()
    return found


def _group_size(problems: Sequence[Problem], recipe: Recipe) -> int:
    """As many as memory holds; one where the optimiser joins its parameters in one search direction (L-BFGS)."""
    probe = recipe.optimizer([torch.zeros(1, requires_grad=True)], lr=recipe.lr)
    if isinstance(probe, torch.optim.LBFGS):
        return 1
    one = problems[0].target.numel() + problems[0].start.numel()
    return max(1, TOGETHER_BYTES // (GRAPH * one * problems[0].target.element_size()))


class _Descent:
    """A group of problems on their way down together."""

    def __init__(self, problems: Sequence[Problem], recipe: Recipe):
        self.problems, self.recipe = problems, recipe
        self.steps, self.box = problems[0].steps, problems[0].box
        self.images = [p.start.clone().requires_grad_() for p in problems]
        self.logits = [p.label_logits.clone().requires_grad_() for p in problems if p.label_logits is not None]
        self.targets = [p.match(p.target) for p in problems]
        self.goals = [_goal(p, recipe.cosine) for p in problems]
        unit = statistics.median_low(p.gmap.unit for p in problems)  # one of another loss's size does not set it
        self.shares = [unit / p.gmap.unit for p in problems]
        self.weights = [1.0 if recipe.cosine else p.scale**-2 for p in problems]
        self.gradients = BatchedGradient(problems[0].gmap.scaled(unit))
        self.optimizer = recipe.optimizer([*self.images, *self.logits], lr=recipe.lr)
        self.running = list(range(len(problems)))
        self.evaluations = 0  # of each running problem
        self.best = [(math.inf, p.start, p.label_logits) for p in problems]
        self.earlier = [math.inf] * len(problems)  # the best objective when a tenth of the steps was left
        self.found: list[Reconstruction | None] = [None] * len(problems)

    def run(self) -> list[Reconstruction]:
        step, drops = 0, [round(share * self.steps) for share in self.recipe.drops]
        with bar(total=self.steps, description="descent", shown=self.problems[0].progress) as progress:
            try:
                for step in range(self.steps + 1):
                    losses = self.evaluate()
                    self.inspect(losses, step)
                    if step == self.steps or not self.running:
                        break
                    if step in drops:
                        for group in self.optimizer.param_groups:
                            group["lr"] /= 10
                    self.update(losses)
                    progress.update()
                    if step % 20 == 0:
                        worst = max(self.best[i][0] for i in self.running)
                        progress.set_postfix_str(f"objective ≤ {worst:.1e}, {len(self.running)} running", refresh=False)
            except KeyboardInterrupt:
                self.stop_all(step, f"interrupted after {step} steps")
        self.stop_all(step, f"used its {self.steps} steps; the last tenth lowered the objective by {{gained:.0%}}")
        return self.found

    def evaluate(self) -> dict[int, Tensor]:
        """The objective of every running problem, with its graph; keeps what is the best so far. With a box, nothing
        is evaluated outside it, whatever the optimiser tries between its steps."""
        chosen = self.running
        if self.box:
            self.project()
        xs = torch.stack([self.images[i] for i in chosen])
        if self.logits:
            ys = torch.stack([self.logits[i] for i in chosen]).softmax(-1)
        else:
            ys = torch.stack([self.problems[i].gmap.y for i in chosen])
        gradients = self.gradients(xs, ys)
        if any(self.shares[i] != 1 for i in chosen):
            gradients = gradients * gradients.new_tensor([self.shares[i] for i in chosen])[:, None]
        distance = _cosine if self.recipe.cosine else _squared
        if all(self.problems[i].match.plain for i in chosen):
            targets = torch.stack([self.targets[i] for i in chosen])
            misfits, absolute = distance(gradients, targets), _absolute(gradients, targets)
        else:
            pairs = [(self.problems[i].match(g), self.targets[i]) for i, g in zip(chosen, gradients, strict=True)]
            misfits, absolute = (torch.stack([norm(*pair) for pair in pairs]) for norm in (distance, _absolute))
        losses = misfits
        if self.recipe.l1:
            losses = losses + absolute * absolute.new_tensor([self.recipe.l1 / self.problems[i].unit for i in chosen])
        if self.problems[0].prior.active:
            losses = losses + torch.stack([self.problems[i].prior.penalty(x) for i, x in zip(chosen, xs, strict=True)])
        self.evaluations += 1
        self.misfits = dict(zip(chosen, misfits.tolist(), strict=True))
        for i, loss in zip(chosen, losses.tolist(), strict=True):
            if loss < self.best[i][0]:
                soft = self.logits[i].detach().clone() if self.logits else None
                self.best[i] = (loss, self.images[i].detach().clone(), soft)
        self.sizes = dict(zip(chosen, xs.detach().flatten(1).abs().amax(1).tolist(), strict=True))
        return dict(zip(chosen, losses, strict=True))

    def inspect(self, losses: dict[int, Tensor], step: int) -> None:
        """Tell the callbacks, and stop the problems that are through or lost."""
        if step == int(0.9 * self.steps):
            self.earlier = [best[0] for best in self.best]
        for i, loss in losses.items():
            value = loss.item()
            self.problems[i].report(step, self.images[i], value, self.evaluations)
            if not math.isfinite(self.problems[i].loss(value)):
                self.stop(i, step, f"failed: the objective is NaN or infinite at step {step}", failed=True)
            elif not self.sizes[i] <= EXPLODED:
                self.stop(i, step, f"failed: pixels beyond {EXPLODED:g} at step {step}", failed=True)
            elif self.misfits[i] <= self.goals[i] and not self.problems[i].prior.active:
                self.stop(i, step, self.matched_words(i), converged=True)

    def matched_words(self, i: int) -> str:
        if self.recipe.cosine:
            return "matched the gradient's direction to the tolerance"
        how = ", weighed by the covariance," if self.problems[i].match.whitens else ""
        return f"matched the gradient{how} to the tolerance"

    def update(self, losses: dict[int, Tensor]) -> None:
        """One step of the optimiser, whose closure hands out the gradient that stands already before it makes more."""
        pending: dict[int, Tensor] | None = losses

        def closure() -> float:
            nonlocal pending
            now, pending = pending or self.evaluate(), None
            return self.backward(now)

        with torch.enable_grad():
            self.optimizer.step(closure)
        if self.box:
            self.project()

    @torch.no_grad()
    def project(self) -> None:
        for i in self.running:
            self.images[i].clamp_(*BOX)

    def backward(self, losses: dict[int, Tensor]) -> float:
        """The sum that the optimiser minimises, and gradients of the running problems' leaves; the others have none, so
        that the optimiser passes them by."""
        leaves = [*self.images, *self.logits]
        moving = [leaves[k] for k in range(len(leaves)) if k % len(self.images) in self.running]
        total = torch.stack([losses[i] * self.weights[i] for i in self.running]).sum()
        for leaf in leaves:
            leaf.grad = None
        for leaf, gradient in zip(moving, torch.autograd.grad(total, moving), strict=True):
            leaf.grad = gradient
        if self.box and isinstance(self.optimizer, torch.optim.LBFGS):
            for i in self.running:
                x, gradient = self.images[i].detach(), self.images[i].grad
                gradient[(x <= BOX[0]) & (gradient > 0) | (x >= BOX[1]) & (gradient < 0)] = 0  # held: no way out
        if self.recipe.signed:
            for i in self.running:
                self.images[i].grad.sign_()
        self.evaluations += 1
        return float(total.detach())

    def stop_all(self, step: int, reason: str) -> None:
        for i in list(self.running):
            earlier, now = self.earlier[i], self.best[i][0]
            self.stop(i, step, reason.format(gained=1 - now / earlier if 0 < earlier < math.inf else 0.0))

    def stop(self, i: int, step: int, reason: str, converged: bool = False, failed: bool = False) -> None:
        loss, x, logits = self.best[i]
        y = None if logits is None else logits.argmax(-1)
        soft = None if logits is None else logits.softmax(-1)
        self.found[i] = self.problems[i].finish(
            x, loss, step, self.evaluations, reason, converged=converged, failed=failed, y=y, soft=soft
        )
        self.running.remove(i)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().sum(-1)


def _absolute(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().sum(-1)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """1 − cos as half the squared distance on the unit sphere: the difference itself has no digits left in float32
    long before the gradient is matched."""
    return _squared(torch.nn.functional.normalize(a, dim=-1), torch.nn.functional.normalize(b, dim=-1)) / 2


def _goal(problem: Problem, cosine: bool) -> float:
    """The distance at which the gradient counts as matched: for a small angle, 1 − cos is half its square."""
    return problem.tolerance**2 / 2 if cosine else (problem.tolerance * problem.scale) ** 2
