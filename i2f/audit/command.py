"""The command `i2f audit`: an audit as a table, as files, and as a gate."""

import argparse
import sys

import torch
from torch import Tensor

from i2f.audit.defense import parse
from i2f.audit.examine import audit
from i2f.audit.inputs import Build, Load, network, samples
from i2f.audit.result import Audit
from i2f.core.message import LocalSteps

GATE = 3  # exit status where --min-rmse is not met; 1: the audit could not be made, 2: the command was wrong
COLUMNS = ["index", "y", "judged", "predicted", "boxed", "prior", "bound", "psnr", "needed", "label", "verdict"]


def run(arguments: argparse.Namespace, load: Load, build: Build, progress: str = "auto") -> int:
    """Makes the audit, prints it and writes what is asked for; returns the exit status.

    Args: load, build: of bundled images, and of networks by name. progress: as for `core.progress.bar`.

    Raises: ValueError or OSError for bad options, files, models or data, before anything is written.
    """
    defense = parse(arguments.defense)
    _check(arguments)
    limits = arguments.range and (_limit(arguments.range[0]), _limit(arguments.range[1]))
    x, y, name = samples(arguments.data, load, bytes_are_pixels=limits is None)
    found = audit(
        network(arguments, name, build),
        x,
        y,
        defense,
        message=_message(arguments),
        range=limits,
        exact=True if arguments.exact else False if arguments.bound else None,
        together=arguments.together,
        attack=arguments.attack,
        target_psnr=arguments.target_psnr,
        seed=arguments.seed,
        progress=progress,
    )
    _show(found, arguments)
    return 0 if arguments.min_rmse is None else _gate(found, arguments.min_rmse)


def _check(arguments: argparse.Namespace) -> None:
    for option in ("target_psnr", "min_rmse"):
        value = getattr(arguments, option)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{option.replace('_', '-')} {value:g} is out of range: give a positive number")
    for path in (arguments.report, arguments.json):
        if path is not None and not path.resolve().parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.resolve().parent}; make it first")


def _message(arguments: argparse.Namespace) -> LocalSteps | None:
    """The local steps whose change is sent; None for a gradient."""
    if arguments.local_steps is None and arguments.epochs is None:
        given = [name for name in ("lr", "batch_size", "momentum", "weight_decay") if getattr(arguments, name)]
        if given:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"{options} is of local steps: give --local-steps K or --epochs E too")
        return None
    if arguments.lr is None:
        raise ValueError("local steps need their learning rate: give --lr")
    return LocalSteps(
        lr=arguments.lr,
        steps=arguments.local_steps,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        momentum=arguments.momentum,
        weight_decay=arguments.weight_decay,
    )


def _limit(text: str) -> float | Tensor:
    """One end of the range: a number, or one for each channel."""
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--range {text.strip()!r} is no number: give LOW HIGH, each a number or one for each channel, a,b,c"
        ) from None
    return torch.tensor(numbers, dtype=torch.float64) if len(numbers) > 1 else numbers[0]


def _show(found: Audit, arguments: argparse.Namespace) -> None:
    columns = [*COLUMNS, "attacked"] if arguments.attack else COLUMNS
    print(found.table()[columns].to_string(index=False, float_format="{:.3g}".format))
    for line in dict.fromkeys(words for sample in found for words in sample.reservations):
        print(f"note: {line}")
    if arguments.report:
        arguments.report.write_text(found.html(), encoding="utf-8")
    if arguments.json:
        arguments.json.write_text(found.json(), encoding="utf-8")


def _gate(found: Audit, min_rmse: float) -> int:
    """The exit status of --min-rmse."""
    if not found.passes(min_rmse):
        below = sum(not sample.judged >= min_rmse for sample in found)
        _warn(f"{below} of {len(found.samples)} samples are judged below an RMSE of {min_rmse:g}, or not known")
        return GATE
    if found.beyond_first_order:
        _warn(
            f"--min-rmse is met, but the first order is no longer reliable for {found.beyond_first_order} samples, "
            "whose predicted errors may be too large: --attack runs an attack"
        )
    return 0


def _warn(message: str) -> None:
    print(f"i2f: {message}", file=sys.stderr)
