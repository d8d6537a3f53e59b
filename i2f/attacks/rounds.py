"""An attack on one or several problems: the checks, the rounds of restarts, and the best result of each problem."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from i2f._torch.operations import ordinary
from i2f.attacks import inputs
from i2f.attacks.knowledge import KNOWN, SEARCHED, Array, Gradient, Knowledge, Search
from i2f.attacks.methods import METHODS, Method
from i2f.attacks.problem import Problem, Reconstruction
from i2f.attacks.setup import make_problems
from i2f.core import checks

ENDED = ("matched", "interrupted")  # how a reason begins after which a problem needs no further restart


def attack(
    model: nn.Module,
    gradients: Array | Sequence[Gradient],
    y: Array | Sequence[Array] | None,
    shape: Sequence[int],
    knowledge: Knowledge,
    search: Search,
) -> list[Reconstruction]:
    """What `invert_many` does, with its keywords in two dataclasses."""
    method = METHODS[checks.one_of("method", search.method, METHODS)]
    inputs.options(search.method, search.options, method.options, [*KNOWN, *SEARCHED])
    if search.callback is not None and not callable(search.callback):
        raise TypeError(f"callback is {type(search.callback).__name__}; give a function of an Iterate")
    if search.method == "idlg" and y is not None:
        raise ValueError("idlg reads the labels off the gradient: give y=None, or method='dgl' for known labels")
    with ordinary():
        rounds = make_problems(model, gradients, y, shape, knowledge, search)
        if not method.together:
            return _in_rounds(method, rounds, search.options)
        found = method.run([problem for one_round in rounds for problem in one_round], **search.options)
        return [_best(found[i :: len(rounds[0])]) for i in range(len(rounds[0]))]


def _in_rounds(method: Method, rounds: Sequence[Sequence[Problem]], options: Any) -> list[Reconstruction]:
    """One start of all problems after another; a problem whose gradient is matched needs no further one."""
    tries: list[list[Reconstruction]] = [[] for _ in rounds[0]]
    for one_round in rounds:
        left = [p for p in one_round if not (tries[p.index] and tries[p.index][-1].reason.startswith(ENDED))]
        for problem, found in zip(left, method.run(left, **options) if left else [], strict=True):
            tries[problem.index].append(found)
    return [_best(found) for found in tries]


def _best(found: Sequence[Reconstruction]) -> Reconstruction:
    """The restart with the lowest objective, with the evaluations of all of them."""
    best = min(range(len(found)), key=lambda i: found[i].loss if math.isfinite(found[i].loss) else math.inf)
    return replace(found[best], evaluations=sum(f.evaluations for f in found), restart=best)
