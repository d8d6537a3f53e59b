"""What the command `i2f audit` reads: samples from files, and a model from a function or by name."""

import argparse
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from i2f.core import checks

Load = Callable[..., tuple[Tensor, Tensor]]  # (name, n=, offset=) -> x, y
Build = Callable[..., nn.Module]  # (name, data set, init, seed, normalize) -> network
Factory = Callable[[], object]


def samples(text: str, load: Load, bytes_are_pixels: bool = True) -> tuple[Tensor, Tensor, str | None]:
    """x, y, and the name of the bundled set, if it is one. Bytes are divided by 255, or taken as they are.

    Raises: FileNotFoundError; ValueError for what cannot be read as samples and labels.
    """
    path = Path(text)
    if path.suffix in (".npz", ".pt"):
        x, y = _stored(path)
        return _pixels(text, x, bytes_are_pixels), _labels(text, y), None
    name, *numbers = text.split(":")
    try:
        count, first = [*map(int, numbers), *(8, 0)[len(numbers) :]]
    except ValueError:
        raise ValueError(f"data={text!r} is malformed: give NAME[:COUNT[:FIRST]], or a file .npz or .pt") from None
    return *load(name, n=count, offset=first), name


def _stored(path: Path) -> tuple[Tensor, Tensor]:
    try:
        if path.suffix == ".npz":
            with np.load(path) as file:
                x, y = torch.from_numpy(file["x"]), torch.from_numpy(file["y"])
        else:
            stored = torch.load(path, weights_only=True, map_location="cpu")
            x, y = stored["x"], stored["y"]
    except FileNotFoundError:
        raise
    except Exception as error:  # every reader has its own
        raise ValueError(f"data={str(path)!r} cannot be read as x and y: {type(error).__name__}: {error}") from error
    for key, value in (("x", x), ("y", y)):
        if not torch.is_tensor(value):
            raise ValueError(f"data={str(path)!r}: {key} is {type(value).__name__}; it must be an array")
    return x, y


def _pixels(text: str, x: Tensor, bytes_are_pixels: bool) -> Tensor:
    if x.dtype == torch.uint8:
        return x.float() / 255 if bytes_are_pixels else x.float()
    if not x.is_floating_point():
        raise ValueError(f"data={text!r}: x is {x.dtype}; give floating-point numbers, or bytes (uint8)")
    return x


def _labels(text: str, y: Tensor) -> Tensor:
    """Class numbers, (n,), or rows of probabilities, (n, classes)."""
    if y.is_floating_point():
        checks.finite(f"data={text!r}: y", y)
        if y.ndim == 2 and y.shape[1] > 1:
            return y
        if not torch.equal(y, y.round()):
            raise ValueError(f"data={text!r}: y holds fractions; it must be class numbers, or rows of probabilities")
    return y.long()


def network(arguments: argparse.Namespace, dataset: str | None, build: Build) -> nn.Module:
    """The model with its checkpoint. dataset: the name of a bundled set, None where the data are a file.

    Raises: FileNotFoundError; ValueError for a model that cannot be made, or a checkpoint that does not fit it.
    """
    if ":" in arguments.model:
        model = made(arguments.model).eval()
    elif dataset is None:
        raise ValueError(
            f"model={arguments.model!r} is built for a bundled data set, and --data is a file: give "
            "package.module:function"
        )
    else:
        model = build(arguments.model, dataset, arguments.init, arguments.seed, arguments.normalize)
    if arguments.checkpoint:
        try:
            model.load_state_dict(torch.load(arguments.checkpoint, weights_only=True, map_location="cpu"))
        except FileNotFoundError:
            raise
        except Exception as error:  # torch.load and load_state_dict have many
            raise ValueError(
                f"checkpoint={str(arguments.checkpoint)!r} cannot be loaded into this model: "
                f"{type(error).__name__}: {error}"
            ) from error
    return model


def made(text: str) -> nn.Module:
    """The module that a function "package.module:function" returns. Its own failure is printed with its traceback."""
    module, _, function = text.partition(":")
    make = _factory(module, function)
    try:
        model = make()
    except Exception as error:
        traceback.print_exc()
        raise ValueError(f"model={text!r} failed ({type(error).__name__}); its traceback is above") from None
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={text!r} returned {type(model).__name__}, and no torch.nn.Module")
    return model


def _factory(module: str, function: str) -> Factory:
    sys.path.insert(0, "")  # modules of the current folder, as with `python -m`
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            raise ValueError(f"model: there is no module {module!r} here: give package.module:function") from None
        traceback.print_exc()
        raise ValueError(f"model: {module!r} fails to import; its traceback is above") from None
    except Exception as error:
        traceback.print_exc()
        raise ValueError(f"model: {module!r} fails to import ({type(error).__name__}); see above") from None
    finally:
        sys.path.remove("")
    make: Factory | None = getattr(found, function, None)
    if not callable(make):
        raise ValueError(f"model: {module!r} has no function {function!r}")
    return make
