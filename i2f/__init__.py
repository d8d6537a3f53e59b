"""How much does a gradient give away?

The reproducible companion to *Understanding Deep Gradient Leakage via Inversion Influence Functions*
(Zhang, Hong, Deng, Mahdavi, Zhou; NeurIPS 2023). Importing it is cheap: each name below loads its module
(and PyTorch) when it is first used.
"""

from importlib import import_module
from typing import Any

__version__ = "1.0.0rc1"

_NAMES = {  # public name -> where it is
    "GradientJacobian": "core.jacobian:GradientJacobian",
    "LocalSteps": "core.message:LocalSteps",
    "flatten_gradient": "core.gradient:flatten_gradient",
    "influence": "core.influence:influence",
    "lower_bound": "core.influence:lower_bound",
    "invert": "attacks:invert",
    "invert_many": "attacks:invert_many",
    "metrics": "core.metrics",
    "perturb": "core.perturb",
    "spectrum": "core.spectrum",
    "streams": "core.streams",
    "trace": "core.trace",
    "memory": "core.memory",
    "attacks": "attacks",
    "audit": "audit",
    "defense": "audit.defense",
    "text": "text",
    "language": "text.language",
    "claims": "paper.claims",
    "data": "paper.data",
    "devices": "paper.devices",
    "figures": "paper.figures",
    "ledger": "paper.ledger",
    "models": "paper.models",
    "pipeline": "paper.pipeline",
    "results": "paper.results",
    "rows": "paper.rows",
    "statistics": "paper.statistics",
    "sweep": "paper.sweep",
    "verify": "paper.verify",
}
__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'i2f' has no attribute {name!r}")
    module, _, attribute = _NAMES[name].partition(":")
    found = import_module(f"i2f.{module}")
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
