"""Deep Gradient Leakage by gradient descent: the attacker of the paper."""

import torch

from i2f.attacks.problem import Problem, Reconstruction
from i2f.gradient import Linearization
from i2f.progress import bar


def dgl(problem: Problem, lr: float = 0.1) -> Reconstruction:
    """Adam on ‖∇_θ L(x) − g‖² (Zhu et al. 2019 as run in the paper: 24,000 steps, lr 0.1, start N(0, 1), no prior).

    Keeps its best iterate. `converged` only where the gradient was matched: Adam cannot tell a slow descent from
    a stationary point, and the reason says how much the last tenth of its steps still gained.
    """
    x = problem.start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=lr)
    best, best_loss, earlier = problem.start, float("inf"), float("inf")
    evaluations, reason, step = 0, "", 0
    with bar(total=problem.steps, description="dgl", shown=problem.progress) as progress:
        for step in range(problem.steps + 1):
            point = Linearization(problem.gmap, x)
            if step == 0:
                point.checked()
            residual = point.gradient - problem.target
            loss = float(residual @ residual)
            evaluations += 1
            if loss < best_loss:
                best, best_loss = point.x.clone(), loss
            if step == int(0.9 * problem.steps):
                earlier = best_loss
            problem.report(step, point.x, loss, evaluations)
            if best_loss <= (problem.matched * problem.scale) ** 2:
                reason = "matched the gradient to machine precision"
                break
            if step == problem.steps:
                break
            x.grad = 2 * point.matvec(residual).view_as(x)
            evaluations += 1
            optimizer.step()
            progress.update()
    gained = 1 - best_loss / earlier if earlier > 0 else 0.0
    converged = bool(reason)
    reason = reason or f"used its {problem.steps} steps; the last tenth lowered the objective by {gained:.0%}"
    return problem.finish(best, best_loss, step, evaluations, converged, reason)
