"""Before a gradient leaves: what it gives away, under which defence, as numbers and as a report."""

from i2f.attacks.prior import TAU
from i2f.audit.attackers import clamped_square
from i2f.audit.defense import Defense
from i2f.audit.examine import audit
from i2f.audit.needed import variance_for
from i2f.audit.result import Audit
from i2f.audit.sample import LEVELS, Sample

__all__ = ["LEVELS", "TAU", "Audit", "Defense", "Sample", "audit", "clamped_square", "variance_for"]
