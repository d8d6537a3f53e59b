"""The perfect attacker on a network with ReLUs: the image together with the gates of units whose side is in doubt."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.special import log_ndtr

from i2f.attacks.problem import Problem
from i2f.attacks.recursive import masks
from i2f.attacks.recursive.gram import LARGEST, preconditioner
from i2f.attacks.recursive.graph import Graph, trace
from i2f.attacks.recursive.tangent import Tangent
from i2f.core.gradient import GradientMap
from i2f.core.linalg import solve_cg, solve_factored
from i2f.core.linearization import Linearization
from i2f.core.progress import bar

WIDTH = 5.0  # at first, units within so many standard deviations of their kink have a free gate
SHOWN, WRONG = 6.0, 0.1  # later, those of whose jump the residual shows so many standard deviations, and that share
WEAK = 0.2  # standard deviation from which a gate is decided by the unit's own value
MOST = 20_000  # free gates: beyond, nothing is known that a step could start from
PASSES = 12
PROBES = 8  # random vectors for the size of the jumps
TOLERANCE, INNER = 1e-3, 1000  # of conjugate gradients
SAME = 0.3  # relative difference of two gradients up to which they share a preconditioner
SETTLED = 1e-3  # a step below this share of the attacker's own error ends the search


class Held(nn.Module):
    """The network with its ReLUs' gates held: a smooth function of z = (x, α), (1, d_x + U), U the number of units.

    gates: (U,), what each unit's pre-activation is multiplied by, to which α is added. sizes: of the ReLUs' values.
    """

    gates: Tensor

    def __init__(self, model: nn.Module, shape: tuple[int, ...], gates: Tensor, sizes: Mapping[str, tuple[int, ...]]):
        super().__init__()
        self.model, self.shape, self.sizes, self.calls = model, shape, sizes, trace(model)
        self.register_buffer("gates", gates)

    def forward(self, z: Tensor) -> Any:
        x, alpha = z[0].split([math.prod(self.shape), len(self.gates)])
        parts = (self.gates + alpha).split([math.prod(size) for size in self.sizes.values()])
        held = {name: part.reshape(size) for (name, size), part in zip(self.sizes.items(), parts, strict=True)}
        return _Held(self.model, held, self.calls).run(x.reshape(1, *self.shape))


class _Held(fx.Interpreter):
    def __init__(self, model: nn.Module, held: Mapping[str, Tensor], calls: fx.Graph):
        super().__init__(model, graph=calls)
        self.held = held

    def run_node(self, n: fx.Node) -> Any:
        if n.name not in self.held:
            return super().run_node(n)
        (u, *_), _ = self.fetch_args_kwargs_from_env(n)
        return u * self.held[n.name]


@dataclass
class Lifted:
    """x: (C, H, W). misfit: ‖∇L(x, gates) − g‖². beyond: units that stand on the other side of their kink at x than
    their gate says. free: gates that were unknowns at first. error: the attacker's own estimate of ‖x − truth‖.
    settled: the last step was small beside it, and the residual shows no wrong gate."""

    x: Tensor
    misfit: float
    beyond: int
    free: int
    error: float
    settled: bool
    steps: int
    products: int

    def __str__(self) -> str:
        how = "settled" if self.settled else "not settled"
        error = f"an error of about {self.error / math.sqrt(self.x.numel()):.1e} a pixel by its own estimate"
        return (
            f"on the gradient with {self.free:,} free gates: {how}, {self.beyond:,} units beyond their kinks, {error}"
        )


class Factors:
    """The preconditioner of the last problem, which serves the next one where that shares nearly the same gradient: of
    the same image under other noise."""

    def __init__(self) -> None:
        self.last: tuple[Problem, Tensor | None] | None = None

    def at(self, problem: Problem, graph: Graph, values: Mapping[str, Tensor], signal: Tensor) -> Tensor | None:
        if self.last is None or not _alike(problem, self.last[0]):
            fits = math.prod(next(iter(graph.nodes.values())).shape) <= LARGEST
            self.last = problem, preconditioner(graph, values, signal) if fits else None
        return self.last[1]


def _alike(one: Problem, other: Problem) -> bool:
    same = one.gmap.model is other.gmap.model
    return same and float((one.target - other.target).norm()) < SAME * float(one.target.norm())


class Search:
    """Gauss–Newton on  ‖∇L(x, gates) − g‖²  over x and the gates in doubt.

    With gates held, ∇L is smooth; as a function of the image alone it jumps wherever a unit crosses its kink, since the
    unit's own signal appears or is gone. That jump is what shows the gate: to first order the residual is
    r + Jᵀs + Cα, C's columns the jumps, and a least-squares solution has α near 0 or ±1. Gates are rounded by
    likelihood, with the unit's own value; a gate that is wrong still shows in the residual, and becomes an unknown.
    """

    def __init__(self, problem: Problem, graph: Graph, factors: Factors):
        gmap = problem.gmap.cast(torch.float64)
        self.gmap, self.graph, self.progress = gmap, graph, problem.progress
        self.problem, self.factors = problem, factors
        self.target = problem.target.double()
        self.relus = [node for node in graph.nodes.values() if node.kind == "relu"]
        self.sizes = {node.name: node.shape for node in self.relus}
        self.slope = torch.cat([torch.full((math.prod(n.shape),), n.slope).double() for n in self.relus])
        self.shape = next(iter(graph.nodes.values())).shape
        self.n = math.prod(self.shape)
        self.factor: Tensor | None = None
        self.mean, self.products = 1.0, 0
        self.generator = torch.Generator().manual_seed(0)

    def run(self, x: Tensor, error: Tensor) -> Lifted | None:
        """From x, (C, H, W), whose error is about as large as `error`; None where too many gates are in doubt."""
        values = self.graph.values(x)
        self.factor = self.factors.at(self.problem, self.graph, values, self._signal(values))
        u = self._flat(values)
        spread, size = self._spread(values, error), math.inf
        gates, free = masks.opened(u, self.slope), u.abs() < WIDTH * spread
        first, settled, steps, misfit, asked = int(free.sum()), False, 0, math.inf, torch.zeros_like(free)
        with bar(total=PASSES, description="gates", shown=self.progress) as shown:
            while not settled and steps < PASSES and int(free.sum()) <= MOST:
                at, r = self.linearized(x, gates)
                scale = self._scale(at)
                s, sigma = self.step(at, r, free, scale)
                misfit = sigma**2 * len(r)
                x, steps = x + s[: self.n].reshape(self.shape), steps + 1
                values = self.graph.values(x)
                u, e = self._flat(values), sigma / scale.sqrt()
                if steps == 1:
                    d = sigma * self.sample(at)
                    size, spread = float(d.norm()), self._spread(values, d)
                new = self._decided(gates, s[self.n :], e, u / spread, free)
                moved = bool((new != gates).any())
                gates = new
                asked = torch.zeros_like(free) if moved else asked | free  # each once
                free = torch.zeros_like(free) if moved else self._shown(x, gates, sigma, scale) & ~asked
                settled = not moved and not free.any() and float(s[: self.n].norm()) <= SETTLED * size
                shown.update()
                shown.set_postfix_str(f"{int(free.sum()):,} gates in doubt")
        if not steps:
            return None
        beyond = int((masks.opened(u, self.slope) != gates).sum())
        return Lifted(x, misfit, beyond, first, size, settled, steps, self.products)

    def linearized(self, x: Tensor, gates: Tensor) -> tuple[Linearization, Tensor]:
        """Products at (x, gates) in float32, and the residual, (d_θ,), in float64."""
        held = GradientMap(Held(self.gmap.model, self.shape, gates, self.sizes), self.gmap.y, self.gmap.loss)
        held = held.scaled(self.gmap.unit)
        z = torch.cat([x.flatten(), torch.zeros_like(gates)])[None]
        return Linearization(held.cast(torch.float32), z.float()), held(z) - self.target

    def step(self, at: Linearization, r: Tensor, free: Tensor, scale: Tensor) -> tuple[Tensor, float]:
        """(s, α), (d_x + U,), zero where a gate is not free, and the noise of a coordinate."""
        size = float(r.norm()) or 1.0
        wanted = torch.cat([free.new_ones(self.n), free])
        s = self._solve(at, -at.matvec((r / size).float()), wanted, scale) * size
        left = r + at.rmatvec(s.float()).double()
        return s, float(left.norm()) / math.sqrt(max(left.numel() - int(wanted.sum()), 1))

    def sample(self, at: Linearization) -> Tensor:
        """A random displacement (J Jᵀ)⁻¹Jξ, ξ ~ N(0, I): what noise of variance one does to the image."""
        wanted = torch.arange(self.n + len(self.slope)) < self.n
        b = at.matvec(torch.randn(self.target.numel(), generator=self.generator))
        return self._solve(at, b, wanted, torch.ones_like(self.slope))[: self.n].reshape(self.shape)

    def _solve(self, at: Linearization, b: Tensor, wanted: Tensor, scale: Tensor) -> Tensor:
        scale = scale[wanted[self.n :]]

        def product(v: Tensor) -> Tensor:
            self.products += 2
            whole = torch.zeros(len(wanted)).masked_scatter(wanted, v.float())
            return at.matvec(at.rmatvec(whole))[wanted].double()

        def precondition(v: Tensor) -> Tensor:
            x, alpha = v[: self.n], v[self.n :] / scale
            x = x / self.mean if self.factor is None else solve_factored(self.factor, x.float()).double()
            return torch.cat([x, alpha])

        found = solve_cg(product, b[wanted].double(), 0.0, TOLERANCE, INNER, precondition).u
        return torch.zeros(len(wanted), dtype=found.dtype).masked_scatter(wanted, found)

    def _scale(self, at: Linearization) -> Tensor:
        """‖c‖² of each unit's jump c, (U,), from products with random vectors."""
        every = torch.zeros(at.x.numel(), dtype=torch.float64)
        for _ in range(PROBES):
            w = torch.randn(self.target.numel(), generator=self.generator)
            every += at.matvec(w).double().square() / PROBES
        self.products += PROBES
        self.mean, found = float(every[: self.n].mean()), every[self.n :]
        return found.clamp(min=1e-12 * float(found.max()))

    def _shown(self, x: Tensor, gates: Tensor, sigma: float, scale: Tensor) -> Tensor:
        """The units whose jump the residual holds, in the direction of the other side: a wrong gate leaves it but for
        what x makes up for."""
        at, r = self.linearized(x, gates)
        size = float(r.norm()) or 1.0
        self.products += 1
        found = at.matvec((r / size).float())[self.n :] * size * torch.where(gates == self.slope, -1.0, 1.0)
        return (found > SHOWN * sigma * scale.sqrt()) & (found > WRONG * scale)

    def _decided(self, gates: Tensor, alpha: Tensor, e: Tensor, own: Tensor, free: Tensor) -> Tensor:
        """The gates of units that are free or weak, by what the gradient and their own values, in standard deviations,
        say."""
        said = masks.of_signals(gates + alpha, e, self.slope) * free + log_ndtr(own) - log_ndtr(-own)
        return torch.where(free | (e > WEAK), masks.opened(said, self.slope), gates)

    def _signal(self, values: Mapping[str, Tensor]) -> Tensor:
        logits = values[self.graph.output][None].requires_grad_()
        with torch.enable_grad():
            found: Tensor = torch.autograd.grad(self.gmap.loss_of(logits), logits)[0][0]
        return found

    def _flat(self, values: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([values[node.inputs[0]].flatten() for node in self.relus])

    def _spread(self, values: Mapping[str, Tensor], error: Tensor) -> Tensor:
        """Of the pre-activations, (U,): the root-mean-square over each channel of what the error does to it."""
        moved = Tangent(self.graph, [node.inputs[0] for node in self.relus], values)(error)
        found = []
        for node in self.relus:
            each = moved[node.inputs[0]]
            mean = each.square().mean(tuple(range(1, each.ndim)) or 0, keepdim=True).sqrt()
            found.append(mean.expand(each.shape).flatten())
        return torch.cat(found).clamp(min=torch.finfo(torch.float64).tiny)
