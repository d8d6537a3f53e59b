"""What an audit returns: its samples and what was asked, as a table, as JSON, as a page."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from i2f.audit import report
from i2f.audit.sample import Sample
from i2f.core.brief import brief
from i2f.core.message import LocalSteps
from i2f.core.metrics import UNIT


@dataclass(frozen=True)
class Audit:
    """The samples, and what was asked of them.

    defense: as text. target_psnr: in dB. together: whether all samples share one gradient. exact: whether J Jᵀ was
    decomposed, or products with J alone were used. range: (low, high) of the inputs, numbers or nested lists. message:
    the local steps whose change is sent; None: one gradient.
    """

    samples: list[Sample]
    defense: str
    target_psnr: float
    together: bool
    exact: bool
    d_theta: int
    range: tuple[Any, Any] = UNIT
    message: LocalSteps | None = None

    __repr__ = brief

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    @property
    def beyond_first_order(self) -> int:
        """How many samples are judged by a first-order prediction that is unreliable, and by no attack."""
        return sum(sample.beyond_first_order for sample in self.samples)

    def table(self) -> pd.DataFrame:
        """One row per sample, without pictures and spectra."""
        rows = [sample.record() | {"reservations": "; ".join(sample.reservations)} for sample in self.samples]
        return pd.DataFrame(rows).drop(columns="spectrum")

    def json(self) -> str:
        """Everything but the pictures; numbers that are not finite become null."""
        record = {
            "defense": self.defense,
            "target_psnr": self.target_psnr,
            "together": self.together,
            "exact": self.exact,
            "d_theta": self.d_theta,
            "range": self.range,
            "message": None if self.message is None else asdict(self.message),
            "samples": [_finite(sample.record()) for sample in self.samples],
        }
        return json.dumps(record, indent=2, ensure_ascii=False) + "\n"

    def passes(self, min_rmse: float) -> bool:
        """Whether every sample's judged error is known and at least `min_rmse`."""
        return all(sample.judged >= min_rmse for sample in self.samples)

    def html(self, title: str = "What this gradient gives away") -> str:
        """One HTML file, pictures included, that loads nothing from elsewhere."""
        return report.page(self, title)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
