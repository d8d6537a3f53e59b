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


class _Run:
    """One problem: its leaves, the objective at its current iterate, and the best iterate so far."""

    def __init__(self, problem: Problem, recipe: Recipe, unit: float):
        self.problem, self.target = problem, problem.match(problem.target)
        self.x = problem.start.clone().requires_grad_()
        self.logits = None if problem.label_logits is None else problem.label_logits.clone().requires_grad_()
        self.share = unit / problem.gmap.unit  # of the unit that the group's gradients are computed in
        self.weight = 1.0 if recipe.cosine else problem.scale**-2  # in the sum that the optimiser sees
        self.objective = problem.start.new_tensor(math.inf)  # with its graph
        self.value = self.misfit = self.size = math.inf  # the objective, its distance, the largest pixel
        self.best, self.best_x, self.best_logits = math.inf, problem.start, problem.label_logits
        self.earlier = math.inf  # the best objective when a tenth of the steps was left

    def evaluated(self, objective: Tensor, value: float, misfit: float, size: float) -> None:
        """Takes what was computed at the leaves as they are."""
        self.objective, self.value, self.misfit, self.size = objective, value, misfit, size
        if value < self.best:
            self.best, self.best_x = value, self.x.detach().clone()
            self.best_logits = None if self.logits is None else self.logits.detach().clone()

    def matched(self, cosine: bool) -> Stop | None:
        if cosine:  # for a small angle, 1 − cos is half its square
            return self.problem.matched(self.misfit, self.problem.tolerance**2 / 2, "gradient's direction")
        return self.problem.matched(self.misfit, (self.problem.tolerance * self.problem.scale) ** 2)


