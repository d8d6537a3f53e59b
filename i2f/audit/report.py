"""An audit as one HTML file: no script, nothing loaded from elsewhere, pictures inside."""

import base64
import io
import math
from html import escape

import numpy as np
from torch import Tensor

from i2f.audit.samples import LEVELS, Audit, Sample
from i2f.core.metrics import UNIT

STYLE = """
body { font: 15px/1.45 system-ui, "DejaVu Sans", sans-serif; color: #222; background: #fff; margin: 2rem auto;
       max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin-top: 2rem }
p.note { color: #555; max-width: 52rem } table { border-collapse: collapse; margin: .6rem 0 }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid #ddd } th:first-child, td:first-child,
td.words { text-align: left } .sample { display: flex; gap: 1.2rem; border-top: 1px solid #ccc; padding: 1rem 0;
align-items: flex-start; flex-wrap: wrap } figure { margin: 0; text-align: center; font-size: .8rem; color: #555 }
figure img { width: 112px; height: 112px; image-rendering: pixelated; border: 1px solid #bbb; display: block }
.words { max-width: 34rem } .bad { color: #b34700; font-weight: 600 } .mid { color: #8a6d00; font-weight: 600 }
.unknown { color: #555; font-weight: 600 } ul { margin: .3rem 0 0 1.1rem; padding: 0; color: #555; font-size: .87rem }
"""
PICTURED = 64  # samples shown with pictures; the table has all


def page(audit: Audit, title: str) -> str:
    """The whole file."""
    samples = audit.samples
    shown = samples[:PICTURED]
    more = f"<p class=note>Pictures of the first {PICTURED} of {len(samples)}.</p>" if len(samples) > PICTURED else ""
    how = "one gradient of all of them" if audit.together else "each alone"
    exact = "the whole spectrum of J Jᵀ" if audit.exact else "products with J alone: bounds, no exact prediction"
    unit = ", for pixels in [0, 1]" if audit.range == UNIT else ", in units of the range that inputs can have"
    worst = min(samples, key=lambda s: -1.0 if math.isnan(s.judged) else s.judged)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p>{len(samples)} sample{"s" * (len(samples) != 1)}, {how}; defence <b>{escape(audit.defense)}</b>; {exact};
{audit.d_theta:,} parameters.
Least protected: sample {worst.index}, {_number(worst.judged)} ({escape(worst.verdict)}).</p>
<p class=note>Errors are root mean squares per entry of the input{unit}. <b>Judged</b> is the smallest
error of the attackers listed, to first order, and under noise an expectation: one draw may leave less. It is no proof
that no other attacker does better, and nothing here means "safe". The second picture is the reconstruction that is
predicted for one draw of the defence, clamped: of a perfect attacker without bounds, or, where J Jᵀ was not formed, of
one with a prior.</p>
{_spectra(samples)}
<h2>Samples</h2>{more}
{"".join(_sample(s) for s in shown)}
<h2>All numbers</h2>
{_table(samples, audit.target_psnr)}
<p class=note>predicted: an attacker without bounds (I²F). box: one who knows the range of the input. prior: one who
expects pixels of some deviation (the linear Bayes error). mask: one who reads the mask off a pruned gradient. bound:
I_lb, for attackers without range and prior. needed: the variance of isotropic Gaussian noise at which the judged error
has a PSNR of {audit.target_psnr:g} dB; ∞: no such noise reaches it; –: not found.</p>
</body></html>
"""


def _sample(s: Sample) -> str:
    pictures = [("private", s.image), ("predicted", s.drawn), ("attack", s.recovered)]
    figures = "".join(
        f'<figure><img src="{source}" alt="{words}"><figcaption>{words}</figcaption></figure>'
        for words, picture in pictures
        if (source := _picture(picture))
    )
    label = {True: "read off the gradient", False: "not read", None: "cannot be read off this network"}[s.label]
    attacked = ""
    if s.attacked is not None:
        attacked = (f"<br>real attack: RMSE {_number(s.attacked)} "
                    f"({escape(s.attacked_reason)})")  # fmt: skip
    rank = "" if s.rank is None else f", rank {s.rank} of J Jᵀ"
    reservations = "".join(f"<li>{escape(words)}</li>" for words in s.reservations)
    return f"""<div class=sample>{figures}<div class=words><b>Sample {s.index}</b>, label {escape(str(s.y))}: {label}
<br><span class="{_tone(s)}">{escape(s.verdict)}</span>:
judged RMSE {_number(s.judged)}, {_number(s.psnr)} dB{rank}{attacked}
<ul>{reservations}</ul></div></div>
"""


def _tone(s: Sample) -> str:
    if math.isnan(s.judged):
        return "unknown"
    return "bad" if s.judged <= LEVELS[0][0] else "mid" if s.judged <= LEVELS[1][0] else "unknown"


def _table(samples: list[Sample], target: float) -> str:
    names = {
        "judged": "judged", "predicted": "predicted", "boxed": "box", "prior": "prior", "masked": "mask",
        "bound": "bound", "psnr": "PSNR, dB", "needed": f"needed, {target:g} dB", "gradient_norm": "‖g‖",
        "lambda_max": "λ_max", "lambda_min": "λ_min", "attacked": "attack",
    }  # fmt: skip
    names = {k: v for k, v in names.items() if any(getattr(s, k) is not None for s in samples)}
    head = "".join(f"<th>{escape(name)}</th>" for name in ("sample", *names.values()))
    rows = "".join(
        f"<tr><td>{s.index}</td>{''.join(f'<td>{_number(getattr(s, k))}</td>' for k in names)}</tr>" for s in samples
    )
    return f"<table><tr>{head}</tr>{rows}</table>"


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else f"{value:.3g}"


def _picture(x: Tensor | None) -> str:
    """An image (1 or 3 channels) as a PNG in a data address; "" for what is no image."""
    from PIL import Image

    if x is None or x.ndim != 3 or x.shape[0] not in (1, 3):
        return ""
    pixels = (x.clamp(0, 1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _spectra(samples: list[Sample]) -> str:
    """The spectra as a line each, in an SVG of their own; nothing where there are none."""
    if not any(s.spectrum for s in samples):
        return ""
    import matplotlib.pyplot as plt

    from i2f.audit import figure as draw

    file = io.StringIO()
    figure = draw.spectra([s.spectrum for s in samples if s.spectrum])
    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
    drawing = file.getvalue()
    return f"<h2>How sharply the gradient shows each direction</h2>{drawing[drawing.index('<svg') :]}"
