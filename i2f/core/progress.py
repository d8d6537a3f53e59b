"""One progress bar for everything long."""

from collections.abc import Iterable
from typing import Any

import tqdm.auto
import tqdm.std


def bar(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    description: str = "",
    shown: bool | str = True,
    **options: Any,
) -> "tqdm.std.tqdm[Any]":  # quoted: the class takes no parameters at run time
    """A tqdm bar that leaves nothing behind when it is done.

    Args: shown: "off" or False; "text", a line that a log can hold, every five seconds; "auto" or True, a widget in a
        notebook and a line elsewhere. options: of tqdm.
    """
    text = shown == "text"
    kind: Any = tqdm.std.tqdm if text else tqdm.auto.tqdm
    options |= {"mininterval": 5.0} if text else {}
    made: tqdm.std.tqdm[Any] = kind(
        iterable, total=total, desc=description, disable=shown in (False, "off"), leave=False, **options
    )
    return made
