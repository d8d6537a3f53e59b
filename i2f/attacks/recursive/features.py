"""The image whose activations are those that were found: Gauss-Newton on features, which are continuous in x."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from i2f.attacks.recursive.graph import Graph
from i2f.attacks.recursive.systems import System
from i2f.attacks.recursive.tangent import Tangent
from i2f.core.progress import bar

CAP = 0.7  # modes and units better known than this share of them count no more than that one
FORCING = 0.3  # largest relative error of a step's linear system
LEAST_FORCING = 1e-3  # and smallest: rounding in float32 allows no better
FINE = 0.02  # relative error below which a step that gains nothing shows that there is nothing to gain
INNER = 200  # conjugate-gradient iterations of a step
MU, MAX_MU = 1e-6, 1e8  # damping at the start, in units of the curvature along the slope; at the end
GAIN = 1e-4  # a step is accepted for this share of the predicted decrease
FURTHER = 1.3  # gain ratio from which a step is tried at twice its length
FLAT = 1e-3  # relative decrease of the objective below which the residual is noise


class Known(Protocol):
    """What is known of the value a of the node `name`, as numbers in units of the noise: size of them, the largest of
    whose weights is `largest`. residual: known minus found; push, pull: its derivative by a, and the transpose."""

    name: str
    size: int
    largest: float

    def residual(self, a: Tensor) -> list[Tensor]: ...

    def push(self, t: Tensor) -> list[Tensor]: ...

    def pull(self, r: Sequence[Tensor]) -> Tensor: ...


class Modes:
    """What incomplete systems, one for each block of channels, say: min(S, S_cap)/σ · (V a − Y)."""

    def __init__(self, name: str, shape: tuple[int, ...], systems: Sequence[System]):
        self.name, self.shape, self.systems = name, shape, systems
        self.weights = [s.S.clamp(max=float(s.S[int(CAP * (s.rank - 1))]))[:, None] / s.sigma for s in systems]
        self.size = sum(s.rank * s.G.shape[1] for s in systems)
        self.largest = max(float(w.max()) for w in self.weights)
        self.rows = cache(
            lambda dtype: [(w / self.largest * s.V).to(dtype) for s, w in zip(systems, self.weights, strict=True)]
        )

    def residual(self, a: Tensor) -> list[Tensor]:
        a = a.flatten(1)
        return [(w * s.misfit(a[s.channels])).T for s, w in zip(self.systems, self.weights, strict=True)]

    def push(self, t: Tensor) -> list[Tensor]:
        rows, t = self.rows(t.dtype), t.flatten(-2)
        return [t[..., s.channels, :] @ V.T * self.largest for s, V in zip(self.systems, rows, strict=True)]

    def pull(self, r: Sequence[Tensor]) -> Tensor:
        rows = self.rows(r[0].dtype)
        return self.largest * torch.cat([one @ V for V, one in zip(rows, r, strict=True)]).reshape(self.shape)


class Values:
    """What is known of a whole value: (a − value)/max(spread, spread_cap)."""

    def __init__(self, name: str, value: Tensor, spread: Tensor):
        self.name, self.value, self.spread, self.size = name, value, spread, value.numel()
        ordered = spread.flatten().sort().values
        self.weight = 1 / spread.clamp(min=float(ordered[int((1 - CAP) * (len(ordered) - 1))]))
        self.largest = float(self.weight.max())

    def residual(self, a: Tensor) -> list[Tensor]:
        return [self.weight * (a - self.value)]

    def push(self, t: Tensor) -> list[Tensor]:
        return [self.weight.to(t.dtype) * t]

    def pull(self, r: Sequence[Tensor]) -> Tensor:
        return self.weight.to(r[0].dtype) * r[0]


Report = Callable[[Tensor, float, int, int], None]


class Found(NamedTuple):
    """x: (C, H, W). loss: ‖r‖² in units of the noise. steps: taken; products: with J or Jᵀ."""

    x: Tensor
    loss: float
    steps: int
    products: int


class Features:
    """r(x): the network's activations at x minus what is known of them, times `unit`, which brings it to order one."""

    def __init__(self, graph: Graph, known: Sequence[Known]):
        self.graph, self.known = graph, known
        self.unit = 1 / max(k.largest for k in known)
        self.size = sum(k.size for k in known)
        self.names = [k.name for k in known]
        self.deepest = [n.name for n in graph.needed(self.names)][-1]

    def at(self, x: Tensor) -> tuple[dict[str, Tensor], list[list[Tensor]]]:
        """All values at x, and r."""
        values = self.graph.values(x, self.deepest)
        return values, [self._scaled(k.residual(values[k.name])) for k in self.known]

    def push(self, tangent: Tangent, t: Tensor) -> list[list[Tensor]]:
        """∂r/∂x · t, for t of x's shape or a stack of them."""
        moved = tangent(t)
        return [self._scaled(k.push(moved[k.name])) for k in self.known]

    def pull(self, tangent: Tangent, r: list[list[Tensor]]) -> Tensor:
        """(∂r/∂x)ᵀ r."""
        covectors: dict[str, Tensor] = {}
        for k, parts in zip(self.known, r, strict=True):
            back = k.pull(self._scaled(parts))
            covectors[k.name] = covectors[k.name] + back if k.name in covectors else back
        return tangent.transpose(covectors)

    def _scaled(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [part * self.unit for part in parts]


def squares(r: list[list[Tensor]]) -> float:
    return sum(float(p.square().sum()) for parts in r for p in parts)


def solve(
    features: Features,
    x: Tensor,
    steps: int,
    goal: float,
    report: Report = lambda *_: None,
    progress: bool | str = False,
    dtype: torch.dtype = torch.float32,
) -> Found:
    """Levenberg–Marquardt on ‖r(x)‖², steps by conjugate gradients in `dtype`, residuals in float64.

    Once no unit changes its side the network is linear, and every step gains as many digits as its system is solved to.
    The objective of a network with kinks often falls by more than the step's own model predicts; such a step is taken
    twice as far where that is better still. report: called with x, ‖r‖², steps and products after each. Stops at
    ‖r‖² ≤ goal, or where nothing is left to gain.
    """
    values, r = features.at(x)
    loss, mu, products, forcing, step = squares(r), 0.0, 0, FORCING, 0
    unit = features.unit**2
    with bar(total=steps, description="features", shown=progress) as shown:
        while step < steps and loss > goal * unit:
            tangent = Tangent(features.graph, features.names, values, dtype=dtype)
            size = math.sqrt(loss)
            b = -features.pull(tangent, [[(p / size).to(dtype) for p in parts] for parts in r])
            if not b.any():
                break
            mu = mu or MU * squares(features.push(tangent, b)) / float(b.square().sum())
            while True:
                s, inner = conjugate(features, tangent, b, mu, forcing)
                products += 2 * inner + 2
                predicted = 2 * float((b * s).sum()) - squares(features.push(tangent, s))
                candidate = x + size * s.double()
                new_values, new_r = features.at(candidate)
                gain = (1 - squares(new_r) / loss) / predicted if predicted > 0 else -1.0
                if gain > GAIN:
                    break
                mu *= 10
                if mu > MAX_MU:
                    return Found(x, loss / unit, step, products)
            if gain > FURTHER:
                further = x + 2 * size * s.double()
                far_values, far_r = features.at(further)
                if squares(far_r) < squares(new_r):
                    candidate, new_values, new_r = further, far_values, far_r
            new = squares(new_r)
            mu = mu * max(0.1, 1 - (2 * gain - 1) ** 3) if gain > 0.25 else mu * 4
            done = 1 - new / loss < FLAT and gain > 0.5 and forcing < FINE
            forcing = min(FORCING, max(LEAST_FORCING, 0.5 * (new / loss) ** 0.75)) if abs(1 - gain) < 0.5 else FORCING
            x, values, r, loss, step = candidate, new_values, new_r, new, step + 1
            report(x, loss / unit, step, products)
            shown.update()
            shown.set_postfix_str(f"misfit {loss / unit / features.size:.1e} of the noise")
            if done:
                break
    return Found(x, loss / unit, step, products)


def sample(features: Features, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random error of the solution x, (AᵀA)⁻¹Aᵀw with A = ∂r/∂x and w ~ N(0, I) in units of the noise: how large an
    error the features leave, (C, H, W)."""
    generator = torch.Generator().manual_seed(0)
    values, r = features.at(x)
    tangent = Tangent(features.graph, features.names, values, dtype=dtype)
    w = [[torch.randn(part.shape, generator=generator, dtype=dtype) * features.unit for part in parts] for parts in r]
    return conjugate(features, tangent, features.pull(tangent, w), 0.0, FINE)[0].double()


def conjugate(features: Features, tangent: Tangent, b: Tensor, mu: float, forcing: float) -> tuple[Tensor, int]:
    """s with ‖(AᵀA + μ) s − b‖ ≤ forcing ‖b‖."""
    s, res, p = torch.zeros_like(b), b.clone(), b.clone()
    rs = first = float(res.square().sum())
    count = 0
    while count < INNER:
        count += 1
        q = features.pull(tangent, features.push(tangent, p)) + mu * p
        alpha = rs / float((p * q).sum())
        s, res = s + alpha * p, res - alpha * q
        new = float(res.square().sum())
        if new <= forcing**2 * first:
            break
        p, rs = res + new / rs * p, new
    return s, count
