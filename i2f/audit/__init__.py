"""Before a gradient leaves: what it gives away, under which defence, as numbers and as a report."""

from i2f.attacks.prior import TAU
from i2f.audit.samples import Audit, Sample, audit, clamped_square, variance_for

__all__ = ["TAU", "Audit", "Sample", "audit", "clamped_square", "variance_for"]
