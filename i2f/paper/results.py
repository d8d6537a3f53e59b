"""What a run of an experiment found."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd
from numpy.typing import NDArray

Config = Mapping[str, Any]  # an experiment's parameters, by name: those of its notebook
Tables = dict[str, pd.DataFrame]
Arrays = dict[str, NDArray[Any]]


class Results(NamedTuple):
    """tables: what is judged and drawn. arrays: what figures also draw."""

    tables: Tables
    arrays: Arrays = {}  # noqa: RUF012 - never changed
