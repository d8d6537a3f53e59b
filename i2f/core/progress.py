"""One progress bar for everything long."""

import os
from typing import Any

import tqdm.auto
import tqdm.std


def bar(
    iterable: Any = None, *, total: int | None = None, description: str = "", shown: bool = True, **options: Any
) -> tqdm.std.tqdm:
    """A tqdm bar for a terminal or a notebook; it leaves nothing behind when it is done.

    The environment variable I2F_PROGRESS chooses for the whole process: "off" (tests, stored notebooks), "text" (a
    line that a log can hold, also in a notebook), anything else for what fits.
    """
    choice = os.environ.get("I2F_PROGRESS", "")
    kind = tqdm.std.tqdm if choice == "text" else tqdm.auto.tqdm
    interval = {"mininterval": 5.0} if choice == "text" else {}
    hidden = not shown or choice == "off"
    return kind(iterable, total=total, desc=description, disable=hidden, leave=False, **interval, **options)
