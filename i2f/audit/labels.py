"""Labels of an audit: as classes, and whether the shared gradient shows them."""

from torch import Tensor

from i2f.attacks import recover_labels
from i2f.core.jacobian import GradientJacobian


def as_classes(y: Tensor) -> list[int | None]:
    """Each label as a class: a whole number, (n,) or (n, 1), or a one-hot row; None for one that is not a class."""
    if y.ndim == 2 and y.shape[1] > 1:
        one_hot = ((y == 0) | (y == 1)).all(1) & ((y == 1).sum(1) == 1)
        return [int(row.argmax()) if one else None for row, one in zip(y.int(), one_hot.tolist(), strict=True)]
    if y.numel() != len(y):
        return [None] * len(y)
    return [int(c) if c >= 0 and c == int(c) else None for c in y.reshape(-1).tolist()]


def read_off(J: GradientJacobian, sent: Tensor, classes: list[int | None]) -> list[bool | None]:
    """Whether each class is read off the shared gradient, g + sent; None where labels are not classes, or cannot be
    read off this network."""
    try:
        if None in classes:
            return [None] * len(classes)
        found = recover_labels(J.map, J.gradient + sent, tuple(J.x.shape)).tolist()
    except (ValueError, TypeError, AttributeError, RuntimeError, LookupError):  # an output or a loss of another form
        return [None] * len(classes)
    answers: list[bool | None] = []
    for label in classes:
        answers.append(label in found)
        if label in found:
            found.remove(label)
    return answers
