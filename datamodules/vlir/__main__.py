"""Make a corpus of interleaved rationales, and look at one.

    python -m datamodules.vlir build --config configs/vlir/build.yaml     # a teacher writes, judges filter
    python -m datamodules.vlir build --config configs/vlir/sample.yaml    # one's own policy writes
    python -m datamodules.vlir report --data data/vlir                    # report.html, and TensorBoard

``build`` run again with the same folder goes on where it ended. ``--help`` behind a command lists what can be set.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

import datamodules.sources  # noqa: F401  data sets, backbones and engines can be named in YAML without a path
import modules  # noqa: F401
from datamodules.vlir.build import Build, build
from datamodules.vlir.policy_teacher import PolicyTeacher
from datamodules.vlir.report import report
from datamodules.vlir.schema import DataError

__all__ = ["PolicyTeacher"]  # imported so that YAML can name it


def parser() -> ArgumentParser:
    """The command line."""
    whole = ArgumentParser(prog="python -m datamodules.vlir", description=__doc__)
    commands = whole.add_subcommands(dest="command")
    making, telling = ArgumentParser(), ArgumentParser()
    making.add_argument("--config", action="config", help="A YAML file of these settings.")
    making.add_class_arguments(Build, as_group=False)
    telling.add_function_arguments(report, as_group=False)
    commands.add_subcommand("build", making, help="Make a corpus.")
    commands.add_subcommand("report", telling, help="Look at one.")
    return whole


def main(args: Sequence[str]) -> int:
    """Run one command.

    Args:
        args: the command line without the program's name.

    Returns:
        What the process ends with: 0; 2 after a mistake of the user; 3 if some questions got no reply; 130 if it was
        interrupted.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    line = parser()
    given = line.parse_args(list(args))
    try:
        if given.command == "report":
            print(report(**vars(given.report)))
            return 0
        settings = line.instantiate(given).build
        plan = Build(**{key: value for key, value in vars(settings).items() if key != "config"})
        complete = build(plan)
        print(report(plan.out))
    except (DataError, ValueError, OSError) as error:  # PolicyError is a ValueError; OSError: a full disk
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was paid for is kept, and the same command goes on", file=sys.stderr)
        return 130
    if not complete:
        print("some questions got no reply; the same command asks these again", file=sys.stderr)
    return 0 if complete else 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
