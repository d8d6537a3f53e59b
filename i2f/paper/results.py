"""What a run of an experiment found, and the files that hold it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from i2f.paper import claims
from i2f.paper.claims import Claim

Config = Mapping[str, Any]  # an experiment's parameters, by name
Tables = dict[str, pd.DataFrame]  # by the name of their file
Arrays = dict[str, NDArray[Any] | dict[str, NDArray[Any]]]  # pictures and spectra, by the name of their file


class Results(NamedTuple):
    """tables: what is judged and published. arrays: what figures also draw; one array, or several by name."""

    tables: Tables
    arrays: Arrays = {}  # noqa: RUF012 - never changed


def save(out: str | Path, results: Results, found: Sequence[Claim], digits: int = 6) -> None:
    """Write a run into the folder `out`: NAME.csv with so many digits, NAME.npy or NAME.npz, claims.json. An empty
    `out` writes nothing: the notebook is only read."""
    if not out:
        return
    folder = Path(out)
    for name, table in results.tables.items():
        table.to_csv(folder / f"{name}.csv", index=False, float_format=f"%.{digits}g")
    for name, array in results.arrays.items():
        if isinstance(array, dict):
            named: Any = array  # by names that the stubs cannot tell from an option
            np.savez(folder / f"{name}.npz", **named)
        else:
            np.save(folder / f"{name}.npy", array)
    claims.save(found, folder / "claims.json")
