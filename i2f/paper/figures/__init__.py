"""Figures: one style, one module per experiment, one function per figure. They know tables, never models.

An experiment's module has `published(run)`: the figures that its results folder holds, drawn from a run's tables.
"""

from i2f.paper.figures.style import save

__all__ = ["save"]
