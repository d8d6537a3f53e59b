"""The attackers of the experiments: what each knows, in words, how it is run, and how figures draw it."""

from dataclasses import dataclass, field
from typing import Any

from i2f.audit.colours import AMBER, BLUE, GREEN, PINK, SKY, VERMILION


@dataclass(frozen=True)
class Attacker:
    """knows: method, and what it is told, in words, for a claim. options: what runs it, in `problems.attack`'s words.

    In figures: label, told (what it knows apart from the model), colour, marker, line.
    """

    knows: str
    options: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    told: str = "label"
    colour: str = BLUE
    marker: str = "o"
    line: Any = "-"


ATTACKERS = {  # by the name in tables
    "gauss-newton": Attacker(
        "gauss-newton: knows model and label, no prior, random start",
        {"method": "gauss-newton", "box": False},
        "Gauss–Newton",
    ),
    "gauss-newton, box": Attacker(
        "gauss-newton with box: knows model, label and pixel range, random start",
        {"method": "gauss-newton", "box": True},
        "Gauss–Newton, box",
        "label, pixel range",
        SKY,
        "v",
    ),
    "dgl": Attacker(
        "dgl: Adam, knows model and label, no prior, random start",
        {"method": "dgl", "box": False},
        "DGL, Adam",
        colour=VERMILION,
        marker="X",
    ),
    "dlg": Attacker("dlg: knows the model alone", {"method": "dlg"}, "DLG, L-BFGS", "nothing else", GREEN, "s"),
    "idlg": Attacker(
        "idlg: knows the model alone", {"method": "idlg"}, "iDLG, Adam", "nothing else", AMBER, "D", (0, (4, 3))
    ),
    "gs": Attacker(
        "gs: Adam on the cosine, knows model, label and pixel range, random start",
        {"method": "gs", "box": True},
        "GS, cosine",
        "label, pixel range",
        PINK,
        "P",
    ),
    "no prior": Attacker("gauss-newton: knows model and label, no prior", {"method": "gauss-newton"}, "no prior"),
    "MAP": Attacker(
        "gauss-newton: knows model and label, the noise's variance, the pixels' mean and variance (MAP, ε = σ²/τ²)",
        {"method": "gauss-newton"},
        "MAP, ε = σ²/τ²",
        "label, mean and variance of pixels",
        GREEN,
        "s",
    ),
    "MAP, 0.1ε": Attacker(
        "gauss-newton: knows model and label, the pixels' mean (MAP, a tenth of σ²/τ²)",
        {"method": "gauss-newton"},
        "MAP, a tenth of σ²/τ²",
        "label, mean of pixels",
        SKY,
        "v",
    ),
    "MAP, 10ε": Attacker(
        "gauss-newton: knows model and label, the pixels' mean (MAP, ten times σ²/τ²)",
        {"method": "gauss-newton"},
        "MAP, ten times σ²/τ²",
        "label, mean of pixels",
        AMBER,
        "^",
    ),
    "MAP, ε = 1": Attacker(
        "gauss-newton: knows model and label, the pixels' mean (MAP, ε = 1)",
        {"method": "gauss-newton"},
        "MAP, ε = 1",
        "label, mean of pixels",
        PINK,
        "D",
    ),
    "Adam": Attacker(
        "dgl: knows model and label, starts from the pixels' mean, stops early",
        {"method": "dgl"},
        "Adam, stopped early",
        "label, mean of pixels",
        VERMILION,
        "X",
    ),
    "ignores": Attacker(
        "gauss-newton: knows model and label, takes the zeros for true, no prior",
        {"method": "gauss-newton", "mask": "none"},
        "ignores the mask",
    ),
    "ignores, Adam": Attacker(
        "dgl: knows model and label, takes the zeros for true, no prior",
        {"method": "dgl", "mask": "none"},
        "ignores the mask, Adam",
        colour=VERMILION,
        marker="X",
    ),
    "reads": Attacker(
        "gauss-newton: knows model and label, reads the mask from the zeros, no prior",
        {"method": "gauss-newton", "mask": "zeros"},
        "reads the mask",
        colour=GREEN,
        marker="s",
    ),
    "reading": Attacker(
        "tokens read off the first layers' gradients; needs no label",
        label="read",
        told="nothing else",
        line=(0, (4, 2)),
    ),
    "reading-shared": Attacker(
        "the same, among the tokens that the embedding's gradient names", label="read", told="the embedding's gradient"
    ),
    "gauss-newton, texts": Attacker(
        "Gauss–Newton from the tokens read; knows the label, which for the next token is the text read",
        {"method": "gauss-newton"},
        "refined",
    ),
    "gauss-newton-random": Attacker(
        "Gauss–Newton from a random start; knows the label", {"method": "gauss-newton"}, "Gauss–Newton, random start"
    ),
    "tag": Attacker(  # its own weight, and a rate a third of DGL's, as embeddings are a tenth of a pixel's size
        "Adam on ‖·‖² + 0.01·‖·‖₁ from a random start; knows the label",
        {"method": "dgl", "l1": 0.01, "lr": 0.03},
        "TAG, Adam",
    ),
}


def knows(name: str) -> str:
    """What the attacker of that name knows; words that are no attacker's name stand for themselves."""
    return ATTACKERS[name].knows if name in ATTACKERS else name
