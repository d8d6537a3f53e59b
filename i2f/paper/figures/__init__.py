"""Figures: one style, one module per experiment, one function per figure. They know tables, never models.

An experiment's module has `published(found, config)`: the figures of a run by file name, drawn from what its experiment
found (`results.Results`) and from the run's parameters.
"""

from i2f.paper.figures.style import save
from i2f.paper.figures.summary import summary

__all__ = ["save", "summary"]
