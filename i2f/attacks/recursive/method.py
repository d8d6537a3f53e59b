"""The attack: recursion, features, and a polish on the gradient itself."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from i2f.attacks.gauss_newton import gauss_newton
from i2f.attacks.prior import BOX
from i2f.attacks.problem import Problem, Reconstruction, Stop
from i2f.attacks.recursive import features, lifted, smoothed
from i2f.attacks.recursive.features import Features, Found, Known, Modes, Values
from i2f.attacks.recursive.graph import Graph
from i2f.attacks.recursive.linearised import LARGEST, first_image
from i2f.attacks.recursive.recursion import Recursion
from i2f.attacks.recursive.systems import NOISY

POLISH = 50  # most steps on the gradient itself
ROUNDS = 4  # of features and of masks decided anew above them
MATCHED = 3.0  # times the noise that the systems show: the largest residual of a gradient that is matched
SHORT = 0.9  # share of the unknowns below which the activations above the last system are matched too


def recursive(problems: Sequence[Problem], polish: bool = True) -> list[Reconstruction]:
    """Recursive gradient attack: the exact inversion of networks with ReLUs, from the last layer down.

    The gradient of a ReLU network jumps where a unit opens or closes, so that descent on it stalls. But the weight
    gradient of a layer is linear in the layer's input once the signal at its output is known,

        ∂L/∂W[o, c, k] = Σ_p δ[o, p] a[c, s·p + k],

    and the input's signs are the mask that gives the next signal (R-GAP, Zhu and Blaschko 2021; R-CONV, Eltaras et al.
    2024). Behind a global average pool, where the activations are unknown and the signal is not, the mask's columns are
    the binary vectors in a known space. Where a layer has fewer equations than unknowns, the image is found as that
    whose activations obey the equations that there are (`features.solve`), which is a continuous problem.

    Noise is estimated from the residuals of the systems; masks are then decided by likelihood, from each unit's own
    value and from the signal that the gradient below it shows, until both agree. The last step (polish=False leaves it
    out) is on the gradient itself, unless that is matched already: under noise over the image and the gates in doubt
    together (`lifted`), which reaches what I²F predicts, and otherwise `gauss_newton` from there.

    Reads networks of convolutions, linear layers, BatchNorm in evaluation mode, ReLU, LeakyReLU, sums, a global average
    pool, max pooling and Flatten that end in a linear layer with a bias; one image at a time. The start is where the
    features' search begins.

    Raises: ValueError for a network that it cannot read (which module), a batch, or a gradient known in part.
    """
    found: list[Reconstruction] = []
    factors = lifted.Factors()
    for problem in problems:
        if found and found[-1].reason.startswith("interrupted"):
            stop = Stop("interrupted before its first step", failed=True)
            found.append(problem.finish(problem.start, math.inf, 0, 0, stop))
        else:
            found.append(_Attack(problem, factors).run(polish))
    return found


class _Attack:
    def __init__(self, problem: Problem, factors: lifted.Factors):
        shape = tuple(problem.start.shape)
        if shape[0] != 1 or len(shape) != 4:
            raise ValueError(f"shape is {shape}: the recursion takes one image, (1, C, H, W)")
        if problem.match.known is not None:
            raise ValueError("mask: the recursion needs every coordinate of the gradient; give method='gauss-newton'")
        self.problem, self.factors = problem, factors
        self.asked: Features | None = None
        self.graph = Graph(problem.gmap.model, shape)
        parts = problem.gmap.split(problem.target.double())
        self.gradient = dict(zip(problem.gmap.parameters, parts, strict=True))
        for node in self.graph.nodes.values():
            for name in node.names:
                if name not in self.gradient:
                    raise ValueError(f"{name} is frozen, and the recursion needs its gradient")
        self.evaluations = self.steps = 0

    def run(self, polish: bool) -> Reconstruction:
        problem, found = self.problem, None
        recursion = Recursion(self.graph, self.gradient, progress=self.problem.progress)
        try:
            x, words = self.image(recursion.run())
            found = self.ended(x, words)
            if polish and not found.converged:
                found = self.polished(x, recursion, found)
        except KeyboardInterrupt:
            if found is None:
                stop = Stop("interrupted", failed=True)
                return problem.finish(problem.start, math.inf, self.steps, self.evaluations, stop)
            found = replace(found, reason=f"interrupted: {found.reason}")
        matched = found.matched and found.relative_residual <= max(problem.tolerance, MATCHED * recursion.noise)
        return replace(found, layers=tuple(recursion.layers), matched=matched)

    def polished(self, x: Tensor, recursion: Recursion, found: Reconstruction) -> Reconstruction:
        """The last steps, on the gradient itself; what was found before where they gain nothing."""
        problem, words = self.problem, found.reason
        if recursion.noise > NOISY and self.asked is not None and problem.match.plain and not problem.prior.active:
            search = lifted.Search(problem, self.graph, self.factors)
            ended = search.run(x, features.sample(self.asked, x))
            if ended is not None and ended.misfit < found.loss:
                self.counted(Found(ended.x, ended.misfit, ended.steps, ended.products))
                return self.ended(ended.x, f"{words}; then {ended}", ended.settled, ended.misfit)
        again = gauss_newton([replace(problem, start=found.x, steps=min(problem.steps, POLISH))])[0]
        if not again.loss < found.loss:
            return found
        steps, evaluations = self.steps + again.steps, self.evaluations + again.evaluations
        reason = f"{words}; then on the gradient: {again.reason}"
        return replace(again, reason=reason, steps=steps, evaluations=evaluations)

    def ended(self, x: Tensor, words: str, settled: bool = False, misfit: float | None = None) -> Reconstruction:
        """The result at x, stationary if it is `settled` or the gradient is matched there. misfit: ‖r‖² where it is not
        that of the network's own gradient."""
        problem = self.problem
        x = (x[None].clamp(*BOX) if problem.box else x[None]).to(problem.start)
        residual = problem.match(problem.gmap(x) - problem.target).double()
        distance = float(residual.norm())
        stop = problem.matched(distance, problem.tolerance * problem.scale)
        loss = distance**2 if misfit is None else misfit
        loss += float(problem.prior.penalty(x)) if problem.prior.active else 0.0
        stop = Stop(f"{stop.reason}: {words}", converged=True) if stop else Stop(words, converged=settled)
        return problem.finish(x, loss, self.steps, self.evaluations + 1, stop)

    def matched(self, asked: Features, x: Tensor, goal: float) -> Found:
        """Steps on the features; where they stall without noise, through kinks, and then again."""
        search = partial(features.solve, asked, steps=self.problem.steps, goal=goal, report=self.report)
        found = self.counted(search(x, progress=self.problem.progress))
        if goal and found.loss > goal and x.numel() <= LARGEST:
            through = self.counted(smoothed.refine(asked, found.x, goal, self.report))
            found = self.counted(search(through.x, progress=self.problem.progress))
        return found

    def counted(self, found: Found) -> Found:
        self.steps, self.evaluations = self.steps + found.steps, self.evaluations + found.products
        return found

    def report(self, x: Tensor, loss: float, steps: int, products: int) -> None:
        """To the callback: the objective while features are matched is theirs."""
        self.problem.report(self.steps + steps, x[None].to(self.problem.start), loss, self.evaluations + products)

    def image(self, recursion: Recursion) -> tuple[Tensor, str]:
        """x from what the recursion found, and the words for how."""
        start = self.problem.start[0].double()
        source = next(name for name, node in self.graph.nodes.items() if node.kind == "input")
        if not recursion.stopped:
            return recursion.value[source], "recursion down to the input"
        known = known_at(self.graph, recursion)
        if not known:
            return start, f"the recursion stopped at {recursion.stopped}"
        noisy = recursion.noise > NOISY
        x, before = start, math.inf
        for _ in range(ROUNDS):
            self.asked = asked = Features(self.graph, known)
            goal = 0.0 if noisy else float(asked.size)
            x = first_image(self.graph, asked, start) if x is start else x
            found = self.matched(asked, x, goal)
            x = found.x
            if not noisy or not recursion.partial:
                break
            if not recursion.again(recursion.at, self.graph.values(x)) and before < math.inf:
                break
            before = found.loss
            known = known_at(self.graph, recursion, above=True)
        layer = f"recursion down to {recursion.stopped}; then features, to {found.loss / asked.size:.1e} of the noise"
        return x, layer


def known_at(graph: Graph, recursion: Recursion, above: bool = False) -> list[Known]:
    """What is known where the recursion stopped: a value, or the modes of a system and, with `above` or where these are
    too few, the values above it."""
    at = recursion.at
    known: list[Known] = []
    if at in recursion.value:
        return [Values(at, recursion.value[at], recursion.spread[at])]
    systems = recursion.partial
    if systems:
        known.append(Modes(at, graph.nodes[at].shape, systems))
        above = above or min(s.rank / s.T.shape[1] for s in systems) < SHORT
    if above or not systems:
        known += [
            Values(n, recursion.value[n], recursion.spread[n]) for n in graph.relus_above(at) if n in recursion.value
        ]
    return known