class _Descent:
    """A group of problems that are minimised together."""

    def __init__(self, problems: Sequence[Problem], recipe: Recipe):
        self.recipe, self.steps, self.box = recipe, problems[0].steps, problems[0].box
        unit = statistics.median_low(p.gmap.unit for p in problems)  # one of another loss's size does not set it
        self.gradients = BatchedGradient(problems[0].gmap.scaled(unit))
        self.runs = [_Run(problem, recipe, unit) for problem in problems]
        self.running = list(self.runs)
        self.optimizer = recipe.optimizer(_leaves(self.runs), lr=recipe.lr)
        self.evaluations = 0  # of each running problem
        self.found: dict[_Run, Reconstruction] = {}

    def run(self) -> list[Reconstruction]:
        step, drops = 0, [round(share * self.steps) for share in self.recipe.drops]
        with bar(total=self.steps, description="descent", shown=self.runs[0].problem.progress) as progress:
            try:
                for step in range(self.steps + 1):
                    self.evaluate()
                    self.inspect(step)
                    if step == self.steps or not self.running:
                        break
                    if step in drops:
                        for group in self.optimizer.param_groups:
                            group["lr"] /= 10
                    self.update()
                    progress.update()
                    if step % 20 == 0:
                        worst = max(run.best for run in self.running)
                        progress.set_postfix_str(f"objective ≤ {worst:.1e}, {len(self.running)} running", refresh=False)
            except KeyboardInterrupt:
                self.stop_all(step, f"interrupted after {step} steps")
        self.stop_all(step, f"used its {self.steps} steps; the last tenth lowered the objective by {{gained:.0%}}")
        return [self.found[run] for run in self.runs]

    def evaluate(self) -> None:
        """The objective of every running problem. With a box, nothing is evaluated outside it, whatever the optimiser
        tries between its steps."""
        if self.box:
            self.project()
        running, problems = self.running, [run.problem for run in self.running]
        xs, logits = torch.stack([run.x for run in running]), [run.logits for run in running if run.logits is not None]
        ys = torch.stack(logits).softmax(-1) if logits else torch.stack([p.gmap.y for p in problems])
        gradients = self.gradients(xs, ys)
        if any(run.share != 1 for run in running):
            gradients = gradients * gradients.new_tensor([run.share for run in running])[:, None]

        def each(norm: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
            if all(problem.match.plain for problem in problems):
                return norm(gradients, torch.stack([run.target for run in running]))
            return torch.stack(
                [norm(run.problem.match(g), run.target) for run, g in zip(running, gradients, strict=True)]
            )

        misfits = objectives = each(_cosine if self.recipe.cosine else _squared)
        if self.recipe.l1:
            weights = objectives.new_tensor([self.recipe.l1 / problem.unit for problem in problems])
            objectives = objectives + each(_absolute) * weights
        if problems[0].prior.active:
            objectives = objectives + torch.stack([p.prior.penalty(x) for p, x in zip(problems, xs, strict=True)])
        self.evaluations += 1
        sizes = xs.detach().flatten(1).abs().amax(1)
        values = (objectives, objectives.tolist(), misfits.tolist(), sizes.tolist())
        for run, *own in zip(running, *values, strict=True):
            run.evaluated(*own)

    def inspect(self, step: int) -> None:
        """Calls the callbacks, and stops the problems that matched their gradient or diverged."""
        for run in list(self.running):
            if step == int(0.9 * self.steps):
                run.earlier = run.best
            run.problem.report(step, run.x, run.value, self.evaluations)
            if not math.isfinite(run.problem.loss(run.value)):
                self.stop(run, step, Stop(f"failed: the objective is NaN or infinite at step {step}", failed=True))
            elif not run.size <= EXPLODED:
                self.stop(run, step, Stop(f"failed: pixels beyond {EXPLODED:g} at step {step}", failed=True))
            elif stop := run.matched(self.recipe.cosine):
                self.stop(run, step, stop)

    def update(self) -> None:
        """One step of the optimiser. The first call of its closure uses the objective that is known already."""
        known = True

        def closure() -> float:
            nonlocal known
            if not known:
                self.evaluate()
            known = False
            return self.backward()

        with torch.enable_grad():
            self.optimizer.step(closure)
        if self.box:
            self.project()

    @torch.no_grad()
    def project(self) -> None:
        for run in self.running:
            run.x.clamp_(*BOX)

    def backward(self) -> float:
        """The sum that the optimiser minimises. Sets the gradients of the running problems' leaves; the others have
        none, so that the optimiser passes them by."""
        moving = _leaves(self.running)
        total = torch.stack([run.objective * run.weight for run in self.running]).sum()
        gradients = torch.autograd.grad(total, moving)
        for run, gradient in zip(self.running, gradients, strict=False):
            if self.box and isinstance(self.optimizer, torch.optim.LBFGS):
                gradient[(run.x <= BOX[0]) & (gradient > 0) | (run.x >= BOX[1]) & (gradient < 0)] = 0  # no way out
            if self.recipe.signed:
                gradient.sign_()
        for leaf in _leaves(self.runs):
            leaf.grad = None
        for leaf, gradient in zip(moving, gradients, strict=True):
            leaf.grad = gradient
        self.evaluations += 1
        return float(total.detach())

    def stop_all(self, step: int, reason: str) -> None:
        for run in list(self.running):
            gained = 1 - run.best / run.earlier if 0 < run.earlier < math.inf else 0.0
            self.stop(run, step, Stop(reason.format(gained=gained)))

    def stop(self, run: _Run, step: int, stop: Stop) -> None:
        self.found[run] = run.problem.finish(run.best_x, run.best, step, self.evaluations, stop, run.best_logits)
        self.running.remove(run)


def _leaves(runs: Sequence[_Run]) -> list[Tensor]:
    """What the optimiser moves: first the images, then the label logits."""
    return [run.x for run in runs] + [run.logits for run in runs if run.logits is not None]


def _squared(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().sum(-1)


def _absolute(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().sum(-1)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """1 − cos as half the squared distance on the unit sphere: computed as a difference, it has no digits left in
    float32 long before the gradient is matched."""
    return _squared(torch.nn.functional.normalize(a, dim=-1), torch.nn.functional.normalize(b, dim=-1)) / 2
