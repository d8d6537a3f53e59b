"""Before a gradient leaves: what it gives away, under which defence, as numbers and as a report."""

from i2f.audit.samples import SPREAD, Audit, Sample, audit, clamped_square, variance_for

__all__ = ["SPREAD", "Audit", "Sample", "audit", "clamped_square", "variance_for"]
