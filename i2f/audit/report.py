"""An audit as one HTML file: no script, nothing loaded from elsewhere, pictures inside."""

import base64
import io
import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from i2f.audit.sample import LEVELS, Sample
from i2f.core.message import LocalSteps
from i2f.core.metrics import UNIT

PICTURED = 64  # samples shown with pictures; the table has all
COLUMNS = {  # attribute of a sample -> its name in the table
    "judged": "judged",
    "predicted": "predicted",
    "boxed": "box",
    "prior": "prior",
    "masked": "mask",
    "bound": "bound",
    "psnr": "PSNR, dB",
    "needed": "needed",
    "gradient_norm": "‖g‖",
    "lambda_max": "λ_max",
    "lambda_min": "λ_min",
    "attacked": "attack",
}
LABELS = {True: "read off the gradient", False: "not read", None: "cannot be read off this network"}


class Audited(Protocol):
    """What a report shows of an `Audit`."""

    @property
    def samples(self) -> list[Sample]: ...
    @property
    def defense(self) -> str: ...
    @property
    def target_psnr(self) -> float: ...
    @property
    def together(self) -> bool: ...
    @property
    def exact(self) -> bool: ...
    @property
    def d_theta(self) -> int: ...
    @property
    def range(self) -> tuple[Any, Any]: ...
    @property
    def message(self) -> LocalSteps | None: ...


def page(audit: Audited, title: str) -> str:
    """The whole file."""
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"number": _number, "picture": _picture, "tone": _tone}
    samples = audit.samples
    columns = COLUMNS | {"needed": f"needed, {audit.target_psnr:g} dB"}
    columns = {k: v for k, v in columns.items() if any(getattr(s, k) is not None for s in samples)}
    return environment.get_template("report.html.j2").render(
        audit=audit,
        title=title,
        columns=columns,
        labels=LABELS,
        limit=PICTURED,
        unit_pixels=audit.range == UNIT,
        spectra=_spectra(samples),
        worst=min(samples, key=lambda s: -1.0 if math.isnan(s.judged) else s.judged),
    )


def _tone(sample: Sample) -> str:
    """The style of a verdict."""
    if math.isnan(sample.judged):
        return "unknown"
    return "bad" if sample.judged <= LEVELS[0][0] else "mid" if sample.judged <= LEVELS[1][0] else "unknown"


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else f"{value:.3g}"


def _picture(x: Tensor | None) -> str:
    """An image of 1 or 3 channels as a PNG in a data address; empty for what is not an image."""
    if x is None or x.ndim != 3 or x.shape[0] not in (1, 3):
        return ""
    pixels = (x.clamp(0, 1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _spectra(samples: list[Sample]) -> Markup:
    """The spectra as an SVG, one line per sample; empty where none was computed."""
    spectra = [s.spectrum for s in samples if s.spectrum]
    if not spectra:
        return Markup()
    from i2f.audit import figure  # Matplotlib and seaborn take a second to import, and an audit alone draws nothing

    drawing = figure.svg(figure.spectra(spectra))
    return Markup(drawing[drawing.index("<svg") :])
