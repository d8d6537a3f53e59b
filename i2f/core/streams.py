"""Random streams by name: two draws with the same seed and different purposes share nothing."""

import hashlib
import operator

import torch


def generator(name: str, seed: int | None) -> torch.Generator | None:
    """A CPU generator for the purpose `name` ("gaussian", "start", …); None, PyTorch's global one, without a seed.

    Its state is the SHA-256 of name and seed. Were the seed used as it is, an attack started with the seed of a noise
    draw would begin at that very draw.

    Raises: TypeError for a seed that is no integer.
    """
    if seed is None:
        return None
    try:
        number = operator.index(seed)  # NumPy's integers too
    except TypeError:
        raise TypeError(f"seed is {type(seed).__name__}; give an integer") from None
    digest = hashlib.sha256(f"{name}:{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
