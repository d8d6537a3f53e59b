"""Recursive gradient attack: a ReLU network inverted from its last layer to its first."""

from i2f.attacks.recursive.forecast import Determined, forecast
from i2f.attacks.recursive.method import recursive
from i2f.attacks.recursive.systems import Layer

__all__ = ["Determined", "Layer", "forecast", "recursive"]
