"""Random streams by name: two draws with the same seed and different purposes share nothing."""

import hashlib

import torch

from i2f.core import checks


def generator(name: str, seed: int | None) -> torch.Generator | None:
    """A CPU generator for the purpose `name` ("gaussian", "start", …); None, PyTorch's global one, without a seed.

    Its state is the SHA-256 of name and seed: with the seed alone, an attack that starts with the seed of a noise draw
    would begin at that very draw.

    Raises: TypeError for a seed that is no integer.
    """
    if seed is None:
        return None
    digest = hashlib.sha256(f"{name}:{checks.whole('seed', seed)}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
