"""One progress bar for everything long; I2F_PROGRESS=0 turns all of them off (tests, stored notebooks)."""

import os
from typing import Any

from tqdm.auto import tqdm


def bar(total: int | None = None, description: str = "", shown: bool = True, **options: Any) -> tqdm:
    """A tqdm bar for a terminal or a notebook; it leaves nothing behind when it is done."""
    hidden = not shown or os.environ.get("I2F_PROGRESS") == "0"
    return tqdm(total=total, desc=description, disable=hidden, leave=False, **options)
