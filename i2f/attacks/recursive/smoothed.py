"""Gauss-Newton through kinks: the residual is exact, the derivative that of smoothed ReLUs."""

import torch
from torch import Tensor

from i2f.attacks.recursive.features import Features, Found, Report, squares
from i2f.attacks.recursive.linearised import LARGEST
from i2f.attacks.recursive.tangent import Tangent

WIDTHS = (0.0, 0.01, 0.03, 0.1)  # of the transition, in deviations of a layer's pre-activations
DAMPINGS = (1e-1, 1e-3, 1e-5)  # in units of the largest curvature
FRACTIONS = (1.0, 0.3)  # of a step
ENOUGH = 1 - 1e-4  # a step must bring the misfit below this share
STEPS = 30


def refine(features: Features, x: Tensor, goal: float, report: Report = lambda *_: None) -> Found:
    """Steps with each width, damping and fraction; of these, the one with the smallest ‖r‖² is taken.

    A closed unit has no derivative, and so no way to open: where that stalls `features.solve`, a ReLU's derivative
    Φ(u/s) lets units that are nearly open answer. The choice by the exact residual is sound because features are
    continuous in x. For images of up to `LARGEST` pixels, whose derivative is formed.
    """
    one, unit = torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape), features.unit**2
    values, r = features.at(x)
    loss, step = squares(r), 0
    while loss > goal * unit and step < STEPS and x.numel() <= LARGEST:
        flat = torch.cat([part.flatten() for parts in r for part in parts])
        tried = []
        for width in WIDTHS:
            tangent = Tangent(features.graph, features.names, values, gates(features, values, width))
            J = torch.cat([part.flatten(1) for parts in features.push(tangent, one) for part in parts], 1)
            curvature, Q = torch.linalg.eigh(J @ J.T)
            slope = Q.T @ (J @ flat)
            for damping in DAMPINGS:
                s = -(Q @ (slope / (curvature + damping * curvature[-1]))).reshape(x.shape)
                tried += [(squares(features.at(x + f * s)[1]), x + f * s) for f in FRACTIONS]
        best, there = min(tried, key=lambda t: t[0])
        if not best <= ENOUGH * loss:
            break
        x, loss, step = there, best, step + 1
        values, r = features.at(x)
        report(x, loss / unit, step, step * len(WIDTHS) * x.numel())
    return Found(x, loss / unit, step, step * len(WIDTHS) * x.numel())


def gates(features: Features, values: dict[str, Tensor], width: float) -> dict[str, Tensor]:
    """Φ(u/s) for each ReLU, s = width · the deviation of its pre-activations; for width 0 the ReLU's own derivative."""
    found = {}
    for node in features.graph.needed(features.names):
        if node.kind == "relu" and width:
            u = values[node.inputs[0]]
            found[node.name] = node.slope + (1 - node.slope) * torch.special.ndtr(u / (width * float(u.std()) or 1.0))
    return found
