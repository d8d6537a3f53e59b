"""Short texts, bundled, and scores of a recovered text."""

import csv
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from i2f.core import checks
from i2f.text.extras import extra

FOLDER = checks.BUNDLE
LABELS = ("entailment", "not_entailment")  # of RTE, in its order: labels 0 and 1
FILE, CHECKSUM = "entailment.tsv", "3731af1e05bbe9ef78ac6d087d91f4836c6b2e1aa79691191f8f9d249e16cdfb"
ROUGE = ("rouge1", "rouge2", "rougeL")
GLUE = {"test": "dev.tsv", "train": "train.tsv"}  # GLUE's own test file has no labels


def load(
    n: int | None = None, offset: int = 0, split: str = "test", root: str | Path | None = None
) -> tuple[list[tuple[str, str]], Tensor]:
    """Pairs of sentences, and whether the first entails the second: 0 entailment, 1 not_entailment.

    Args:
        n, offset: as in `data.load`. split: of GLUE: "train", or "test", which is its dev.tsv.
        root: a folder with GLUE's RTE files (train.tsv, dev.tsv), or with a folder RTE of them; None: the bundle, 64
            pairs of at most 16 word pieces, written for this project, half of them entailed.

    Returns: n pairs; labels (n,) int64.

    Raises: ValueError for a range outside the set, an unknown label or an empty sentence; FileNotFoundError, OSError.
    """
    checks.one_of("split", split, GLUE)
    path = checks.verified(FOLDER / FILE, CHECKSUM) if root is None else _glue(Path(root), GLUE[split])
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if rows and not {"sentence1", "sentence2", "label"} <= rows[0].keys():
        raise ValueError(f"{path} has the columns {', '.join(rows[0])}; RTE's are index, sentence1, sentence2, label")
    n = len(rows) - offset if n is None else n
    if offset < 0 or n < 1 or offset + n > len(rows):
        more = "" if root else "; GLUE's own are read with root="
        raise ValueError(f"n={n} texts from offset={offset} are not there: {path.name} has {len(rows)}{more}")
    chosen = rows[offset : offset + n]
    labels = [LABELS.index(checks.one_of("label", row["label"], LABELS)) for row in chosen]
    pairs = [(row["sentence1"], row["sentence2"]) for row in chosen]
    if empty := [place for place, pair in enumerate(pairs, offset) if not all(half and half.strip() for half in pair)]:
        raise ValueError(f"{path.name}: text {empty[0]} has an empty sentence")
    return pairs, torch.tensor(labels)


def verify(folder: Path | None = None) -> None:
    """Compares the bundled texts with their checksum. Raises: FileNotFoundError or OSError."""
    checks.verified((folder or FOLDER) / FILE, CHECKSUM)


def _glue(root: Path, name: str) -> Path:
    for path in (root / name, root / "RTE" / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"root={str(root)!r} holds no {name} and no RTE/{name}: GLUE's RTE task has these files")


def accuracy(found: Sequence[int], truth: Sequence[int], special: Sequence[int] = ()) -> float:
    """The share of tokens found at their places, without the places whose true token is one of `special`.

    Raises: ValueError for different lengths, or where no place counts.
    """
    if len(found) != len(truth):
        raise ValueError(f"found has {len(found)} tokens and truth {len(truth)}: both need the same length")
    places = [(f, t) for f, t in zip(found, truth, strict=True) if t not in set(special)]
    if not places:
        raise ValueError("truth has no token that counts: there is nothing to find")
    return sum(f == t for f, t in places) / len(places)


def overlap(found: str, truth: str) -> dict[str, float]:
    """rouge1, rouge2, rougeL: F-measures of the shared words, word pairs and longest subsequence (Lin 2004), by
    `rouge-score`; bleu: of the sentence, smoothed exponentially, by `sacrebleu` (Post 2018). All in [0, 1].

    Raises: ValueError for an empty truth; ModuleNotFoundError without the extra `text`.
    """
    if not truth.strip():
        raise ValueError("truth is empty: there is nothing to find")
    scores = _rouge().score(truth, found)
    bleu = extra("sacrebleu").sentence_bleu(found, [truth]).score / 100
    return {**{name: float(scores[name].fmeasure) for name in ROUGE}, "bleu": min(bleu, 1.0)}


@lru_cache(maxsize=1)
def _rouge() -> Any:
    return extra("rouge_score.rouge_scorer").RougeScorer(list(ROUGE))
