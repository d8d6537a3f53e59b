"""The packages of the extra `text`, loaded where they are used."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


def extra(module: str) -> Any:
    """A module that the extra `text` brings.

    Raises: ModuleNotFoundError, with the command that installs it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"texts need the package of {module}, which is not installed ({error}): pip install 'i2f[text]'"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """`transformers` without its loading reports and progress bars; a newly drawn head is intended here."""
    log = extra("transformers").logging
    before = log.get_verbosity()
    shown = log.is_progress_bar_enabled() if hasattr(log, "is_progress_bar_enabled") else True
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if shown:
            log.enable_progress_bar()
