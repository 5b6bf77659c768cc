"""The `dsfp4` command: one module for each subcommand."""

import argparse
import os
import sys
from collections.abc import Sequence

import dsfp4
from dsfp4.cli import bench, demo, info, quantize, run
from dsfp4.errors import Dsfp4Error

_INTERRUPTED = 130  # what a shell reports for Ctrl-C


def make_parser() -> argparse.ArgumentParser:
    """Return the parser; each subcommand sets `execute`, a function of the parsed arguments."""
    parser = argparse.ArgumentParser(
        prog="dsfp4",
        description="Runs DeepSeek models in FP4. Try `dsfp4 demo` first.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dsfp4 {dsfp4.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (demo, run, info, quantize, bench):
        command.add_command(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 1 for an error while running.

    Wrong usage exits with code 2 (SystemExit, by argparse).
    """
    arguments = make_parser().parse_args(argv)
    try:
        arguments.execute(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader went away, as `head` does. Nothing more can be said, not even by the flush that
        # Python does at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Dsfp4Error, OSError) as error:
        print(f"dsfp4: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dsfp4: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0
