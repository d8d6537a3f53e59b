"""Transformers of texts: the model as a function of its embeddings, networks by name, texts as tokens."""

from i2f.text.model import LanguageModel, embedding_gradient, next_token
from i2f.text.names import NAMES, SIZES
from i2f.text.networks import TASKS, build
from i2f.text.tokenizer import decode, encode, tokenizer

__all__ = [
    "NAMES",
    "SIZES",
    "TASKS",
    "LanguageModel",
    "build",
    "decode",
    "embedding_gradient",
    "encode",
    "next_token",
    "tokenizer",
]
