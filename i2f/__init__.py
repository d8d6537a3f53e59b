"""How much does a gradient give away?

The reproducible companion to *Understanding Deep Gradient Leakage via Inversion Influence Functions*
(Zhang, Hong, Deng, Mahdavi, Zhou; NeurIPS 2023). Importing it is cheap: each name below loads its module
(and PyTorch) when it is first used.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_MODULES = (
    "attacks", "batchnorm", "claims", "data", "devices", "figures", "language", "memory", "metrics", "models",
    "perturb", "pipeline", "spectrum", "streams", "sweep", "text", "trace",
)  # fmt: skip
_NAMES = {
    "GradientJacobian": "jacobian",
    "flatten_gradient": "gradient",
    "influence": "influence",
    "lower_bound": "influence",
    "invert": "attacks",
    "invert_many": "attacks",
}
__all__ = sorted([*_MODULES, *_NAMES])


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(f"i2f.{_NAMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"i2f.{name}")
    raise AttributeError(f"module 'i2f' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Package(ModuleType):
    """Keeps `i2f.influence` the function: Python would bind the submodule of that name over it when it loads.

    Pickles by name, as plain modules do for workers that get a script's or a notebook's own functions.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _NAMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __reduce__(self) -> tuple:
        return import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Package
