"""Texts: transformers as functions of their embeddings, tokens read off a gradient, bundled texts and their scores."""

from i2f.text.corpus import FILE, ROUGE, accuracy, load, overlap, verify
from i2f.text.extras import extra

__all__ = ["FILE", "ROUGE", "accuracy", "extra", "load", "overlap", "verify"]
