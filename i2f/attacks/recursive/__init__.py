"""Recursive gradient attack: a ReLU network inverted from its last layer to its first."""

from i2f.attacks.recursive.method import recursive

__all__ = ["recursive"]
