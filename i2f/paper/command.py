"""The command `i2f data`: the bundled images and texts."""

import argparse

from i2f import text
from i2f.paper import data


def run(arguments: argparse.Namespace) -> int:
    """Carries out `arguments.action` and returns the exit status.

    Raises: FileNotFoundError or OSError where the bundle is incomplete or altered; what `data.bundle` and `data.fetch`
    raise.
    """
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
