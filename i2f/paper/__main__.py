"""The companion's own commands: `python -m i2f.paper source | keys | run | solve | verify | publish`.

params.yaml lists the runs. `run` executes a run's notebook, `solve` solves what is missing for it, `publish` makes it
the published one, and `verify` solves a sample of what is published anew. `make help` names what to type.
"""

import argparse
import sys

from i2f.paper import pipeline


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m i2f.paper", description=__doc__)
    commands = found.add_subparsers(dest="command", required=True)
    commands.add_parser("source", help="write every notebook without its outputs, a stage's dependency")
    commands.add_parser("keys", help="list the runs")
    for name, words in (("run", "execute a run's notebook"), ("solve", "solve what a run is missing, to publish it")):
        commands.add_parser(name, help=words).add_argument("key", help="of the run, in params.yaml")
    command = commands.add_parser("publish", help="make finished runs the published ones; every number follows them")
    command.add_argument("keys", nargs="*", help="of the runs; default: all")
    command = commands.add_parser("verify", help="solve a sample of the published rows anew and compare")
    command.add_argument("--budget", type=float, default=8.0, help="minutes of two cores (default: 8)")
    command.add_argument("--share", type=float, default=None, help="this share of every table instead; 1: every row")
    command.add_argument("--seed", default="", help="of the sample; default: what code and tables give")
    command.add_argument("--runs", nargs="*", default=[], metavar="KEY", help="only of these runs; default: all")
    return found


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.command == "source":
        pipeline.source()
    elif arguments.command == "keys":
        print(*pipeline.runs(), sep="\n")
    elif arguments.command == "run":
        pipeline.run(arguments.key)
    elif arguments.command == "solve":
        pipeline.solve(arguments.key)
    elif arguments.command == "publish":
        from i2f.paper import publishing  # which brings PyTorch and the figures

        publishing.publish(arguments.keys)
    else:
        from i2f.paper import verify

        return verify.command(arguments)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, LookupError, OSError) as error:
        sys.exit(f"error: {error}")
