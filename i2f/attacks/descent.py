"""First-order gradient inversion: one loop for every published attack, many problems in it at once."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from i2f.attacks.batched import BatchedGradient
from i2f.attacks.prior import BOX
from i2f.attacks.problem import EXPLODED, Problem, Reconstruction, Stop
from i2f.core.progress import bar

MakeOptimizer = Callable[..., torch.optim.Optimizer]
TOGETHER_BYTES = 2**30  # of the problems' gradients and their graphs
GRAPH = 16  # a problem's graph, in units of its gradient and its input


class Recipe(NamedTuple):
    """The settings in which first-order attacks differ.

    optimizer: called as optimizer(parameters, lr=lr). cosine: match the gradient's direction instead of its value.
    signed: step along the sign of the objective's gradient. drops: at these shares of the budget lr falls tenfold.
    l1: weight of the sum of absolute differences, added to the distance.
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
    scale of the loss. The problems share the model, the shape and the number of steps; each has its own leaf tensor,
    stops by itself, and keeps its own best iterate.

    `converged` only where the gradient was matched: a first-order method cannot distinguish a slow descent from a
    stationary point. The reason reports how much the last tenth of the steps gained.
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
    """A group of problems that are minimised together."""

    def __init__(self, problems: Sequence[Problem], recipe: Recipe):
        self.problems, self.recipe = problems, recipe
        self.steps, self.box = problems[0].steps, problems[0].box
        self.images = [p.start.clone().requires_grad_() for p in problems]
        self.logits = [p.label_logits.clone().requires_grad_() for p in problems if p.label_logits is not None]
        self.targets = [p.match(p.target) for p in problems]
        unit = statistics.median_low(p.gmap.unit for p in problems)  # one of another loss's size does not set it
        self.shares = [unit / p.gmap.unit for p in problems]
        self.weights = [1.0 if recipe.cosine else p.scale**-2 for p in problems]
        self.gradients = BatchedGradient(problems[0].gmap.scaled(unit))
        self.optimizer = recipe.optimizer([*self.images, *self.logits], lr=recipe.lr)
        self.running = list(range(len(problems)))
        self.evaluations = 0  # of each running problem
        self.misfits: dict[int, float] = {}  # of the running problems: the distance, and
        self.sizes: dict[int, float] = {}  # the largest pixel
        self.best = [(math.inf, p.start, p.label_logits) for p in problems]
        self.earlier = [math.inf] * len(problems)  # the best objective when a tenth of the steps was left
        self.found: dict[int, Reconstruction] = {}

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
        return [self.found[i] for i in range(len(self.problems))]

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
        """Calls the callbacks, and stops the problems that matched their gradient or diverged."""
        if step == int(0.9 * self.steps):
            self.earlier = [best[0] for best in self.best]
        for i, loss in losses.items():
            value = loss.item()
            self.problems[i].report(step, self.images[i], value, self.evaluations)
            if not math.isfinite(self.problems[i].loss(value)):
                self.stop(i, step, Stop(f"failed: the objective is NaN or infinite at step {step}", failed=True))
            elif not self.sizes[i] <= EXPLODED:
                self.stop(i, step, Stop(f"failed: pixels beyond {EXPLODED:g} at step {step}", failed=True))
            elif stop := self.matched(i):
                self.stop(i, step, stop)

    def matched(self, i: int) -> Stop | None:
        problem = self.problems[i]
        if self.recipe.cosine:  # for a small angle, 1 − cos is half its square
            return problem.matched(self.misfits[i], problem.tolerance**2 / 2, "gradient's direction")
        return problem.matched(self.misfits[i], (problem.tolerance * problem.scale) ** 2)

    def update(self, losses: dict[int, Tensor]) -> None:
        """One step of the optimiser. The first call of its closure uses the objective that is known already."""
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
        """The sum that the optimiser minimises. Sets the gradients of the running problems' leaves; the others have
        none, so that the optimiser passes them by."""
        images = [self.images[i] for i in self.running]
        moving = images + [self.logits[i] for i in self.running if self.logits]
        total = torch.stack([losses[i] * self.weights[i] for i in self.running]).sum()
        gradients = torch.autograd.grad(total, moving)
        for x, gradient in zip(images, gradients, strict=False):
            if self.box and isinstance(self.optimizer, torch.optim.LBFGS):
                gradient[(x <= BOX[0]) & (gradient > 0) | (x >= BOX[1]) & (gradient < 0)] = 0  # held: no way out
            if self.recipe.signed:
                gradient.sign_()
        for leaf in [*self.images, *self.logits]:
            leaf.grad = None
        for leaf, gradient in zip(moving, gradients, strict=True):
            leaf.grad = gradient
        self.evaluations += 1
        return float(total.detach())

    def stop_all(self, step: int, reason: str) -> None:
        for i in list(self.running):
            earlier, now = self.earlier[i], self.best[i][0]
            self.stop(i, step, Stop(reason.format(gained=1 - now / earlier if 0 < earlier < math.inf else 0.0)))

    def stop(self, i: int, step: int, stop: Stop) -> None:
        loss, x, logits = self.best[i]
        self.found[i] = self.problems[i].finish(x, loss, step, self.evaluations, stop, logits)
        self.running.remove(i)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().sum(-1)


def _absolute(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().sum(-1)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """1 − cos as half the squared distance on the unit sphere: computed as a difference, it has no digits left in
    float32 long before the gradient is matched."""
    return _squared(torch.nn.functional.normalize(a, dim=-1), torch.nn.functional.normalize(b, dim=-1)) / 2
