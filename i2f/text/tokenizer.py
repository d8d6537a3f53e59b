"""Texts as tokens, and back."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from i2f.text.extras import extra, quiet
from i2f.text.names import source


@lru_cache(maxsize=4)
def tokenizer(name: str) -> Any:
    """The `transformers` tokenizer of a network of `build`."""
    with quiet():
        return extra("transformers").AutoTokenizer.from_pretrained(source(name))


def encode(name: str, texts: Sequence[str | tuple[str, str]]) -> list[Tensor]:
    """Each text, or pair of texts, as its tokens, (1, length), with the tokenizer's special tokens and no padding.

    Raises: ValueError for an empty text.
    """
    words, found = tokenizer(name), []
    for text in texts:
        parts = (text,) if isinstance(text, str) else text
        if not all(part.strip() for part in parts):
            raise ValueError(f"text {text!r} is empty, or half of the pair is: there is nothing to encode")
        found.append(torch.tensor([words(*parts)["input_ids"]]))
    return found


def decode(name: str, tokens: Tensor) -> str:
    """The words of (length,) tokens, without the special tokens."""
    return str(tokenizer(name).decode(tokens.tolist(), skip_special_tokens=True))
