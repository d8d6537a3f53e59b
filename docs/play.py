"""The page to play with: the gallery's published rows and pictures, inline, so that it works from a file."""

import base64
import html
import io
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from i2f.paper import data, pipeline, rows
from i2f.paper.experiments import gallery
from i2f.paper.figures.style import DATASETS
from i2f.paper.results import Results
from i2f.paper.sweep import Settings

PANELS = {"private": "private image", "predicted": "predicted by I²F", "recovered": "recovered by the attack"}


def published() -> Results:
    """The gallery's rows, which are read and never solved.

    Raises: LookupError where they are not published.
    """
    config = pipeline.runs()["gallery"]["parameters"]
    store = rows.Store([pipeline.RESULTS / "gallery"], solve=False)
    return gallery.run(gallery.problems(config), Settings(jobs=1, progress="off", store=store))


def page(found: Results) -> str:
    """The form, the three pictures, and the rows as JSON; docs/static/play.js serves them."""
    table = found.tables["problems"].reset_index(drop=True)
    networks: dict[str, Any] = {}
    for k, row in enumerate(table.itertuples()):
        network = networks.setdefault(row.network, {"name": _words(row.network), "images": {}})
        image = network["images"].setdefault(str(row.image), _private(row) | {"levels": []})
        image["levels"].append(
            {
                "variance": f"{row.variance:g}",
                "expected": f"{row.predicted_rmse:.2g}",
                "measured": f"{row.rmse:.2g}" if np.isfinite(row.rmse) else "none",
                "converged": bool(row.converged),
                **{name: png(found.arrays[name][k]) for name in gallery.PICTURES},
            }
        )
    names = {html.escape(key): html.escape(network["name"]) for key, network in networks.items()}
    options = "".join(f"<option value='{key}'>{name}</option>" for key, name in names.items())
    panels = "".join(
        f"<figure><img id='play-{name}' alt=''><figcaption>{words}<br><output id='play-{name}-error'></output>"
        "</figcaption></figure>"
        for name, words in PANELS.items()
    )
    rows_ = json.dumps(networks, separators=(",", ":")).replace("</", "<\\/")
    return (
        f"<form class='play'><p><label>Network <select name='network'>{options}</select></label></p>"
        "<fieldset class='play-images'><legend>Private image</legend></fieldset>"
        "<p><label>Noise <input type='range' name='level' min='0' step='1'></label> "
        "<output id='play-variance'></output></p>"
        f"<div class='play-panels'>{panels}</div><p id='play-note' role='status'></p></form>"
        f"<script type='application/json' id='play-rows'>{rows_}</script>"
    )


def _private(row: Any) -> dict[str, str]:
    x, y = data.load(row.dataset, 1, int(row.image), split=row.split)
    words = f"{'a' if row.dataset == 'mnist' else 'class'} {int(y)}"
    return {"label": words, "private": png(gallery.shades(x))}


def _words(network: str) -> str:
    dataset, *rest = network.split()
    return f"{DATASETS.get(dataset, dataset)}, {' '.join(rest)}"


def png(image: NDArray[np.uint8]) -> str:
    """An image (C, H, W), 0 to 255, as a PNG in a data URI."""
    file = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
